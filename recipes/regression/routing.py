"""What the routes of a model tell of its router, in nats.

The atoms' use in all, H(mean route), is the sum of three parts (the chain rule of entropy): what a route leaves open,
what the example decides within a block, and what the block decides.
"""

import torch
from torch import Tensor


def entropy(weights: Tensor) -> Tensor:
    """Entropy of distributions over the last dimension."""
    return torch.special.entr(weights).sum(-1)


def route_statistics(routes: Tensor) -> list[dict[str, float]]:
    """Of each run of `routes` [R, B, n, M]: the three parts of the entropy, and the atoms that no route uses.

    Returns:
        A dictionary a run: `entropy` of a route; `by_example` and `by_block`, what these two decide; `dead` atoms.
    """
    one, block, all_blocks = entropy(routes), entropy(routes.mean(2)), entropy(routes.mean((1, 2)))
    statistics = {
        "entropy": one.mean((1, 2)),
        "by_example": (block - one.mean(2)).mean(1),
        "by_block": all_blocks - block.mean(1),
        "dead": (routes.amax((1, 2)) == 0).sum(1),
    }
    columns = zip(*(values.tolist() for values in statistics.values()), strict=True)
    return [dict(zip(statistics, column, strict=True)) for column in columns]
