"""The router: chooses how a block's route mixes the atoms (Eqs. 2, 27 to 37).

A call routes K rank states of each of B sequences: K = 1 for one route per sequence, K = T for one per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .atoms import Atoms, Weight, without_autocast

RMS_EPS = 1e-6  # epsilon of Assumption D.3; the paper states no value


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without a learned scale over the last dimension of `x` [..., d] (Assumption D.3)."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def top_k_softmax(logits: Tensor, k: int | None) -> Tensor:
    """Softmax over the `k` largest of `logits` [..., M], exactly zero elsewhere; over all of them if None (Eq. 37).

    The zeros are dense, so that every logit has a gradient in every step; equal logits are taken in index order.
    """
    if k is None:
        return logits.softmax(-1)
    if torch.onnx.is_in_onnx_export():  # no stable sort there, and ONNX's TopK takes equal values in index order
        top, index = logits.topk(k, dim=-1)
    else:  # a stable sort, unlike topk, breaks ties the same way on every device
        top, index = (t[..., :k] for t in logits.sort(stable=True, dim=-1, descending=True))
    return torch.zeros_like(logits).scatter(-1, index, top.softmax(-1))


@dataclass(frozen=True)
class RouterSettings:
    """What a router is built from; symbols are the paper's.

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
        query_terms: which of "state", "depth" and "instruction" the query has beside the block prior.
        atom_scale: initial standard deviation of the atoms' entries, times sqrt(r).
        router_scale: initial standard deviation of the entries of keys and block priors.
        longest_stack: largest number of blocks in one stack; None if all `num_blocks` are in one.
    """

    rank: int
    num_atoms: int
    top_k: int | None
    num_blocks: int
    dim: int
    instruction_dim: int | None = None
    attention_temperature: float = 1.0
    depth_temperature: float = 1.0
    language_temperature: float = 1.0
    instruction_strength: float = 1.0
    instruction_query_weight: float = 1.0
    query_terms: tuple[str, ...] = ("state", "depth", "instruction")
    atom_scale: float = 1.0
    router_scale: float = 1.0
    longest_stack: int | None = None


@dataclass(frozen=True)
class SharedTerms:
    """Terms of the routing that all blocks of a call share, computed once per call.

    Args:
        keys: RMSNorm(k_m), [M, d_k].
        instruction_query: the instruction's term of every query, lambda Q_ctx e(c), [B or 1, 1 or T, d_k]; None
            without it.
        instruction_logits: the instruction's term of every logit, tau rho, [B or 1, 1 or T, M]; None without it.
    """

    keys: Tensor
    instruction_query: Tensor | None
    instruction_logits: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> SharedTerms:
        terms = (None if t is None else function(t) for t in (self.instruction_query, self.instruction_logits))
        return SharedTerms(function(self.keys), *terms)

    def by_token(self, index: Tensor) -> SharedTerms:
        """The terms of n instructions, each [n, 1, ...], by the token that follows them: `index` [B, T]."""
        terms = (self.instruction_query, self.instruction_logits)
        return SharedTerms(self.keys, *(None if t is None else t[index.to(t.device), 0] for t in terms))


class Router(nn.Module):
    """Atoms {C_m}, their keys {k_m} and the router of one adapter, shared by all its adapted modules.

    It computes in float32, or in the parameters' dtype if that is wider, whatever autocast says.
    """

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__()
        self.settings = settings
        rank, dim, terms = settings.rank, settings.dim, settings.query_terms
        self.attention_scale = 1 / (math.sqrt(dim) * settings.attention_temperature)
        self.depth_scale = 1 / (math.sqrt(dim) * settings.depth_temperature)
        self.language_scale = 1 / (math.sqrt(dim) * settings.language_temperature)

        self.atoms = Atoms(settings.num_atoms, rank)  # C
        self.keys = Weight(settings.num_atoms, dim)  # k
        self.block_prior = Weight(settings.num_blocks, dim)  # w
        self.state_query = nn.Linear(rank, dim, bias=False) if "state" in terms else None  # Q_cur
        # A stack's first block has no earlier one to read, and its second has no choice among them: what only later
        # blocks learn from is made for later blocks only.
        blocks = (settings.longest_stack or settings.num_blocks) if "depth" in terms else 0
        self.depth_value = nn.Linear(rank, dim, bias=False) if blocks > 1 else None  # Q_dep
        self.depth_query = nn.Linear(dim, dim, bias=False) if blocks > 2 else None  # Q_dep,q
        self.depth_key = nn.Linear(rank, dim, bias=False) if blocks > 2 else None  # Q_dep,k
        self.default_instruction: Weight | None = None  # e(c) of calls without one; zero means none (Prop. D.7a)
        self.instruction_query: nn.Linear | None = None  # Q_ctx
        self.instruction_prior: nn.Linear | None = None  # R_ctx
        if settings.instruction_dim is not None:
            self.default_instruction = Weight(1, settings.instruction_dim)
            self.default_instruction.requires_grad_(False)
            if settings.instruction_strength > 0:
                self.instruction_prior = nn.Linear(settings.instruction_dim, dim, bias=False)
            if "instruction" in terms and settings.instruction_query_weight > 0:
                self.instruction_query = nn.Linear(settings.instruction_dim, dim, bias=False)
        nn.init.normal_(self.atoms.weight, std=settings.atom_scale / math.sqrt(rank))
        # Whatever the scale of keys, the logits of a random query are about N(0, 1 / T_attn^2).
        nn.init.normal_(self.keys.weight, std=settings.router_scale)
        nn.init.normal_(self.block_prior.weight, std=settings.router_scale)
        if self.default_instruction is not None:
            nn.init.zeros_(self.default_instruction.weight)

    def requires_grad_(self, requires_grad: bool = True) -> Router:
        """As for any module, except that the default instruction is given and never learned."""
        super().requires_grad_(requires_grad)
        if self.default_instruction is not None:
            self.default_instruction.requires_grad_(False)
        return self

    @property
    def uses_depth(self) -> bool:
        """Whether the query looks at earlier blocks, so that their means have to be kept."""
        return self.depth_value is not None

    @property
    def reads_states(self) -> bool:
        """Whether routes depend on rank states at all, and so on the tokens of a call."""
        return self.state_query is not None or self.uses_depth

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return torch.promote_types(self.keys.weight.dtype, torch.float32)

    def zero(self) -> Tensor:
        """Zero, with every trainable parameter in its graph: where routes are given, their gradients are zero."""
        zero = self.keys.weight.new_zeros((), dtype=self.dtype)
        for parameter in self.parameters() if torch.is_grad_enabled() else ():
            if parameter.requires_grad:
                zero = zero + 0 * parameter.to(self.dtype).sum()
        return zero

    def prepare(self, instruction: Tensor | None = None) -> SharedTerms:
        """The terms that all blocks of a call share.

        Args:
            instruction: embeddings e(c), [B, d_c] or [1, d_c], or [n, d_c] for `SharedTerms.by_token`; None takes the
                adapter's default, which is 0 unless set.
        """
        with without_autocast(self.keys.weight):
            keys = rms_norm(self.keys.weight.to(self.dtype))  # [M, d_k]
            if self.default_instruction is None:
                return SharedTerms(keys, None, None)
            # Even an embedding of 0 keeps Q_ctx and R_ctx in the graph.
            instruction = self.default_instruction.weight if instruction is None else instruction
            embedding = instruction.to(keys).unsqueeze(1)  # [B or 1, 1, d_c]
            query = logits = None
            if self.instruction_query is not None:
                query = self.settings.instruction_query_weight * _linear(self.instruction_query, embedding)
            if self.instruction_prior is not None:
                rho = rms_norm(_linear(self.instruction_prior, embedding)) @ keys.T * self.language_scale  # Eq. 33
                logits = self.settings.instruction_strength * rho
            return SharedTerms(keys, query, logits)

    def forward(self, block: int, state: Tensor, means: list[Tensor], shared: SharedTerms) -> Tensor:
        """Routing weights alpha of one block (Algorithm 2, lines 6 to 24).

        Args:
            block: index of the block among `num_blocks`.
            state: entry state s_entry, [B, K, r].
            means: means s_i of the stack's earlier blocks, each [B, K, r]; empty for its first block.
            shared: the call's shared terms, from `prepare`.

        Returns:
            Weights over the atoms, [B, K, M] in the router's dtype: non-negative, rows sum to one, at most k non-zero.
        """
        dtype = shared.keys.dtype
        with without_autocast(state):
            query = self._query(block, state.to(dtype), [mean.to(dtype) for mean in means], shared)  # [B, K, d_k]
            logits = rms_norm(query) @ shared.keys.T * self.attention_scale  # Eq. 34
            if shared.instruction_logits is not None:
                # Lemma D.5: rho in place of log p moves all logits alike, so the route is exactly that of Eq. 36.
                logits = logits + shared.instruction_logits
            return top_k_softmax(logits, self.settings.top_k)

    def _query(self, block: int, state: Tensor, means: list[Tensor], shared: SharedTerms) -> Tensor:
        prior = self.block_prior.weight[block].to(state)
        if self.state_query is None:  # Eq. 2, term by term
            query = prior.expand(*state.shape[:-1], -1)
        else:
            query = F.linear(state, self.state_query.weight.to(state), prior)
        if shared.instruction_query is not None:
            query = query + shared.instruction_query
        if self.depth_value is not None:
            query = query + _linear(self.depth_value, self._depth_summary(query, state, means))  # Eq. 29
        return query

    def _depth_summary(self, query: Tensor, state: Tensor, means: list[Tensor]) -> Tensor:
        """Attention over earlier block means: u [B, K, r] (Eqs. 27, 28, 30 to 32)."""
        # The first block attends to one zero state: u is exactly 0, and every projection stays in the graph.
        means = means or [torch.zeros_like(state)]
        if self.depth_key is None:  # no block has two earlier ones, and one mean gets all the attention
            return means[0]
        values = torch.stack(means, dim=-2)  # [B, K, n, r]
        keys = rms_norm(_linear(self.depth_key, values))  # [B, K, n, d_k]
        logits = keys @ rms_norm(_linear(self.depth_query, query)).unsqueeze(-1) * self.depth_scale  # [B, K, n, 1]
        return (logits.softmax(-2) * values).sum(-2)


def _linear(layer: nn.Linear | None, x: Tensor) -> Tensor:
    """`layer(x)` computed in the dtype and on the device of `x`, which may be wider or elsewhere than the weight."""
    assert layer is not None
    return F.linear(x, layer.weight.to(x))
