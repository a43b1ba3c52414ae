"""The paper's theorems on adapted modules, in float64: updates and gradients of the library against each statement."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from helpers import reference
from helpers.models import MLP, llama, token_ids
from helpers.reference import Bank, Hyper
from helpers.situations import SLACK, Constants, Situation, close, norm, opposed
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.linalg import vector_norm

from peft_queryable import QueryableLoraConfig
from peft_queryable.method import router as router_module
from peft_queryable.method.router import top_k_softmax
from peft_queryable.tuner.layer import QueryableLoraLayer

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
        self.instruction: Tensor  # embeddings [B, d_c] of the call
        self.asked: list[tuple] = []  # arguments of the router
        self.logits: list[Tensor] = []  # [B, K, M]
        self.weights: list[Tensor] = []  # [B, K, M]
        self.operators: list[Tensor] = []  # [B, r, r] where one serves the sequence, else [B, T, r, r]
        self.modules: list[Seen] = []
        monkeypatch.setattr(router_module, "top_k_softmax", self._spy_on_logits)
        transposed = self.router.atoms.transposed_operators
        operators = self._recording(lambda weights: transposed(weights).mT, self.operators)
        monkeypatch.setattr(self.router.atoms, "transposed_operators", lambda weights: operators(weights).mT)
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
    x, watch.instruction = torch.randn(rows, 3, 8).double(), torch.randn(rows, 3).double()
    y = adapted(x, instruction_embeds=watch.instruction)
    (y.sin() * torch.randn_like(y)).sum().backward()
    assert [m.block for m in watch.modules] == [0, 0, 1, 2]
    return adapted, watch


SCOPES = pytest.mark.parametrize("scope", ["sequence", "causal"])


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
    for block, (_, state, means, _) in enumerate(watch.asked):
        by_zeta = watch.by_logits(block).detach()
        by_rho = hyper.instruction_strength * by_zeta
        for row, k in torch.cartesian_prod(*(torch.arange(n) for n in state.shape[:2])).tolist():
            e, earlier = watch.instruction[row], [mean[row, k].detach() for mean in means]
            q = reference.query(bank, block, state[row, k].detach(), earlier, e)
            scalar = scalar + by_zeta[row, k] @ torch.stack(reference.state_logits(bank, q))
            scalar = scalar + by_rho[row, k] @ torch.stack(reference.prior_logits(bank, e))
    router = watch.router
    for ours, theirs in ((bank.w, router.block_prior), (bank.R_ctx, router.instruction_prior), (bank.k, router.keys)):
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


@pytest.mark.filterwarnings("ignore:With `top_k=1`")
@given(st.integers(0, 1000), st.integers(1, 4), st.none() | st.integers(1, 4))
def test_theorem_5_2_and_corollary_d8_1_updates_are_bounded(seed, r, top_k):
    """(7), (8): Delta W and its action on every input of a module stay below the bounds by ||B||, g, R_C, ||A||."""
    torch.manual_seed(seed)
    adapted = adapt(MLP().double(), r=r, top_k=top_k, routing_scope="sequence")
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(adapted, monkeypatch)
        adapted(torch.randn(2, 3, 8).double())
        check_updates(watch)


@pytest.mark.filterwarnings("ignore:With `num_atoms=1`")
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
    s = Situation(hyper, dict(router.named_parameters()), first.asked[0][1][0, 0].detach(), [], e)
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
    tensors = s.router.state_dict() | {"block_prior.weight": s.bank.w[:1]}
    router.load_state_dict({name: tensors[name] for name in router.state_dict()})  # a single block has no depth term
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
