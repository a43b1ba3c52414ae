"""Which module stands where: stacks of layers, their blocks, and the projections that share an entry state."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..calls.current import Current
from ..calls.model_call import ModelHooks
from ..calls.plan import Plan, StackTraits
from ..calls.stack import Stack
from ..method.router import Router
from ..method.scope import SCOPES, Scope
from .denoisers import denoiser_of, generates_nothing_later, has_streams, mixed_modules, sees_text

_MODALITIES_OF_TOWERS = {"image", "video", "audio"}  # transformers' words for what is no text
_ATTENTION_PROJECTION = re.compile(r"(to_|w)?(q|k|v|query|key|value)(_?(proj|lin|layer))?")
_CROSS_ATTENTION = re.compile(
    r"(^|\.)(enc_?dec_?attention|encoder_attn|(decoding_)?cross_?att(ention|n)?)\.", re.IGNORECASE
)
_MEMORY_PROJECTION = re.compile(r"(to_|w)?(k|v|kv|key|value)(_?(proj|lin|layer))?|c_attn")


@dataclass
class Place:
    """Where one adapter's module stands.

    Args:
        stack: the run of layers it belongs to.
        block: index of its block in that stack.
        entry_group: the adapted query, key and value projections that read the module's input, itself included, whose
            mean state is the entry state if the module is its block's entry (Eq. 16); elsewhere just itself.
    """

    stack: Stack
    block: int
    entry_group: list[Any] = field(default_factory=list)


class StackKey(NamedTuple):
    """What tells stacks apart.

    Args:
        owner: name of the module whose call runs the layers, "" for the model itself.
        reads_memory: whether the stack is made of the cross-attention projections that read an encoder's output.
        is_loose: whether it stands outside every list of layers of a model that has some: a head, a connector.
        holder: of an entry of an `nn.ModuleDict`, the owner in whose call it runs; None if there is none.
    """

    owner: str
    reads_memory: bool = False
    is_loose: bool = False
    holder: str | None = None

    def __str__(self) -> str:
        return (self.owner or "the model") + (" (cross-attention)" if self.reads_memory else "")


@dataclass(frozen=True)
class Layout:
    """The stacks that an adapter's modules form, and their blocks.

    Args:
        stacks: by stack, the names of its adapted modules by layer, in order.
        blocks: by stack, the block of each of these layers.
    """

    stacks: dict[StackKey, list[list[str]]]
    blocks: dict[StackKey, list[int]]

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], num_blocks: int) -> Layout:
        """The layout of the adapted modules `names`, with at most `num_blocks` blocks per stack."""
        stacks = find_stacks(model, names)
        return cls(stacks, {key: split_into_blocks(len(layers), num_blocks) for key, layers in stacks.items()})

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all stacks together."""
        return sum(blocks[-1] + 1 for blocks in self.blocks.values())

    @property
    def longest_stack(self) -> int:
        """Number of blocks in the stack that has most."""
        return max(blocks[-1] + 1 for blocks in self.blocks.values())


def resolve_scope(name: str, sees_all: bool) -> Scope:
    """The scope that the configuration's `routing_scope`, `name`, means in a stack; `sees_all`: see [`sees_all`]."""
    return SCOPES[("sequence" if sees_all else "causal") if name == "auto" else name]


