"""What the routes of a model tell about its router, in nats.

The entropy of the atoms' use, H(mean route), is the sum of three parts (its chain rule): what a route leaves open,
what the example decides within a block, and what the block decides.
"""

import torch
from torch import Tensor


def entropy(weights: Tensor) -> Tensor:
    """Entropy of distributions over the last dimension."""
    return torch.special.entr(weights).sum(-1)


def route_statistics(routes: Tensor) -> list[dict[str, float]]:
    """The three parts of the entropy, and the atoms that no route uses, of each run of `routes` [R, B, n, M].

    Returns:
        One dictionary per run: `entropy` of a route, `by_example` and `by_block`, and the number of `dead` atoms.
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
