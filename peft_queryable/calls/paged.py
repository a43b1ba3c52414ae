"""What routes need of earlier tokens, in the blocks of transformers' continuous batching.

The running sums after a token, its *tally*, are a function of the tokens up to it, as its keys and values are. So it
lies in the same block as these: the cache is built as if the model had some further layers, and their pages hold the
tallies. Whatever shares, copies, moves, drops or uses blocks anew does so with whole blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from .plan import Plan

_ATTRIBUTE = "queryable_lora_tallies"  # of a paged cache
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Filling:
    """Under what a paged cache is filled: its blocks may serve any later request with the same tokens.

    Args:
        plans: how the active adapters route.
        call: the [`ModelCall`] that says which instruction and which fixed routes hold: a manager calls the model in a
            thread of its own, which knows of none.
        outside: the [`ModelCall`] of calls outside of all blocks, with the routes that are fixed for all threads.
    """

    plans: tuple[Plan, ...]
    call: Any
    outside: Any

    @property
    def routed(self) -> list[Plan]:
        """The plans whose routes depend on tokens."""
        return [plan for plan in self.plans if self.call.reads_tokens(plan)]

    def current(self, plans: Sequence[Plan], outside: Any) -> Any:
        """The model call that holds for all requests.

        Raises:
            ValueError: if other adapters are active by now, or routes were fixed or let go outside of blocks.
        """
        if tuple(plans) != self.plans or outside is not self.outside:
            raise ValueError(_CHANGED)
        return self.call

    def equals(self, other: Filling) -> bool:
        """Whether a cache that was filled under this may be filled on under `other`."""
        same = (getattr(self.call, name) is getattr(other.call, name) for name in _CONTEXT)
        return self.plans == other.plans and self.outside is other.outside and all(same)


_CONTEXT = ("instruction_embeds", "instructions", "routes")
_CHANGED = (
    "The active adapters, an instruction or fixed routes have changed since the manager of continuous batching was "
    "made, and tokens in its cache were routed as it was then. Make a new one: "
    "`model.destroy_cached_continuous_batching_manager()` if it is a persistent one, else `manager.stop()`, and then "
    "`generate_batch` or `init_continuous_batching` again."
)


class Tallies:
    """The tallies of a paged cache, and under what it is filled.

    Args:
        cache: a `PagedAttentionCache` that was built for further layers.
        filling: under what it is filled.
        further: by plan, the number of further layers of its tallies.
    """

    def __init__(self, cache: Any, filling: Filling, further: Mapping[Plan, int]) -> None:
        self.filling = filling
        self.group = cache.layer_to_allocator[max(cache.layer_to_allocator)]
        layers = iter(self.group.layer_indices[-sum(further.values()) :] if further else ())
        # What would be the keys, and the values, of each further layer: bytes [slots, bytes per token].
        self.pages = {
            plan: [
                view.flatten(1).view(torch.uint8)
                for _ in range(number)
                for view in self.group._kv_token_views[next(layers)]
            ]
            for plan, number in further.items()
        }

    def read(self, plan: Plan, slots: Tensor) -> Tensor:
        """The tallies of a plan at `slots` [n]: [n, numbers]."""
        read = torch.cat([page.index_select(0, slots) for page in self.pages[plan]], dim=1)
        dtype = tally_dtype(plan)
        return read[:, : sum(widths(plan).values()) * dtype.itemsize].contiguous().view(dtype)

    def write(self, plan: Plan, slots: Tensor, tallies: Tensor) -> None:
        """Write `tallies` [n, numbers] of a plan at `slots` [n]."""
        pages = self.pages[plan]
        parts = tallies.to(tally_dtype(plan)).contiguous().view(torch.uint8).split(pages[0].shape[1], dim=1)
        for page, part in zip(pages, parts, strict=False):  # the last pages may stay empty
            page[:, : part.shape[1]].index_copy_(0, slots, part)


@dataclass(frozen=True)
class PagedCall:
    """The requests of one call of continuous batching: T new tokens of n of them, one after another in one row.

    Args:
        tallies: those of its cache.
        segments: [1, T] int64, index of each token's request.
        past: [n] bool, whether a request has cached tokens; None if none has any.
        last: [n] int64, slot of the last cached token of each request that has one.
        write: [T] int64, slot of each new token.
    """

    tallies: Tallies
    segments: Tensor
    past: Tensor | None
    last: Tensor | None
    write: Tensor

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> PagedCall | None:
        """The requests of a model's call with these keyword arguments; None without a cache that carries tallies."""
        tallies = getattr(arguments.get("cache"), _ATTRIBUTE, None)
        if tallies is None:
            return None
        group, bounds = tallies.group, arguments["cu_seq_lens_q"].long()
        read, write = arguments["read_index"][group.index], arguments["write_index"][group.index]
        index = torch.arange(arguments["input_ids"].shape[1], device=bounds.device)
        segments = torch.bucketize(index, bounds[1:-1], right=True)  # padding comes last, and joins the last request
        past = last = None
        if len(read) > 0:
            # A request's indices are those of its cached tokens in order and then those of its new ones.
            bounds_k = arguments["cu_seq_lens_k"][group.layer_type].long()
            cached = bounds_k.diff() - bounds.diff()
            past, last = cached > 0, read[(bounds_k[:-1] + cached - 1).clamp(min=0)]
        return cls(tallies, segments.unsqueeze(0), past, last, write)

    @property
    def filling(self) -> Filling:
        return self.tallies.filling

    def load(self, plan: Plan) -> dict[str, Tensor]:
        """By name, the sums from which those of each token go on, [1, T, ...]; empty if no request has a past."""
        if self.past is None or self.last is None:
            return {}
        found = self.tallies.read(plan, self.last).masked_fill(~self.past.unsqueeze(-1), 0)
        names = widths(plan)
        return dict(zip(names, found[self.segments].split(list(names.values()), dim=-1), strict=True))

    def store(self, plan: Plan, sums: Mapping[str, Tensor]) -> None:
        """Keep the running sums after each token, [1, T, ...] by name, in the pages of its keys and values."""
        parts = [sums[name][0].to(self.write.device) for name in widths(plan)]
        self.tallies.write(plan, self.write, torch.cat(parts, dim=-1))


