"""One call of one stack: a snapshot of what its arguments and the model call around it say."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..method.scope import Tokens
from .cache import find_cache
from .model_call import ModelCall
from .plan import Plan
from .rows import Rows
from .tokens import has_tokens, read_tokens

_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "hidden_states")


@dataclass(frozen=True)
class StackCall:
    """One call of one stack.

    Args:
        stack: name of the stack.
        model_call: the model call that it is a part of.
        arguments: arguments of the stack's call, by name.
        inputs: the one of them that tells rows and tokens: token ids [B, T], hidden states [B, T, d], or other inputs
            [B, ...].
        past: number of tokens per row that the cache holds before the call; see [`cached_length`].
        reads_memory: whether its modules see an encoder's output.
        takes_labels: whether labels and prompts of the model call are about this stack's tokens.
        is_training: whether the stack is in training mode.
        is_checkpointing: whether layers will run again in the backward pass.
    """

    stack: str
    model_call: ModelCall
    arguments: dict[str, Any]
    inputs: Tensor
    past: int | Tensor
    reads_memory: bool
    takes_labels: bool
    is_training: bool
    is_checkpointing: bool

    @property
    def batch(self) -> int:
        """Number B of rows."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int | None:
        """Number T of tokens per row; None where the inputs have no token axis that is known for one."""
        is_named = any(self.inputs is self.arguments.get(name) for name in _TOKEN_ARGUMENTS)
        return self.inputs.shape[1] if is_named and has_tokens(self.inputs) else None

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
        if self.model_call.paged is not None:
            return Tokens(segments=self.model_call.paged.segments)  # its masks are about blocks of keys
        outer = self.model_call if self.takes_labels else ModelCall()
        tokens = read_tokens(
            self.inputs,
            self.arguments,
            past=self.past,
            labels=outer.labels,
            prompt_mask=outer.prompt_mask,
            prompt_length=outer.prompt_length,
            is_per_token=plan.scope.is_per_token,
            is_known=self.length is not None,
            is_generating=self.model_call.is_generating,
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

    def reading(self) -> StackCall:
        """This call of a stack outside of all layers, with the tokens of the stack whose output it reads.

        That is the last of the model call's stacks that has ended and had as many rows and tokens.

        Raises:
            ValueError: if it reads a part of the tokens of the stack that has just ended, or if it reads no stack and
                the model call's mask hides tokens that are not this call's.
        """
        ended, mask = self.model_call.ended or [], self.model_call.attention_mask
        inputs = self.inputs
        if not has_tokens(inputs):
            return self  # a vector per sequence, or none of the layouts that tell tokens
        for source in reversed(ended):
            if source.batch == self.batch and source.length == inputs.shape[1]:
                return replace(source, stack=self.stack, is_checkpointing=self.is_checkpointing)
        if ended and ended[-1].takes_labels and ended[-1].batch == self.batch and ended[-1].length is not None:
            raise ValueError(
                f"{self.stack} sees {inputs.shape[1]} tokens per row of the {ended[-1].length} that "
                f"{ended[-1].stack} has just run, and which of them is not known (`logits_to_keep`, in generation). "
                f"Exclude it with `exclude_modules=r'{re.escape(self.stack)}.*'`."
            )
        if ended or mask is None or "attention_mask" in self.arguments:
            return self
        if mask.shape == inputs.shape[:2]:
            return replace(self, arguments={**self.arguments, "attention_mask": mask})
        if not torch.compiler.is_compiling() and not mask.all():
            raise ValueError(
                f"{self.stack} runs before the layers, on {inputs.shape[1]} tokens per row, and the attention mask of "
                f"the model's call is about {mask.shape[1]}: which of its tokens are padding is not known. Exclude it "
                f"with `exclude_modules=r'{re.escape(self.stack)}.*'`, or pass rows of one length."
            )
        return self

    def fixed_routes(self, plan: Plan) -> Tensor | None:
        """The weights of an adapter's fixed routes, [B or 1, blocks, M]; None if they are not fixed."""
        return self.model_call.fixed_routes(plan, self.batch)

    def instruction(self, plan: Plan) -> Tensor | None:
        """The embeddings that an adapter follows, [B, d_c] or [1, d_c]; None for its default."""
        return self.model_call.instruction(plan, self.batch)


def leading_tensor(arguments: dict[str, Any]) -> Tensor:
    """The argument that tells a call's rows and tokens: token ids or hidden states if there are any, else the first.

    Raises:
        ValueError: for a call without any tensor.
    """
    named = [arguments.get(name) for name in _TOKEN_ARGUMENTS]
    for value in (*named, *arguments.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError("A call without any tensor among its arguments cannot be routed: its batch size is not known.")
