"""What a recorder gets of a call that has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutedCall:
    """Routes of one adapter in one call of one stack of layers.

    Args:
        adapter_name: the adapter.
        stack: name of the module that runs the layers.
        weights: by block, counted through all stacks, the weights over the atoms [B, K, M], on the CPU. B is the
            number of rows that the adapter serves; K is 1 where one route serves a row, else its number of tokens.
        real: [B, K] bool, False for padding; None if all are real or K is 1.
    """

    adapter_name: str
    stack: str
    weights: dict[int, Tensor]
    real: Tensor | None


Recorder = Callable[[RoutedCall], None]
