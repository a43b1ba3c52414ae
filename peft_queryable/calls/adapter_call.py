"""One adapter in one call of one stack: its routes, made block by block as the stack runs, or brought by a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..method.route import Route, SequenceRoute, leaf, make_route
from ..method.scope import Pool, Tokens
from .cache import CachedRouting, check_cache, find_cache, load, store
from .plan import Plan
from .record import RoutedCall
from .stack_call import StackCall


class AdapterCall:
    """One adapter in one call of one stack.

    Its routes are made block by block while the stack runs, or it is born with routes: those that are fixed, or those
    that an earlier prefill left on the cache. Only the call itself adds to it; layers that gradient checkpointing runs
    again read it through an [`AdapterReplay`](replay.py).

    Args:
        plan: how the adapter routes the stack.
        stack_call: the call of the stack.

    Attributes:
        rows: the rows that the adapter serves, None for all.
        batch: number B of these rows.
        gate_values: see [`CachedRouting`]; None where the gates have to be read as tensors.
    """

    def __init__(self, plan: Plan, stack_call: StackCall) -> None:
        self.plan, self.key = plan, (plan.adapter_name, stack_call.stack)
        self.rows = stack_call.rows(plan.adapter_name)
        self.batch = stack_call.batch if self.rows is None else len(self.rows.index)
        self.tokens_per_row = stack_call.length  # None if unknown
        self.keeps_states = stack_call.is_checkpointing  # block states must outlive their mean, for a replay
        self.length = 0  # tokens per row
        self.real: Tensor | None = None
        fixed = stack_call.fixed_routes(plan)
        instruction, sequences = stack_call.instruction(plan) if fixed is None else (None, None)
        self.is_static = not stack_call.model_call.reads_tokens(plan)  # such routes need to know of no token
        self.past = CachedRouting(id(plan.router))
        self.paged = stack_call.model_call.paged
        self.start: dict[str, Tensor] = {}  # sums that those of the call go on from: [B, 1, ...], or of each token
        if not self.is_static:
            if self.paged is None:
                check_cache(stack_call.arguments, plan.adapter_name)
                self.past = load(stack_call.cache, stack_call.past, self.key, id(plan.router), self.rows)
                self.start = {name: sums[:, -1:] for name, sums in self.past.sums.items()}
                if self.past.routes:
                    stack_call.check_continues(plan)
            else:
                self.start = self.paged.load(plan)
        self.gate_values = _gate_values(self.past)
        self.is_routed = fixed is not None or bool(self.past.routes)  # born with routes
        self.routes: list[Route | None] = [self.past.routes.get(block) for block in range(plan.num_blocks)]
        if fixed is not None:
            self.routes = self._fixed(fixed)
        self.entries: list[nn.Module | None] = [None] * plan.num_blocks
        if not self.is_routed:
            tokens = Tokens() if self.is_static else stack_call.tokens(plan)
            if self.rows is not None:
                tokens = tokens.of_rows(self.rows.index)
                if sequences is not None:
                    sequences = self.rows.select(sequences)
                elif instruction is not None and instruction.shape[0] > 1:
                    instruction = self.rows.select(instruction)
            self._prepare(tokens, instruction, sequences)

    def _fixed(self, weights: Tensor) -> list[Route | None]:
        """The routes that mix the atoms by `weights` [B or 1, blocks, M] of the stack call."""
        router = self.plan.router
        if self.rows is not None and weights.shape[0] > 1:
            weights = self.rows.select(weights)
        zero = router.zero()
        weights = (weights.to(zero) + zero).expand(self.batch, -1, -1)
        return [SequenceRoute.of(router.atoms, block) for block in weights.split(1, dim=1)]

    def _prepare(self, tokens: Tokens, instruction: Tensor | None, sequences: Tensor | None) -> None:
        """Get ready to make routes; `sequences` [B, T] tells which instruction each token of packed rows follows."""
        plan = self.plan
        self.shared = plan.router.prepare(instruction)
        if sequences is not None:
            self.shared = self.shared.by_token(sequences)
        self.real, self.pool = tokens.real, Pool(plan.scope, tokens)
        self.last_read = plan.last_read
        self.count: Tensor | None = None  # number of tokens in each sum over `counted` tokens per row
        self.counted = 0
        self.sums: dict[str, Tensor] | None = {}  # running sums of this call's tokens, for the cache; None once ended
        self.means: list[Tensor | None] = [None] * plan.num_blocks  # pooled block means, [B, K, r]
        self.states: list[list[Tensor]] = [[] for _ in range(plan.num_blocks)]  # rank states by block, each [B, T, r]

    # What an adapted module asks for, in this order

    def by_row(self, states: Tensor) -> Tensor:
        """Rank states [B, ..., r] or [B T, r] as [B, T, r].

        Raises:
            ValueError: if they are not the call's tokens row by row.
        """
        if states.ndim == 3 and states.shape[0] == self.batch:
            return states
        check_layout(states, self.batch, self.tokens_per_row)
        if states.shape[0] == self.batch:  # which may be 0, where torch infers no other size
            return states.flatten(1, -2) if states.ndim > 2 else states.unsqueeze(1)
        return states.reshape(self.batch, -1, states.shape[-1])

    def route_for(self, block: int, layer: nn.Module) -> Route | None:
        """The route of `block`; None if it is still to be chosen, by its entry. Only a replay asks for `layer`."""
        return self.routes[block]

    def choose(self, block: int, layer: nn.Module, entry_states: Tensor) -> Route:
        """Choose the route of `block` by the token states of its entry, `entry_states` [B, T, r]."""
        self.entries[block] = layer
        self.routes[block], mean = route, _ = self.make_route(block, entry_states)
        if block > 0:
            self.means[block - 1] = mean
            if not self.keeps_states:
                self.states[block - 1] = []
        return route

    def keep(self, block: int, states: Tensor) -> None:
        """Keep a module's `states` [B, T, r] for the mean of its block (Algorithm 2, line 43)."""
        self.length = states.shape[1]
        if not self.is_routed and block < self.last_read and self.routes[block + 1] is None:
            self.states[block].append(states)

    def make_route(self, block: int, entry_states: Tensor) -> tuple[Route, Tensor | None]:
        """The route of `block` and the mean of the block before it; changes nothing that a replay reads."""
        router = self.plan.router
        if self.is_static:
            weights = router(self.plan.first_block + block, entry_states.new_zeros(self.batch, 1, 1), [], self.shared)
            return make_route(router.atoms, weights, entry_states.dtype), None
        mean = self._block_mean(block - 1) if block > 0 and self.states[block - 1] else None
        state = self._pooled(f"entry.{block}", entry_states)
        means = [m for m in (*self.means[: max(block - 1, 0)], mean) if m is not None]
        device = router.keys.weight.device
        weights = router(self.plan.first_block + block, state.to(device), [m.to(device) for m in means], self.shared)
        return make_route(router.atoms, weights, entry_states.dtype), mean

    def _block_mean(self, block: int) -> Tensor:
        """Mean over the block's adapted modules of their pooled states (Algorithm 2, line 45): [B, K, r]."""
        states = [s.to(self.states[block][0].device) for s in self.states[block]]
        if any(s.shape[1] != states[0].shape[1] for s in states):
            return torch.stack([self._pooled(f"mean.{block}", s) for s in states]).mean(0)
        # Pooling is linear: pool the modules' mean once, not every module.
        mean = torch.stack(states).to(torch.promote_types(states[0].dtype, torch.float32)).mean(0)
        return self._pooled(f"mean.{block}", mean)

    def _pooled(self, name: str, states: Tensor) -> Tensor:
        """Mean of `states` [B, T, r] over the tokens that the scope sees (Eq. 15): [B, K, r]."""
        length = states.shape[1]
        if self.count is None or self.counted != length:
            self.count, self.counted = self._continued("count", self.pool.count(states)).clamp(min=1), length
        return self._continued(name, self.pool.sum(states)) / self.count.to(states.device)

    def _continued(self, name: str, sums: Tensor) -> Tensor:
        """Running sums [B, T, ...] of the call, continued from those of the cached tokens."""
        if not self.plan.scope.is_per_token:
            return sums
        if self.start:
            sums = sums + self.start[name].to(sums.device)
        if self.sums is not None:  # else a replay runs
            self.sums[name] = sums
        return sums

    # When the call has ended

    def store(self, cache: Cache | None) -> None:
        """Put on the call's cache, `cache` or a paged one, what routes of the tokens to come need."""
        if self.length == 0 or self.is_static:
            return  # no adapted module ran, or none of its tokens matters
        if self.paged is not None:
            self.paged.store(self.plan, self.sums or {})
            return
        if cache is None:
            return
        if self.is_routed:
            cached = self.past.extended(self.length, {}, cache)
        elif self.plan.scope.is_per_token:
            cached = self.past.extended(self.length, self.sums or {}, cache)
        else:
            routes = {block: route.last() for block, route in enumerate(self.routes) if route is not None}
            prefill_length = self.pool.last_seen(self.length)
            cached = CachedRouting(self.past.router, self.length, routes=routes, prefill_length=prefill_length)
        store(cache, self.key, cached if self.rows is None else cached.spread(self.rows))

    def record(self) -> RoutedCall | None:
        """The call's routes; None if it made none."""
        first_block = self.plan.first_block
        weights = {first_block + b: route.weights.detach() for b, route in enumerate(self.routes) if route}
        if not weights:
            return None
        is_per_token = next(iter(weights.values())).shape[1] > 1
        return RoutedCall(*self.key, weights, self.real if is_per_token else None)

    def seal(self) -> None:
        """Detach what a replay reads: the graph holds the replay, which must not hold the graph in turn."""
        if self.is_routed:
            return
        self.sums = None
        self.states = [[leaf(s) for s in states] for states in self.states]
        self.means = [None if m is None else leaf(m) for m in self.means]
        self.routes = [None if route is None else route.sealed() for route in self.routes]
        self.shared = self.shared.map(leaf)


