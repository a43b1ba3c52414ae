"""The paper's theorems as numbers, in float64: what the library's router and layers return against each statement.

Logits come from the formulas of reference.py; routes, operators, updates and gradients come from the library. Every
bound is also met, or nearly, with equality somewhere, so that it says something.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import MLP, llama, token_ids
from peft import LoraConfig, get_peft_model
from reference import Bank, Hyper
from torch import Tensor, nn
from torch.linalg import matrix_norm, vector_norm

from peft_queryable import QueryableLoraConfig
from peft_queryable import router as router_module
from peft_queryable.layer import QueryableLoraLayer
from peft_queryable.router import RMS_EPS, Router, rms_norm, top_k_softmax

SLACK = 1 + 1e-9  # rounding, in bounds that are met with equality


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-8)


def norm(matrix: Tensor) -> Tensor:
    """Operator norm."""
    return matrix_norm(matrix, ord=2)


# One route of one sequence


@dataclass
class Situation:
    """A router in float64 and what one block of one sequence gives it: state [r], means [r], instruction [d_c]."""

    hyper: Hyper
    router: Router
    state: Tensor
    means: list[Tensor]
    e: Tensor

    @property
    def bank(self) -> Bank:
        return Bank.read(dict(self.router.named_parameters()), self.hyper)

    @property
    def block(self) -> int:
        return len(self.means)

    def alpha(self, e: Tensor | None = None) -> Tensor:
        """The library's route, [M]."""
        means = [mean[None, None] for mean in self.means]
        return self.router(self.block, self.state[None, None], means, (self.e if e is None else e)[None])[0, 0]

    def operator(self, e: Tensor | None = None) -> Tensor:
        """The library's S, [r, r]."""
        return self.router.operator(self.alpha(e)[None, None])[0]

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
        M, r, _ = self.bank.C.shape
        router = Router(r, M, num_blocks=4, dim=self.bank.k.shape[1], instruction_dim=len(self.e), **asdict(new))
        router = router.double().requires_grad_(False)
        router.load_state_dict(self.router.state_dict())
        return Situation(new, router, self.state, self.means, self.e)


def make_situation(seed: int, M: int = 5, r: int = 3, d: int = 4, means: int = 2, **hyper: Any) -> Situation:
    torch.manual_seed(seed)
    settings = Hyper(**hyper)
    router = Router(r, M, num_blocks=4, dim=d, instruction_dim=3, **asdict(settings)).double().requires_grad_(False)
    for p in router.parameters():
        nn.init.normal_(p)
    state, *earlier = torch.randn(1 + means, r).double()
    return Situation(settings, router, state, earlier, torch.randn(3).double())


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


@given(situations())
def test_lemma_d5_rho_stands_for_log_p(s):
    """Dense and top-k routes from zeta + tau log p and from zeta + tau rho are the library's route."""
    fused = s.zeta() + s.hyper.instruction_strength * s.rho().log_softmax(0)
    z = s.zeta() + s.hyper.instruction_strength * s.rho()
    assert (fused - z).std(correction=0) < 1e-12  # one scalar apart
    for logits in (fused, z):
        close(s.alpha(), torch.stack(reference.top_k_softmax(list(logits), s.hyper.top_k)))


@given(situations())
def test_top_k_route_is_the_dense_one_restricted(s):
    """Eq. 37: the k largest weights of the dense route, renormalised; exact zeros elsewhere; k = M is dense."""
    k = s.hyper.top_k or len(s.rho())
    dense = s.changed(top_k=None).alpha()
    active = dense.argsort(descending=True)[:k]
    expected = torch.zeros_like(dense)
    expected[active] = dense[active] / dense[active].sum()
    close(s.alpha(), expected)
    assert (s.alpha() != 0).sum() == k
    close(s.changed(top_k=len(dense)).alpha(), dense)


# Theorem 5.1


