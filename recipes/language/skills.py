"""Sequence skills: what the base learns, the tasks that recombine it, and the ways in which a task is told.

A line of tokens is two cues, six symbols, a separator and the six answers: the symbols in another order, each mapped
to another symbol. Token ids: symbols first, then the separator, "no cue", and cues of orders, maps and tasks.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

SYMBOLS, LENGTH = 16, 6
ORDERS = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5, 0], [1, 0, 3, 2, 5, 4]])
MAPS = torch.stack([torch.arange(16), (torch.arange(16) + 1) % 16, 15 - torch.arange(16), (torch.arange(16) + 5) % 16])
SKILLS = [(order, map) for order, map in product(range(4), range(4)) if order == 0 or map == 0]  # of the base
TASKS = [(order, map) for order, map in product(range(1, 4), range(1, 4))][:8]  # none of them a skill
SEPARATOR, NO_CUE, ORDER_CUE, MAP_CUE, TASK_CUE = 16, 17, 18, 22, 26
VOCABULARY = TASK_CUE + len(TASKS)
PROMPT = 2 + LENGTH  # tokens before the separator

# How the task is told: by the second cue; by the value, modulo 8, of a symbol at this place; by nothing in the tokens,
# so that the adapter has to be told; or there is one task only; or one after another, each with its cue.
PLACES = {"first": 0, "middle": LENGTH // 2, "last": LENGTH - 1}
CONDITIONS = ("token", *PLACES, "instruction", "single", "sequence")
INSTRUCTIONS = torch.randn(len(TASKS), 16, generator=torch.Generator().manual_seed(0))  # e(c) of each task


def lines(skills: Tensor, cues: Tensor, symbols: Tensor) -> Tensor:
    """Token ids [n, 15] of n lines.

    Args:
        skills: order and map of each, [n, 2].
        cues: the two cues, [n, 2].
        symbols: [n, 6].
    """
    order, map = skills.T
    answers = MAPS[map].gather(1, symbols.gather(1, ORDERS[order]))
    return torch.cat([cues, symbols, torch.full((len(cues), 1), SEPARATOR), answers], 1)


def skill_lines(n: int, generator: torch.Generator) -> Tensor:
    """Lines of the base's skills, each told by the cues of its order and its map: [n, 15]."""
    skills = torch.tensor(SKILLS)[torch.randint(len(SKILLS), (n,), generator=generator)]
    symbols = torch.randint(SYMBOLS, (n, LENGTH), generator=generator)
    return lines(skills, skills + torch.tensor([ORDER_CUE, MAP_CUE]), symbols)


def task_lines(condition: str, tasks: Tensor, generator: torch.Generator) -> Tensor:
    """Lines of `tasks` [n], told as `condition` says: [n, 15]."""
    symbols = torch.randint(SYMBOLS, (len(tasks), LENGTH), generator=generator)
    if condition in PLACES:
        symbols[:, PLACES[condition]] = tasks + 8 * torch.randint(2, tasks.shape, generator=generator)
    cue = TASK_CUE + tasks if condition in ("token", "sequence") else torch.full_like(tasks, NO_CUE)
    return lines(torch.tensor(TASKS)[tasks], torch.stack([torch.full_like(tasks, NO_CUE), cue], 1), symbols)


def tasks_of(condition: str, stage: int, n: int) -> Tensor:
    """The tasks of n rows, [n]: row i has task i modulo 8, or all have the one of the stage."""
    if condition in ("single", "sequence"):
        return torch.full((n,), stage)
    return torch.arange(n) % len(TASKS)


def stages_of(condition: str) -> Sequence[int]:
    """The stages of a fine-tuning, by index."""
    return range(len(TASKS)) if condition == "sequence" else (0,)
