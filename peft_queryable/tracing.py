"""Recording the routes of a model while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls.record import RoutedCall
from .statistics import RouteStatistics
from .tuner.model import QueryableLoraModel


class RoutingTrace:
    """What [`record_routing`] recorded.

    Attributes:
        calls: the calls, in the order in which they ended, `limit` of each adapter and stack at most.
        statistics: by adapter, running statistics of all calls that were looked at, also of those beyond the limit.
    """

    def __init__(self, every: int = 1, limit: int | None = None) -> None:
        self.every, self.limit = every, limit
        self.calls: list[RoutedCall] = []
        self.statistics: dict[str, RouteStatistics] = {}
        self._seen: Counter[tuple[str, str]] = Counter()

    def record(self, call: RoutedCall) -> None:
        """Take a call in: every `every`-th of its adapter and stack, and its routes while there are below `limit`."""
        number = self._seen[call.adapter_name, call.stack]
        self._seen[call.adapter_name, call.stack] += 1
        if number % self.every:
            return
        self.statistics.setdefault(call.adapter_name, RouteStatistics()).add(call.weights, call.real)
        if self.limit is None or number // self.every < self.limit:
            self.calls.append(call.cpu())

    def weights(self, adapter_name: str = "default") -> dict[int, Tensor]:
        """By block, all recorded weights of an adapter without those of padding, [N, M].

        Raises:
            ValueError: if no call of this adapter was recorded.
        """
        calls = [call for call in self.calls if call.adapter_name == adapter_name]
        if not calls:
            recorded = sorted({call.adapter_name for call in self.calls})
            raise ValueError(
                f"No route of adapter {adapter_name!r} was recorded, only of {recorded}. Call the model inside the "
                "block and in the block's own thread, with this adapter active. Managers of continuous batching call "
                "it in another."
            )
        flat: dict[int, list[Tensor]] = {}
        for call in calls:
            for block, weights in call.weights.items():
                flat.setdefault(block, []).append(weights.flatten(0, 1) if call.real is None else weights[call.real])
        return {block: torch.cat(flat[block]) for block in sorted(flat)}

    def plot(self, tokens: Sequence[str] | None = None, adapter_name: str = "default") -> Any:
        """A picture of the routes; needs matplotlib (`pip install "peft_queryable[plots]"`).

            trace.plot()  # the mean weight of each atom in each block
            trace.plot(tokenizer.convert_ids_to_tokens(ids[0]))  # each token's route

        Args:
            tokens: the real tokens of the first row of the first call, to draw its routes along them.
            adapter_name: the adapter.

        Returns:
            A matplotlib Figure, which notebooks show; `figure.savefig("routes.svg")` writes it.

        Raises:
            ValueError: if no call of this adapter was recorded, or `tokens` are not those of the first row.
        """
        from .plots import plot_tokens, plot_usage  # matplotlib is an extra

        weights = self.weights(adapter_name)
        if tokens is None:
            usages = torch.stack([routes.mean(0) for routes in weights.values()])
            return plot_usage({"all routes": usages}, list(weights))
        call = next(call for call in self.calls if call.adapter_name == adapter_name)
        return plot_tokens({block: call.row(block, 0) for block in call.weights}, tokens)


@contextmanager
def record_routing(model: nn.Module, every: int = 1, limit: int | None = None) -> Iterator[RoutingTrace]:
    """Record the routes of every call of `model` in this thread that ends inside the block, `generate` included.

    Continuous batching calls the model in a thread of its own, so it is refused inside the block.

        with record_routing(model) as trace:
            model(**batch)
        trace.weights()  # by block, [tokens or sequences, atoms]
        trace.statistics["default"].summary()

    A recorded call takes 4 M bytes of memory per route and block, and a route per token in scope `causal`: a batch of
    8 x 1024 tokens over 16 atoms and 4 blocks takes 2 MiB. `limit` bounds it; statistics go on beyond it in 2 M + 2
    numbers per block. `limit=0` keeps nothing but those, and copies nothing to the CPU.

    Args:
        model: a model with Queryable LoRA adapters, or one that wraps it.
        every: of the calls of each adapter and stack, look at the first and at each `every`-th after it.
        limit: number of calls of each adapter and stack whose routes are kept, the first ones; None keeps all.

    Raises:
        ValueError: if `model` has no such adapter, or for an `every` below 1 or a `limit` below 0.
    """
    if every < 1 or (limit is not None and limit < 0):
        raise ValueError(
            f"`record_routing` takes `every` of 1 or more and `limit` of 0 or more, got {every} and {limit}."
        )
    model_hooks, trace = routed_tuner(model).model_hooks, RoutingTrace(every, limit)
    with model_hooks.entered(recorders=(*model_hooks.call.recorders, trace.record), records_all=True):
        yield trace


def routed_tuner(model: nn.Module) -> QueryableLoraModel:
    """The tuner in `model`, or in what it wraps.

    Raises:
        ValueError: if there is none.
    """
    tuners = [module for module in model.modules() if isinstance(module, QueryableLoraModel)]
    if not tuners:
        raise ValueError("There is no Queryable LoRA adapter in this model whose routes could be recorded.")
    return tuners[0]
