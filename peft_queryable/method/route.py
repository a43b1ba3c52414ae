"""What a route does to the rank states of its block: one operator for a sequence, or one for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .router import Router


@dataclass(frozen=True)
class SequenceRoute:
    """A block's route where one serves a whole sequence.

    Args:
        weights: over the atoms, [B, 1, M].
        operator: their mixture transposed, S^T [B, r, r], as rank states are rows.
    """

    weights: Tensor
    operator: Tensor

    @classmethod
    def of(cls, router: Router, weights: Tensor) -> SequenceRoute:
        """The route that mixes the atoms of `router` by `weights` [B, 1, M]."""
        return cls(weights, router.operator(weights).transpose(1, 2))

    def apply(self, states: Tensor, gate: Tensor | float, scaling: float) -> Tensor:
        """alpha / r times t = s + g S s (Eqs. 94, 95), which costs no more than t does.

        Args:
            states: rank states s, [B, T, r].
            gate: g, [1] as `states` or a number.
            scaling: alpha / r.

        Returns:
            [B, T, r] as `states`.
        """
        operator = self.operator.to(states)
        if isinstance(gate, float):
            return torch.baddbmm(states, states, operator, beta=scaling, alpha=scaling * gate)
        return torch.baddbmm(states, states, gate * operator, beta=scaling, alpha=scaling)

    def fixed(self) -> SequenceRoute:
        """The route as later calls find it on their cache."""
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> SequenceRoute:
        return replace(self, weights=function(self.weights), operator=function(self.operator))


@dataclass(frozen=True)
class TokenRoute:
    """A block's routes where every token has its own: `weights` [B, T, M] over the atoms of `router`."""

    router: Router
    weights: Tensor

    def apply(self, states: Tensor, gate: Tensor | float, scaling: float) -> Tensor:
        """As [`SequenceRoute.apply`].

        Raises:
            ValueError: for states of another number of tokens.
        """
        if states.shape[1] != self.weights.shape[1]:
            raise ValueError(
                f"A module got {states.shape[1]} tokens a row, but its block routes {self.weights.shape[1]}: it sees "
                "other tokens than its stack. Exclude it with `exclude_modules`."
            )
        mixed = self.router.mix(self.weights.to(states.device), states)
        return (states + gate * mixed) * scaling

    def fixed(self) -> SequenceRoute:
        return SequenceRoute.of(self.router, self.weights[:, -1:])

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenRoute:
        return TokenRoute(self.router, function(self.weights))


Route = SequenceRoute | TokenRoute
