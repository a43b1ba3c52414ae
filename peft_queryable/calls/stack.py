"""Stacks: runs of layers that execute in order, found by name, cut into blocks, and watched by hooks."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache import cached_length, find_cache
from .call import OuterCall
from .checkpointing import BoundCheckpoint
from .context import Context, ReplayContext
from .pooling import read_tokens
from .routing import FixedRouting, Plan, Replay, Routing

_ATTENTION_PROJECTION = re.compile(r"(to_|w)?(q|k|v|query|key|value)(_?(proj|lin|layer))?")
_CROSS_ATTENTION = re.compile(r"(^|\.)(enc_?dec_?attention|encoder_attn|cross_?att(ention|n)?)\.", re.IGNORECASE)
_MEMORY_PROJECTION = re.compile(r"(to_|w)?(k|v|kv|key|value)(_?(proj|lin|layer))?|c_attn")


class StackKey(NamedTuple):
    """What tells stacks apart.

    Args:
        owner: name of the module whose call runs the layers, "" for the model itself.
        reads_memory: whether the stack is made of the cross-attention projections that read an encoder's output.
    """

    owner: str
    reads_memory: bool = False

    def __str__(self) -> str:
        return (self.owner or "the model") + (" (cross-attention)" if self.reads_memory else "")


def is_decoder(owner: nn.Module) -> bool:
    """Whether the layers of `owner` attend to earlier tokens only: what makes `auto` mean `causal`."""
    flags = [module.is_causal for module in owner.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if flags:
        return any(flags)
    if not isinstance(owner, PreTrainedModel) or owner.config.is_encoder_decoder:
        return bool(getattr(owner, "is_decoder", False))
    # Without attention that tells (Bloom, Mamba), a model type that generates text is a decoder.
    return owner.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def split_into_blocks(num_layers: int, num_blocks: int) -> list[int]:
    """Block index of each layer, contiguous and split as `numpy.array_split` does; one layer a block if few."""
    num_blocks = min(num_layers, num_blocks)
    size, larger = divmod(num_layers, num_blocks)
    return [block for block in range(num_blocks) for _ in range(size + (block < larger))]


def find_stacks(model: nn.Module, names: Sequence[str]) -> dict[StackKey, list[list[str]]]:
    """Stacks of the adapted modules `names`: module names by layer, in order.

    A module belongs to the entry that holds it of the outermost `nn.ModuleList` on its path; the list's parent is the
    owner. Modules outside such lists are layers of their own: of the stack whose owner holds them, else, in a model
    without any list, of one stack of the whole model, else of a stack of their parent module. Key and value
    projections of a cross-attention see the encoder's tokens, and so form a stack beside that of their layers.
    """
    layer_of = {name: _repeated_layer(model, name) for name in names}
    owners = {owner for owner, _ in filter(None, layer_of.values())}
    stacks: dict[StackKey, dict[str, list[str]]] = {}
    for name in names:
        owner, layer = layer_of[name] or (_loose_owner(name, owners), name)
        reads_memory = bool(_CROSS_ATTENTION.search(name) and _MEMORY_PROJECTION.fullmatch(name.rpartition(".")[2]))
        stacks.setdefault(StackKey(owner, reads_memory), {}).setdefault(layer, []).append(name)
    return {key: list(layers.values()) for key, layers in stacks.items()}


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
        key: its owner's name, and whose tokens it sees.
        owner: the module whose call runs the layers.
        stacks: all stacks of the model, this one included.
        call: the outermost call.
        takes_labels: whether labels and prompts of the outermost call speak of this stack's tokens.
    """

    def __init__(
        self, key: StackKey, owner: nn.Module, stacks: dict[StackKey, Stack], call: OuterCall, takes_labels: bool
    ) -> None:
        self.key, self.stacks, self.call, self.takes_labels = key, stacks, call, takes_labels
        self.plans: dict[str, Plan] = {}
        self.context: Context | ReplayContext | None = None
        self.recorders: list[Callable[[Context], None]] = []
        self.thread = 0  # that opened it
        self.parameters = [p.name for p in inspect.signature(owner.forward).parameters.values()]
        self.checkpointing: list[Any] = [m for m in owner.modules() if hasattr(m, "gradient_checkpointing")]
        self.hooks = [
            owner.register_forward_pre_hook(self._open, with_kwargs=True),
            owner.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def routing(self, adapter: str) -> Routing | FixedRouting | Replay:
        """Routes of `adapter` in the current call.

        Raises:
            RuntimeError: if no call is open.
        """
        if self.context is None:
            raise RuntimeError(
                f"An adapted module ran outside a call of {self.key}, so its tokens are not known. "
                "Call the model, not a layer of it. If this happened in a backward pass, a layer was checkpointed by "
                "other means than transformers' `gradient_checkpointing_enable`, which is the supported one."
            )
        return self.context.routing(adapter)

    @contextmanager
    def entered(self, context: ReplayContext) -> Iterator[None]:
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
        if any(isinstance(plan.router.keys, FullyShardedDataParallel) for plan in self.plans.values()):
            raise RuntimeError(
                "Under PEFT's `fsdp_auto_wrap_policy` FSDP1 wraps each tensor of the adapter alone, so layers cannot "
                "read them together. Use FSDP2 (`fsdp_version: 2`), or wrap whole decoder layers."
            )
        if not torch.compiler.is_compiling():
            self._claim_thread()
        call = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if self.key.reads_memory:
            memory, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
            if memory is None:
                return  # then no cross-attention runs
            call = {"hidden_states": memory, "attention_mask": mask}  # no cache: it is read once, in the first call
        self.context = self._context(call, is_checkpointing=owner.training and self._bind_checkpoints())
        for plan in self.call.active_plans():
            if self.plans.get(plan.adapter) is plan:
                self.context.routing(plan.adapter)  # outside of checkpointed layers, which would have to repeat it

    def _claim_thread(self) -> None:
        if self.context is not None and self.thread != threading.get_ident():
            raise RuntimeError(
                f"Two threads call {self.key} at once, and would take each other's routes. Give each thread a copy of "
                "the model, or let one call end before the next begins."
            )
        self.thread = threading.get_ident()

    def _context(self, call: dict[str, Any], is_checkpointing: bool) -> Context:
        """The context of a call that the arguments `call` describe."""
        outer, cache = self.call, find_cache(call)
        tensor = _leading_tensor(call)
        tokens = partial(
            read_tokens,
            tensor,
            call,
            past=cached_length(cache),
            labels=outer.labels if self.takes_labels else None,
            prompt_mask=outer.prompt_mask if self.takes_labels else None,
            prompt_length=outer.prompt_length if self.takes_labels else None,
        )
        return Context(
            str(self.key),
            self.plans,
            outer.row_adapters(tensor.shape[0]),
            outer.instruction_for,
            outer.is_generating,
            tensor.shape[0],
            tokens,
            cache,
            is_checkpointing,
        )

    def _close(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context, self.context = self.context, None
        if isinstance(context, Context) and output is not None:  # None: the call raised
            context.close(output)
            for record in self.recorders:
                record(context)

    def _bind_checkpoints(self) -> bool:
        """Make layers that gradient checkpointing runs again find the call they belong to."""
        active = [module for module in self.checkpointing if module.gradient_checkpointing]
        for module in active:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, BoundCheckpoint):
                module._gradient_checkpointing_func = BoundCheckpoint(self.stacks, checkpoint)
        return bool(active)


def _leading_tensor(call: dict[str, Any]) -> Tensor:
    """The tensor that tells a call's rows and tokens: token ids or hidden states if there are any, else the first."""
    named = [call.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states")]
    for value in (*named, *call.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError("A call without any tensor among its arguments cannot be routed: its batch size is not known.")
