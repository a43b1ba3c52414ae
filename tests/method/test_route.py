"""What a route does to the rank states of its block."""

import pytest
import torch
from helpers.models import adapted
from torch import nn


def test_other_tokens_than_the_stacks_are_refused():
    """A module that sees other tokens than its block raises a ValueError with both numbers and a remedy."""

    class Shorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x)[:, :3])

    model = adapted(Shorter(), target_modules=["first", "second"], num_blocks=1, routing_scope="causal")
    with pytest.raises(ValueError, match=r"3 tokens per row.* routes 5.*`exclude_modules`"):
        model(torch.randn(2, 5, 4))
