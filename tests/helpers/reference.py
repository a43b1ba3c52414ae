"""The method in loops: one token, one atom, one module at a time, to compare the library with.

Written from the method's text and the paper's equations, and sharing no code with the library: of an adapted model it
reads the parameters, by name. Slow, differentiable, and meant for float64.

    parameters = read_parameters(adapted)                       # copies of the trainable tensors, with gradients
    call = Call(parameters, config, scope, tokens, instruction)
    with call.on(base):                                         # the base model, as it was before it was adapted
        logits = base(**inputs).logits
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RMS_EPS = 1e-6  # Assumption D.3; the paper states no value
ROUTER = "base_model.queryable_lora_router."
MODULES = "base_model.model."


# One route


@dataclass
class Hyper:
    """What the router has beside its tensors, under the names that configuration and router give it."""

    top_k: int | None = None  # k
    attention_temperature: float = 1.0  # T_attn
    depth_temperature: float = 1.0  # T_dep
    language_temperature: float = 1.0  # T_lang
    instruction_strength: float = 1.0  # tau
    instruction_query_weight: float = 1.0  # lambda

    @staticmethod
    def of(config: Any) -> Hyper:
        return Hyper(**{name: getattr(config, name) for name in Hyper.__dataclass_fields__})


@dataclass
class Bank:
    """Atoms, keys and projections under the paper's symbols; None for those of a query term that is left out."""

    hyper: Hyper
    C: Tensor  # [M, r, r]
    k: Tensor  # [M, d_k]
    w: Tensor  # [blocks, d_k]
    Q_cur: Tensor | None  # [d_k, r]
    Q_dep: Tensor | None  # [d_k, r]
    Q_dep_q: Tensor | None  # [d_k, d_k]
    Q_dep_k: Tensor | None  # [d_k, r]
    Q_ctx: Tensor | None  # [d_k, d_c]
    R_ctx: Tensor | None  # [d_k, d_c]

    @staticmethod
    def read(tensors: dict[str, Tensor], hyper: Hyper) -> Bank:
        """From a router's parameters by name."""
        return Bank(
            hyper,
            C=tensors["atoms.weight"],
            k=tensors["keys.weight"],
            w=tensors["block_prior.weight"],
            Q_cur=tensors.get("state_query.weight"),
            Q_dep=tensors.get("depth_value.weight"),
            Q_dep_q=tensors.get("depth_query.weight"),
            Q_dep_k=tensors.get("depth_key.weight"),
            Q_ctx=tensors.get("instruction_query.weight"),
            R_ctx=tensors.get("instruction_prior.weight"),
        )


def rms(x: Tensor) -> Tensor:
    """RMS_eps of a vector."""
    return torch.sqrt(x @ x / len(x) + RMS_EPS)


def rms_norm(x: Tensor) -> Tensor:
    return x / rms(x)


def softmax(logits: list[Tensor]) -> list[Tensor]:
    largest = max(x.item() for x in logits)
    exps = [torch.exp(x - largest) for x in logits]
    total = sum(exps)
    return [x / total for x in exps]


def pre_query(bank: Bank, block: int, state: Tensor, e: Tensor | None) -> Tensor:
    """q0 = w_b + Q_cur s_entry + lambda Q_ctx e(c)  (2)."""
    q0 = bank.w[block]
    if bank.Q_cur is not None:
        q0 = q0 + bank.Q_cur @ state
    if bank.Q_ctx is not None and e is not None:
        q0 = q0 + bank.hyper.instruction_query_weight * (bank.Q_ctx @ e)
    return q0


def depth_summary(bank: Bank, q0: Tensor, means: list[Tensor]) -> Tensor:
    """u = sum_i beta_i s_i, beta = softmax(xi), and 0 for the first block  (27, 28, 30 to 32)."""
    if not means:
        return q0.new_zeros(bank.C.shape[-1])
    if bank.Q_dep_q is None or bank.Q_dep_k is None:  # left out where no block has two earlier ones: beta is 1
        (mean,) = means
        return mean
    xi = []
    for mean in means:
        similarity = rms_norm(bank.Q_dep_q @ q0) @ rms_norm(bank.Q_dep_k @ mean)
        xi.append(similarity / (len(q0) ** 0.5 * bank.hyper.depth_temperature))
    return sum(beta * mean for beta, mean in zip(softmax(xi), means, strict=True))


