"""The paper's theorems as numbers, in float64: what the library's router returns against each statement.

Logits come from the formulas of reference.py; routes, operators and gradients come from the library. Every
bound is also met, or nearly, with equality somewhere, so that it says something.
"""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from helpers import reference
from helpers.situations import SLACK, Constants, Situation, close, make_situation, norm, opposed, situations
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.linalg import vector_norm

from peft_queryable.method.router import RMS_EPS, Router, RouterSettings, rms_norm, top_k_softmax


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
    plain = (
        Router(RouterSettings(r, M, num_blocks=4, dim=s.bank.k.shape[1], **asdict(s.hyper)))
        .double()
        .requires_grad_(False)
    )
    plain.load_state_dict({k: v for k, v in s.router.state_dict().items() if "instruction" not in k})
    means = [mean[None, None] for mean in s.means]
    expected = plain(s.block, s.state[None, None], means, plain.prepare())[0, 0]
    close(s.changed(instruction_strength=0.0, instruction_query_weight=0.0).alpha(), expected)
    close(s.alpha(torch.zeros(3).double()), expected)
    close(s.router(s.block, s.state[None, None], means, s.router.prepare())[0, 0], expected)


def test_proposition_d7a_language_matters():
    """Either of lambda and tau alone moves the route."""
    s = make_situation(0, instruction_strength=0.0, instruction_query_weight=0.0)
    assert (s.changed(instruction_strength=1.0).alpha() - s.alpha()).abs().max() > 0.01
    assert (s.changed(instruction_query_weight=1.0).alpha() - s.alpha()).abs().max() > 0.01


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
    close(s.router.atoms.mix(alpha[None, None], s.state[None, None])[0, 0], s.operator() @ s.state)
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
    for table in (s.router.depth_value, s.router.block_prior):
        table.requires_grad_(True)
    loss = s.alpha().log() @ torch.randn(len(s.rho())).double()
    by_Q_dep, by_w = torch.autograd.grad(loss, [s.router.depth_value.weight, s.router.block_prior.weight])
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


def test_propositions_d12_and_d13_are_tight():
    """A small step meets every bound, and the one of the weight update of a layer, but for terms of second order."""
    s, other = opposed()
    constants = Constants(s, other)
    moves, distance = steps(s, other)
    for name, move in moves.items():
        bound = getattr(constants, name) * distance
        assert 0.999 * bound < move <= bound * SLACK, name
