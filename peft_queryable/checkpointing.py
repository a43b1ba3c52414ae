"""Gradient checkpointing: layers that run again in the backward pass find the call they ran in first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .context import Context

if TYPE_CHECKING:
    from .stack import Stack


class BoundCheckpoint:
    """A checkpoint function whose recomputation sees the routes of the call that it belongs to.

    The backward pass runs layers long after their call, last layer first, and maybe after other calls: what each needs
    is bound to its own checkpoint.

    Args:
        stack: the stack whose layers are checkpointed.
        checkpoint: what `gradient_checkpointing_enable` installed: `torch.utils.checkpoint.checkpoint`, partially
            applied.

    Raises:
        ValueError: if `checkpoint` is reentrant.
    """

    def __init__(self, stack: Stack, checkpoint: Callable) -> None:
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Queryable LoRA does not support reentrant gradient checkpointing: it runs the first pass without a "
                "graph, so a route would get no gradient from the layers that use it. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        self.stack, self.checkpoint = stack, checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        context = self.stack.context
        if not isinstance(context, Context):
            return self.checkpoint(function, *args, **kwargs)

        def bound(*args: Any, **kwargs: Any) -> Any:
            is_first_pass = self.stack.context is context
            with self.stack.entered(context if is_first_pass else context.replay()):
                return function(*args, **kwargs)

        return self.checkpoint(bound, *args, **kwargs)
