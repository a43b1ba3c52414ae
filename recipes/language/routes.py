"""What routes tell, and the routes of other lines in place of a line's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import log
from statistics import mean

import torch
from torch import Tensor, nn

from peft_queryable import RouteStatistics
from peft_queryable.metrics import information


def told_by(routes: Mapping[int, Tensor], lengths: Tensor, tasks: Tensor) -> dict[str, float]:
    """What routes of answers tell of the task and of the place in the answer, in bits; means over blocks.

    Args:
        routes: by block, those of all answers' tokens, [N, M].
        lengths: tokens of each answer [n], N together.
        tasks: task of each answer, [n].
    """
    statistics = RouteStatistics()
    statistics.add(routes)
    summary = statistics.summary()
    whole = [each.double() for each in routes.values()]
    by_task, by_place = tasks.repeat_interleave(lengths), torch.cat([torch.arange(int(length)) for length in lengths])
    return {
        "mi_task": mean(information(each, by_task).item() for each in whole) / log(2),
        "mi_place": mean(information(each, by_place).item() for each in whole) / log(2),
        "entropy": summary["entropy"] / log(2),
        "dead": summary["dead"],
    }


@contextmanager
def shuffled(model: nn.Module, n: int) -> Iterator[None]:
    """Within it, each of n lines has the routes that another one would have."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    router = model.base_model.queryable_lora_router["default"]
    handle = router.register_forward_hook(lambda router, arguments, weights: weights[order])
    try:
        yield
    finally:
        handle.remove()
