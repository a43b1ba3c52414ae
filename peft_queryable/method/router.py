"""The paper's equations: a bank of rank-space atoms and the router that mixes them.

Tensors in, tensors out. Nothing here knows of PEFT, of tokens or of adapted modules: a *state* is a vector of rank
space, and a call routes K states of each of B sequences (K = 1: one route a sequence; K = T: one a token).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPS = 1e-6  # epsilon of Assumption D.3; the paper states no value


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without a learned scale over the last dimension of `x` [..., d] (Assumption D.3)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)


def top_k_softmax(logits: Tensor, k: int | None) -> Tensor:
    """Softmax over the `k` largest of `logits` [..., M], exactly zero elsewhere; over all of them if None (Eq. 37).

    The zeros are dense, so that every logit has a gradient in every step; equal logits are taken in index order.
    """
    if k is None:
        return logits.softmax(-1)
    # A stable sort, unlike topk, breaks ties the same way on every device.
    top, index = (t[..., :k] for t in logits.sort(stable=True, dim=-1, descending=True))
    return torch.zeros_like(logits).scatter(-1, index, top.softmax(-1))


class Table(nn.Module):
    """A trainable tensor in a module of its own: what FSDP wraps and TRL copies are modules with a `weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


@dataclass(frozen=True)
class Lookup:
    """What the routes of all blocks of a call have in common, computed once.

    Args:
        keys: RMSNorm(k_m), [M, d_k].
        query: the instruction's term of every query, lambda Q_ctx e(c), [B or 1, 1, d_k]; None without that term.
        prior: the instruction's term of every logit, tau rho, [B or 1, 1, M]; None without instruction parameters.
    """

    keys: Tensor
    query: Tensor | None
    prior: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Lookup:
        terms = (None if term is None else function(term) for term in (self.query, self.prior))
        return Lookup(function(self.keys), *terms)


class Router(nn.Module):
    """Bank {C_m, k_m} and router of one adapter, shared by all its adapted modules.

    Maths is done in float32, or in the parameters' dtype if that is wider, whatever autocast says.

    Args:
        rank: r.
        num_atoms: M.
        top_k: k, or None to mix all atoms.
        num_blocks: number of blocks in all stacks together; each has a prior w_b.
        dim: d_k.
        instruction_dim: d_c, or None for no instruction parameters.
        attention_temperature: T_attn.
        depth_temperature: T_dep.
        language_temperature: T_lang.
        instruction_strength: tau.
        instruction_query_weight: lambda.
        query_terms: which of "state", "depth" and "instruction" the query has beside the prior.
        atom_scale: initial standard deviation of atom entries, times sqrt(r).
    """

    def __init__(
        self,
        rank: int,
        num_atoms: int,
        top_k: int | None,
        num_blocks: int,
        dim: int,
        instruction_dim: int | None = None,
        attention_temperature: float = 1.0,
        depth_temperature: float = 1.0,
        language_temperature: float = 1.0,
        instruction_strength: float = 1.0,
        instruction_query_weight: float = 1.0,
        query_terms: tuple[str, ...] = ("state", "depth", "instruction"),
        atom_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.rank, self.num_atoms, self.top_k, self.num_blocks = rank, num_atoms, top_k, num_blocks
        self.instruction_dim = instruction_dim
        self.instruction_strength = instruction_strength
        self.instruction_query_weight = instruction_query_weight
        self.attention_scale = 1 / (math.sqrt(dim) * attention_temperature)
        self.depth_scale = 1 / (math.sqrt(dim) * depth_temperature)
        self.language_scale = 1 / (math.sqrt(dim) * language_temperature)

        self.atoms = Table(num_atoms, rank, rank)  # C
        self.keys = Table(num_atoms, dim)  # k
        self.prior = Table(num_blocks, dim)  # w
        self.state_query = nn.Linear(rank, dim, bias=False) if "state" in query_terms else None  # Q_cur
        self.depth_value = nn.Linear(rank, dim, bias=False) if "depth" in query_terms else None  # Q_dep
        self.depth_query = nn.Linear(dim, dim, bias=False) if "depth" in query_terms else None  # Q_dep,q
        self.depth_key = nn.Linear(rank, dim, bias=False) if "depth" in query_terms else None  # Q_dep,k
        self.instruction: Table | None = None  # e(c) of calls without one; zero is no instruction (Prop. D.7a)
        self.instruction_query: nn.Linear | None = None  # Q_ctx
        self.instruction_prior: nn.Linear | None = None  # R_ctx
        if instruction_dim is not None:
            self.instruction = Table(1, instruction_dim)
            self.instruction.requires_grad_(False)
            self.instruction_prior = nn.Linear(instruction_dim, dim, bias=False)
            if "instruction" in query_terms:
                self.instruction_query = nn.Linear(instruction_dim, dim, bias=False)
        self.reset_parameters(atom_scale)

    def reset_parameters(self, atom_scale: float) -> None:
        nn.init.normal_(self.atoms.weight, std=atom_scale / math.sqrt(self.rank))
        nn.init.normal_(self.keys.weight)  # unit scale: logits of a random query are then about N(0, 1 / T_attn^2)
        nn.init.normal_(self.prior.weight)
        if self.instruction is not None:
            nn.init.zeros_(self.instruction.weight)

    def requires_grad_(self, requires_grad: bool = True) -> Router:
        """As for any module, but the instruction is given and never learned."""
        super().requires_grad_(requires_grad)
        if self.instruction is not None:
            self.instruction.requires_grad_(False)
        return self

    @property
    def uses_depth(self) -> bool:
        """Whether the query looks at earlier blocks, so that their means have to be kept."""
        return self.depth_value is not None

    def prepare(self, instruction: Tensor | None = None) -> Lookup:
        """What all blocks of a call share.

        Args:
            instruction: embedding e(c), [B, d_c] or [1, d_c]; None is the adapter's own, which is 0 unless set.
        """
        dtype = torch.promote_types(self.keys.weight.dtype, torch.float32)
        with _without_autocast(self.keys.weight):
            keys = rms_norm(self.keys.weight.to(dtype))  # [M, d_k]
            if self.instruction is None:
                return Lookup(keys, None, None)
            # Even an embedding of 0 keeps Q_ctx and R_ctx in the graph.
            instruction = self.instruction.weight if instruction is None else instruction
            embedding = instruction.to(keys).unsqueeze(1)  # [B or 1, 1, d_c]
            query = None
            if self.instruction_query is not None:
                query = self.instruction_query_weight * _linear(self.instruction_query, embedding)
            rho = rms_norm(_linear(self.instruction_prior, embedding)) @ keys.T * self.language_scale  # Eq. 33
            return Lookup(keys, query, self.instruction_strength * rho)

    def forward(self, block: int, state: Tensor, means: list[Tensor], lookup: Lookup) -> Tensor:
        """Routing weights alpha of one block (Algorithm 2, lines 6 to 24).

        Args:
            block: index of the block among `num_blocks`.
            state: entry state s_entry, [B, K, r].
            means: means s_i of the stack's earlier blocks, each [B, K, r]; empty for its first block.
            lookup: of the call, from `prepare`.

        Returns:
            Weights over the atoms, [B, K, M] in the router's dtype: non-negative, rows sum to one, at most k non-zero.
        """
        dtype = lookup.keys.dtype
        with _without_autocast(state):
            query = self._query(block, state.to(dtype), [mean.to(dtype) for mean in means], lookup)  # [B, K, d_k]
            logits = rms_norm(query) @ lookup.keys.T * self.attention_scale  # Eq. 34
            if lookup.prior is not None:
                # Lemma D.5: rho in place of log p moves all logits alike, so the route is Eq. 36's to the letter.
                logits = logits + lookup.prior
            return top_k_softmax(logits, self.top_k)

    def operator(self, weights: Tensor) -> Tensor:
        """Routed operators S = sum_m alpha_m C_m (Eq. 23) of `weights` [B, 1, M]: [B, r, r] in their dtype."""
        with _without_autocast(weights):
            atoms = self.atoms.weight.to(weights).flatten(1)  # [M, r r]
            return (weights @ atoms).view(-1, self.rank, self.rank)

    def mix(self, weights: Tensor, states: Tensor) -> Tensor:
        """Routed states S_t s_t of `states` [B, T, r] under `weights` [B, T, M], without any [B, T, r, r] tensor.

        Returns [B, T, r] in the dtype of `states`.
        """
        return _Mix.apply(weights.to(states), states, self.atoms.weight.to(states))

    def _query(self, block: int, state: Tensor, means: list[Tensor], lookup: Lookup) -> Tensor:
        prior = self.prior.weight[block].to(state)
        if self.state_query is None:  # Eq. 2, term by term
            query = prior.expand(*state.shape[:-1], -1)
        else:
            query = F.linear(state, self.state_query.weight.to(state), prior)
        if lookup.query is not None:
            query = query + lookup.query
        if self.depth_value is not None:
            query = query + _linear(self.depth_value, self._depth_summary(query, state, means))  # Eq. 29
        return query

    def _depth_summary(self, query: Tensor, state: Tensor, means: list[Tensor]) -> Tensor:
        """Attention over earlier block means: u [B, K, r] (Eqs. 27, 28, 30 to 32)."""
        # The first block attends to one zero state: u is exactly 0, and every projection stays in the graph.
        values = torch.stack(means or [torch.zeros_like(state)], dim=-2)  # [B, K, n, r]
        keys = rms_norm(_linear(self.depth_key, values))  # [B, K, n, d_k]
        logits = keys @ rms_norm(_linear(self.depth_query, query)).unsqueeze(-1) * self.depth_scale  # [B, K, n, 1]
        return (logits.softmax(-2) * values).sum(-2)


class _Mix(torch.autograd.Function):
    """sum_m alpha_m C_m s of every token, for weights [..., M], states [..., r] and atoms [M, r, r].

    It is one product with the outer products alpha s, [..., M r], which are made again in the backward pass.
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


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Entered only under autocast: it costs as much as the operations in it, and the meta device has none."""
    device = tensor.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def _linear(layer: nn.Linear | None, x: Tensor) -> Tensor:
    """`layer(x)` in the dtype of `x` and on its device, for weights that are narrower or, in split models, afar."""
    assert layer is not None
    return F.linear(x, layer.weight.to(x))
