"""What travels with a key/value cache, so that routes go on from the cached tokens.

It is kept on the cache object, one [`CachedRouting`] for each adapter and stack, and follows what generation does to
the cache: reorder (beams), crop (assisted decoding), repeat, select, reset and deepcopy (shared prefixes).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..method.route import SequenceRoute
from .arguments import parameter_names
from .rows import Rows

_ATTRIBUTE = "queryable_lora"
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of a `Cache`, the name since transformers 5.24 first
# Arguments that hold models' own caches: keys and values as tuples, Reformer's buckets, XLNet's mems, RWKV's state.
_CACHE_ARGUMENTS = (*CACHE_NAMES, "past_buckets_states", "mems", "state")


@dataclass
class CachedRouting:
    """What an adapter's routes need to know of the tokens that a cache holds.

    Args:
        router: identity of the router that routed them.
        length: number of tokens per row, padding included, that were routed; a tensor without dimensions, as in the
            cache itself, beside a static one, because torch.compile would trace each step anew for another number.
        sums: of a scope with a route per token, running sums after every token or only the last, each
            [B, length or 1, ...]. Routes of later tokens go on from the last one; cropping tokens crops their sums.
        routes: of a scope with a route per sequence, by block, the routes that the prefill made.
        prefill_length: the shortest length that `routes` are still right for; a tensor without dimensions where only
            the masks' values tell.
        gate_values: gates as floats, keyed by layer; valid because a cache is only continued with the weights that
            filled it.
        rows: [B] bool, the rows that the adapter serves in a batch of several adapters, the others being zero in
            `sums` and `routes`; None where it serves all.
    """

    router: int
    length: int | Tensor = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    routes: dict[int, SequenceRoute] = field(default_factory=dict)
    prefill_length: int | Tensor = 0
    gate_values: dict[int, float] = field(default_factory=dict)
    rows: Tensor | None = None

    def extended(self, length: int, sums: dict[str, Tensor], cache: Cache) -> CachedRouting:
        """What to keep on `cache` after `length` more tokens with running sums `sums`; this object stays as it is.

        Only a croppable cache can go back to an earlier token. On any other, and on a static one, the last sums are
        kept, whose shape stays the same from step to step, which spares torch.compile a new graph.
        """
        if cache.is_compileable or not cache.is_croppable:
            # Copies: a slice would keep the prompt's sums alive, and torch.compile guards its strides.
            sums = {name: new[:, -1:].clone(memory_format=torch.contiguous_format) for name, new in sums.items()}
        elif self.sums:
            sums = {name: torch.cat([self.sums[name], new], dim=1) for name, new in sums.items()}
        return replace(self, length=self.length + length, sums=sums)

    def map_rows(self, function) -> None:
        """Replace every tensor by `function` of it, which acts on the batch dimension."""
        self.sums = {name: function(t) for name, t in self.sums.items()}
        self.routes = {block: route.map(function) for block, route in self.routes.items()}
        self.rows = None if self.rows is None else function(self.rows)

    def select(self, rows: Rows) -> CachedRouting:
        """What is cached of `rows` alone."""
        selected = replace(self, rows=None)
        selected.map_rows(rows.select)
        return selected

    def spread(self, rows: Rows) -> CachedRouting:
        """This, which is of `rows` alone, among the rows of the whole batch."""
        spread = replace(self, rows=torch.ones_like(rows.index, dtype=torch.bool))
        spread.map_rows(rows.spread)
        return spread

    def serves(self, rows: Rows | None) -> bool:
        """Whether it was made by an adapter that served `rows`."""
        if self.rows is None or rows is None:
            return self.rows is None and rows is None
        served = self.rows.nonzero()[:, 0]
        return torch.equal(served, rows.index.to(served.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Cut `-tokens_to_remove` tokens off the end: transformers passes a negative number."""
        self.length += tokens_to_remove
        self.sums = {name: t[:, : max(t.shape[1] + tokens_to_remove, 0)] for name, t in self.sums.items()}
        # What saw tokens that are gone is dropped, and `load` refuses to go on from there.
        if any(t.shape[1] == 0 for t in self.sums.values()):
            self.sums = {}
        if self.length < self.prefill_length:
            self.routes = {}


def load(
    cache: Cache | None, length: int | Tensor, key: tuple[str, str], router: int, rows: Rows | None
) -> CachedRouting:
    """What `cache` carries for `key` (adapter and stack); an empty [`CachedRouting`] for an empty or missing cache.

    Args:
        cache: a call's cache.
        length: number of tokens per row that it held before the call; a tensor in a graph, where it is not read.
        key: names of the adapter and of the stack.
        router: identity of the adapter's router.
        rows: the rows that the adapter serves, None for all.

    Raises:
        ValueError: if tokens were put into the cache without this adapter, under another one, or if it was cropped
            into the prompt that fixed its routes.
    """
    is_counted = not isinstance(length, Tensor)
    if is_counted and length == 0:
        return CachedRouting(router)
    adapter_name = key[0]
    cached: CachedRouting | None = getattr(cache, _ATTRIBUTE, {}).get(key)
    is_own = cached is not None and cached.router == router and cached.serves(rows)
    if cached is None or not is_own or (is_counted and cached.length != length):
        raise ValueError(
            f"The cache holds {length} tokens, but adapter {adapter_name!r} routed "
            f"{int(cached.length) if cached is not None and is_own else 0} of them: the others went in without it, "
            "under another adapter, or through another model. Start from an empty cache, or fill this one with the "
            "adapter active."
        )
    if not cached.sums and not cached.routes and isinstance(cached.prefill_length, int) and cached.prefill_length == 0:
        raise ValueError(
            f"The cache was cropped to {length} tokens, but beside a {type(cache).__name__} only the last token's "
            f"state of adapter {adapter_name!r} is kept. Use a `transformers.DynamicCache`, in `generate` "
            "`cache_implementation='dynamic'`."
        )
    if not cached.sums and not cached.routes:
        raise ValueError(
            f"The cache was cropped to {length} tokens, into those that fixed the routes of adapter {adapter_name!r}. "
            "Start from an empty cache, or use `routing_scope='causal'`."
        )
    return cached if rows is None else cached.select(rows)


