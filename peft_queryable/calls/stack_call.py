"""One call of one stack: a snapshot of what its arguments and the model call around it say."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..method.scope import Tokens
from .cache import cached_length, find_cache
from .model_call import ModelCall
from .plan import Plan
from .rows import Rows
from .tokens import read_tokens


@dataclass(frozen=True)
class StackCall:
    """One call of one stack.

    Args:
        stack: name of the stack.
        model_call: the model call that it is a part of.
        arguments: arguments of the stack's call, by name.
        inputs: the one of them that tells rows and tokens: token ids [B, T], hidden states [B, T, d], or other inputs
            [B, ...].
        takes_labels: whether labels and prompts of the model call are about this stack's tokens.
        is_training: whether the stack is in training mode.
        is_checkpointing: whether layers will run again in the backward pass.
    """

    stack: str
    model_call: ModelCall
    arguments: dict[str, Any]
    inputs: Tensor
    takes_labels: bool
    is_training: bool
    is_checkpointing: bool

    @property
    def batch(self) -> int:
        """Number B of rows."""
        return self.inputs.shape[0]

    @property
    def cache(self) -> Cache | None:
        """The key/value cache that the call goes on from or fills."""
        return find_cache(self.arguments)

    def rows(self, adapter_name: str) -> Rows | None:
        """The rows that an adapter serves, None for all."""
        return Rows.of(adapter_name, self.model_call.row_adapters(self.batch))

    def tokens(self, plan: Plan) -> Tokens:
        """The tokens of the call, as an adapter needs to know them.

        Raises:
            ValueError: if they cannot be known from the call's arguments, or if its scope needs a prompt and nothing
                tells it in training.
        """
        outer = self.model_call if self.takes_labels else ModelCall()
        tokens = read_tokens(
            self.inputs,
            self.arguments,
            past=cached_length(self.cache),
            labels=outer.labels,
            prompt_mask=outer.prompt_mask,
            prompt_length=outer.prompt_length,
        )
        if self.takes_labels and plan.scope.needs_prompt and tokens.prompt is None and not outer.is_generating:
            self._miss_prompt(plan.adapter_name)
        return tokens

    def _miss_prompt(self, adapter_name: str) -> None:
        """Nothing tells the prompt: in training the answer would route itself."""
        message = (
            f"Adapter {adapter_name!r} has the routing scope 'prompt', but nothing in the call tells the prompt: "
            "neither `labels` nor `prompt_mask`"
        )
        if self.is_training:
            raise ValueError(
                f"{message}, so the answer would route itself. Put a `prompt_mask` [batch, tokens] in the batch of a "
                "trainer that takes the labels out of it (`label_smoothing_factor`, `compute_loss_func`), or use "
                "`routing_scope='causal'`."
            )
        if not torch.compiler.is_compiling():
            warnings.warn(f"{message}. All its tokens count as the prompt.", stacklevel=2)

    def instruction(self, plan: Plan) -> Tensor | None:
        """The embeddings that an adapter follows, [B, d_c] or [1, d_c]; None for its default."""
        return self.model_call.instruction(plan, self.batch)


def leading_tensor(arguments: dict[str, Any]) -> Tensor:
    """The argument that tells a call's rows and tokens: token ids or hidden states if there are any, else the first.

    Raises:
        ValueError: for a call without any tensor.
    """
    named = [arguments.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states")]
    for value in (*named, *arguments.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError("A call without any tensor among its arguments cannot be routed: its batch size is not known.")
