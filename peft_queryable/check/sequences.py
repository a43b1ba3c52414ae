"""A batch as the sequences in it, and sequences as a batch again: side by side, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls.arguments import leading_tensor
from ..calls.tokens import IGNORE_INDEX

Batch = dict[str, Any]

_TOKENS = ("input_ids", "token_type_ids", "mm_token_type_ids", "position_ids")
SUPERVISION = ("labels", "prompt_mask")


def num_rows(batch: Batch) -> int:
    """Number B of rows."""
    return leading_tensor(batch).shape[0]


def select(batch: Batch, index: Sequence[int]) -> Batch:
    """The rows `index` of `batch`: of every tensor [B, ...], whatever it is; the rest as it is."""
    rows, number = list(index), num_rows(batch)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == number else value
        for name, value in batch.items()
    }


def joined(rows: Sequence[Batch], dim: int = 0) -> Batch:
    """Rows, each [1, ...], as one batch; along `dim` 1 as one packed row."""
    return {
        name: torch.cat([row[name] for row in rows], dim=dim) if isinstance(value, Tensor) and value.ndim else value
        for name, value in rows[0].items()
    }


class Sequences:
    """The sequences of a batch, without padding.

    Args:
        batch: with `input_ids` [B, T] and, where rows are padded, `attention_mask` [B, T], one run of ones per row.
        is_encoder_decoder: whether labels and prompts are of other tokens than `input_ids`.
        adds_positions: whether to number the tokens of each sequence, in `position_ids`.

    Attributes:
        rows: each sequence as a batch of one row, [1, T] for its own T, without an attention mask.
        names: those of its tensors that hold one value per token.
    """

    def __init__(self, batch: Batch, is_encoder_decoder: bool, adds_positions: bool) -> None:
        ids = batch["input_ids"]
        names = _TOKENS if is_encoder_decoder else _TOKENS + SUPERVISION
        self.names = [n for n in names if isinstance(batch.get(n), Tensor) and batch[n].shape == ids.shape]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        self.rows = [self._row(select(batch, [i]), mask[i], adds_positions) for i in range(len(ids))]
        if adds_positions and "position_ids" not in self.names:
            self.names.append("position_ids")

    def _row(self, row: Batch, real: Tensor, adds_positions: bool) -> Batch:
        index = real.nonzero()[:, 0]
        row = {name: row[name][:, index] if name in self.names else row[name] for name in row}
        row.pop("attention_mask", None)
        if adds_positions and "position_ids" not in self.names:
            row["position_ids"] = torch.arange(len(index), device=real.device)[None]
        return row

    @property
    def lengths(self) -> list[int]:
        return [row["input_ids"].shape[1] for row in self.rows]

    @property
    def has_tokens_alone(self) -> bool:
        """Whether there is nothing else in the batch, such as images or instructions."""
        return set(self.rows[0]) <= {*self.names, *SUPERVISION}

    def padded(self, side: str, pad_token_id: int) -> Batch:
        """All sequences as one batch, with at least two tokens of padding in each row, on the left or the right."""
        length = max(self.lengths) + 2
        values = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
        rows = []
        for row, own in zip(self.rows, self.lengths, strict=True):
            pad = (length - own, 0) if side == "left" else (0, length - own)
            tokens = {name: F.pad(row[name], pad, value=values.get(name, 0)) for name in self.names}
            mask = F.pad(torch.ones_like(row["input_ids"]), pad)
            rows.append({**row, **tokens, "attention_mask": mask})
        return joined(rows)

    def packed(self) -> Batch:
        """All sequences in one row, told apart by `position_ids` alone."""
        return joined(self.rows, dim=1)

    def cut(self, length: int) -> Batch:
        """The first `length` tokens of each sequence as one batch, without padding, labels and prompts."""
        kept = [name for name in self.rows[0] if name not in (*SUPERVISION, "position_ids")]
        return joined([{n: row[n][:, :length] if n in self.names else row[n] for n in kept} for row in self.rows])