def store(cache: Cache, key: tuple[str, str], routing: CachedRouting) -> None:
    """Keep `routing` on `cache`, which from then on takes it along through its own operations."""
    if cache.is_compileable and not isinstance(routing.length, Tensor):
        kept = next(iter(routing.sums.values()), None)
        device = (next(iter(routing.routes.values())).weights if kept is None else kept).device
        routing.length = torch.full((), routing.length, device=device)
    if not hasattr(cache, _ATTRIBUTE):
        setattr(cache, _ATTRIBUTE, {})
        for method in (_reorder_cache, _batch_repeat_interleave, _batch_select_indices, _crop, _reset):
            setattr(cache, method.__name__[1:], _CacheMethod(method, cache))
    getattr(cache, _ATTRIBUTE)[key] = routing


def cache_argument(module: nn.Module) -> str | None:
    """Name of the argument that takes the module's key/value cache; None if no known one is in its signature."""
    return next((name for name in CACHE_NAMES if name in parameter_names(module)), None)


def find_cache(values: Any) -> Cache | None:
    """The cache among the inputs or outputs of a call, if there is one."""
    values = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def check_cache(arguments: Mapping[str, Any], adapter_name: str) -> None:
    """Refuse a cache that cannot carry what routes need of its tokens: every step would start as if it held none.

    Raises:
        ValueError: for a cache that is no transformers `Cache`, such as that of continuous batching, and for two of
            them under the names that models have given theirs.
    """
    given = [name for name in CACHE_NAMES if isinstance(arguments.get(name), Cache)]
    if any(arguments[name] is not arguments[given[0]] for name in given):
        raise ValueError(
            f"The call was given two caches, `{given[0]}` and `{given[1]}`, and which of them adapter "
            f"{adapter_name!r} is to go on from is not known. Pass one of them."
        )
    for name, value in arguments.items():
        kind = type(value).__name__
        is_cache = kind.endswith("Cache") or (name in _CACHE_ARGUMENTS and isinstance(value, (tuple, list, dict)))
        if is_cache and not isinstance(value, Cache):
            raise ValueError(
                f"The call's `{name}` is a cache of type {kind}, which cannot carry what the routes of adapter "
                f"{adapter_name!r} need of the tokens in it. Use a `transformers.DynamicCache`, as `generate` does in "
                "most models, or `use_cache=False`."
            )


def cached_length(cache: Cache | None) -> int | Tensor:
    """Number of tokens per row, padding included, that `cache` holds.

    A tensor without dimensions in a graph that goes on from a static cache: that counts in a tensor.

    Raises:
        ValueError: while a step of a static cache is exported.
    """
    if cache is None:
        return 0
    lengths = [routing.length for routing in _carried(cache)]
    try:
        length: int | Tensor = cache.get_seq_length()
    except ValueError:  # linear attention alone keeps no count, so ours is all there is
        length = lengths[0] if lengths else int(cache.has_previous_state())
    if torch.compiler.is_exporting() and isinstance(length, Tensor):
        raise ValueError(
            "Steps of a static cache cannot be exported with an adapter: one graph for every step cannot carry what "
            "routes need. Merge the adapter first, `with fix_routes(model, routes): model = model.merge_and_unload()`"
            ", or export calls with `use_cache=False`."
        )
    if lengths and torch.compiler.is_compiling() and isinstance(length, Tensor):
        return length.clone()  # layers count on in place
    return int(length)


class _CacheMethod:
    """`function` as a method of `cache`, which it does not keep alive; a copied cache gets methods of its own."""

    def __init__(self, function: Callable[..., None], cache: Cache) -> None:
        self.function, self.cache = function, weakref.ref(cache)
        self.__name__ = function.__name__[1:]  # EncoderDecoderCache asks its methods for their names

    def __reduce__(self) -> tuple[type, tuple]:
        return _CacheMethod, (self.function, self.cache())  # of copies and pickles: bound to the copied cache

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.function(self.cache(), *args, **kwargs)


def _carried(cache: Cache) -> list[CachedRouting]:
    return list(getattr(cache, _ATTRIBUTE, {}).values())


def _reorder_cache(self: Cache, beam_idx: Tensor) -> None:
    type(self).reorder_cache(self, beam_idx)
    for routing in _carried(self):
        routing.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))


def _batch_repeat_interleave(self: Cache, repeats: int) -> None:
    type(self).batch_repeat_interleave(self, repeats)
    for routing in _carried(self):
        routing.map_rows(lambda t: t.repeat_interleave(repeats, dim=0))


def _batch_select_indices(self: Cache, indices: Tensor) -> None:
    type(self).batch_select_indices(self, indices)
    for routing in _carried(self):
        routing.map_rows(lambda t: t[indices.to(t.device)])


def _crop(self: Cache, tokens_to_remove: int) -> None:
    type(self).crop(self, tokens_to_remove)
    for routing in _carried(self):
        routing.crop(tokens_to_remove)


def _reset(self: Cache) -> None:
    type(self).reset(self)
    getattr(self, _ATTRIBUTE).clear()
