"""Rows of tokens as collators send them: packed, or padded."""

from itertools import pairwise

import torch
from hypothesis import strategies as st

PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])


@st.composite
def packed_rows(draw):
    """Lengths of the sequences of each row: every row has the same number of tokens, and at least one sequence."""
    total, rows = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    lengths = []
    for _ in range(rows):
        cuts = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=4))})
        lengths.append([b - a for a, b in pairwise(cuts)])
    return lengths


def segments_of(lengths: list[list[int]]) -> torch.Tensor:
    """Index of each token's sequence [B, T]."""
    return torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
