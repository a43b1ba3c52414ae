"""The atoms: how they start, and their mixtures, as operators and applied to rank states."""

import pytest
import torch
from torch import Tensor

from peft_queryable.method.atoms import _Mix
from peft_queryable.method.router import Router, RouterSettings

BATCH, ROUTES, RANK, ATOMS = 3, 5, 4, 6


def router(**kwargs) -> Router:
    """A router, which holds the atoms."""
    config = {"rank": RANK, "num_atoms": ATOMS, "top_k": 3, "num_blocks": 4, "dim": 8, "instruction_dim": 7}
    return Router(RouterSettings(**(config | kwargs)))


def test_operator_is_the_mixture_of_atoms():
    """S = sum_m alpha_m C_m (Eq. 23)."""
    module = router().double()
    weights = torch.rand(BATCH, ROUTES, ATOMS, dtype=torch.float64)
    expected = sum(weights[..., m, None, None] * module.atoms.weight[m] for m in range(ATOMS))
    torch.testing.assert_close(module.atoms.transposed_operators(weights).mT, expected)


@pytest.mark.parametrize("routes", [1, ROUTES])
def test_mix_applies_the_operator(routes):
    """`mix` is S_t s_t for each token, or S s_t for all of them where there is one route."""
    module = router().double()
    weights = torch.rand(BATCH, routes, ATOMS, dtype=torch.float64)
    states = torch.randn(BATCH, ROUTES, RANK, dtype=torch.float64)
    mixed = module.atoms.mix(weights, states)
    for row in range(BATCH):
        for t in range(ROUTES):
            operator = module.atoms.transposed_operators(weights[row, min(t, routes - 1)]).mT
            torch.testing.assert_close(mixed[row, t], operator @ states[row, t])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_initial_atoms(scale):
    """Entries have the standard deviation `atom_scale` / sqrt(r)."""
    atoms = router(rank=16, num_atoms=32, atom_scale=scale).atoms.weight
    assert atoms.std().item() == pytest.approx(scale / 4, rel=0.05)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_gradients_of_mix(shape):
    """What is made again in the backward pass has the gradients of the sum over atoms, for batches and under vmap."""
    module = router().double()
    weights, states = torch.randn(*shape, ATOMS).double(), torch.randn(*shape, RANK).double()
    upstream = torch.randn(*shape, RANK).double()
    inputs = [weights.requires_grad_(), states.requires_grad_(), module.atoms.weight]

    def by_sum(weights: Tensor, states: Tensor, atoms: Tensor) -> Tensor:
        return torch.einsum("...m,mij,...j->...i", weights, atoms, states)

    expected = torch.autograd.grad(by_sum(*inputs), inputs, upstream)
    for found, gradient in zip(
        torch.autograd.grad(module.atoms.mix(weights, states), inputs, upstream), expected, strict=True
    ):
        torch.testing.assert_close(found, gradient)

    def loss(mix, atoms: Tensor) -> Tensor:
        return (mix(weights.detach(), states.detach(), atoms) * upstream).sum()

    atoms = torch.randn(3, *module.atoms.weight.shape).double()
    stacked, looped = (
        torch.func.vmap(torch.func.grad(lambda atoms, mix=mix: loss(mix, atoms)))(atoms)
        for mix in (_Mix.apply, by_sum)
    )
    torch.testing.assert_close(stacked, looped)
