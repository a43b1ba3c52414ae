"""One call of one stack: a snapshot of what its arguments and the model call around it say."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor  # has no values to look at
from transformers.cache_utils import Cache

from ..method.scope import Tokens
from .arguments import TOKEN_ARGUMENTS, leading_tensor
from .cache import cached_length, find_cache
from .model_call import ModelCall
from .plan import Plan, StackTraits
from .prompts import check_no_more_prompt, check_some_prompt, miss_prompt
from .rows import Rows
from .tokens import (
    check_rows,
    has_tokens,
    labels_of_tokens,
    packed_segments,
    prompt_tokens,
    read_mask,
    sequence_index,
)


@dataclass(frozen=True)
class StackCall:
    """One call of one stack.

    Args:
        stack: name of the stack.
        traits: of the stack whose tokens these are: this one, or the one that it reads.
        model_call: the model call that it is a part of.
        arguments: arguments of the stack's call, by name.
        inputs: the one of them that tells rows and tokens: token ids [B, T], hidden states [B, T, d], or other inputs
            [B, ...].
        past: number of tokens per row that the cache holds before the call; see [`cached_length`].
        is_training: whether the stack is in training mode.
        is_checkpointing: whether layers will run again in the backward pass.
    """

    stack: str
    traits: StackTraits
    model_call: ModelCall
    arguments: dict[str, Any]
    inputs: Tensor
    past: int | Tensor
    is_training: bool
    is_checkpointing: bool

    @property
    def batch(self) -> int:
        """Number B of rows."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int | None:
        """Number T of tokens per row; None where the inputs have no token axis that is known for one."""
        is_named = any(self.inputs is self.arguments.get(name) for name in TOKEN_ARGUMENTS)
        return self.inputs.shape[1] if is_named and has_tokens(self.inputs) else None

    @property
    def is_step(self) -> bool:
        """Whether the call goes on from a filled cache."""
        return isinstance(self.past, Tensor) or self.past > 0

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
        segments = None if self.is_step else packed_segments(self.arguments, self.batch, self.length)
        real, visible = read_mask(self.arguments.get("attention_mask"), self.batch, self.length, self.past)
        must_see_all = self.model_call.is_generating or not plan.scope.is_per_token
        if real is not None and visible is not None and must_see_all:
            check_rows(visible, real, self.model_call.is_generating)
        prompt, given = self._prompt(real, segments), self._generation_prompt()
        if self.traits.predicts and plan.scope.needs_prompt:
            if prompt is None and not self.model_call.is_generating:
                miss_prompt(plan, self.is_training)
            elif prompt is not None and self.is_training:
                check_some_prompt(plan, prompt, real)
        return Tokens(real, prompt, given, segments, visible)

    def _prompt(self, real: Tensor | None, segments: Tensor | None) -> Tensor | None:
        """Tokens [B, T] that labels or a mask mark as the prompt; None where nothing does.

        Raises:
            ValueError: for a mask of another shape.
        """
        if not self.traits.predicts:
            return None
        labels, prompt_mask = labels_of_tokens(self.model_call.labels, self.length), self.model_call.prompt_mask
        if prompt_mask is not None and self.length is not None and prompt_mask.shape != self.inputs.shape[:2]:
            raise ValueError(
                f"`prompt_mask` must have the shape of the call's tokens, {list(self.inputs.shape[:2])}, got "
                f"{list(prompt_mask.shape)}."
            )
        # The outermost call's own, which accelerate has not moved yet where it moves inputs to the model's device.
        labels, prompt_mask = (None if t is None else t.to(self.inputs.device) for t in (labels, prompt_mask))
        return prompt_tokens(labels, prompt_mask, real, segments)

    def _generation_prompt(self) -> Tensor | None:
        """Tokens [B, T] that `generate` was called with; None outside of its prefill."""
        length = self.model_call.prompt_length
        if length is None or not self.traits.predicts:
            return None
        return (torch.arange(self.inputs.shape[1], device=self.inputs.device) < length).expand(self.batch, -1)

    def check_continues(self, plan: Plan) -> None:
        """Raise a ValueError if the call marks more of the prompt whose routes its cache has brought."""
        is_told = self.model_call.labels is not None or self.model_call.prompt_mask is not None
        if plan.scope.needs_prompt and is_told:
            real, _ = read_mask(self.arguments.get("attention_mask"), self.batch, self.length, self.past)
            prompt = self._prompt(real, None)
            check_no_more_prompt(plan, prompt if prompt is None or real is None else prompt & real)

    def reading(self, held_by: StackCall | None) -> StackCall:
        """This call of a stack outside of all layers, with the tokens of the stack whose output it reads.

        That is the call `held_by` that it runs in, if there is one, else the last of the model call's stacks that has
        ended and had as many rows and tokens, else, before any has, the model call itself if it has as many.

        Raises:
            ValueError: if it reads a part of the tokens of the stack that has just ended, if it reads no stack and the
                model call's mask hides tokens that may not be this call's, or if no model call tells of padding.
        """
        if not has_tokens(self.inputs):
            return self  # a vector per sequence, or none of the layouts that tell tokens
        if held_by is not None:
            return replace(held_by, stack=self.stack)
        self._check_called_by_model()
        ended = self.model_call.ended or []
        for source in reversed(ended):
            if source.has_as_many(self.inputs):
                return replace(source, stack=self.stack, is_checkpointing=self.is_checkpointing)
        if ended:
            self._check_all_of(ended[-1])
        outer = self.model_call.arguments
        if "attention_mask" in self.arguments or not outer:
            return self
        mask = outer.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        is_masks_size = mask is not None and mask.shape == self.inputs.shape[:2]
        if not ended:
            call = replace(self, arguments=outer, inputs=leading_tensor(outer), past=cached_length(find_cache(outer)))
            if call.has_as_many(self.inputs):
                return call
            if is_masks_size:
                return replace(self, arguments={**self.arguments, "attention_mask": mask})
        if is_masks_size or not ended:
            self._check_hides_nothing(mask)
        return self

    @property
    def _exclude(self) -> str:
        return f"`exclude_modules=r'{re.escape(self.stack)}.*'`"

    def _check_called_by_model(self) -> None:
        if self.model_call.ended is None and self.length is None and not self.model_call.is_generating:
            raise ValueError(
                f"{self.stack} was called outside a call of the model, with an input {list(self.inputs.shape)}: which "
                f"of its tokens are padding is not known. Call the model, or exclude it with {self._exclude}."
            )

    def _check_all_of(self, last: StackCall) -> None:
        """The last stack's tokens are none or all of this call's, not a part of them."""
        if last.traits.predicts and last.batch == self.batch and last.length is not None:
            raise ValueError(
                f"{self.stack} sees {self.inputs.shape[1]} tokens per row of the {last.length} that {last.stack} has "
                f"just run, and which of them is not known (`logits_to_keep`, in generation). "
                f"Exclude it with {self._exclude}."
            )

    def _check_hides_nothing(self, mask: Tensor | None) -> None:
        if mask is not None and not torch.compiler.is_compiling() and not mask.all():
            raise ValueError(
                f"{self.stack} sees {self.inputs.shape[1]} tokens per row that no stack before it has seen, and the "
                f"attention mask of the model's call, about {mask.shape[1]}, may not be about them: which of them are "
                f"padding is not known. Exclude it with {self._exclude}, or pass rows of one length."
            )

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
            ValueError: for another number of instructions, and for none at all in an adapter's first training call.
        """
        embeds = self.model_call.instruction(plan)
        self._check_told(plan, embeds is not None)
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

    def _check_told(self, plan: Plan, is_told: bool) -> None:
        """A trainer that drops its column of instructions would train an adapter that never learns to follow any."""
        default = plan.router.default_instruction
        if default is None or not self.is_training or self.model_call.is_generating or "instruction" in plan.seen:
            return
        message = (
            f"Adapter {plan.adapter_name!r} takes instructions, and its first training call brings none. Call "
            "`use_instruction_column(trainer)` before `trainer.train()`, pass `instruction_embeds`, or say that "
            "there is none: `with use_instructions(model, None):`."
        )
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():  # a graph knows of no first call: each one has to bring some word
            if not is_told:
                torch._assert_async(default.weight.any(), message)
            return
        if isinstance(default.weight, FakeTensor):
            return
        if not is_told and not default.weight.any():
            raise ValueError(message)
        plan.seen.add("instruction")

    def has_packed_instructions(self, plan: Plan) -> bool:
        """Whether an adapter was given instructions in a number that only the sequences of packed rows can have."""
        embeds = self.model_call.instruction(plan)
        return embeds is not None and not self.model_call.is_generating and len(embeds) not in (1, self.batch)

    def _sequence_index(self) -> Tensor | None:
        """The index [B, T] of each token's sequence among those of all rows; None unless rows are packed."""
        if self.model_call.is_generating or self.is_step:
            return None
        segments = packed_segments(self.arguments, self.batch, self.length)
        return None if segments is None else sequence_index(segments)
