"""One call of one stack: a snapshot of what its arguments and the model call around it say."""

from __future__ import annotations

import re
import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor  # has no values to look at
from transformers.cache_utils import Cache

from ..method.router import Router
from ..method.scope import Tokens
from .cache import cached_length, find_cache
from .model_call import ModelCall
from .plan import Plan
from .rows import Rows
from .tokens import has_tokens, packed_segments, read_tokens, sequence_index

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
        for name, ndim in (("input_ids", 2), ("inputs_embeds", 3)):
            if self.inputs is self.arguments.get(name) and self.inputs.ndim < ndim:
                raise ValueError(
                    f"`{name}` {list(self.inputs.shape)} of {self.stack} has no batch dimension, so its tokens would "
                    f"be rows. Pass `{name}.unsqueeze(0)`."
                )
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
        if self.takes_labels and plan.scope.needs_prompt and self.is_training and tokens.prompt is not None:
            _check_prompt(plan, tokens.prompt if tokens.real is None else tokens.prompt & tokens.real)
        return tokens

    def _miss_prompt(self, adapter_name: str) -> None:
        """Nothing tells the prompt: in training the answer would route itself."""
        message = (
            f"Adapter {adapter_name!r} has the routing scope 'prompt', but nothing in the call tells the prompt: "
            "neither integer `labels` [batch, tokens] nor `prompt_mask`"
        )
        if self.is_training:
            raise ValueError(
                f"{message}, so the answer would route itself. Put a `prompt_mask` [batch, tokens] in the batch of a "
                "trainer that takes the labels out of it (`label_smoothing_factor`, `compute_loss_func`), or use "
                "`routing_scope='causal'`."
            )
        if not torch.compiler.is_compiling():
            warnings.warn(f"{message}. All its tokens count as the prompt.", stacklevel=2)

    def reading(self, held_by: StackCall | None) -> StackCall:
        """This call of a stack outside of all layers, with the tokens of the stack whose output it reads.

        That is the call `held_by` that it runs in, if there is one, else the last of the model call's stacks that has
        ended and had as many rows and tokens, else, before any has, the model call itself if it has as many.

        Raises:
            ValueError: if it reads a part of the tokens of the stack that has just ended, if it reads no stack and the
                model call's mask hides tokens that may not be this call's, or if no model call tells of padding.
        """
        inputs, ended, outer = self.inputs, self.model_call.ended, self.model_call.arguments
        if not has_tokens(inputs):
            return self  # a vector per sequence, or none of the layouts that tell tokens
        if held_by is not None:
            return replace(held_by, stack=self.stack)
        exclude = f"`exclude_modules=r'{re.escape(self.stack)}.*'`"
        if ended is None and self.length is None and not self.model_call.is_generating:
            raise ValueError(
                f"{self.stack} was called outside a call of the model, with an input {list(inputs.shape)}: which of "
                f"its tokens are padding is not known. Call the model, or exclude it with {exclude}."
            )
        for source in reversed(ended or []):
            if source.has_as_many(inputs):
                return replace(source, stack=self.stack, is_checkpointing=self.is_checkpointing)
        if ended and ended[-1].takes_labels and ended[-1].batch == self.batch and ended[-1].length is not None:
            raise ValueError(
                f"{self.stack} sees {inputs.shape[1]} tokens per row of the {ended[-1].length} that "
                f"{ended[-1].stack} has just run, and which of them is not known (`logits_to_keep`, in generation). "
                f"Exclude it with {exclude}."
            )
        if "attention_mask" in self.arguments or not outer:
            return self
        mask = outer.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        is_masks_size = mask is not None and mask.shape == inputs.shape[:2]
        if not ended:
            call = replace(self, arguments=outer, inputs=leading_tensor(outer), past=cached_length(find_cache(outer)))
            if call.has_as_many(inputs):
                return call
            if is_masks_size:
                return replace(self, arguments={**self.arguments, "attention_mask": mask})
        if (is_masks_size or not ended) and mask is not None and not torch.compiler.is_compiling() and not mask.all():
            raise ValueError(
                f"{self.stack} sees {inputs.shape[1]} tokens per row that no stack before it has seen, and the "
                f"attention mask of the model's call, about {mask.shape[1]}, may not be about them: which of them are "
                f"padding is not known. Exclude it with {exclude}, or pass rows of one length."
            )
        return self

    def has_as_many(self, inputs: Tensor) -> bool:
        """Whether the call has as many rows and tokens as `inputs` [B, T, ...]."""
        return self.batch == inputs.shape[0] and self.length == inputs.shape[1]

    def fixed_routes(self, plan: Plan) -> Tensor | None:
        """The weights of an adapter's fixed routes, [B or 1, blocks, M]; None if they are not fixed."""
        return self.model_call.fixed_routes(plan, self.batch)

    def instruction(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        """The embeddings that an adapter follows, and which of them each token of packed rows follows.

        Returns:
            [B, d_c] or [1, d_c], and None; or [n, d_c] for n packed sequences, and their indices [B, T]. None and None
            for its default.

        Raises:
            ValueError: for another number of instructions.
        """
        embeds = self.model_call.instruction(plan)
        if embeds is None:
            return None, None
        index = self._sequence_index() if len(embeds) > 1 else None
        if index is None:
            return self.model_call.by_row(embeds, self.batch, "instructions"), None
        if torch.compiler.is_compiling():
            message = f"{len(embeds)} instructions were given for another number of packed sequences."
            torch._assert_async(index[-1, -1] + 1 == len(embeds), message)
        elif (sequences := int(index[-1, -1]) + 1) != len(embeds):
            raise ValueError(
                f"{len(embeds)} instructions were given for {sequences} sequences packed in {self.batch} rows: give "
                "one, or one for each sequence in order. Padding at the end of a packed row counts as `position_ids`, "
                "`seq_idx` or `cu_seq_lens_q` say."
            )
        return embeds, index

    def has_packed_instructions(self, plan: Plan) -> bool:
        """Whether an adapter was given instructions in a number that only the sequences of packed rows can have."""
        embeds = self.model_call.instruction(plan)
        return embeds is not None and not self.model_call.is_generating and len(embeds) not in (1, self.batch)

    def _sequence_index(self) -> Tensor | None:
        """The index [B, T] of each token's sequence among those of all rows; None unless rows are packed."""
        if self.model_call.is_generating or isinstance(self.past, Tensor) or self.past > 0:
            return None
        segments = packed_segments(self.arguments, self.batch, self.length)
        return None if segments is None else sequence_index(segments)


_seen: weakref.WeakSet[Router] = weakref.WeakSet()  # whose first prompts in training have been looked at


def _check_prompt(plan: Plan, prompt: Tensor) -> None:
    """Warn if the first training call of an adapter has no token in any prompt, [B, T]; waits once for the device."""
    if torch.compiler.is_compiling() or isinstance(prompt, FakeTensor) or plan.router in _seen or not prompt.numel():
        return
    _seen.add(plan.router)
    if not prompt.any():
        warnings.warn(
            f"Adapter {plan.adapter_name!r} has the routing scope 'prompt', but every token of its first training "
            "call is supervised, so there is no prompt, and routes are the same for all inputs. Set the `labels` of "
            "prompts to -100 (in TRL `completion_only_loss=True`), or use `routing_scope='causal'`.",
            stacklevel=2,
        )


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
