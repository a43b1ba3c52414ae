"""An encoder of instructions that can be looked into."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_queryable import InstructionEncoder


class Counting(InstructionEncoder):
    """Vectors of a text's length, and a list of what was encoded."""

    name = "counting"

    def __init__(self, width: int = 3) -> None:
        self.size, self.seen = width, []

    def encode(self, texts: list[str]) -> Tensor:
        self.seen += texts
        with torch.inference_mode():
            return torch.tensor([[len(text)] * self.size for text in texts], dtype=torch.bfloat16)


class Fixed(InstructionEncoder):
    """A random vector of width 5 for each text, always the same."""

    def encode(self, texts: list[str]) -> Tensor:
        seeds = [int.from_bytes(text.encode()[:7], "big") for text in texts]
        return torch.stack([3 * torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
