"""Routing scopes: over which tokens the rank states are averaged that choose a route (Eq. 15).

Rank states come as [B, T, r]: B rows of T tokens. A row is one sequence, or several packed one after another.
To add a scope, write a subclass of [`Scope`], list it in `SCOPES`, and name it in the configuration's `RoutingScope`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of one call; None means "all of them" for a mask.

    Args:
        real: [B, T] bool, False for padding.
        prompt: [B, T] bool, True before the first supervised token of the token's sequence.
        generation_prompt: [B, T] bool, True for the tokens that `generate` was called with.
        segments: [B, T] int64, index of the token's sequence within its packed row, in order from 0; None where each
            row is one sequence.
        visible: [B, T, T] bool, True where token t may see token j, if the attention mask says so for each pair; it
            then takes the place of `segments`.
    """

    real: Tensor | None = None
    prompt: Tensor | None = None
    generation_prompt: Tensor | None = None
    segments: Tensor | None = None
    visible: Tensor | None = None

    def of_rows(self, index: Tensor) -> Tokens:
        """The tokens of the rows `index` [n] alone."""
        masks = (self.real, self.prompt, self.generation_prompt, self.segments, self.visible)
        return Tokens(*(None if mask is None else mask[index.to(mask.device)] for mask in masks))


class Scope(ABC):
    """Which tokens a route sees, and what follows from it.

    Attributes:
        name: what the configuration's `routing_scope` calls it.
        is_per_token: True: every token has a route of its own, made from the tokens up to it, so a cache keeps running
            sums and a prompt may come in chunks. False: one route serves a sequence and stays as the prefill made it,
            so a cache keeps the routes and a prompt has to come in one call.
        needs_prompt: whether it has to be known which tokens are the prompt.
    """

    name: ClassVar[str]
    is_per_token: ClassVar[bool]
    needs_prompt: ClassVar[bool] = False

    @abstractmethod
    def masks(self, tokens: Tokens) -> tuple[Tensor | None, ...]:
        """Masks [B, T] that a token has to pass to count; None passes all."""


class Causal(Scope):
    """Position t sees the real tokens of its sequence up to t."""

    name, is_per_token = "causal", True

    def masks(self, tokens: Tokens) -> tuple[Tensor | None, ...]:
        return (tokens.real,)


class Prompt(Scope):
    """All positions see the real tokens of their sequence's prompt."""

    name, is_per_token, needs_prompt = "prompt", False, True

    def masks(self, tokens: Tokens) -> tuple[Tensor | None, ...]:
        return tokens.real, tokens.generation_prompt, tokens.prompt


class Sequence(Scope):
    """All positions see all real tokens of their sequence: the paper to the letter. Generated tokens never count."""

    name, is_per_token = "sequence", False

    def masks(self, tokens: Tokens) -> tuple[Tensor | None, ...]:
        return tokens.real, tokens.generation_prompt


SCOPES: dict[str, Scope] = {scope.name: scope for scope in (Causal(), Prompt(), Sequence())}


class Pool:
    """Sums of rank states over the tokens that a scope lets a route see, for the tokens of one call."""

    def __init__(self, scope: Scope, tokens: Tokens) -> None:
        self.is_per_token = scope.is_per_token
        self.segments = tokens.segments
        masks = [mask for mask in scope.masks(tokens) if mask is not None]
        self.mask = torch.stack(masks).all(0).unsqueeze(-1) if masks else None  # [B, T, 1]
        self.unseen = None if self.mask is None else ~self.mask
        self.visible = tokens.visible.tril() if self.is_per_token and tokens.visible is not None else None

    def sum(self, states: Tensor) -> Tensor:
        """Sums of `states` [B, T, r] in at least float32: [B, T, r], or [B, 1, r] where one serves a whole row.

        Raises:
            ValueError: if `states` and the call's masks disagree on T.
        """
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        length = states.shape[1]
        masks = [mask for mask in (self.mask, self.segments, self.visible) if mask is not None]
        if length == 1 and (not self.is_per_token or any(mask.shape[1] > 1 for mask in masks)):
            return states  # one vector per sequence, as a pooler or a classifier gets: there is no token to leave out
        for mask in masks:
            if mask.shape[1] != length:
                raise ValueError(
                    f"The activations of an adapted module have {length} tokens per row, but the masks or positions "
                    f"of the call have {mask.shape[1]}. Exclude modules that see other tokens than their stack, with "
                    "`exclude_modules`."
                )
        if self.unseen is not None:
            states = states.masked_fill(self.unseen.to(states.device), 0)
        if length == 1:
            return states
        if self.visible is not None:
            return self.visible.to(states) @ states
        segments = self.segments.to(states.device) if self.segments is not None else None
        return segment_cumsum(states, segments) if self.is_per_token else segment_sum(states, segments)

    def count(self, states: Tensor) -> Tensor:
        """Number of tokens in each of the sums of `states` [B, T, r]: [B, T, 1] or [B, 1, 1]."""
        return self.sum(torch.ones_like(states[..., :1], requires_grad=False))

    def last_seen(self, length: int) -> int | Tensor:
        """Number of leading tokens, of `length` per row, after which a route of a sequence sees none in any row."""
        if self.mask is None:
            return length
        is_seen = self.mask[..., 0].any(0)  # [T]
        return (torch.arange(1, length + 1, device=is_seen.device) * is_seen).max()


def segment_cumsum(x: Tensor, segments: Tensor | None) -> Tensor:
    """Running sums of `x` [B, T, r] along T that restart with every segment [B, T]."""
    if segments is None:
        return x.cumsum(1)
    # float64, so that subtracting the sums of earlier sequences of a packed row removes their rounding as well.
    sums = x.double().cumsum(1) if x.is_floating_point() else x.cumsum(1)
    index = torch.arange(x.shape[1], device=x.device).expand_as(segments)
    is_first = torch.nn.functional.pad(torch.diff(segments, dim=-1) != 0, (1, 0), value=True)
    start = torch.where(is_first, index, 0).cummax(-1).values.unsqueeze(-1).expand_as(x)  # first token of the segment
    return (sums - (sums - x).gather(1, start)).to(x.dtype)


def segment_sum(x: Tensor, segments: Tensor | None) -> Tensor:
    """Sums of `x` [B, T, r] over each segment [B, T], at every one of its tokens: [B, T, r]; [B, 1, r] for rows."""
    if segments is None:
        return x.sum(1, keepdim=True)
    index = segments.unsqueeze(-1).expand_as(x)
    return torch.zeros_like(x).scatter_add(1, index, x).gather(1, index)
