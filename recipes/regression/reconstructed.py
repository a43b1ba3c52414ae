"""Reconstructions of three methods without public code: RepLoRA, HyRA and DoRAN.

RepLoRA (arXiv 2502.03044), HyRA (2510.04295) and DoRAN (2510.04331) are rebuilt here from the descriptions in their
papers; sizes, activation, initialisation and the rank of the seeds are ours. In all three a learned diagonal seed
a [r] goes through a network with one hidden layer, whose first half is shared by the targets of a layer, and comes out
as a factor:

    factor = W2 relu(W1 diag(a)), [width, r]

The factors of B start at zero, so an adapted model starts as its base.
"""

from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.regression.backbones import MLP, Transformer
from recipes.regression.settings import ALPHA, RANK


class Trunk(nn.Module):
    """The half of the generating networks that targets share: from seeds to hidden features.

    Args:
        hidden: width h of the networks.
        heads: number of seeds of B, one per head.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.seed_A, self.seed_B = nn.Parameter(torch.randn(RANK)), nn.Parameter(torch.randn(heads, RANK))
        self.first_A, self.first_B = (nn.Parameter(torch.randn(hidden, RANK) / RANK**0.5) for _ in range(2))

    def features(self) -> tuple[Tensor, Tensor]:
        """Those of A, [h, r], and of B, [heads, h, r]."""
        return torch.relu(self.first_A * self.seed_A), torch.relu(self.first_B * self.seed_B.unsqueeze(-2))


class Generated(nn.Module):
    """RepLoRA, and with several heads HyRA: W h + (alpha / r) B A h, with A and B made by a network.

    With several heads, each has its own seed for an equal share of the rows of B.
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


def attach_generated(backbone: Transformer | MLP, kind: type[Generated], hidden: int, heads: int) -> nn.Module:
    """Replace the targets. Those of a layer share a trunk; where a layer has only one target, all layers share one."""
    names = [name for name, _ in backbone.named_modules() if name.endswith(backbone.targets)]
    layers = groupby(names, key=lambda name: name.split(".")[1] if len(backbone.targets) > 1 else None)
    for _, group in layers:
        trunk = Trunk(hidden, heads)
        for name in group:
            backbone.set_submodule(name, kind(backbone.get_submodule(name), trunk))
    return backbone