def kl(a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of distributions [..., k]."""
    return torch.xlogy(a, a).sum(-1) - (a * log_b).sum(-1)


def simplex_points(k: int) -> Tensor:
    """Random points of Delta(I), near its faces, all over it and near its centre, and its vertices: [n, k]."""
    sampled = [torch.distributions.Dirichlet(torch.full((k,), c).double()).sample((30,)) for c in (0.1, 1.0, 10.0)]
    return torch.cat([*sampled, torch.eye(k).double()])


@given(situations())
def test_theorem_5_1_route_maximises_the_objective(s):
    """Phi(a) = <a, zeta> - KL(a || pi) is KL(a || alpha) below Phi(alpha) at every a in Delta(I), so alpha is the only
    maximiser. The entropy form (5) has the same gaps. I holds the k largest fused logits.
    """
    alpha = s.alpha()
    active = alpha > 0
    alpha, zeta, log_pi = alpha[active], s.zeta()[active], s.tempered_prior(active)
    log_p = s.rho().log_softmax(0)
    fused = s.zeta() + s.hyper.instruction_strength * log_p
    assert active.all() or fused[active].min() > fused[~active].max()

    def phi(a: Tensor) -> Tensor:
        return a @ zeta - kl(a, log_pi)

    def entropy_form(a: Tensor) -> Tensor:
        return a @ fused[active] - torch.xlogy(a, a).sum(-1)

    points = simplex_points(len(alpha))
    gaps = phi(alpha) - phi(points)
    assert gaps.min() > -1e-12
    close(gaps, kl(points, alpha.log()))
    close(entropy_form(alpha) - entropy_form(points), gaps)


@given(situations())
def test_theorem_5_1_first_order_condition(s):
    """KKT (44): zeta_m - log alpha_m + log pi_m is one constant on I, alpha is positive there and sums to one."""
    alpha = s.alpha()
    active = alpha > 0
    multipliers = s.zeta()[active] - alpha[active].log() + s.tempered_prior(active)
    assert multipliers.std(correction=0) < 1e-10
    close(alpha.sum(), torch.ones(()).double())


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_5_1_numerical_optimum(seed, top_k):
    """A search that only evaluates the objective, moving mass between two atoms at a time, ends at the route."""
    s = make_situation(seed, M=4, top_k=top_k)
    alpha = s.alpha()
    active = alpha > 0
    zeta, log_pi = s.zeta()[active], s.tempered_prior(active)
    best = torch.full_like(zeta, 1 / len(zeta))
    pairs = [(i, j) for i in range(len(best)) for j in range(i)]
    for _ in range(30):
        for i, j in pairs:
            total = best[i] + best[j]
            low, high = 0.0, 1.0
            for _ in range(4):  # ever finer grids around the best point
                share = torch.linspace(low, high, 201, dtype=torch.float64)
                points = best.repeat(201, 1)
                points[:, i], points[:, j] = share * total, (1 - share) * total
                at = int((points @ zeta - kl(points, log_pi)).argmax())
                low, high = share[max(at - 1, 0)].item(), share[min(at + 1, 200)].item()
            best = points[at]
    close(best, alpha[active], atol=1e-6)


@given(situations())
def test_corollary_5_1_1_bound(s):
    """0 <= max zeta - <alpha, zeta> <= log 1 / pi at the state's preferred atom."""
    alpha = s.alpha()
    active = alpha > 0
    zeta = s.zeta()[active]
    loss = zeta.max() - alpha[active] @ zeta
    assert -1e-12 < loss <= -s.tempered_prior(active)[zeta.argmax()] + 1e-12


def test_corollary_5_1_1_is_tight():
    """Two atoms on which state and instruction disagree come near the upper bound; no preference, no loss."""
    s = make_situation(0, M=2, d=2, means=0, attention_temperature=2**0.5 / 45, language_temperature=2**0.5)
    s = s.changed(instruction_strength=36.0, instruction_query_weight=0.0)
    s.bank.k.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    s.bank.w.copy_(torch.tensor([1.0, 0.0]).expand(4, 2))
    s.bank.Q_cur.zero_()
    s.bank.R_ctx.copy_(torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    s.e.copy_(torch.tensor([1.0, 0.0, 0.0]))
    zeta, log_pi = s.zeta(), s.tempered_prior(torch.tensor([True, True]))
    loss, bound = zeta.max() - s.alpha() @ zeta, -log_pi[zeta.argmax()]
    assert 0.85 * bound < loss <= bound
    s.bank.w.zero_()
    assert s.zeta().max() - s.alpha() @ s.zeta() == 0


# Proposition D.7


@given(situations())
def test_proposition_d7a_no_language(s):
    """With lambda = tau = 0 the route is that of a router without any instruction, whatever e(c); with e(c) = 0 or
    without e(c) it is, whatever lambda and tau.
    """
    M, r, _ = s.bank.C.shape
    plain = Router(r, M, num_blocks=4, dim=s.bank.k.shape[1], **asdict(s.hyper)).double().requires_grad_(False)
    plain.load_state_dict({k: v for k, v in s.router.state_dict().items() if "instruction" not in k})
    means = [mean[None, None] for mean in s.means]
    expected = plain(s.block, s.state[None, None], means)[0, 0]
    close(s.changed(instruction_strength=0.0, instruction_query_weight=0.0).alpha(), expected)
    close(s.alpha(torch.zeros(3).double()), expected)
    close(s.router(s.block, s.state[None, None], means, None)[0, 0], expected)


def test_proposition_d7a_language_matters():
    """Either of lambda and tau alone moves the route."""
    s = make_situation(0, instruction_strength=0.0, instruction_query_weight=0.0)
    assert (s.changed(instruction_strength=1.0).alpha() - s.alpha()).abs().max() > 0.01
    assert (s.changed(instruction_query_weight=1.0).alpha() - s.alpha()).abs().max() > 0.01


@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_proposition_d7b_closed_gates(scope):
    """With every g = 0 the model is PEFT's LoRA with the same A and B."""
    base, x = MLP().double(), torch.randn(2, 3, 8).double()
    adapted = adapt(base, routing_scope=scope)
    lora = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second", "third", "head"]),
        autocast_adapter_dtype=False,
    )
    factors = {name: p for name, p in adapted.state_dict().items() if ".lora_" in name}
    assert not lora.load_state_dict(factors, strict=False).unexpected_keys
    assert (adapted(x) - lora(x)).abs().max() > 0.01  # open gates
    for name, p in adapted.named_parameters():
        if "gate" in name:
            nn.init.constant_(p, -1e4)
    close(adapted(x), lora(x))


@given(situations(min_atoms=2))
def test_proposition_d7c_dominant_language(s):
    """Weights relative to the preferred atom's are exp(differences of zeta + tau rho), and for tau to infinity the
    route is that atom alone and S its C.
    """
    rho, zeta = s.rho(), s.zeta()
    best, second = rho.sort(descending=True).values[:2]
    assume(best - second > 1e-3)
    top = int(rho.argmax())
    alpha = s.changed(top_k=None).alpha()
    ratio = torch.exp(zeta - zeta[top] + s.hyper.instruction_strength * (rho - best))
    close(alpha / alpha[top], ratio)
    tau = float((50 + zeta.max() - zeta.min()) / (best - second))
    limit = s.changed(instruction_strength=tau)
    close(limit.alpha(), nn.functional.one_hot(torch.tensor(top), len(rho)).double())
    close(limit.operator(), s.bank.C[top])


@given(situations(min_atoms=2))
def test_proposition_d7d_indifferent_state(s):
    """Constant zeta leaves the tempered prior on I; at tau = 1, p restricted to I and renormalised."""
    s = s.changed(instruction_query_weight=0.0)
    for name in ("w", "Q_cur", "Q_dep"):
        getattr(s.bank, name).zero_()
    assert not s.zeta().any()
    alpha = s.alpha()
    close(alpha[alpha > 0], s.tempered_prior(alpha > 0).exp())
    alpha = s.changed(instruction_strength=1.0).alpha()
    p = s.rho().softmax(0)[alpha > 0]
    close(alpha[alpha > 0], p / p.sum())
    assert (p.max() - p.min()) > 1e-9 or len(p) == 1


# Propositions D.8 and D.9: convex hulls


@given(situations())
def test_proposition_d8_operator_is_in_the_hull_of_the_atoms(s):
    """S = sum alpha_m C_m with alpha in the simplex, so ||S|| <= sum alpha ||C_m|| <= max ||C_m||; equal for k = 1."""
    alpha, C = s.alpha(), s.bank.C
    assert alpha.min() >= 0
    close(alpha.sum(), torch.ones(()).double())
    close(s.operator(), sum(a * atom for a, atom in zip(alpha, C, strict=True)))
    close(s.router.mix(alpha[None, None], s.state[None, None])[0, 0], s.operator() @ s.state)
    mean_norm = sum(a * norm(atom) for a, atom in zip(alpha, C, strict=True))
    assert norm(s.operator()) <= mean_norm * SLACK <= max(norm(atom) for atom in C) * SLACK**2
    one = s.changed(top_k=1)
    close(one.operator(), C[one.alpha().argmax()])


def read_summary(s: Situation) -> Tensor:
    """The library's depth summary u [r], out of two gradients: at Q_dep = 0, that of Q_dep is dL/dq u^T, that of w_b
    dL/dq.
    """
    s = s.changed(top_k=None)
    s.router.depth_value.weight.zero_()
    for table in (s.router.depth_value, s.router.prior):
        table.requires_grad_(True)
    loss = s.alpha().log() @ torch.randn(len(s.rho())).double()
    by_Q_dep, by_w = torch.autograd.grad(loss, [s.router.depth_value.weight, s.router.prior.weight])
    by_q = by_w[s.block]
    return by_Q_dep.T @ by_q / (by_q @ by_q)


@given(situations(min_atoms=2))
def test_proposition_d9_summary_is_bounded(s):
    """u = sum beta_i s_i with beta in the simplex, so ||u|| <= max ||s_i||, equal for equal means; u = 0 before."""
    u = read_summary(s)
    if not s.means:
        assert not u.any()
        return
    q0 = reference.pre_query(s.bank, s.block, s.state, s.e)
    close(u, reference.depth_summary(s.bank, q0, s.means), atol=1e-8)
    R_s = max(vector_norm(mean) for mean in s.means)
    assert vector_norm(u) <= R_s * (1 + 1e-7)
    s.means[:] = s.means[:1] * len(s.means)
    close(read_summary(s), s.means[0], atol=1e-7)


def query_bound(s: Situation, R_s: Tensor) -> Tensor:
    """Right side of (64)."""
    bank, R_w = s.bank, vector_norm(s.bank.w[s.block])
    by_instruction = s.hyper.instruction_query_weight * norm(bank.Q_ctx) * vector_norm(s.e)
    return R_w + norm(bank.Q_cur) * R_s + by_instruction + norm(bank.Q_dep) * R_s


def read_query(s: Situation) -> Tensor:
    """The query with the library's own depth summary in it; its logits make the library's route."""
    q = reference.pre_query(s.bank, s.block, s.state, s.e) + s.bank.Q_dep @ read_summary(s)
    logits = torch.stack(reference.state_logits(s.bank, q)) + s.hyper.instruction_strength * s.rho()
    close(s.changed(top_k=None).alpha(), logits.softmax(0), atol=1e-7)
    return q


@given(situations(min_atoms=2))
def test_corollary_d9_1_query_is_bounded(s):
    """||q|| <= R_w + ||Q_cur|| R_s + lambda ||Q_ctx|| R_e + ||Q_dep|| R_s."""
    R_s = max(vector_norm(v) for v in [s.state, *s.means])
    assert vector_norm(read_query(s)) <= query_bound(s, R_s) * SLACK


def test_corollary_d9_1_is_tight():
    """Terms that all point the same way meet the bound."""
    s = make_situation(0, r=1, d=2, means=2)
    for p in (s.bank.w, s.bank.Q_cur, s.bank.Q_ctx, s.bank.Q_dep):
        p.copy_(torch.rand(1).double() + torch.zeros_like(p))
    for v in (s.state, s.e, *s.means):
        v.fill_(0.7)
    close(vector_norm(read_query(s)), query_bound(s, vector_norm(s.state)), atol=1e-7)


# Lemmas D.10 and D.11, Propositions D.12 and D.13: stability


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(1e-3, 10))
def test_lemma_d10_rms_norm_jacobian(seed, d, scale):
    """J = I / r - x x^T / (d r^3), and ||J|| <= 1 / r with equality from two dimensions on."""
    x = scale * torch.randn(d, generator=torch.Generator().manual_seed(seed)).double()
    r = (x.square().mean() + RMS_EPS).sqrt()
    J = torch.autograd.functional.jacobian(rms_norm, x)
    close(J * r, torch.eye(d).double() - torch.outer(x, x) / (d * r**2))
    assert norm(J) <= SLACK / r
    assert d == 1 or norm(J) >= 1 / (r * SLACK)


