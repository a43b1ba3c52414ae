"""Adapters on a backbone, by name: PEFT's, ours, and reconstructions of three methods without public code.

RepLoRA (arXiv 2502.03044), HyRA (2510.04295) and DoRAN (2510.04331) are rebuilt here from descriptions of their
papers; sizes, activation, initialisation and the rank of the seeds are ours. In all three a learned diagonal seed
a [r] goes through a one-hidden-layer network, whose first layer the targets of a layer share, and gives a factor:

    factor = W2 relu(W1 diag(a)), [width, r]

The factors of B start at zero, so an adapted model starts as its base.
"""

from itertools import groupby

import torch
from backbones import MLP, Transformer
from peft import LilyConfig, LoraConfig, PeftConfig, VBLoRAConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from variants import VARIANTS, Variant

from peft_queryable import QueryableLoraConfig, set_instruction

RANK, ALPHA = 8, 16  # B.3; Sec. 4.1 states neither
INSTRUCTION_DIM = 32  # as much as 10% more parameters than LoRA leave room for in the MLP
METHODS = ("soap", "lora", "dora", "lily", "vblora", "replora", "hyra", "doran", "queryable", "instruction")
OURS = ("queryable", "instruction", *VARIANTS)


class Trunk(nn.Module):
    """The half of the generating networks that targets share: hidden features of seeds.

    Args:
        hidden: width h of the networks.
        heads: number of seeds of B, one a head.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.seed_A, self.seed_B = nn.Parameter(torch.randn(RANK)), nn.Parameter(torch.randn(heads, RANK))
        self.first_A, self.first_B = (nn.Parameter(torch.randn(hidden, RANK) / RANK**0.5) for _ in range(2))

    def features(self) -> tuple[Tensor, Tensor]:
        """Those of A, [h, r], and of B, [heads, h, r]."""
        return torch.relu(self.first_A * self.seed_A), torch.relu(self.first_B * self.seed_B.unsqueeze(-2))


class Generated(nn.Module):
    """RepLoRA, and with several heads HyRA: W h + (alpha / r) B A h, A and B out of a network.

    With more than one head, each has a seed of its own for its equal share of the rows of B.
    """

    def __init__(self, base_layer: nn.Linear, trunk: Trunk) -> None:
        super().__init__()
        (heads, _), hidden = trunk.seed_B.shape, len(trunk.first_A)
        self.base_layer, self.trunk = base_layer, trunk
        self.second_A = nn.Parameter(
            torch.randn(base_layer.in_features, hidden) / (hidden * base_layer.in_features) ** 0.5
        )
        self.second_B = nn.Parameter(torch.zeros(base_layer.out_features // heads, hidden))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        features_A, features_B = self.trunk.features()
        return (self.second_A @ features_A).mT, (self.second_B @ features_B).flatten(-3, -2)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        return self.base_layer(x) + ALPHA / RANK * F.linear(F.linear(x, A), B)


class Normalised(Generated):
    """DoRAN: the weight m V / (norm(V) + t), where V = W + (alpha / r) B A, by DoRA's norm and a learned t > 0."""

    def __init__(self, base_layer: nn.Linear, trunk: Trunk) -> None:
        super().__init__(base_layer, trunk)
        self.offset = nn.Parameter(torch.zeros(1))  # softplus keeps t positive
        norm = base_layer.weight.detach().norm(dim=1)
        self.magnitude = nn.Parameter(norm + F.softplus(self.offset.detach()))

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        weight = self.base_layer.weight + ALPHA / RANK * B @ A
        scale = self.magnitude / (weight.norm(dim=1) + F.softplus(self.offset))
        return F.linear(x, scale.unsqueeze(-1) * weight, self.base_layer.bias)


# Class, width h of the networks and heads of B. The widths give LoRA's number of parameters within 10%.
GENERATED = {"replora": (Generated, 8, 1), "hyra": (Generated, 13, 4), "doran": (Normalised, 8, 1)}


def attach(method: str, backbone: Transformer | MLP, instruction: Tensor | None = None) -> nn.Module:
    """`backbone`, changed in place, with a new adapter whose parameters alone are trainable.

    Args:
        method: one of `METHODS` or `VARIANTS`; with "soap" there is no adapter, and everything is trainable.
        instruction: an embedding [1, INSTRUCTION_DIM], for the method of that name only.
    """
    if method == "soap":
        return backbone.requires_grad_(True)
    backbone.requires_grad_(False)
    if method in GENERATED:
        return attach_generated(backbone, *GENERATED[method])
    model = get_peft_model(backbone, config(method, backbone))
    if method == "instruction":
        set_instruction(model, instruction)
    VARIANTS.get(method, Variant()).prepare(model)
    return model


def attach_generated(backbone: Transformer | MLP, kind: type[Generated], hidden: int, heads: int) -> nn.Module:
    """The targets of a layer share a trunk; where a layer has but one target, all layers share it."""
    names = [name for name, _ in backbone.named_modules() if name.endswith(backbone.targets)]
    layers = groupby(names, key=lambda name: name.split(".")[1] if len(backbone.targets) > 1 else None)
    for _, group in layers:
        trunk = Trunk(hidden, heads)
        for name in group:
            backbone.set_submodule(name, kind(backbone.get_submodule(name), trunk))
    return backbone


def config(method: str, backbone: Transformer | MLP) -> PeftConfig:
    """The configuration of one of PEFT's methods or of ours, of LoRA's number of parameters within 10%."""
    wide = isinstance(backbone, Transformer)
    targets = {"target_modules": list(backbone.targets)}
    low_rank = targets | {"r": RANK, "lora_alpha": ALPHA}
    if method == "lora":
        return LoraConfig(**low_rank)
    if method == "dora":
        return LoraConfig(**low_rank, use_dora=True)
    if method == "lily":
        return LilyConfig(
            **targets, **({"r": 32, "stride_A": 4, "num_B": 2} if wide else {"r": 16, "stride_A": 2, "num_B": 8})
        )
    if method == "vblora":  # the vectors' length has to divide every width
        return VBLoRAConfig(
            **targets,
            r=RANK,
            **({"vector_length": 256, "num_vectors": 209} if wide else {"vector_length": 32, "num_vectors": 30}),
        )
    ours = {
        **low_rank,
        "num_atoms": 8,  # with the next two: B.3
        "top_k": 2,
        "num_blocks": 4,
        "router_dim": 8,  # leaves room for the instruction
        "instruction_dim": INSTRUCTION_DIM if method == "instruction" else None,
    }
    return QueryableLoraConfig(**{**ours, **VARIANTS.get(method, Variant()).config})
