"""Our method with one thing changed: ablations, and a sweep over what the paper leaves open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

# Tensors of an adapter, by parts of their names. The others are the factors A and B of each module.
GATES = ("queryable_lora_gate",)
BANK = ("atoms", "keys")
ROUTER = ("prior", "state_query", "depth_")


@dataclass(frozen=True)
class Variant:
    """What differs from the method "queryable".

    Args:
        config: fields of `QueryableLoraConfig`.
        prepare: what is done to a new adapted model.
        lr_factors: by part of a tensor's name, what its learning rate is multiplied by.
        weight_decays: by part of a tensor's name, its weight decay, where it is not AdamW's default.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = lambda model: None
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    weight_decays: Mapping[str, float] = field(default_factory=dict)


def shut_gates(model: nn.Module) -> None:
    """Fix every gate at sigmoid(-inf) = 0, which leaves plain LoRA (Prop. D.7b)."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in GATES):
            nn.init.constant_(parameter, -torch.inf)
            parameter.requires_grad_(False)


def rescale(part: str, factor: float, model: nn.Module) -> None:
    """Multiply the initial values of the tensors that have `part` in their names."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data.mul_(factor)


def fields(name: str, *values: Any) -> dict[str, Variant]:
    """One variant per value of a field of the configuration."""
    return {f"{name}={value}": Variant({name: value}) for value in values}


def scales(part: str, *factors: float) -> dict[str, Variant]:
    return {f"{part}*{factor}": Variant(prepare=partial(rescale, part, factor)) for factor in factors}


def rates(label: str, parts: tuple[str, ...], *factors: float) -> dict[str, Variant]:
    return {f"{label}_lr*{factor}": Variant(lr_factors=dict.fromkeys(parts, factor)) for factor in factors}


ABLATIONS = {
    "state_only": Variant({"query_terms": ("state",)}),
    "depth_only": Variant({"query_terms": ("depth",)}),
    "prior_only": Variant({"query_terms": ()}),
    "one_atom": Variant({"num_atoms": 1, "top_k": None}),
    "all_atoms": Variant({"top_k": None}),
    "shut_gates": Variant(prepare=shut_gates),
}
SWEEP = {
    **fields("init_atom_scale", 0.1, 0.5, 2.0, 4.0),
    **fields("init_gate", 0.1, 0.9),
    **scales("keys", 0.1, 10.0),
    **scales("prior", 0.1, 10.0),
    **fields("router_dim", 4, 16, 32),
    **fields("num_blocks", 1, 2, 8, 16),
    **fields("top_k", 1, 4),
    **rates("bank", BANK, 0.1, 10.0),
    **rates("router", ROUTER, 0.1, 10.0),
    **rates("gate", GATES, 10.0),
    "no_decay": Variant(weight_decays=dict.fromkeys((*GATES, "keys"), 0.0)),
}
VARIANTS = ABLATIONS | SWEEP