def check_layout(x: Tensor, batch: int, length: int | None) -> None:
    """Raise a ValueError unless `x` [B, ..., d] or [B T, d] is known to be a call's tokens row by row.

    Args:
        x: activations or states.
        batch: number B of rows of the call.
        length: number T of its tokens per row; None if unknown.
    """
    lead = x.shape[:-1]
    is_flat = length is not None and len(lead) == 1 and lead[0] == batch * length
    if lead and (lead[0] == batch or is_flat or (batch == 1 and length is None)):  # a single row owns all there is
        return
    if not lead:
        raise ValueError(
            f"A module got one vector of features without a batch dimension, so whose it is, of the "
            f"call's {batch} rows, is not known. Pass the model a batch: `x.unsqueeze(0)`."
        )
    tokens = "" if length is None else f" and {length} tokens per row"
    raise ValueError(
        f"A module got activations of shape {[*lead, 'features']} in a call of batch size {batch}{tokens}, so they "
        "are not the call's tokens row by row and cannot be routed. Exclude the module with `exclude_modules`."
    )


class RunningCall:
    """A call of a stack while it runs, with an [`AdapterCall`] for each adapter, made when it is first asked for."""

    def __init__(self, stack_call: StackCall, plans: dict[str, Plan]) -> None:
        self.stack_call, self.plans = stack_call, plans
        self.adapter_calls: dict[str, AdapterCall] = {}

    def adapter_call(self, adapter_name: str) -> AdapterCall:
        if adapter_name not in self.adapter_calls:
            self.adapter_calls[adapter_name] = AdapterCall(self.plans[adapter_name], self.stack_call)
        return self.adapter_calls[adapter_name]

    def close(self, output: Any) -> None:
        """End the call: store on its cache what later calls need, ready it for replays, and tell recorders."""
        stack_call = self.stack_call
        returned = find_cache(output)  # which BLIP wraps around the one that was passed
        cache = stack_call.cache if returned is None else returned
        if stack_call.traits.reads_memory:
            cache = None  # the first call reads all of the memory
        for call in self.adapter_calls.values():
            call.store(cache)
            if stack_call.is_checkpointing:
                call.seal()
        if (ended := stack_call.model_call.ended) is not None:
            ended.append(stack_call)
        for record in stack_call.model_call.recorders:
            for call in self.adapter_calls.values():
                if (routed := call.record()) is not None:
                    record(routed)


def _gate_values(past: CachedRouting) -> dict[int, float] | None:
    is_step = bool(past.sums or past.routes) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return past.gate_values if is_step else None  # as floats they would be constants of a graph of either kind
