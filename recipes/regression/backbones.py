"""The two regressors that the runs adapt: points [n, 2] in, values [n] out. Ordinary modules, nothing of PEFT.

The paper gives their depths and widths. Coordinates as tokens, four heads, an inner width of 4 x 256 and layer norm
before each part are ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention of plain linear layers: `nn.MultiheadAttention` calls no module that an adapter could replace."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # [n, heads, T, d]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return self.o_proj((weights @ v).transpose(-3, -2).flatten(-2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2, self.mlp_norm = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A Transformer that reads a point as two tokens, one per coordinate: wide and shallow, Sec. 4.1."""

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

    def __init__(self, depth: int = 8, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2, width))
        self.position = nn.Parameter(torch.randn(2, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1) * self.scale + self.position  # [n, 2, width]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(-2))).squeeze(-1)


class Hidden(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


class MLP(nn.Module):
    """A GELU network of `depth` hidden layers without shortcuts: narrow and deep, B.3.

    Its first hidden layer, which reads two numbers, is not among the targets.
    """

    targets = ("linear",)

    def __init__(self, depth: int = 32, width: int = 32) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(Hidden(width) for _ in range(depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x).squeeze(-1)


BACKBONES: dict[str, Callable[[], Transformer | MLP]] = {"wide": Transformer, "deep": MLP}
