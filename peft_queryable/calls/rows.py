"""The rows of a batch that has several adapters (PEFT's `adapter_names`): each adapter serves a part of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows `index` [n] of a call's `batch` rows that one adapter serves."""

    index: Tensor
    batch: int

    @classmethod
    def of(cls, adapter_name: str, row_adapters: Sequence[str] | None) -> Rows | None:
        """The rows of `adapter_name` where `row_adapters` names the adapter of each row; None if it serves all."""
        if row_adapters is None:
            return None
        index = [row for row, name in enumerate(row_adapters) if name == adapter_name]
        return None if len(index) == len(row_adapters) else cls(torch.tensor(index), len(row_adapters))

    def take(self, x: Tensor) -> Tensor:
        """Activations [B, ..., d] or [B T, d] of these rows: [n, T, d]."""
        return x.reshape(self.batch, -1, x.shape[-1])[self.index.to(x.device)]

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x` with `rows` [n, T, d] in the place of these rows."""
        by_row = x.reshape(self.batch, -1, x.shape[-1])
        return by_row.index_copy(0, self.index.to(x.device), rows.to(x.dtype)).view(x.shape)

    def select(self, x: Tensor) -> Tensor:
        """The entries of these rows among those of all, [B, ...] to [n, ...]."""
        return x[self.index.to(x.device)]

    def spread(self, x: Tensor) -> Tensor:
        """The entries `x` [n, ...] of these rows among zeros for the others: [B, ...]."""
        return x.new_zeros(self.batch, *x.shape[1:]).index_copy(0, self.index.to(x.device), x)


def name_rows(adapter_names: Sequence[str] | None, batch: int, may_repeat: bool) -> list[str] | None:
    """The adapter of each of `batch` rows, or None for a batch of the active adapters.

    Args:
        adapter_names: one name per row, "__base__" for rows without an adapter; None for none.
        batch: number of rows.
        may_repeat: whether each name may stand for several rows in a row, as `generate` repeats them for beams.

    Raises:
        ValueError: if there is another number of names.
    """
    if adapter_names is None:
        return None
    number = len(adapter_names)
    if number == 0 or batch % number or (batch != number and not may_repeat):
        raise ValueError(
            f"`adapter_names` has {number} names for a batch of {batch}: give one name for each row, "
            "'__base__' for rows without an adapter."
        )
    return [name for name in adapter_names for _ in range(batch // number)]
