"""What the scope `prompt` asks of a call: that its prompt is told, and does not grow once it has fixed the routes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch._subclasses import FakeTensor  # has no values to look at

from .plan import Plan


def miss_prompt(plan: Plan, is_training: bool) -> None:
    """Nothing tells the prompt of a call: a warning; an error in training, where the answer would route itself."""
    message = (
        f"Adapter {plan.adapter_name!r} has the routing scope 'prompt', but nothing in the call tells the prompt: "
        "neither integer `labels` [batch, tokens] nor `prompt_mask`"
    )
    if is_training:
        raise ValueError(
            f"{message}, so the answer would route itself. Put a `prompt_mask` [batch, tokens] in the batch of a "
            "trainer that takes the labels out of it (`label_smoothing_factor`, `compute_loss_func`), or use "
            "`routing_scope='causal'`."
        )
    if not torch.compiler.is_compiling():
        warnings.warn(f"{message}. All its tokens count as the prompt.", stacklevel=2)


def check_some_prompt(plan: Plan, prompt: Tensor, real: Tensor | None) -> None:
    """Warn if the first training call of an adapter has no token in any prompt; waits for the device, once.

    Args:
        plan: how the adapter routes.
        prompt: [B, T], True for the prompt's tokens.
        real: [B, T], False for padding; None if there is none.
    """
    is_unknown = torch.compiler.is_compiling() or isinstance(prompt, FakeTensor) or not prompt.numel()
    if is_unknown or "prompt" in plan.seen:
        return
    plan.seen.add("prompt")
    if not (prompt if real is None else prompt & real).any():
        warnings.warn(
            f"Adapter {plan.adapter_name!r} has the routing scope 'prompt', but every token of its first training "
            "call is supervised, so there is no prompt, and routes are the same for all inputs. Set the `labels` of "
            "prompts to -100 (in TRL `completion_only_loss=True`), or use `routing_scope='causal'`.",
            stacklevel=2,
        )


def check_no_more_prompt(plan: Plan, prompt: Tensor | None) -> None:
    """Raise a ValueError if a call that goes on from a filled cache marks tokens of it as `prompt` [B, T]."""
    if prompt is None or isinstance(prompt, FakeTensor):
        return
    message = (
        f"Adapter {plan.adapter_name!r} has the routing scope 'prompt', and a call that goes on from a filled cache "
        "marks tokens as prompt, by `prompt_mask` or by labels of -100 before the first supervised one. Routes stay "
        "as the cached prompt made them. Pass the prompt in one call, or use `routing_scope='causal'`."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~prompt.any(), message)
    elif prompt.any():
        raise ValueError(message)
