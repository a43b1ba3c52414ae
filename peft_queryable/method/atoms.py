"""The bank of rank-space atoms and their mixtures (Eq. 23)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Weight(nn.Module):
    """One trainable tensor in a module of its own: FSDP wraps, and TRL copies, modules that have a `weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class Atoms(Weight):
    """The atoms C_1 .. C_M, `weight` [M, r, r], that every adapted module of an adapter shares.

    Args:
        num_atoms: M.
        rank: r.
    """

    def __init__(self, num_atoms: int, rank: int) -> None:
        super().__init__(num_atoms, rank, rank)
        self.rank = rank

    def transposed_operators(self, weights: Tensor) -> Tensor:
        """Operators S = sum_m alpha_m C_m (Eq. 23) of `weights` [..., M], transposed because rank states are rows.

        Returns:
            S^T, [..., r, r] in the dtype of `weights`.
        """
        with without_autocast(weights):
            atoms = self.weight.to(weights).mT.flatten(1)  # [M, r r]
            return (weights @ atoms).unflatten(-1, (self.rank, self.rank))

    def mix(self, weights: Tensor, states: Tensor) -> Tensor:
        """Mixed states S_t s_t of `states` [B, T, r] under `weights` [B, T, M]: [B, T, r] in the dtype of `states`.

        No operator is built, which is cheaper where r > M.
        """
        return _Mix.apply(weights.to(states), states, self.weight.to(states))


class _Mix(torch.autograd.Function):
    """sum_m alpha_m C_m s for each token, for weights [..., M], states [..., r] and atoms [M, r, r].

    This is one product with the outer products alpha s, [..., M r], which the backward pass computes again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, states: Tensor, atoms: Tensor) -> Tensor:
        return _outer(weights, states) @ atoms.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, states, atoms = ctx.saved_tensors
        back = (grad @ atoms.transpose(0, 1).flatten(1)).unflatten(-1, atoms.shape[:2])  # C_m^T grad, [..., M, r]
        by_weights = (back * states.unsqueeze(-2)).sum(-1)
        by_states = (weights.unsqueeze(-1) * back).sum(-2)
        by_atoms = grad.flatten(0, -2).T @ _outer(weights, states).flatten(0, -2)  # [r, M r]
        return by_weights, by_states, by_atoms.unflatten(1, atoms.shape[:2]).transpose(0, 1)


def _outer(weights: Tensor, states: Tensor) -> Tensor:
    """alpha_m s_j of `weights` [..., M] and `states` [..., r]: [..., M r]."""
    return (weights.unsqueeze(-1) * states.unsqueeze(-2)).flatten(-2)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Switches autocast off where it is on: entering it costs as much as the operations inside."""
    device = tensor.device.type  # the meta device has no autocast
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