def sees_all(model: nn.Module, owner: str) -> bool:
    """Whether it is known that no output of the stack of `owner` is used to predict or generate a later token.

    So it is in encoders of encoder-decoders, in vision and audio towers, in models that cannot generate and have a
    masked language model among their classes, and in denoisers whose call says nothing of frames to come. Everything
    else counts as causal: in an encoder that is merely another pooling, while averaging over the whole sequence in a
    decoder would leak the answer.
    """
    if (found := denoiser_of(model, owner)) is not None:
        return generates_nothing_later(found[1])
    path = [model]
    for part in owner.split(".") if owner else ():
        path.append(path[-1].get_submodule(part))
    models: list[Any] = [module for module in path if isinstance(module, PreTrainedModel)]
    # `is_causal=True` is evidence; `is_causal=False` is none, because decoders of several models say it.
    if not models or any(getattr(module, "is_causal", False) is True for module in path[-1].modules()):
        return False
    for outer in models:
        if outer.config.is_encoder_decoder and (encoder := outer.get_encoder()) is not outer and encoder in path:
            return True
    config, generates = models[-1].config, any(outer.can_generate() for outer in models)
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return False
    modalities = models[-1].input_modalities
    if ({modalities} if isinstance(modalities, str) else {*modalities}) <= _MODALITIES_OF_TOWERS:
        # A tower has a configuration of its own; ImageGPT, which generates pixels, is no tower of anything.
        return not any(outer.can_generate() and type(outer.config) is type(config) for outer in models)
    return not generates and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def split_into_blocks(num_layers: int, num_blocks: int) -> list[int]:
    """Block index of each layer, contiguous and split as `numpy.array_split` does; one layer per block if few."""
    num_blocks = min(num_layers, num_blocks)
    size, larger = divmod(num_layers, num_blocks)
    return [block for block in range(num_blocks) for _ in range(size + (block < larger))]


def find_stacks(model: nn.Module, names: Sequence[str]) -> dict[StackKey, list[list[str]]]:
    """Stacks of the adapted modules `names`: module names by layer, in order.

    A module belongs to the entry that holds it of the outermost `nn.ModuleList` on its path; the module that holds the
    list is the owner. Modules outside such lists are layers of their own, of a stack as [`_loose_owner`] says. Key and
    value projections of a cross-attention see the encoder's tokens, and so form a stack beside that of their layers.
    """
    layer_of = {name: _repeated_layer(model, name) for name in names}
    owners = {owner for owner, _ in filter(None, layer_of.values())} or {""}
    stacks: dict[StackKey, dict[str, list[str]]] = {}
    for name in names:
        owner, layer = layer_of[name] or (_loose_owner(model, name, owners), name)
        reads_memory = bool(_CROSS_ATTENTION.search(name) and _MEMORY_PROJECTION.fullmatch(name.rpartition(".")[2]))
        reads_memory = reads_memory or sees_text(model, owner, name)
        holder = _holder(name, owners) if owner not in owners else None
        key = StackKey(owner, reads_memory, is_loose=owner not in owners, holder=holder)
        stacks.setdefault(key, {}).setdefault(layer, []).append(name)
    return {key: list(layers.values()) for key, layers in stacks.items()}


def _repeated_layer(model: nn.Module, name: str) -> tuple[str, str] | None:
    """Names of the owner and of the layer that hold module `name`, or None outside every `nn.ModuleList`."""
    parts, path = name.split("."), path_to(model, name)
    for depth, module in enumerate(path):
        if isinstance(module, nn.ModuleList):
            # An `nn.ModuleDict` is never called.
            caller = max((d for d in range(depth) if not isinstance(path[d], nn.ModuleDict)), default=0)
            return ".".join(parts[:caller]), ".".join(parts[: depth + 1])
    return None


def _loose_owner(model: nn.Module, name: str, owners: set[str]) -> str:
    """Name of the module whose call is that of the stack of module `name`, which stands outside every list.

    It is the entry of an `nn.ModuleDict` that holds the module, because a call may run one entry and not another. Else
    it is the one of `owners`, those of lists, that holds the module; the model itself, in a model without lists. Else
    it is the parent, or the module itself where that is a model, which has more methods than `forward`.
    """
    parts, path = name.split("."), path_to(model, name)
    for depth in reversed(range(len(parts))):
        if isinstance(path[depth], nn.ModuleDict):
            return ".".join(parts[: depth + 1])
    if (holder := _holder(name, owners)) is not None:
        return holder
    return name if path[-1] is model or isinstance(path[-1], PreTrainedModel) else name.rpartition(".")[0]


