"""A block's route, ready to be applied to rank states (Eqs. 94, 95): one for a sequence, or one for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .atoms import Atoms


@dataclass(frozen=True)
class SequenceRoute:
    """A block's route where one serves a whole sequence.

    Args:
        weights: over the atoms, [B, 1, M].
        operator: their mixture transposed, S^T [B, r, r], because rank states are rows.
    """

    weights: Tensor
    operator: Tensor

    @classmethod
    def of(cls, atoms: Atoms, weights: Tensor) -> SequenceRoute:
        """The route that mixes `atoms` by `weights` [B, 1, M]."""
        return cls(weights, atoms.operator(weights).transpose(1, 2))

    def apply(self, states: Tensor, gate: Tensor | float, scaling: float) -> Tensor:
        """alpha / r times t = s + g S s (Eqs. 94, 95), at the cost of t alone.

        Args:
            states: rank states s, [B, T, r].
            gate: g, a tensor [1] like `states`, or a number.
            scaling: alpha / r.

        Returns:
            [B, T, r] like `states`.
        """
        operator = self.operator.to(states)
        if isinstance(gate, float):
            return torch.baddbmm(states, states, operator, beta=scaling, alpha=scaling * gate)
        return torch.baddbmm(states, states, gate * operator, beta=scaling, alpha=scaling)

    def last(self) -> SequenceRoute:
        """The route of the last token, as a route of its sequence."""
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> SequenceRoute:
        return replace(self, weights=function(self.weights), operator=function(self.operator))


@dataclass(frozen=True)
class TokenRoute:
    """A block's routes where every token has its own: `weights` [B, T, M] over `atoms`."""

    atoms: Atoms
    weights: Tensor

    def apply(self, states: Tensor, gate: Tensor | float, scaling: float) -> Tensor:
        """As [`SequenceRoute.apply`].

        Raises:
            ValueError: for states of another number of tokens.
        """
        if states.shape[1] != self.weights.shape[1]:
            raise ValueError(
                f"A module got {states.shape[1]} tokens per row, but its block routes {self.weights.shape[1]}: it "
                "sees other tokens than its stack. Exclude it with `exclude_modules`."
            )
        mixed = self.atoms.mix(self.weights.to(states.device), states)
        return (states + gate * mixed) * scaling

    def last(self) -> SequenceRoute:
        return SequenceRoute.of(self.atoms, self.weights[:, -1:])

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenRoute:
        return TokenRoute(self.atoms, function(self.weights))


Route = SequenceRoute | TokenRoute


def make_route(atoms: Atoms, weights: Tensor) -> Route:
    """The route that mixes `atoms` by `weights` [B, K, M]: one for the sequence if K is 1, else one per token."""
    return SequenceRoute.of(atoms, weights) if weights.shape[1] == 1 else TokenRoute(atoms, weights)
