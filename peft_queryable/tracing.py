"""Recording the routes of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .context import Context
from .model import QueryableLoraModel


@dataclass(frozen=True)
class RoutedCall:
    """Routes of one adapter in one call of one stack of layers.

    Args:
        adapter: name of the adapter.
        stack: name of the module that runs the layers.
        weights: by block, counted through all stacks, the weights over the atoms [B, K, M], on the CPU. B is the
            number of rows that the adapter serves; K is 1 where one route serves a row, else its number of tokens.
        real: [B, K] bool, False for padding; None if all are real or K is 1.
    """

    adapter: str
    stack: str
    weights: dict[int, Tensor]
    real: Tensor | None


@dataclass
class RoutingTrace:
    """What [`record_routing`] recorded: `calls`, in the order in which they ended."""

    calls: list[RoutedCall] = field(default_factory=list)

    def weights(self, adapter: str = "default") -> dict[int, Tensor]:
        """By block, all recorded weights of `adapter` without those of padding, [N, M].

        Raises:
            ValueError: if no call of this adapter was recorded.
        """
        calls = [call for call in self.calls if call.adapter == adapter]
        if not calls:
            recorded = sorted({call.adapter for call in self.calls})
            raise ValueError(
                f"No route of adapter {adapter!r} was recorded, only of {recorded}. Call the model inside the block, "
                "with this adapter active."
            )
        flat: dict[int, list[Tensor]] = {}
        for call in calls:
            for block, weights in call.weights.items():
                flat.setdefault(block, []).append(weights.flatten(0, 1) if call.real is None else weights[call.real])
        return {block: torch.cat(flat[block]) for block in sorted(flat)}

    def record(self, context: Context) -> None:
        """Take the routes of a call that has ended."""
        for adapter, routing in context.routings.items():
            first_block = context.plans[adapter].first_block
            weights = {first_block + block: w.detach().cpu() for block, w in routing.weights().items()}
            if weights:
                is_by_token = next(iter(weights.values())).shape[1] > 1
                real = routing.real.cpu() if is_by_token and routing.real is not None else None
                self.calls.append(RoutedCall(adapter, context.name, weights, real))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record the routes of every call of `model` that ends inside the block, steps of `generate` included.

        with record_routing(model) as trace:
            model(**batch)
        trace.weights()  # by block, [tokens or sequences, atoms]

    Args:
        model: a model with Queryable LoRA adapters, or one that wraps it.

    Raises:
        ValueError: if `model` has no such adapter.
    """
    tuners = [module for module in model.modules() if isinstance(module, QueryableLoraModel)]
    if not tuners:
        raise ValueError("There is no Queryable LoRA adapter in this model whose routes could be recorded.")
    trace = RoutingTrace()
    with ExitStack() as undo:
        for stack in tuners[0].stacks.values():
            stack.recorders.append(trace.record)
            undo.callback(stack.recorders.remove, trace.record)
        yield trace
