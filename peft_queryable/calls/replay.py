"""Gradient checkpointing: layers that run again in the backward pass find the call they ran in first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from .context import Context

if TYPE_CHECKING:
    from .stack import Stack


class BoundCheckpoint:
    """A checkpoint function whose recomputation sees the routes of the call that it belongs to.

    The backward pass runs layers long after their call, last layer first, and maybe after other calls: what each needs
    is bound to its own checkpoint.

    Args:
        stacks: the stacks whose modules may be in a checkpointed layer.
        checkpoint: what transformers' checkpointing installed: `torch.utils.checkpoint.checkpoint`, partially applied.

    Raises:
        ValueError: if `checkpoint` is reentrant.
    """

    def __init__(self, stacks: Mapping[Any, Stack], checkpoint: Callable) -> None:
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Queryable LoRA does not support reentrant gradient checkpointing: it runs the first pass without a "
                "graph, so a route would get no gradient from the layers that use it. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        self.stacks, self.checkpoint = stacks, checkpoint
        # Where the caller says nothing, as `prepare_model_for_kbit_training`, torch's own default is still reentrant.
        self.run = partial(checkpoint, use_reentrant=False)

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        calls = [(stack, stack.context) for stack in self.stacks.values() if isinstance(stack.context, Context)]

        def bound(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as entered:
                for stack, context in calls:
                    if stack.context is not context:  # not the first pass
                        entered.enter_context(stack.entered(context.replay()))
                return function(*args, **kwargs)

        return self.run(bound, *args, **kwargs)
