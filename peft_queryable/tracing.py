"""Recording the routes of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .calls.record import RoutedCall
from .tuner.model import QueryableLoraModel


@dataclass
class RoutingTrace:
    """What [`record_routing`] recorded: `calls`, in the order in which they ended."""

    calls: list[RoutedCall] = field(default_factory=list)

    def weights(self, adapter_name: str = "default") -> dict[int, Tensor]:
        """By block, all recorded weights of an adapter without those of padding, [N, M].

        Raises:
            ValueError: if no call of this adapter was recorded.
        """
        calls = [call for call in self.calls if call.adapter_name == adapter_name]
        if not calls:
            recorded = sorted({call.adapter_name for call in self.calls})
            raise ValueError(
                f"No route of adapter {adapter_name!r} was recorded, only of {recorded}. Call the model inside the "
                "block, with this adapter active."
            )
        flat: dict[int, list[Tensor]] = {}
        for call in calls:
            for block, weights in call.weights.items():
                flat.setdefault(block, []).append(weights.flatten(0, 1) if call.real is None else weights[call.real])
        return {block: torch.cat(flat[block]) for block in sorted(flat)}


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record the routes of every call of `model` in this thread that ends inside the block, `generate` included.

        with record_routing(model) as trace:
            model(**batch)
        trace.weights()  # by block, [tokens or sequences, atoms]

    Args:
        model: a model with Queryable LoRA adapters, or one that wraps it.

    Raises:
        ValueError: if `model` has no such adapter.
    """
    tuners = [module for module in model.modules() if isinstance(module, QueryableLoraModel)]
    if not tuners:
        raise ValueError("There is no Queryable LoRA adapter in this model whose routes could be recorded.")
    trace, model_hooks = RoutingTrace(), tuners[0].model_hooks
    with model_hooks.entered(recorders=(*model_hooks.call.recorders, trace.calls.append)):
        yield trace
