"""Instruction embeddings that are given to a call, and when they are none for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def idle_instruction(adapter_name: str) -> ValueError:
    """The error for an instruction to an adapter whose routes are fixed."""
    return ValueError(
        f"An instruction was given, but the routes of adapter {adapter_name!r} are fixed, so it would change nothing. "
        "Leave the instruction out, or fix the routes that it chooses: `instruction_routes(model, text)`."
    )


def check_embeds(embeds: Any, adapter_name: str, dim: int | None, source: str) -> None:
    """Raise a ValueError unless `embeds`, which came from `source`, are instruction embeddings [n, `dim`]."""
    if dim is None:
        raise ValueError(
            f"{source} was given, but adapter {adapter_name!r} takes no instruction: it was made with "
            "`instruction_dim=None`. Leave the instruction out, or train an adapter with `instruction_encoder` or "
            "`instruction_dim`."
        )
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != dim:
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(
            f"{source} must be a tensor of shape [batch, {dim}] or [1, {dim}] for adapter {adapter_name!r}, got "
            f"{shape}."
        )