def query(bank: Bank, block: int, state: Tensor, means: list[Tensor], e: Tensor | None) -> Tensor:
    """q = q0 + Q_dep u  (29)."""
    q = pre_query(bank, block, state, e)
    if bank.Q_dep is not None:
        q = q + bank.Q_dep @ depth_summary(bank, q, means)
    return q


def state_logits(bank: Bank, q: Tensor) -> list[Tensor]:
    """zeta_m = <RMSNorm(q), RMSNorm(k_m)> / (sqrt(d_k) T_attn)  (34)."""
    scale = len(q) ** 0.5 * bank.hyper.attention_temperature
    return [rms_norm(q) @ rms_norm(key) / scale for key in bank.k]


def prior_logits(bank: Bank, e: Tensor | None) -> list[Tensor]:
    """rho_m = <RMSNorm(R_ctx e(c)), RMSNorm(k_m)> / (sqrt(d_k) T_lang), all 0 without an instruction  (33)."""
    if e is None or bank.R_ctx is None:
        return [bank.k.new_zeros(()) for _ in bank.k]
    scale = bank.k.shape[1] ** 0.5 * bank.hyper.language_temperature
    return [rms_norm(bank.R_ctx @ e) @ rms_norm(key) / scale for key in bank.k]


def fused_logits(bank: Bank, zeta: list[Tensor], rho: list[Tensor]) -> list[Tensor]:
    """zeta_m + tau log p_m, p = softmax(rho)  (35, 36)."""
    return [z + bank.hyper.instruction_strength * torch.log(p) for z, p in zip(zeta, softmax(rho), strict=True)]


def top_k_softmax(logits: list[Tensor], k: int | None) -> list[Tensor]:
    """Softmax over the k largest, zero elsewhere  (37)."""
    active = sorted(range(len(logits)), key=lambda m: logits[m].item(), reverse=True)[:k]
    weights = dict(zip(active, softmax([logits[m] for m in active]), strict=True))
    return [weights.get(m, torch.zeros_like(logits[m])) for m in range(len(logits))]


def route(bank: Bank, block: int, state: Tensor, means: list[Tensor], e: Tensor | None) -> list[Tensor]:
    """alpha_1 .. alpha_M of one block for one entry state [r], earlier block means [r] and instruction [d_c]."""
    q = query(bank, block, state, means, e)
    return top_k_softmax(fused_logits(bank, state_logits(bank, q), prior_logits(bank, e)), bank.hyper.top_k)


# Which tokens a route sees


@dataclass
class Tokens:
    """One call's tokens, [B][T] each; None: all real, one sequence a row, none supervised."""

    batch: int
    length: int
    real: list[list[bool]] | None = None
    segments: list[list[int]] | None = None
    supervised: list[list[bool]] | None = None

    def visible(self, scope: str, row: int, t: int) -> list[int]:
        """Positions whose states are averaged for position t  (15, and the table of scopes)."""
        seen = []
        for j in range(self.length):
            is_real = self.real is None or self.real[row][j]
            is_mate = self.segments is None or self.segments[row][j] == self.segments[row][t]
            if not (is_real and is_mate):
                continue
            if scope == "prompt" and self.supervised is not None and self.supervised[row][j]:
                break
            if scope == "causal" and j > t:
                break
            seen.append(j)
        return seen


def pool(states: list[Tensor], positions: list[int]) -> Tensor:
    """Mean state of the positions; zero where there are none, as for a padding token before its sequence."""
    if not positions:
        return torch.zeros_like(states[0])
    return sum(states[j] for j in positions) / len(positions)


# A model


