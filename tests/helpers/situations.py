"""One route of one sequence: the library's router beside the formulas of reference.py, with the paper's constants."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.linalg import matrix_norm, vector_norm

from helpers import reference
from helpers.reference import Bank, Hyper
from peft_queryable.method.router import Router, RouterSettings

SLACK = 1 + 1e-9  # rounding, in bounds that are met with equality


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-8)


def norm(matrix: Tensor) -> Tensor:
    """Operator norm."""
    return matrix_norm(matrix, ord=2)


@dataclass
class Situation:
    """A router in float64 and what one block of one sequence gives it: state [r], means [r], instruction [d_c].

    Its tensors are all that a router can have; the library's own has only those that can learn.
    """

    hyper: Hyper
    tensors: dict[str, Tensor]
    state: Tensor
    means: list[Tensor]
    e: Tensor

    @property
    def bank(self) -> Bank:
        return Bank.read(self.tensors, self.hyper)

    @cached_property
    def router(self) -> Router:
        """The library's router, on the same tensors."""
        M, r, _ = self.bank.C.shape
        router = Router(
            RouterSettings(
                r, M, num_blocks=4, dim=self.bank.k.shape[1], instruction_dim=len(self.e), **asdict(self.hyper)
            )
        )
        router = router.double()
        router.load_state_dict({name: self.tensors[name] for name in router.state_dict()}, assign=True)
        return router.requires_grad_(False)

    @property
    def block(self) -> int:
        return len(self.means)

    def alpha(self, e: Tensor | None = None) -> Tensor:
        """The library's route, [M]."""
        means = [mean[None, None] for mean in self.means]
        lookup = self.router.prepare((self.e if e is None else e)[None])
        return self.router(self.block, self.state[None, None], means, lookup)[0, 0]

    def operator(self, e: Tensor | None = None) -> Tensor:
        """The library's S, [r, r]."""
        return self.router.atoms.transposed_operators(self.alpha(e)).mT

    def zeta(self, e: Tensor | None = None) -> Tensor:
        """State logits, [M]."""
        q = reference.query(self.bank, self.block, self.state, self.means, self.e if e is None else e)
        return torch.stack(reference.state_logits(self.bank, q))

    def rho(self, e: Tensor | None = None) -> Tensor:
        """Raw language logits, [M]."""
        return torch.stack(reference.prior_logits(self.bank, self.e if e is None else e))

    def tempered_prior(self, active: Tensor) -> Tensor:
        """log pi on the active set, of p over all atoms: [k]."""
        return (self.hyper.instruction_strength * self.rho().log_softmax(0))[active].log_softmax(0)

    def changed(self, **hyper: Any) -> Situation:
        """The same tensors under other hyperparameters."""
        new = Hyper(**(asdict(self.hyper) | hyper))
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return Situation(new, tensors, self.state, self.means, self.e)


def make_situation(seed: int, M: int = 5, r: int = 3, d: int = 4, means: int = 2, **hyper: Any) -> Situation:
    torch.manual_seed(seed)
    router = Router(RouterSettings(r, M, top_k=None, num_blocks=4, dim=d, instruction_dim=3)).double()
    router.requires_grad_(False)
    for p in router.parameters():
        nn.init.normal_(p)
    nn.init.zeros_(router.default_instruction.weight)
    state, *earlier = torch.randn(1 + means, r).double()
    return Situation(Hyper(**hyper), dict(router.named_parameters()), state, earlier, torch.randn(3).double())


@st.composite
def situations(draw, min_atoms: int = 1, min_means: int = 0) -> Situation:
    """Any sizes, temperatures and strengths, dense and top-k."""
    M = draw(st.integers(min_atoms, 7))
    temperature = st.floats(0.3, 2)
    return make_situation(
        draw(st.integers(0, 10_000)),
        M,
        r=draw(st.integers(1, 4)),
        d=draw(st.integers(2, 6)),
        means=draw(st.integers(min_means, 3)),
        top_k=draw(st.none() | st.integers(1, M)),
        attention_temperature=draw(temperature),
        depth_temperature=draw(temperature),
        language_temperature=draw(temperature),
        instruction_strength=draw(st.floats(0, 3)),
        instruction_query_weight=draw(st.floats(0, 2)),
    )


@dataclass
class Constants:
    """Constants of D.12 and D.13 over the two instructions e and e'."""

    s: Situation
    other: Tensor  # e'
    rho_min: Tensor = field(init=False)
    R_s: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s, bank, normalised = self.s, self.s.bank, []
        for e in (s.e, self.other):
            q0 = reference.pre_query(bank, s.block, s.state, e)
            q = reference.query(bank, s.block, s.state, s.means, e)
            normalised += [bank.Q_dep_q @ q0, q, bank.R_ctx @ e]
        self.rho_min = min(reference.rms(x) for x in normalised)
        self.R_s = max([vector_norm(mean) for mean in s.means], default=torch.zeros(()).double())

    @property
    def summary(self) -> Tensor:
        """(71)."""
        s, bank, hyper = self.s, self.s.bank, self.s.hyper
        factor = len(s.means) * self.R_s * norm(bank.Q_dep_q) / (2 * hyper.depth_temperature * self.rho_min)
        return factor * hyper.instruction_query_weight * norm(bank.Q_ctx)

    @property
    def query(self) -> Tensor:
        """L_q  (73)."""
        bank = self.s.bank
        return self.s.hyper.instruction_query_weight * norm(bank.Q_ctx) + norm(bank.Q_dep) * self.summary

    @property
    def route(self) -> Tensor:
        """L_alpha  (79)."""
        hyper, k = self.s.hyper, self.s.hyper.top_k or len(self.s.bank.k)
        prior = hyper.instruction_strength * norm(self.s.bank.R_ctx) / hyper.language_temperature
        return k**0.5 / (2 * self.rho_min) * (self.query / hyper.attention_temperature + prior)

    @property
    def operator(self) -> Tensor:
        """Factor of ||e - e'|| in (80)."""
        k = self.s.hyper.top_k or len(self.s.bank.k)
        return max(norm(atom) for atom in self.s.bank.C) * k**0.5 * self.route


def opposed(means: int = 2) -> tuple[Situation, Tensor]:
    """Two atoms and two means that an instruction decides between, seen at right angles from query and prior."""
    s = make_situation(
        0,
        M=2,
        r=2,
        d=2,
        means=means,
        attention_temperature=0.9,
        depth_temperature=0.8,
        language_temperature=0.7,
        instruction_strength=1.3,
        instruction_query_weight=0.6,
    )
    one, zero = torch.eye(2).double(), torch.zeros(2, 2).double()
    along, across = one[1], one[0] * 0.5 * 2**0.5  # `across` has RMS 0.5
    s.bank.k.copy_(torch.stack([along, -along]))
    s.bank.w.copy_(across.expand(4, 2))
    s.bank.Q_cur.copy_(zero)
    for p in (s.bank.Q_dep, s.bank.Q_dep_q, s.bank.Q_dep_k):
        p.copy_(one)
    s.bank.Q_ctx.copy_(torch.stack([0 * along, along, 0 * along], dim=1))
    s.bank.R_ctx.copy_(torch.stack([across, along, 0 * along], dim=1))
    s.bank.C.copy_(torch.stack([3 * one, -3 * one]))
    s.means[:] = [2 * along, -2 * along][:means]
    s.e.copy_(torch.tensor([1.0, 5e-4, 0.0]))
    return s, torch.tensor([1.0, -5e-4, 0.0]).double()
