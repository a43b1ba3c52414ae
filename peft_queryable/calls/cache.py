"""Routing state that travels with a key/value cache.

It is kept on the cache object, one [`RoutingState`] for each adapter and stack, and follows what generation does to
the cache: reorder (beams), crop (assisted decoding), repeat, select, reset and deepcopy (shared prefixes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_ATTRIBUTE = "queryable_lora"


@dataclass
class RoutingState:
    """What an adapter's routes need of the tokens that a cache holds.

    Args:
        router: identity of the router whose states these are.
        length: number of tokens of each row, padding included, that the state covers.
        sums: running sums of scope `causal`, of every token or the last, each [B, length or 1, ...]. A route of a
            later token starts from the last of them, and cutting tokens off is cutting them short.
        routes: of each block, in the scopes whose routes stay as the prefill made them.
        prefill_length: the shortest length that `routes` are still right for; a tensor of no dimension where it takes
            data to tell.
        constants: what steps have made of weights alone, by the identity of whose it is: a cache as a whole is of the
            weights that filled it.
        rows: [B] bool, the rows that the adapter serves in a batch of several adapters, the others being zero in
            `sums` and `routes`; None where it serves all.
    """

    router: int
    length: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    routes: dict[int, Any] = field(default_factory=dict)
    prefill_length: int | Tensor = 0
    constants: dict[int, Any] = field(default_factory=dict)
    rows: Tensor | None = None

    def extended(self, length: int, sums: dict[str, Tensor], is_croppable: bool) -> RoutingState:
        """The state after `length` more tokens whose running sums are `sums`; this one stays as it is.

        Only a croppable cache can go back to an earlier token: on another, the last sums are all there is to keep, and
        their shape stays the same from step to step, as torch.compile likes it.
        """
        if not is_croppable:
            sums = {name: new[:, -1:] for name, new in sums.items()}
        elif self.sums:
            sums = {name: torch.cat([self.sums[name], new], dim=1) for name, new in sums.items()}
        return replace(self, length=self.length + length, sums=sums)

    def map_rows(self, function) -> None:
        """Replace every tensor by `function` of it, which acts on the batch dimension."""
        self.sums = {name: function(t) for name, t in self.sums.items()}
        self.routes = {block: route.map(function) for block, route in self.routes.items()}
        self.rows = None if self.rows is None else function(self.rows)

    def of_rows(self, index: Tensor) -> RoutingState:
        """The state of the rows `index` [n] alone."""
        state = replace(self, rows=None)
        state.map_rows(lambda t: t[index.to(t.device)])
        return state

    def spread(self, index: Tensor, batch: int) -> RoutingState:
        """This state of n rows as that of the rows `index` [n] among `batch`."""
        state = replace(self, rows=torch.ones_like(index, dtype=torch.bool))
        state.map_rows(lambda t: t.new_zeros(batch, *t.shape[1:]).index_copy(0, index.to(t.device), t))
        return state

    def crop(self, tokens_to_remove: int) -> None:
        """Cut `-tokens_to_remove` tokens off the end: transformers gives the number as a negative one."""
        self.length += tokens_to_remove
        self.sums = {name: t[:, : max(t.shape[1] + tokens_to_remove, 0)] for name, t in self.sums.items()}
        # What saw tokens that are gone is dropped, and `load_state` refuses to go on from there.
        if any(t.shape[1] == 0 for t in self.sums.values()):
            self.sums = {}
        if self.length < self.prefill_length:
            self.routes = {}


def load_state(cache: Cache | None, key: tuple[str, str], router: int, rows: Tensor | None = None) -> RoutingState:
    """The state that `cache` carries for `key` (adapter and stack), empty for an empty or missing cache.

    Args:
        rows: [n], the rows that the adapter serves, whose state is wanted; None for all.

    Raises:
        ValueError: if tokens were put into the cache without this adapter, under another one, or if it was cropped
            into the prompt that fixed its routes.
    """
    length = cached_length(cache)
    state = getattr(cache, _ATTRIBUTE, {}).get(key)
    if length == 0:
        return RoutingState(router)
    adapter = key[0]
    served = None if state is None or state.rows is None else state.rows.nonzero()[:, 0]
    is_same = rows is None if served is None else rows is not None and torch.equal(served, rows.to(served.device))
    if state is None or state.router != router or state.length != length or not is_same:
        covered = 0 if state is None or state.router != router or not is_same else state.length
        raise ValueError(
            f"The cache holds {length} tokens, but adapter {adapter!r} routed {covered} of them: the others went in "
            "without it, under another adapter, or through another model. Start from an empty cache, or fill this one "
            "with the adapter active."
        )
    if not state.sums and not state.routes:
        raise ValueError(
            f"The cache was cropped to {length} tokens, into those that fixed the routes of adapter {adapter!r}. "
            "Start from an empty cache, or use `routing_scope='causal'`."
        )
    return state if rows is None else state.of_rows(rows)


def find_cache(values: Any) -> Cache | None:
    """The cache among the inputs or outputs of a call, if there is one."""
    values = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def cached_length(cache: Cache | None) -> int:
    """Number of tokens of each row, padding included, that `cache` holds."""
    if cache is None:
        return 0
    lengths = [state.length for state in _states(cache)]
    if lengths and torch.compiler.is_compiling():
        return max(lengths)  # a static cache counts in a tensor, which a graph cannot read
    try:
        return int(cache.get_seq_length())
    except ValueError:  # of linear attention alone, which keeps no count: ours is all there is
        return max(lengths) if lengths else int(cache.has_previous_state())


def store_state(cache: Cache, key: tuple[str, str], state: RoutingState) -> None:
    """Keep `state` on `cache`, which from then on takes it along through its own operations."""
    if not hasattr(cache, _ATTRIBUTE):
        setattr(cache, _ATTRIBUTE, {})
        for method in (_reorder_cache, _batch_repeat_interleave, _batch_select_indices, _crop, _reset):
            # A deepcopy of the cache copies the partial with it, and so carries a copy of the state.
            setattr(cache, method.__name__[1:], partial(method, cache))
    getattr(cache, _ATTRIBUTE)[key] = state


def _states(cache: Cache) -> list[RoutingState]:
    return list(getattr(cache, _ATTRIBUTE, {}).values())


def _reorder_cache(self: Cache, beam_idx: Tensor) -> None:
    type(self).reorder_cache(self, beam_idx)
    for state in _states(self):
        state.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))


def _batch_repeat_interleave(self: Cache, repeats: int) -> None:
    type(self).batch_repeat_interleave(self, repeats)
    for state in _states(self):
        state.map_rows(lambda t: t.repeat_interleave(repeats, dim=0))


def _batch_select_indices(self: Cache, indices: Tensor) -> None:
    type(self).batch_select_indices(self, indices)
    for state in _states(self):
        state.map_rows(lambda t: t[indices.to(t.device)])


def _crop(self: Cache, tokens_to_remove: int) -> None:
    type(self).crop(self, tokens_to_remove)
    for state in _states(self):
        state.crop(tokens_to_remove)


def _reset(self: Cache) -> None:
    type(self).reset(self)
    getattr(self, _ATTRIBUTE).clear()
