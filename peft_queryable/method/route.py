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
        return cls(weights, atoms.transposed_operators(weights[:, 0]))

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
        return SequenceRoute(function(self.weights), function(self.operator))

    def sealed(self) -> SequenceRoute:
        """The same without its graph, for layers that run again in the backward pass."""
        return self.map(leaf)

    def unsealed(self) -> SequenceRoute:
        """A sealed route, ready to be applied."""
        return self


@dataclass(frozen=True)
class TokenRoute:
    """A block's routes where every token has its own.

    Args:
        atoms: what the routes mix.
        weights: over the atoms, [B, T, M].
        dtype: dtype of most rank states.
        operators: the mixtures transposed, S_t^T [B, T, r, r] in `dtype`, which the block's modules share. None in a
            sealed route, and where they are larger than the outer products alpha_t s_t, [B, T, M r], of a module.
    """

    atoms: Atoms
    weights: Tensor
    dtype: torch.dtype
    operators: Tensor | None = None

    @classmethod
    def of(cls, atoms: Atoms, weights: Tensor, dtype: torch.dtype) -> TokenRoute:
        """The routes that mix `atoms` by `weights` [B, T, M] for rank states of `dtype`."""
        operators = atoms.transposed_operators(weights.to(dtype)) if atoms.rank <= weights.shape[-1] else None
        return cls(atoms, weights, dtype, operators)

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
        mixed = self._mix(states)
        if isinstance(gate, float):
            return torch.add(states, mixed, alpha=gate) * scaling
        return torch.addcmul(states, gate, mixed) * scaling

    def _mix(self, states: Tensor) -> Tensor:
        """S_t s_t of `states` [B, T, r], like them."""
        if self.operators is None:
            return self.atoms.mix(self.weights.to(states.device), states)
        # A product and a sum: batched matrix products are slow at this size. Autocast would sum in float32.
        return (self.operators.to(states) * states.unsqueeze(-1)).sum(-2, dtype=states.dtype)

    def last(self) -> SequenceRoute:
        return SequenceRoute.of(self.atoms, self.weights[:, -1:])

    def sealed(self) -> TokenRoute:
        return replace(self, weights=leaf(self.weights), operators=None)

    def unsealed(self) -> TokenRoute:
        with torch.no_grad():
            route = TokenRoute.of(self.atoms, self.weights, self.dtype)
        if route.operators is not None:  # layers that run again have to save the same tensors
            route.operators.requires_grad_(self.weights.requires_grad or self.atoms.weight.requires_grad)
        return route


Route = SequenceRoute | TokenRoute


def make_route(atoms: Atoms, weights: Tensor, dtype: torch.dtype) -> Route:
    """The route that mixes `atoms` by `weights` [B, K, M]: one for the sequence if K is 1, else one per token.

    Args:
        dtype: dtype of the rank states that it will be applied to.
    """
    return SequenceRoute.of(atoms, weights) if weights.shape[1] == 1 else TokenRoute.of(atoms, weights, dtype)


def leaf(t: Tensor) -> Tensor:
    """The tensor without its graph: a leaf, which needs a gradient if `t` does."""
    return t.detach().requires_grad_(t.requires_grad)
