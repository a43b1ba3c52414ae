"""Statistics of routes as they come: a few sums per block, however many routes there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .metrics import entropy, jensen_shannon, load_balance


class RouteStatistics:
    """What the routes of one adapter were like, from running sums: 2 M + 2 numbers of eight bytes per block.

    The sums stay on the device of the routes until they are read, so adding waits for nothing. The entropy of the
    atoms' use, H(u), has three parts (its chain rule): `entropy`, what a route leaves open; `by_input`, what the input
    decides within a block; and `by_block`, what the block decides.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # by block: routes, their entropies, weights [M], non-zero weights [M]

    def add(self, weights: Mapping[int, Tensor], real: Tensor | None = None) -> None:
        """Add routes.

        Args:
            weights: by block, [..., M].
            real: [...] bool, False for those to leave out.
        """
        for block, routes in weights.items():
            routes = routes.detach().double()
            counted = torch.ones_like(routes[..., :1]) if real is None else real.to(routes).unsqueeze(-1)
            parts = (counted, counted * entropy(routes).unsqueeze(-1), counted * routes, counted * (routes > 0))
            sums = torch.cat(parts, -1).flatten(0, -2).sum(0)
            self.sums[block] = self.sums[block] + sums if block in self.sums else sums

    @property
    def blocks(self) -> list[int]:
        return sorted(self.sums)

    def table(self) -> Tensor:
        """The sums of all blocks, [blocks, 2 M + 2] float64; sums of several processes add up to those of all."""
        device = self.sums[self.blocks[0]].device
        return torch.stack([self.sums[block].to(device) for block in self.blocks])

    @property
    def count(self) -> int:
        """Number of routes per block, in its first block."""
        return int(self.sums[self.blocks[0]][0])

    def usage(self) -> Tensor:
        """The mean route of each block, [blocks, M] on the CPU."""
        return Readings(self.table()).usage

    def summary(self) -> dict[str, float]:
        """Means over the blocks, in nats where nothing else is said.

        Returns:
            `entropy`, `by_input` and `by_block`, whose sum is the entropy of the atoms' use; `load_balance`, from 0
            for one atom alone to 1 for all alike; `top_atom`, the share of weight of the most used atom; and `dead`,
            the number of atoms that no route of any block uses.
        """
        return Readings(self.table()).summary()


class Readings:
    """What a table of sums [blocks, 2 M + 2] says. Copies it to the CPU, once."""

    def __init__(self, table: Tensor) -> None:
        table = table.cpu()
        num_atoms = (table.shape[1] - 2) // 2
        count, entropies, weights, used = table.split([1, 1, num_atoms, num_atoms], 1)
        self.count = count[:, 0]  # [blocks]
        self.entropy = (entropies / count)[:, 0]  # [blocks]
        self.usage = weights / count  # [blocks, M]
        self.used = used / count  # [blocks, M], the share of routes that give an atom weight

    @property
    def by_input(self) -> Tensor:
        """What the input decides in each block, [blocks]."""
        return (entropy(self.usage) - self.entropy).clamp(min=0)  # rounding can put it below

    @property
    def dead(self) -> list[int]:
        """The atoms that no route uses."""
        return (self.used == 0).all(0).nonzero().flatten().tolist()

    def summary(self) -> dict[str, float]:
        """See [`RouteStatistics.summary`]."""
        mean = self.usage.mean(0)
        return {
            "entropy": self.entropy.mean().item(),
            "by_input": self.by_input.mean().item(),
            "by_block": jensen_shannon(self.usage).clamp(min=0).item(),
            "load_balance": load_balance(mean).item(),
            "top_atom": mean.max().item(),
            "dead": float(len(self.dead)),
        }