def read_parameters(adapted: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable tensors by name, with gradients of their own."""
    return {name: p.detach().clone().requires_grad_() for name, p in adapted.named_parameters() if p.requires_grad}


def split_layers(names: list[str], num_blocks: int) -> dict[str, int]:
    """Block of each adapted module: contiguous, as numpy.array_split; a module outside a list of layers is a layer."""
    layers: dict[str, list[str]] = {}
    for name in names:
        in_list = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(in_list[1] if in_list else name, []).append(name)
    block_of = {}
    for block, indices in enumerate(np.array_split(np.arange(len(layers)), min(num_blocks, len(layers)))):
        for index in indices:
            for name in list(layers.values())[index]:
                block_of[name] = block
    return block_of


def entry_group(name: str, names: list[str]) -> list[str]:
    """Adapted projections whose mean state is the entry state if module `name` is the entry  (16)."""
    parent, _, child = name.rpartition(".")
    projections = [f"{parent}.{p}_proj" for p in "qkv"]
    return [p for p in projections if p in names] if child in ("q_proj", "k_proj", "v_proj") else [name]


class Call:
    """One forward pass over one stack: what Algorithm 2 carries from block to block.

    Args:
        parameters: trainable tensors by the adapted model's names.
        config: r, alpha, blocks and the router's hyperparameters.
        scope: "causal", "prompt" or "sequence".
        tokens: the tokens of the call.
        instruction: e(c), [B, d_c] or [1, d_c].
        adapter: the adapter's name.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: Any,
        scope: str,
        tokens: Tokens,
        instruction: Tensor | None = None,
        adapter: str = "default",
    ) -> None:
        self.adapter = adapter
        self.parameters, self.scope, self.tokens, self.instruction = parameters, scope, tokens, instruction
        self.scale = config.lora_alpha / config.r
        router, A = f"{ROUTER}{adapter}.", f".lora_A.{adapter}.weight"
        shared = {name.removeprefix(router): p for name, p in parameters.items() if name.startswith(router)}
        self.bank = Bank.read(shared, Hyper.of(config))
        self.names = [name.removeprefix(MODULES).removesuffix(A) for name in parameters if name.endswith(A)]
        self.block_of = split_layers(self.names, config.num_blocks)
        self.routes: dict[int, list[list[list[Tensor]]]] = {}  # by block: [B][T][M]
        self.states: dict[int, list[list[list[Tensor]]]] = {}  # by block: one [B][T] list of states [r] a module

    def parameter(self, module: str, kind: str) -> Tensor:
        return self.parameters[f"{MODULES}{module}.{kind}.{self.adapter}.weight"]

    @contextmanager
    def on(self, base: nn.Module) -> Iterator[None]:
        """Let the base model add the update to what each adapted module returns."""

        def hook(name: str) -> Any:
            return lambda module, args, output: output + self.update(name, args[0])

        hooks = [base.get_submodule(name).register_forward_hook(hook(name)) for name in self.names]
        try:
            yield
        finally:
            for h in hooks:
                h.remove()

    def update(self, name: str, x: Tensor) -> Tensor:
        """(alpha / r) B (s + g S s), s = A x, of inputs x [B, d] or [B, T, d]  (92 to 95)."""
        rows = x.reshape(self.tokens.batch, self.tokens.length, -1)
        block = self.block_of[name]
        if block not in self.routes:
            self.routes[block] = self.block_routes(block, name, rows)
        B, gate = self.parameter(name, "lora_B"), torch.sigmoid(self.parameter(name, "queryable_lora_gate"))
        states = self.rank_states(name, rows)
        self.states.setdefault(block, []).append(states)
        updates = []
        for row in range(self.tokens.batch):
            for t in range(self.tokens.length):
                s = states[row][t]
                mixed = torch.zeros_like(s)
                for alpha, atom in zip(self.routes[block][row][t], self.bank.C, strict=True):
                    mixed = mixed + alpha * (atom @ s)
                updates.append(self.scale * (B @ (s + gate * mixed)))
        return torch.stack(updates).reshape(*x.shape[:-1], -1)

    def rank_states(self, name: str, rows: Tensor) -> list[list[Tensor]]:
        """A h of every token, [B][T] vectors [r]."""
        A = self.parameter(name, "lora_A")
        return [[A @ h for h in row] for row in rows]

    def block_routes(self, block: int, entry: str, rows: Tensor) -> list[list[list[Tensor]]]:
        """The routes of every token at the block's entry, [B][T][M]."""
        group = [self.rank_states(name, rows) for name in entry_group(entry, self.names)]
        routes: list[list[list[Tensor]]] = []
        for row in range(self.tokens.batch):
            e = self.instruction
            routes.append([])
            for t in range(self.tokens.length):
                seen = self.tokens.visible(self.scope, row, t)
                state = sum(pool(states[row], seen) for states in group) / len(group)
                means = [self.block_mean(earlier, row, seen) for earlier in range(block)]
                embedding = None if e is None else e[row if len(e) > 1 else 0]
                routes[-1].append(route(self.bank, block, state, means, embedding))
        return routes

    def block_mean(self, block: int, row: int, seen: list[int]) -> Tensor:
        """Mean over the block's adapted modules of their pooled states (Algorithm 2, line 45)."""
        return sum(pool(states[row], seen) for states in self.states[block]) / len(self.states[block])