def _holder(name: str, owners: set[str]) -> str | None:
    """The innermost of `owners` that holds module `name`."""
    return max((owner for owner in owners if not owner or name.startswith(owner + ".")), key=len, default=None)


def path_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that hold module `name`, from the model to its parent."""
    path = [model]
    for part in name.split(".")[:-1]:
        path.append(getattr(path[-1], part))
    return path


def entry_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """For each of `names`, the adapted query, key and value projections of its attention that read its input."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        key = parent + "." if _ATTENTION_PROJECTION.fullmatch(child) else name
        groups.setdefault(key, []).append(name)
    return {name: group for group in groups.values() for name in group}


class Stacks:
    """The stacks of a model, made as adapters need them, with the plan of each adapter in them.

    Args:
        model: the base model.
        model_hooks: tells the stacks what the model call says.
    """

    def __init__(self, model: nn.Module, model_hooks: ModelHooks) -> None:
        self.model, self.model_hooks = model, model_hooks
        self.by_key: dict[StackKey, Stack] = {}
        self.currents: list[Current] = []  # the running call of each stack

    def __iter__(self) -> Iterator[Stack]:
        return iter(self.by_key.values())

    def plans(self, adapter_names: Collection[str]) -> list[Plan]:
        """The plans of these adapters in all stacks, as far as they are not merged."""
        names = set(adapter_names) - self.model_hooks.merged
        return [plan for stack in self for name, plan in stack.plans.items() if name in names]

    def place(self, adapter_name: str, layers: dict[str, Any], layout: Layout, router: Router, scope: str) -> None:
        """Tell the adapted modules `layers`, by name, where they stand; `scope` is the adapter's `routing_scope`."""
        first_block = 0
        for key, names_by_layer in layout.stacks.items():
            stack, blocks = self._stack(key), layout.blocks[key]
            num_blocks = blocks[-1] + 1
            # Memory is no sequence that a later token extends: all of it is there from the first.
            resolved = SCOPES["sequence"] if key.reads_memory else resolve_scope(scope, not stack.traits.predicts)
            names = [name for names in names_by_layer for name in names]
            mixed = "" if key.reads_memory else mixed_modules(self.model, key.owner, names)
            stack.plans[adapter_name] = Plan(
                adapter_name, stack.traits, router, resolved, first_block, num_blocks, mixed
            )
            groups = entry_groups(names)
            for names, block in zip(names_by_layer, blocks, strict=True):
                for name in names:
                    layers[name].places[adapter_name] = Place(stack, block, [layers[peer] for peer in groups[name]])
            first_block += num_blocks

    def _stack(self, key: StackKey) -> Stack:
        if key not in self.by_key:
            traits = StackTraits(
                name=str(key),
                reads_memory=key.reads_memory,
                is_loose=key.is_loose,
                is_denoiser=has_streams(self.model, key.owner),
                predicts=not key.reads_memory and not sees_all(self.model, key.owner),
            )
            holder = None if key.holder is None else self._stack(StackKey(key.holder))
            owner = self.model.get_submodule(key.owner)
            self.by_key[key] = Stack(traits, owner, holder, self.model_hooks, self.currents)
        return self.by_key[key]

    def forget(self, adapter_name: str) -> None:
        """Drop the plans of an adapter."""
        for stack in self:
            stack.plans.pop(adapter_name, None)

    def remove(self) -> None:
        """Leave the model as it was."""
        for stack in self:
            stack.remove()


def remove_hooks(model: nn.Module) -> None:
    """Free `model` of the hooks of a tuner that failed to load: they would take inputs that are not for them."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            watcher = getattr(hook, "__self__", None)
            if isinstance(watcher, ModelHooks):
                watcher.remove(model)
            elif isinstance(watcher, Stack):
                watcher.remove()
