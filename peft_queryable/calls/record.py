"""What a recorder gets of a call that has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class RoutedCall:
    """Routes of one adapter in one call of one stack of layers.

    Args:
        adapter_name: the adapter.
        stack: name of the module that runs the layers.
        weights: by block, counted through all stacks, the weights over the atoms [B, K, M], without a graph. B is
            the number of rows that the adapter serves; K is 1 where one route serves a row, else its number of tokens.
            A trace has them on the CPU; a recorder gets them on the router's device.
        real: [B, K] bool, False for padding; None if all are real or K is 1.
    """

    adapter_name: str
    stack: str
    weights: dict[int, Tensor]
    real: Tensor | None

    def row(self, block: int, row: int) -> Tensor:
        """The routes of one row without those of padding: [T, M], or [1, M] where one serves the row."""
        weights = self.weights[block][row]
        return weights if self.real is None else weights[self.real[row]]

    def cpu(self) -> RoutedCall:
        """The same on the CPU."""
        weights = {block: weights.cpu() for block, weights in self.weights.items()}
        return replace(self, weights=weights, real=None if self.real is None else self.real.cpu())


Recorder = Callable[[RoutedCall], None]
