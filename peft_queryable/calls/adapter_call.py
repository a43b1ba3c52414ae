"""The routes of one adapter in one forward call of one stack, made block by block while the stack runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cache import RoutingState
from .pooling import Pool, Tokens
from .router import Router
from .routes import Route, SequenceRoute, TokenRoute


@dataclass(frozen=True)
class Plan:
    """How one adapter routes one stack.

    Args:
        adapter: name of the adapter.
        router: its router.
        scope: "causal", "prompt" or "sequence".
        first_block: index, among the router's blocks, of the stack's first one.
        num_blocks: number of blocks of the stack.
    """

    adapter: str
    router: Router
    scope: str
    first_block: int
    num_blocks: int


@dataclass(frozen=True)
class Rows:
    """The rows `index` [n] of a call's `batch` rows that one adapter serves, where a batch has several adapters."""

    index: Tensor
    batch: int

    def take(self, x: Tensor) -> Tensor:
        """Activations [B, ..., d] or [B T, d] of these rows: [n, T, d]."""
        return x.reshape(self.batch, -1, x.shape[-1])[self.index.to(x.device)]

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x` with `rows` [n, T, d] in the place of these rows."""
        by_row = x.reshape(self.batch, -1, x.shape[-1])
        return by_row.index_copy(0, self.index.to(x.device), rows.to(x.dtype)).view(x.shape)


class Routing:
    """Routes of one adapter in one call: made block by block while the stack runs.

    Only the call itself adds to it: layers that run again in the backward pass of gradient checkpointing read it, and
    add nothing (see [`Replay`]).

    Args:
        plan: how the adapter routes the stack.
        tokens: the tokens of the rows that the adapter serves.
        batch: number B of these rows.
        rows: which of the call's rows they are, or None for all.
        instruction: embedding [B, d_c] or [1, d_c], or None for the adapter's default.
        past: routing state of the tokens that the call's cache holds.
        keeps_states: whether block states must outlive the mean made of them, for a replay.
    """

    def __init__(
        self,
        plan: Plan,
        tokens: Tokens,
        batch: int,
        rows: Rows | None,
        instruction: Tensor | None,
        past: RoutingState,
        keeps_states: bool,
    ) -> None:
        self.plan, self.batch, self.rows, self.past = plan, batch, rows, past
        self.constants = _constants(past)
        self.lookup = plan.router.prepare(instruction)
        self.keeps_states, self.real = keeps_states, tokens.real
        self.pool = Pool(tokens, plan.scope)
        # Blocks before this one have means that a later block reads.
        self.last_read = plan.num_blocks - 1 if plan.router.uses_depth else 0
        self.count: Tensor | None = None  # number of tokens in each sum over `counted` tokens a row
        self.counted = 0
        self.length = 0
        self.sums: dict[str, Tensor] = {}  # running sums of this call's tokens, for the cache
        self.routes: list[Route | None] = [None] * plan.num_blocks
        self.means: list[Tensor | None] = [None] * plan.num_blocks  # pooled block means, [B, K, r]
        self.states: list[list[Tensor]] = [[] for _ in range(plan.num_blocks)]  # rank states by block, each [B, T, r]
        self.entries: list[nn.Module | None] = [None] * plan.num_blocks

    def route(self, block: int, layer: nn.Module, states: Tensor, entry_states: Callable[[], Tensor]) -> Route:
        """The route of `block`, made from `entry_states()` [B, T, r] by the first layer that asks.

        The layer's own `states` [B, T, r] go into the mean of its block (Algorithm 2, line 43).
        """
        route = self.routes[block]
        if route is None:
            self.entries[block] = layer
            self.routes[block], mean = route, _ = self.make_route(block, entry_states)
            if block > 0:
                self.means[block - 1] = mean
                if not self.keeps_states:
                    self.states[block - 1] = []
        self.length = states.shape[1]
        if block < self.last_read and self.routes[block + 1] is None:
            self.states[block].append(states)
        return route

    def make_route(self, block: int, entry_states: Callable[[], Tensor]) -> tuple[Route, Tensor | None]:
        """The route of `block` and the mean of the block before it; changes nothing that a replay reads."""
        router = self.plan.router
        mean = self._block_mean(block - 1) if block > 0 and self.states[block - 1] else None
        state = self._pooled(f"entry.{block}", entry_states())
        means = [m for m in (*self.means[: max(block - 1, 0)], mean) if m is not None]
        device = router.keys.weight.device
        weights = router(self.plan.first_block + block, state.to(device), [m.to(device) for m in means], self.lookup)
        if weights.shape[1] == 1:
            return SequenceRoute.of(router, weights), mean
        return TokenRoute(router, weights), mean

    def _block_mean(self, block: int) -> Tensor:
        """Mean over the block's adapted modules of their pooled states (Algorithm 2, line 45): [B, K, r]."""
        states = [s.to(self.states[block][0].device) for s in self.states[block]]
        if all(s.shape[1] == states[0].shape[1] for s in states):
            # Pooling is linear: one pooling of the modules' mean, not one a module.
            states = [torch.stack(states).to(torch.promote_types(states[0].dtype, torch.float32)).mean(0)]
        return torch.stack([self._pooled(f"mean.{block}", s) for s in states]).mean(0)

    def _pooled(self, name: str, states: Tensor) -> Tensor:
        """Mean of `states` [B, T, r] over the tokens that the scope sees (Eq. 15): [B, K, r]."""
        length = states.shape[1]
        if self.count is None or self.counted != length:
            self.count, self.counted = self._continued("count", self.pool.count(states)).clamp(min=1), length
        return self._continued(name, self.pool.sum(states)) / self.count.to(states.device)

    def _continued(self, name: str, sums: Tensor) -> Tensor:
        """Running sums [B, T, ...] of the call, continued from those of the cached tokens."""
        if not self.pool.causal:
            return sums
        if self.past.sums:
            sums = sums + self.past.sums[name][:, -1:].to(sums.device)
        self.sums[name] = sums
        return sums

    def state(self, is_croppable: bool) -> RoutingState:
        """What the call's cache, croppable or not, has to carry for the tokens to come."""
        if self.plan.scope == "causal":
            state = self.past.extended(self.length, self.sums, is_croppable)
        else:
            routes = {block: route.fixed() for block, route in enumerate(self.routes) if route is not None}
            prefill_length = self.pool.last_seen(self.length)
            state = RoutingState(self.past.router, self.length, routes=routes, prefill_length=prefill_length)
        return state if self.rows is None else state.spread(self.rows.index, self.rows.batch)

    def weights(self) -> dict[int, Tensor]:
        """Weights over the atoms by block, each [B, K, M]."""
        return {block: route.weights for block, route in enumerate(self.routes) if route is not None}

    def seal(self) -> None:
        """Cut what a replay reads off the graph: the graph holds the replay, and must not be held by it in turn."""
        self.sums = {}
        self.states = [[_leaf(s) for s in states] for states in self.states]
        self.means = [None if m is None else _leaf(m) for m in self.means]
        self.routes = [None if route is None else route.map(_leaf) for route in self.routes]
        self.lookup = self.lookup.map(_leaf)

    def replay(self) -> Replay:
        return Replay(self)


class FixedRouting:
    """Routes of one adapter in a call that goes on from the prefill that fixed them: its tokens have no say in them.

    Args:
        batch: number B of rows that the adapter serves.
        rows: which of the call's rows they are, or None for all.
        past: routing state of the tokens that the call's cache holds.
    """

    def __init__(self, batch: int, rows: Rows | None, past: RoutingState) -> None:
        self.batch, self.rows, self.past = batch, rows, past
        self.length, self.real = 0, None
        self.constants = _constants(past)

    def route(self, block: int, layer: nn.Module, states: Tensor, entry_states: Callable[[], Tensor]) -> Route:
        self.length = states.shape[1]
        return self.past.routes[block]

    def state(self, is_croppable: bool) -> RoutingState:
        state = self.past.extended(self.length, {}, is_croppable)
        return state if self.rows is None else state.spread(self.rows.index, self.rows.batch)

    def weights(self) -> dict[int, Tensor]:
        return {block: route.weights for block, route in self.past.routes.items()}

    def seal(self) -> None:
        pass

    def replay(self) -> FixedRouting:
        return self


class Replay:
    """A finished [`Routing`] as seen by layers that gradient checkpointing runs again in the backward pass.

    The layer that made a route makes it again, because what it saved for the backward pass has to be saved again; all
    others find the route that was made. Nothing is kept: blocks come back last first, and any number of times.
    """

    constants = None

    def __init__(self, routing: Routing) -> None:
        self.routing, self.batch, self.rows = routing, routing.batch, routing.rows

    def route(self, block: int, layer: nn.Module, states: Tensor, entry_states: Callable[[], Tensor]) -> Route:
        if self.routing.entries[block] is layer:
            return self.routing.make_route(block, entry_states)[0]
        route = self.routing.routes[block]
        assert route is not None  # every layer that runs again has run before
        return route


def _constants(past: RoutingState) -> dict[int, Any] | None:
    """Where the steps of a cache keep what they make of weights alone; None where a graph of either kind is made."""
    is_step = past.length > 0 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return past.constants if is_step else None


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)