@given(situations())
def test_lemma_d11_softmax_jacobian(s):
    """J = diag(alpha) - alpha alpha^T, zero off the active set, ||J|| <= 1/2 with equality at two equal weights."""
    z = s.zeta() + s.hyper.instruction_strength * s.rho()
    J = torch.autograd.functional.jacobian(lambda z: top_k_softmax(z, s.hyper.top_k), z)
    alpha = s.alpha()
    close(J, torch.diag(alpha) - torch.outer(alpha, alpha))
    assert norm(J) <= 0.5 * SLACK
    even = torch.autograd.functional.jacobian(lambda z: top_k_softmax(z, 2), torch.tensor([3.0, 3.0, 0.0]).double())
    close(norm(even), torch.tensor(0.5).double())


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


def steps(s: Situation, other: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """How far u, q, alpha and S move from e to e', and ||e - e'||."""
    at_other = copy.deepcopy(s)
    at_other.e = other
    moves = {
        "summary": vector_norm(read_summary(s) - read_summary(at_other)),
        "query": vector_norm(read_query(s) - read_query(at_other)),
        "route": vector_norm(s.alpha() - s.alpha(other)),
        "operator": norm(s.operator() - s.operator(other)),
    }
    return moves, vector_norm(s.e - other)


@given(situations(min_atoms=2, min_means=1), st.sampled_from([0.01, 0.3, 2.0]))
def test_propositions_d12_and_d13_lipschitz_bounds(s, size):
    """u, q, alpha and S move by no more than their constants times ||e - e'||, on one active set."""
    other = s.e + size * torch.randn(3).double()
    assume(((s.alpha() > 0) == (s.alpha(other) > 0)).all())
    constants = Constants(s, other)
    moves, distance = steps(s, other)
    for name, move in moves.items():
        assert move <= getattr(constants, name) * distance * SLACK + 1e-7, name


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


def test_propositions_d12_and_d13_are_tight():
    """A small step meets every bound, and the one of the weight update of a layer, but for terms of second order."""
    s, other = opposed()
    constants = Constants(s, other)
    moves, distance = steps(s, other)
    for name, move in moves.items():
        bound = getattr(constants, name) * distance
        assert 0.999 * bound < move <= bound * SLACK, name


# Layers


TARGETS = ["first", "second", "third", "head"]


def adapt(base: nn.Module, **config: Any) -> nn.Module:
    """A copy of `base` with an adapter of random tensors."""
    defaults = {
        "r": 3,
        "lora_alpha": 5,
        "num_atoms": 4,
        "top_k": 3,
        "num_blocks": 3,
        "router_dim": 4,
        "target_modules": TARGETS,
        "instruction_dim": 3,
        "instruction_strength": 1.3,
        "language_temperature": 0.6,
    }
    peft_config = QueryableLoraConfig(**(defaults | config))
    adapted = get_peft_model(copy.deepcopy(base), peft_config, autocast_adapter_dtype=False).eval()
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    return adapted


@dataclass
class Seen:
    """One adapted module in one call: input [B, T, in], output [B, T, out] and its output without the adapter."""

    block: int
    layer: Any
    x: Tensor
    y: Tensor
    base: Tensor

    @property
    def A(self) -> Tensor:
        return self.layer.lora_A["default"].weight

    @property
    def B(self) -> Tensor:
        return self.layer.lora_B["default"].weight

    @property
    def eta(self) -> Tensor:
        return self.layer.queryable_lora_gate["default"].weight

    @property
    def g(self) -> Tensor:
        return self.eta.sigmoid()

    @property
    def scale(self) -> float:
        return self.layer.scaling["default"]

    def update(self, S: Tensor) -> Tensor:
        """Delta W under S  (24)."""
        return self.scale * self.B @ (torch.eye(len(S)).to(S) + self.g * S) @ self.A

    @property
    def s(self) -> Tensor:
        """Rank states (92), [B, T, r]."""
        return self.x @ self.A.T

    @property
    def r(self) -> Tensor:
        """dL/dt (96), [B, T, r], after the backward pass."""
        return self.scale * self.y.grad @ self.B


class Watch:
    """Routes, logits and operators of each block of a call, and what its adapted modules see, with gradients."""

    def __init__(self, adapted: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.router = adapted.base_model.queryable_lora_router["default"]
        self.asked: list[tuple] = []  # arguments of the router
        self.logits: list[Tensor] = []  # [B, K, M]
        self.weights: list[Tensor] = []  # [B, K, M]
        self.operators: list[Tensor] = []  # [B, r, r] where K = 1
        self.modules: list[Seen] = []
        monkeypatch.setattr(router_module, "top_k_softmax", self._spy_on_logits)
        monkeypatch.setattr(self.router, "operator", self._recording(self.router.operator, self.operators))
        monkeypatch.setattr(self.router, "forward", self._recording(self.router.forward, self.weights))
        layers = [module for module in adapted.modules() if isinstance(module, QueryableLoraLayer)]
        self.hooks = [layer.register_forward_hook(self._see) for layer in layers]

    def _recording(self, function: Callable, record: list[Tensor]) -> Callable:
        def recorded(*args: Any) -> Tensor:
            result = function(*args)
            result.retain_grad()
            record.append(result)
            if record is self.weights:
                self.asked.append(args)
            return result

        return recorded

    def _spy_on_logits(self, logits: Tensor, k: int | None) -> Tensor:
        logits.retain_grad()
        self.logits.append(logits)
        return top_k_softmax(logits, k)

    def _see(self, layer: Any, args: tuple, y: Tensor) -> None:
        y.retain_grad()
        self.modules.append(Seen(len(self.weights) - 1, layer, args[0], y, layer.base_layer(args[0])))

    def by_operator(self, block: int) -> Tensor:
        """Right side of (10) for every token, [B, T, r, r]."""
        return sum(m.g * torch.einsum("bti,btj->btij", m.r, m.s) for m in self.modules if m.block == block)

    def by_weights(self, block: int) -> Tensor:
        """psi = <grad S, C_m> (11), [B, K, M]."""
        psi = torch.einsum("btij,mij->btm", self.by_operator(block), self.router.atoms.weight)
        return psi if self.weights[block].shape[1] > 1 else psi.sum(1, keepdim=True)

    def by_logits(self, block: int) -> Tensor:
        """alpha (psi - mean psi) (13), [B, K, M]."""
        alpha, psi = self.weights[block], self.by_weights(block)
        return alpha * (psi - (alpha * psi).sum(-1, keepdim=True))


def differentiated(monkeypatch: pytest.MonkeyPatch, scope: str, rows: int = 2) -> tuple[nn.Module, Watch]:
    """An adapted model after a backward pass of a random scalar, and what was seen of it."""
    adapted = adapt(MLP().double(), routing_scope=scope)
    for name, p in adapted.named_parameters():
        if name.endswith("base_layer.weight"):
            p.requires_grad_(True)  # its gradient is that of the dense weight
    watch = Watch(adapted, monkeypatch)
    y = adapted(torch.randn(rows, 3, 8).double(), instruction_embeds=torch.randn(rows, 3).double())
    (y.sin() * torch.randn_like(y)).sum().backward()
    assert [m.block for m in watch.modules] == [0, 0, 1, 2]
    return adapted, watch


SCOPES = pytest.mark.parametrize("scope", ["sequence", "causal"])


def test_theorem_5_3_operator_gradient(monkeypatch):
    """(10): the gradient of S_b, which serves all tokens and modules of the block, is sum g r s^T."""
    _, watch = differentiated(monkeypatch, "sequence")
    for block, S in enumerate(watch.operators):
        assert S.grad.abs().max() > 1e-3
        close(S.grad, watch.by_operator(block).sum(1))


@SCOPES
def test_theorem_5_3_atom_and_weight_gradients(monkeypatch, scope):
    """(11): atoms get alpha_m grad S, summed over routes and blocks; the weights get <grad S, C_m>."""
    _, watch = differentiated(monkeypatch, scope)
    by_atoms = torch.zeros_like(watch.router.atoms.weight)
    for block, weights in enumerate(watch.weights):
        assert weights.shape[1] == (3 if scope == "causal" else 1)
        close(weights.grad, watch.by_weights(block))
        by_atoms = by_atoms + torch.einsum("btm,btij->mij", weights.expand(-1, 3, -1), watch.by_operator(block))
    assert by_atoms.abs().amax((1, 2)).min() > 1e-3
    close(watch.router.atoms.weight.grad, by_atoms)


@SCOPES
def test_theorem_5_3_gate_gradients(monkeypatch, scope):
    """(12): eta gets sigma' <r, d>, d = S s, summed over tokens."""
    _, watch = differentiated(monkeypatch, scope)
    for m in watch.modules:
        S = torch.einsum("btm,mij->btij", watch.weights[m.block].expand(-1, 3, -1), watch.router.atoms.weight)
        d = torch.einsum("btij,btj->bti", S, m.s)
        assert m.eta.grad.abs() > 1e-4
        close(m.eta.grad, m.g * (1 - m.g) * (m.r * d).sum())


@SCOPES
def test_corollary_5_3_1_logit_gradients(monkeypatch, scope):
    """(13): logits get alpha (psi - mean psi) on the active set, and nothing off it."""
    _, watch = differentiated(monkeypatch, scope)
    for block, logits in enumerate(watch.logits):
        assert ((watch.weights[block] > 0).sum(-1) == 3).all()
        assert not logits.grad[watch.weights[block] == 0].any()
        assert logits.grad.abs().max() > 1e-4
        close(logits.grad, watch.by_logits(block))


@SCOPES
def test_corollary_5_3_1_state_and_language_logits(monkeypatch, scope):
    """(14): zeta gets the gradients of (13) and rho tau times them; by the formulas of zeta and rho, these give those
    of w, R_ctx and the keys.
    """
    adapted, watch = differentiated(monkeypatch, scope)
    hyper = Hyper.of(adapted.peft_config["default"])
    bank = Bank.read(dict(watch.router.named_parameters()), hyper)
    scalar = torch.zeros(()).double()
    for block, (_, state, means, instruction) in enumerate(watch.asked):
        by_zeta = watch.by_logits(block).detach()
        by_rho = hyper.instruction_strength * by_zeta
        for row, k in torch.cartesian_prod(*(torch.arange(n) for n in state.shape[:2])).tolist():
            e, earlier = instruction[row], [mean[row, k].detach() for mean in means]
            q = reference.query(bank, block, state[row, k].detach(), earlier, e)
            scalar = scalar + by_zeta[row, k] @ torch.stack(reference.state_logits(bank, q))
            scalar = scalar + by_rho[row, k] @ torch.stack(reference.prior_logits(bank, e))
    router = watch.router
    for ours, theirs in ((bank.w, router.prior), (bank.R_ctx, router.instruction_prior), (bank.k, router.keys)):
        (expected,) = torch.autograd.grad(scalar, ours, retain_graph=True)
        assert expected.abs().max() > 1e-4
        close(theirs.weight.grad, expected)


def test_proposition_d14_compressed_gradient(monkeypatch):
    """(86): <G, (alpha / r) g B S A> = (alpha / r) g <B^T G A^T, S>, G the gradient of the dense weight; and such
    compressed gradients are what adds up to the gradient of S.
    """
    _, watch = differentiated(monkeypatch, "sequence", rows=1)
    for block, S in enumerate(watch.operators):
        compressed = torch.zeros(3, 3).double()
        for m in (m for m in watch.modules if m.block == block):
            G = m.layer.base_layer.weight.grad
            by_module = m.scale * m.g * m.B.T @ G @ m.A.T
            dense = (G * (m.scale * m.g * m.B @ S[0] @ m.A)).sum()
            assert dense.abs() > 1e-4
            close(dense, (by_module * S[0]).sum())
            compressed = compressed + by_module
        close(S.grad[0], compressed)


def check_updates(watch: Watch) -> None:
    """Updates are (alpha / r) B (I + g S) A x, and (7), (8), (58) to (60), (88) bound them."""
    R_C = max(norm(C) for C in watch.router.atoms.weight)
    R_A, R_B = (max(norm(getattr(m, factor)) for m in watch.modules) for factor in "AB")
    for m in watch.modules:
        for row, S in enumerate(watch.operators[m.block]):
            W = m.update(S)
            added = m.y[row] - m.base[row]
            close(added, m.x[row] @ W.T)
            bound = m.scale * norm(m.B) * (1 + m.g * R_C) * norm(m.A)
            assert norm(W) <= bound * SLACK <= m.scale * R_B * (1 + R_C) * R_A * SLACK
            assert (vector_norm(added, dim=-1) <= bound * vector_norm(m.x[row], dim=-1) * SLACK).all()


@given(st.integers(0, 1000), st.integers(1, 4), st.none() | st.integers(1, 4))
def test_theorem_5_2_and_corollary_d8_1_updates_are_bounded(seed, r, top_k):
    """(7), (8): Delta W and its action on every input of a module stay below the bounds by ||B||, g, R_C, ||A||."""
    torch.manual_seed(seed)
    adapted = adapt(MLP().double(), r=r, top_k=top_k)
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(adapted, monkeypatch)
        adapted(torch.randn(2, 3, 8).double())
        check_updates(watch)


def test_theorem_5_2_is_tight(monkeypatch):
    """One positive atom of rank one, and inputs along A, meet (58) and (59)."""
    adapted = adapt(nn.Sequential(nn.Linear(8, 5)).double(), r=1, num_atoms=1, top_k=1, target_modules=["0"])
    watch = Watch(adapted, monkeypatch)
    watch.router.atoms.weight.data.fill_(2.0)
    x = adapted.base_model.model[0].lora_A["default"].weight.detach().clone()
    adapted(x)
    (m,) = watch.modules
    bound = m.scale * norm(m.B) * (1 + 2 * m.g) * norm(m.A)
    close(norm(m.update(watch.operators[0][0])), bound.squeeze())
    close(vector_norm(m.y - m.base), (bound * vector_norm(x)).squeeze())


def watched(adapted: nn.Module, inputs: Tensor, e: Tensor, **kwargs: Any) -> Watch:
    """A call under instruction e."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(adapted, monkeypatch)
        adapted(inputs, instruction_embeds=e[None], **kwargs)
    for hook in watch.hooks:
        hook.remove()
    return watch


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_d15_attention_projections(seed, top_k):
    """(88) for query, key, value and output projections of a Llama; (89) in its first block, where the state does not
    depend on the instruction, for the weight update and, with the same input, for what it adds.
    """
    torch.manual_seed(seed)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = adapt(llama().double(), target_modules=projections, routing_scope="sequence", top_k=top_k)
    ids, e = token_ids(1, 5), torch.randn(3).double()
    other = e + 0.01 * torch.randn(3).double()
    first, second = (watched(adapted, ids, embedding, use_cache=False) for embedding in (e, other))
    check_updates(first)
    check_updates(second)
    assert ((first.weights[0] > 0) == (second.weights[0] > 0)).all()

    router, hyper = first.router, Hyper.of(adapted.peft_config["default"])
    s = Situation(hyper, router, first.asked[0][1][0, 0].detach(), [], e)
    constant = Constants(s, other).operator * vector_norm(e - other)
    moved = 0.0
    in_block = [pair for pair in zip(first.modules, second.modules, strict=True) if pair[0].block == 0]
    assert len(in_block) == 2 * len(projections)
    for index, (m, n) in enumerate(in_block):
        change = norm(m.update(first.operators[0][0]) - n.update(second.operators[0][0]))
        bound = m.scale * norm(m.B) * m.g * norm(m.A) * constant
        assert change <= bound
        moved = max(moved, (change / bound).item())
        if index < 3:  # queries, keys and values of the first layer read the same
            assert torch.equal(m.x, n.x)
            assert (vector_norm(m.y - n.y, dim=-1) <= bound * vector_norm(m.x, dim=-1)).all()
    assert moved > 1e-3


def test_theorem_d15_is_tight():
    """A layer whose factors stretch all directions alike meets (89) on the opposed pair, and (81) at any input."""
    s, other = opposed(means=0)
    base = nn.Sequential(nn.Linear(2, 2)).double()
    adapted = adapt(base, r=2, num_atoms=2, router_dim=2, target_modules=["0"], **asdict(s.hyper))
    router = adapted.base_model.queryable_lora_router["default"]
    router.load_state_dict(s.router.state_dict() | {"prior.weight": s.bank.w[:1]})
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(0.8 * torch.eye(2))
        layer.lora_B["default"].weight.copy_(1.7 * torch.eye(2))
        x = torch.randn(1, 2).double()
    (m,), (n,) = (watched(adapted, x, e).modules for e in (s.e, other))
    bound = m.scale * norm(m.B) * m.g * norm(m.A) * Constants(s, other).operator * vector_norm(s.e - other)
    change = norm(m.update(s.operator()) - n.update(s.operator(other)))
    assert 0.999 * bound < change <= bound * SLACK
    assert 0.999 * bound * vector_norm(x) < vector_norm(m.y - n.y) <= bound * vector_norm(x) * SLACK
