"""Kernel launches and bytes moved: what a GPU pays for where tensors are small, counted on any device."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_queryable.calls.cache import cache_argument
from recipes.benchmark.shapes import Setup
from recipes.benchmark.work import inputs, training_loss

LAUNCHING = ("decoding step", "training step")
_LAUNCHES_NOTHING = (
    "aten::_unsafe_view",  # which torch does not call a view
    "aten::detach",
    "aten::empty",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::promote_types",
)


class Kernels(TorchDispatchMode):
    """Counts the operators that run a kernel, about one launch each, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not function.is_view and name not in _LAUNCHES_NOTHING:
            self.calls[name] += 1
            tensors = [value for value in tree_leaves((args, kwargs, output)) if isinstance(value, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def launches(model: nn.Module, method: str, setup: Setup) -> dict[str, tuple[int, int]]:
    """Number of launches and bytes moved in a step of decoding with a cache, and of training without an optimiser."""
    given = inputs(method, setup, 1, setup.prompt)
    model.eval()
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        step = {
            "input_ids": given["input_ids"][:, -1:],
            "use_cache": True,
            cache_argument(model.get_base_model()): cache,
        }
        model(**step)  # the first step after the prompt reads the gates, for all that follow
        with Kernels() as decoding:
            model(**step)
    with Kernels() as training:
        training_loss(model.train(), method, setup).backward()
    model.zero_grad(set_to_none=True)
    counted = zip(LAUNCHING, (decoding, training), strict=True)
    return {name: (kernels.calls.total(), kernels.bytes) for name, kernels in counted}
