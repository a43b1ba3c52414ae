"""One forward call of one stack: its tokens, its cache and what its adapters carry from block to block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import find_cache, load_state, store_state
from .pooling import Tokens
from .routing import FixedRouting, Plan, Replay, Routing, Rows


class Context:
    """One call of a stack: its tokens, its cache, and each adapter's routing.

    Args:
        name: name of the stack.
        plans: by adapter, how it routes the stack.
        adapter_names: [B], the adapter of each row where a batch has several, or None.
        instruction_for: gives the embeddings [n, d_c] that an adapter follows in this call, or None.
        is_generating: whether the call is a step of `generate`, which repeats rows, for beams say.
        batch: number B of rows of the call.
        read_tokens: tells its tokens; not called where no route needs them.
        cache: its cache.
        is_checkpointing: whether layers will run again in the backward pass.
    """

    def __init__(
        self,
        name: str,
        plans: dict[str, Plan],
        adapter_names: list[str] | None,
        instruction_for: Callable[[Plan], Tensor | None],
        is_generating: bool,
        batch: int,
        read_tokens: Callable[[], Tokens],
        cache: Cache | None,
        is_checkpointing: bool,
    ) -> None:
        self.name, self.plans, self.adapter_names = name, plans, adapter_names
        self.instruction_for, self.is_generating = instruction_for, is_generating
        self.batch, self.read_tokens, self.cache, self.is_checkpointing = batch, read_tokens, cache, is_checkpointing
        self.routings: dict[str, Routing | FixedRouting] = {}

    def routing(self, adapter: str) -> Routing | FixedRouting:
        if adapter not in self.routings:
            self.routings[adapter] = self._start(self.plans[adapter])
        return self.routings[adapter]

    def _start(self, plan: Plan) -> Routing | FixedRouting:
        rows, key = self._rows(plan.adapter), (plan.adapter, self.name)
        instruction, index = self._instruction(plan), None if rows is None else rows.index
        batch = self.batch if index is None else len(index)
        past = load_state(self.cache, key, id(plan.router), index)
        if past.routes:
            return FixedRouting(batch, rows, past)
        tokens = self.read_tokens()
        if index is not None:
            tokens = tokens.rows(index)
            if instruction is not None and instruction.shape[0] > 1:
                instruction = instruction[index.to(instruction.device)]
        return Routing(plan, tokens, batch, rows, instruction, past, keeps_states=self.is_checkpointing)

    def _rows(self, adapter: str) -> Rows | None:
        if self.adapter_names is None:
            return None
        index = [row for row, name in enumerate(self.adapter_names) if name == adapter]
        return None if len(index) == self.batch else Rows(torch.tensor(index), self.batch)

    def _instruction(self, plan: Plan) -> Tensor | None:
        """Embeddings of the call's rows [B, d_c] or [1, d_c]."""
        embeds = self.instruction_for(plan)
        if embeds is None:
            return None
        rows = embeds.shape[0]
        if self.is_generating and self.batch % rows == 0:
            return embeds.repeat_interleave(self.batch // rows, dim=0)
        if rows not in (1, self.batch):
            raise ValueError(
                f"{rows} instructions were given for a call of batch size {self.batch}: give one, or one for each row "
                "of the batch."
            )
        return embeds

    def close(self, output: Any) -> None:
        """End the call: put routing states on its cache, and ready it for a replay."""
        cache = self.cache if self.cache is not None else find_cache(output)
        for adapter, routing in self.routings.items():
            if cache is not None and routing.length > 0:
                store_state(cache, (adapter, self.name), routing.state(cache.is_croppable))
            if self.is_checkpointing:
                routing.seal()

    def replay(self) -> ReplayContext:
        return ReplayContext({adapter: routing.replay() for adapter, routing in self.routings.items()})


@dataclass(frozen=True)
class ReplayContext:
    """A finished [`Context`] as seen by layers that run again in the backward pass."""

    replays: dict[str, Replay | FixedRouting]

    def routing(self, adapter: str) -> Replay | FixedRouting:
        return self.replays[adapter]
