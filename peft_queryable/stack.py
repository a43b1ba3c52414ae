"""Stacks: runs of layers that execute in order, found by name, cut into blocks, and watched by hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .checkpointing import BoundCheckpoint
from .context import CallInputs, Context, Plan, Replay, ReplayContext, Routing

_ATTENTION_PROJECTION = re.compile(r"(to_|w)?(q|k|v|query|key|value)(_?(proj|lin|layer))?")


def is_decoder(owner: nn.Module) -> bool:
    """Whether the layers of `owner` attend to earlier tokens only: what makes `auto` mean `causal`."""
    flags = [module.is_causal for module in owner.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if flags:
        return any(flags)
    # Without attention to ask (Mamba and its like, or older code), what generates text is a decoder.
    if not isinstance(owner, PreTrainedModel) or owner.config.is_encoder_decoder:
        return bool(getattr(owner, "is_decoder", False))
    return any("ForCausalLM" in name for name in owner.config.architectures or [])


def split_into_blocks(num_layers: int, num_blocks: int) -> list[int]:
    """Block index of each layer, contiguous and split as `numpy.array_split` does; one layer a block if few."""
    num_blocks = min(num_layers, num_blocks)
    size, larger = divmod(num_layers, num_blocks)
    return [block for block in range(num_blocks) for _ in range(size + (block < larger))]


def find_stacks(model: nn.Module, names: Sequence[str]) -> dict[str, list[list[str]]]:
    """Stacks of the adapted modules `names`: by the name of the owner, module names by layer, in order.

    A module belongs to the entry that holds it of the outermost `nn.ModuleList` on its path; the list's parent is the
    owner. Modules outside such lists are layers of their own: of the stack whose owner holds them, else, in a model
    without any list, of one stack of the whole model, else of a stack of their parent module.
    """
    layer_of = {name: _repeated_layer(model, name) for name in names}
    owners = {owner for owner, _ in filter(None, layer_of.values())}
    stacks: dict[str, dict[str, list[str]]] = {}
    for name in names:
        owner, layer = layer_of[name] or (_loose_owner(name, owners), name)
        stacks.setdefault(owner, {}).setdefault(layer, []).append(name)
    return {owner: list(layers.values()) for owner, layers in stacks.items()}


def _repeated_layer(model: nn.Module, name: str) -> tuple[str, str] | None:
    """Names of the owner and of the layer that hold module `name`, or None outside every `nn.ModuleList`."""
    parts = name.split(".")
    module = model
    for depth, part in enumerate(parts):
        if isinstance(module, nn.ModuleList):
            return ".".join(parts[: depth - 1]), ".".join(parts[: depth + 1])
        module = getattr(module, part)
    return None


def _loose_owner(name: str, owners: set[str]) -> str:
    if not owners:
        return ""
    holders = [owner for owner in owners if owner == "" or name.startswith(owner + ".")]
    return max(holders, key=len) if holders else name.rpartition(".")[0]


def entry_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """For each of `names`, the adapted query, key and value projections of its attention that read its input."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        key = parent + "." if _ATTENTION_PROJECTION.fullmatch(child) else name
        groups.setdefault(key, []).append(name)
    return {name: group for group in groups.values() for name in group}


class Stack:
    """One stack of a model: opens a context when its owner is called, and closes it when the call ends.

    Adapted modules reach it through their `Place`; it is no module and owns no tensor.

    Args:
        name: name of the owner in the model, "" for the model itself.
        owner: the module whose call runs the layers.
        inputs: the inputs of the outermost call, filled by whoever sees it.
        takes_labels: whether labels and prompt masks of the outermost call speak of this stack's tokens.
    """

    def __init__(self, name: str, owner: nn.Module, inputs: CallInputs, takes_labels: bool) -> None:
        self.name, self.inputs, self.takes_labels = name, inputs, takes_labels
        self.plans: dict[str, Plan] = {}
        self.context: Context | ReplayContext | None = None
        self.checkpointing: list[Any] = [
            module for module in owner.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self.hooks = [
            owner.register_forward_pre_hook(self._open, with_kwargs=True),
            owner.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def routing(self, adapter: str) -> Routing | Replay:
        """Routes of `adapter` in the current call.

        Raises:
            RuntimeError: if no call is open.
        """
        if self.context is None:
            raise RuntimeError(
                f"An adapted module ran outside a call of {self.name or 'the model'!r}, so its tokens are not known. "
                "Call the model, not a layer of it. If this happened in a backward pass, a layer was checkpointed by "
                "other means than transformers' `gradient_checkpointing_enable`, which is the supported one."
            )
        return self.context.routing(adapter)

    @contextmanager
    def entered(self, context: Context | ReplayContext) -> Iterator[None]:
        """Let adapted modules find `context` for a while."""
        outer, self.context = self.context, context
        try:
            yield
        finally:
            self.context = outer

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        for module in self.checkpointing:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, BoundCheckpoint):
                module._gradient_checkpointing_func = checkpoint.checkpoint

    def _open(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(owner, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs one model in several threads, which would share one routing context. Use "
                "DistributedDataParallel (`accelerate launch` or `torchrun`), or make one device visible."
            )
        is_checkpointing = owner.training and self._bind_checkpoints()
        self.context = Context(self.name, self.plans, self.inputs, self.takes_labels, args, kwargs, is_checkpointing)

    def _close(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context, self.context = self.context, None
        if isinstance(context, Context) and output is not None:  # None: the call raised
            context.close(output)

    def _bind_checkpoints(self) -> bool:
        """Make layers that gradient checkpointing runs again find the call they belong to."""
        active = [module for module in self.checkpointing if module.gradient_checkpointing]
        for module in active:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, BoundCheckpoint):
                module._gradient_checkpointing_func = BoundCheckpoint(self, checkpoint)
        return bool(active)
