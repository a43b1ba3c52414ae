"""The nine functions of two variables that the regression runs learn, and samples of them.

A source sample is of the function itself. A target sample is of a shifted one: the coefficients of its non-linear
terms are multiplied by `COEFFICIENT`, and its landscape is turned by `ANGLE` about the centre of its box. The paper
says that it does both (Sec. 4.1), but not by how much: these amounts are ours. Dropwave is the same from every side.

Eight functions are of the library that the paper cites (Surjanovic and Bingham), with its domains as boxes. It has no
"Sin-Cos". We take sin(x1) + cos(x2): the constant fits of the paper's Table 9 leave an error of 1.0, which is the
variance of that sum; the product's is 0.25.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 0.05  # standard deviation, B.3
COEFFICIENT = 1.1  # what the constant fits of Table 9 on Levy and Michalewicz suggest
ANGLE = math.pi / 12


@dataclass(frozen=True)
class Function:
    """A function of two variables.

    Args:
        value: takes points [n, 2] and the factor c of the non-linear terms, 1 for the function as it is known, and
            gives values [n].
        low, high: the box of both variables.
        description: what it looks like; its instruction.
    """

    value: Callable[[Tensor, float], Tensor]
    low: float
    high: float
    description: str

    def sample(self, n: int, generator: torch.Generator, target: bool) -> tuple[Tensor, Tensor]:
        """Points [n, 2], uniform in the box, and noisy values [n] of the source or the target function."""
        x = torch.rand(n, 2, generator=generator) * (self.high - self.low) + self.low
        y = self.target(x) if target else self.value(x, 1.0)
        return x, y + NOISE * torch.randn(n, generator=generator)

    def target(self, x: Tensor) -> Tensor:
        """Values [n] of the shifted function at `x` [n, 2]."""
        cosine, sine, centre = math.cos(ANGLE), math.sin(ANGLE), (self.low + self.high) / 2
        turned = (x - centre) @ torch.tensor([[cosine, -sine], [sine, cosine]]) + centre
        return self.value(turned, COEFFICIENT)


def ackley(x: Tensor, c: float) -> Tensor:
    bowl = 20 - 20 * torch.exp(-0.2 * x.square().mean(-1).sqrt())
    return bowl + c * (math.e - torch.exp(torch.cos(2 * math.pi * x).mean(-1)))


def dropwave(x: Tensor, c: float) -> Tensor:
    square = x.square().sum(-1)
    return -(1 + c * torch.cos(12 * square.sqrt())) / (0.5 * square + 2)


def langermann(x: Tensor, c: float) -> Tensor:
    heights = torch.tensor([1.0, 2.0, 5.0, 2.0, 3.0])
    centres = torch.tensor([[3.0, 5.0], [5.0, 2.0], [2.0, 1.0], [1.0, 4.0], [7.0, 9.0]])
    square = (x[:, None] - centres).square().sum(-1)
    return c * (heights * torch.exp(-square / math.pi) * torch.cos(math.pi * square)).sum(-1)


def levy(x: Tensor, c: float) -> Tensor:
    w1, w2 = (1 + (x - 1) / 4).unbind(-1)
    first = (w1 - 1) ** 2 * (1 + 10 * c * torch.sin(math.pi * w1 + 1) ** 2)
    second = (w2 - 1) ** 2 * (1 + c * torch.sin(2 * math.pi * w2) ** 2)
    return c * torch.sin(math.pi * w1) ** 2 + first + second


def matyas(x: Tensor, c: float) -> Tensor:
    return c * (0.26 * x.square().sum(-1) - 0.48 * x.prod(-1))


def michalewicz(x: Tensor, c: float) -> Tensor:
    steepness = torch.tensor([1.0, 2.0]) * x.square() / math.pi
    return -c * (torch.sin(x) * torch.sin(steepness) ** 20).sum(-1)


def rastrigin(x: Tensor, c: float) -> Tensor:
    return (x.square() + 10 * c * (1 - torch.cos(2 * math.pi * x))).sum(-1)


def sin_cos(x: Tensor, c: float) -> Tensor:
    return c * (torch.sin(x[:, 0]) + torch.cos(x[:, 1]))


def styblinski_tang(x: Tensor, c: float) -> Tensor:
    return 0.5 * (c * (x**4 - 16 * x**2) + 5 * x).sum(-1)


FUNCTIONS = {
    "Ackley": Function(
        ackley, -32.768, 32.768, "A nearly flat outer plain with many small ripples and one deep hole at the centre."
    ),
    "Dropwave": Function(
        dropwave, -5.12, 5.12, "Circular waves around the centre, as of a drop in water, that fade outwards."
    ),
    "Langermann": Function(
        langermann, 0.0, 10.0, "Five unevenly placed bumps of different heights, each with rings that fade quickly."
    ),
    "Levy": Function(
        levy, -10.0, 10.0, "A bowl whose walls are corrugated by waves along one axis, and weaker along the other."
    ),
    "Matyas": Function(matyas, -10.0, 10.0, "A smooth plate-shaped bowl with a long diagonal valley and no ripples."),
    "Michalewicz": Function(
        michalewicz, 0.0, math.pi, "A flat plateau cut by steep and narrow valleys, deepest where they cross."
    ),
    "Rastrigin": Function(
        rastrigin, -5.12, 5.12, "A wide bowl covered by a regular grid of many equally deep local minima."
    ),
    "Sin-Cos": Function(
        sin_cos,
        -2 * math.pi,
        2 * math.pi,
        "A smooth periodic wave: a sine along one axis plus a cosine along the other.",
    ),
    "Styblinski-Tang": Function(
        styblinski_tang, -5.0, 5.0, "A smooth quartic landscape with four basins, the deepest in one corner."
    ),
}
