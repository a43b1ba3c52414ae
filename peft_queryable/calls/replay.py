"""Gradient checkpointing: layers that run again in the backward pass find the call they ran in first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..method.route import Route
from .adapter_call import AdapterCall, RunningCall
from .current import Current

_REENTRANT = (
    "Queryable LoRA does not support reentrant gradient checkpointing: it runs the first pass without a graph, so a "
    "route would get no gradient from the layers that use it. Pass "
    "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
)


class AdapterReplay:
    """An [`AdapterCall`] that has ended, as layers see it that gradient checkpointing runs again.

    The layer that chose a route makes it again, because what it saved for the backward pass has to be saved again; all
    others find the route that was made. The call is not changed: blocks come back last first, and any number of times.
    """

    gate_values = None

    def __init__(self, call: AdapterCall) -> None:
        self.call, self.rows, self.by_row, self.tokens_per_row = call, call.rows, call.by_row, call.tokens_per_row
        self.routes: dict[int, Route] = {}  # those that the layers of this replay have asked for

    def route_for(self, block: int, layer: nn.Module) -> Route | None:
        if self.call.entries[block] is layer:
            return None
        if block not in self.routes:
            route = self.call.routes[block]
            assert route is not None
            self.routes[block] = route.unsealed()
        return self.routes[block]

    def choose(self, block: int, layer: nn.Module, entry_states: Tensor) -> Route:
        return self.call.make_route(block, entry_states)[0]

    def keep(self, block: int, states: Tensor) -> None:
        """Nothing to do: the call itself has kept them."""


class StackReplay:
    """A [`RunningCall`] that has ended, as layers see it that gradient checkpointing runs again."""

    def __init__(self, call: RunningCall) -> None:
        self.calls = {name: AdapterReplay(adapter_call) for name, adapter_call in call.adapter_calls.items()}

    def adapter_call(self, adapter_name: str) -> AdapterReplay:
        return self.calls[adapter_name]


class BoundCheckpoint:
    """A checkpoint function whose recomputation sees the routes of the call that it belongs to.

    The backward pass runs layers long after their call, last layer first, and maybe after other calls: what each needs
    is bound to its own checkpoint.

    Args:
        currents: for each stack whose modules may be in a checkpointed layer, its running call.
        checkpoint: what transformers' checkpointing installed: `torch.utils.checkpoint.checkpoint`, partially applied.

    Raises:
        ValueError: if `checkpoint` is reentrant.
    """

    def __init__(self, currents: Sequence[Current], checkpoint: Callable) -> None:
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(_REENTRANT)
        self.currents, self.checkpoint = currents, checkpoint
        # Where the caller says nothing, as `prepare_model_for_kbit_training`, torch's own default is still reentrant.
        self.run = partial(checkpoint, use_reentrant=False) if _takes_use_reentrant(checkpoint) else checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        calls = [(current, current.call) for current in self.currents if isinstance(current.call, RunningCall)]

        has_graph = torch.is_grad_enabled()

        def bound(*args: Any, **kwargs: Any) -> Any:
            if has_graph and not torch.is_grad_enabled():  # the first pass of a function that does not tell
                raise ValueError(_REENTRANT)
            with ExitStack() as entered:
                for current, call in calls:
                    if current.call is not call:  # not the first pass
                        entered.enter_context(current.entered(StackReplay(call)))
                return function(*args, **kwargs)

        return self.run(bound, *args, **kwargs)


def _takes_use_reentrant(checkpoint: Callable) -> bool:
    parameters = inspect.signature(checkpoint).parameters.values()
    return any(p.name == "use_reentrant" or p.kind is p.VAR_KEYWORD for p in parameters)