def widths(plan: Plan) -> dict[str, int]:
    """Names of the running sums of a plan, and how many numbers each is for a token."""
    rank = plan.router.settings.rank
    entries, means = range(plan.num_blocks), range(plan.last_read)
    return {"count": 1} | {f"entry.{b}": rank for b in entries} | {f"mean.{b}": rank for b in means}


def tally_dtype(plan: Plan) -> torch.dtype:
    """Dtype of a plan's running sums."""
    return torch.promote_types(plan.router.keys.weight.dtype, torch.float32)


# The manager


def check_requests(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError for `adapter_names` among the arguments of `generate_batch`, which would ignore them."""
    if arguments.get("adapter_names") is not None:
        raise ValueError(
            "Continuous batching serves all requests by the active adapters and takes no `adapter_names`. Call "
            "`generate_batch` once for each adapter, after `model.set_adapter(name)`, or use `generate`."
        )


def init_manager(init: Callable[..., Any], args: tuple, kwargs: dict[str, Any], filling: Filling) -> Any:
    """A manager of continuous batching whose cache carries what routes need.

    Args:
        init: transformers' `init_continuous_batching`.
        args: its positional arguments: `generation_config`, `continuous_batching_config`.
        kwargs: its keyword arguments.
        filling: under what the cache will be filled.

    Raises:
        ValueError: for what cannot be run exactly, and for a persistent manager that was made under something else.
    """
    check_filling(filling)
    if filling.routed:
        names = ("generation_config", "continuous_batching_config", "workload_hints")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = kwargs.get("continuous_batching_config")
        given = given or getattr(kwargs.get("generation_config"), "continuous_batching_config", None)
        args, kwargs = (), {**kwargs, "continuous_batching_config": known_paths(given or ContinuousBatchingConfig())}
    manager = init(*args, **kwargs)
    made: Filling | None = vars(manager).get(_ATTRIBUTE)
    if made is None:
        _carry_tallies(manager, filling)
    elif not made.equals(filling):
        raise ValueError(_CHANGED)
    return manager


def check_filling(filling: Filling) -> None:
    """Raise a ValueError unless every request can be served alike, by a route for each token of a decoder."""
    if others := [plan for plan in filling.routed if not plan.scope.is_per_token]:
        names, scopes = sorted({p.adapter_name for p in others}), sorted({p.scope.name for p in others})
        raise ValueError(
            "Continuous batching (`generate_batch`, TRL's `use_transformers_continuous_batching`) cannot run adapters "
            f"{names} with routing scope {scopes}: it takes prompts in parts, and the route of the first part depends "
            "on the last. Use `routing_scope='causal'`, or `generate`."
        )
    given = [filling.call.instruction_embeds, *(filling.call.instructions or {}).values()]
    sizes = [len(each) for each in (*given, *filling.call.routes.values()) if each is not None]
    if any(size != 1 for size in sizes):
        raise ValueError(
            "Continuous batching puts all requests in one row, which follows one instruction or one set of fixed "
            f"routes, but {max(sizes)} were given. Call `generate_batch` once for each, or use `generate`."
        )


def known_paths(config: Any) -> Any:
    """A `ContinuousBatchingConfig` like `config` whose calls of the model are those that tests have run.

    Raises:
        ValueError: if it asks for other ones.
    """
    graphs = config.use_cuda_graph
    asked = {
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "use_async_batching": config.use_async_batching,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level,
        "max_blocks_per_request": config.max_blocks_per_request,
    }
    if unknown := [name for name, value in asked.items() if value]:
        raise ValueError(
            f"`{unknown[0]}` of the ContinuousBatchingConfig was not tested with routes that depend on tokens, so the "
            "result is not known to be right. Leave it out."
        )
    config = copy.copy(config)
    # Without a block table each call says by index where its tokens lie.
    config.use_cuda_graph = config.use_async_batching = False
    config.max_blocks_per_request = 0
    return config


def _carry_tallies(manager: Any, filling: Filling) -> None:
    """Have `manager` build its cache with the further layers that the tallies of `filling` need."""
    if filling.routed and getattr(manager.model.config.get_text_config(), "sliding_window", None) == 1:
        raise ValueError(
            "A window of one token keeps no earlier token, and routes need the last one's. Use `generate`."
        )

    def create_batch_processor() -> Any:
        model = manager.model
        config, further = with_tallies(model.config.get_text_config(), model.dtype, filling.routed)
        builder = copy.copy(manager)  # a stand-in, as other threads use the manager itself
        builder.model = _Like(model, config=_Like(model.config, get_text_config=lambda: config))
        processor = type(manager)._create_batch_processor(builder)
        manager._use_prefix_sharing = builder._use_prefix_sharing
        if not hasattr(processor.cache, _ATTRIBUTE):  # else it is an earlier one, reset
            setattr(processor.cache, _ATTRIBUTE, Tallies(processor.cache, filling, further))
        return processor

    manager._create_batch_processor = create_batch_processor
    setattr(manager, _ATTRIBUTE, filling)


def with_tallies(config: Any, dtype: torch.dtype, plans: Sequence[Plan]) -> tuple[Any, dict[Plan, int]]:
    """A configuration like `config` with further layers for tallies, and by plan their number."""
    per_layer = 2 * find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize  # bytes per token
    further = {plan: -(-sum(widths(plan).values()) * tally_dtype(plan).itemsize // per_layer) for plan in plans}
    config = copy.deepcopy(config)
    if (types := getattr(config, "layer_types", None)) is not None:
        config.layer_types = [*types, *[_FULL if _FULL in types else _SLIDING] * sum(further.values())]
    config.num_hidden_layers += sum(further.values())
    return config, further


class _Like:
    """`target`, with other values of some attributes."""

    def __init__(self, target: Any, **others: Any) -> None:
        vars(self).update(others, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
