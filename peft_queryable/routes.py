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
        operator: their mixture S, [B, r, r].
        gates: g by the identity of its logit, filled as they are read: in the steps of a cache, which as a whole is of
            the weights that filled it. None elsewhere.
    """

    weights: Tensor
    operator: Tensor
    gates: dict[int, float] | None = None

    def apply(self, states: Tensor, gate: Tensor) -> Tensor:
        """t = s + g S s (Eq. 94) of `states` [B, T, r] under gate logit `gate` [1]: [B, T, r], as `states`."""
        operator = self.operator.to(states).transpose(1, 2)
        if self.gates is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.baddbmm(states, states, gate.sigmoid().to(states) * operator)
        if id(gate) not in self.gates:
            self.gates[id(gate)] = gate.sigmoid().item()
        return torch.baddbmm(states, states, operator, alpha=self.gates[id(gate)])

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

    def apply(self, states: Tensor, gate: Tensor) -> Tensor:
        """As [`SequenceRoute.apply`]."""
        mixed = self.router.mix(self.weights.to(states.device), states)
        return states + gate.sigmoid().to(states) * mixed

    def fixed(self) -> SequenceRoute:
        weights = self.weights[:, -1:]
        return SequenceRoute(weights, self.router.operator(weights))

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenRoute:
        return TokenRoute(self.router, function(self.weights))


Route = SequenceRoute | TokenRoute
