"""One comparison's runs: an arm at a rank and a learning rate, for several seeds that train as one stacked model."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.language.arguments import Setting
from recipes.language.arms import attach, find, inputs, routing
from recipes.language.prompted import PromptStates
from recipes.language.routes import shuffled, told_by
from recipes.language.skills import TASKS, stages_of, task_lines, tasks_of
from recipes.language.stacked import Stacked, is_exact, train

TRAIN, VALIDATION, TEST = range(3)  # streams of examples


class Job(NamedTuple):
    condition: str
    rank: int
    arm: str
    lr: float


class Runs:
    """The runs of a job. A seed has the same base and the same examples in every arm.

    Args:
        setting: sizes.
        job: what to train.
        seeds: one for each run.
        bases: the pre-trained base of each; they are changed.
    """

    def __init__(self, setting: Setting, job: Job, seeds: Sequence[int], bases: Sequence[nn.Module]) -> None:
        self.setting, self.job, self.seeds, self.arm = setting, job, seeds, find(job.arm)
        self.copies = len(TASKS) if self.arm.is_each else 1  # models per run
        models = []
        for seed, base in zip(seeds, bases, strict=True):
            for i in range(self.copies):
                torch.manual_seed(1000 * i + seed)
                models.append(attach(self.arm, copy.deepcopy(base), job.rank, job.condition))
        self.usages: list[Tensor] = []  # after each stage, if there are several: of all tasks, [R, tasks, blocks, M]
        prompt_states = PromptStates(bases, job.condition) if self.arm.is_prompted else None
        given = partial(inputs, self.arm, job.condition, prompt_states)
        self.stacked = Stacked(models, given, partial(routing, self.arm))

    def tasks(self, stage: int, n: int) -> Tensor:
        """The tasks of n lines, as each model gets them."""
        return tasks_of(self.job.condition, stage, n)[: n // self.copies]

    def stream(self, stage: int, n: int, kind: int) -> Callable[[], Tensor]:
        """A function that draws n further lines of each run: [R, n, 15], or [8 R, n / 8, 15] with a model per task."""
        tasks = tasks_of(self.job.condition, stage, n)
        generators = [torch.Generator().manual_seed(3 * (100 * seed + stage) + kind) for seed in self.seeds]

        def draw() -> Tensor:
            lines = torch.stack([task_lines(self.job.condition, tasks, generator) for generator in generators])
            by_copy = lines.unflatten(1, (-1, self.copies)).transpose(1, 2)  # [R, copies, n / copies, 15]
            return by_copy.flatten(0, 1)

        return draw

    def train(self, advance: Callable[[], object]) -> list[list[Tensor]]:
        """Train; the test losses [R] of all tasks after each stage, if there are several."""
        stages, matrix = stages_of(self.job.condition), []
        for stage in stages:
            steps = self.setting.steps if len(stages) == 1 else self.setting.stage_steps
            batch = self.setting.batch
            lines = self.stream(stage, batch, TRAIN)
            train(self.stacked, self.job.lr, steps, lines, self.tasks(stage, batch), advance, self.arm.lr_factors)
            if len(stages) > 1:
                matrix.append(self.losses(TEST))
                if self.arm.is_routed:
                    self.usages.append(self.usage())
        return matrix

    @torch.no_grad()
    def over_stages(self, function: Callable[[Tensor, Tensor], Tensor], kind: int) -> list[Tensor]:
        """Means over lines of `function`, of lines and their tasks, for each stage's lines: [R] each."""
        stages, means = stages_of(self.job.condition), []
        n = (self.setting.test if kind == TEST else self.setting.validation) // len(stages)
        for stage in stages:
            values = function(self.stream(stage, n, kind)(), self.tasks(stage, n))  # [copies R, n / copies]
            means.append(values.reshape(len(self.seeds), -1).mean(1))
        return means

    def losses(self, kind: int) -> list[Tensor]:
        return self.over_stages(self.stacked.losses, kind)

    def exact(self, kind: int) -> list[Tensor]:
        return self.over_stages(partial(self.stacked.map, is_exact), kind)

    @torch.no_grad()
    def usage(self) -> Tensor:
        """The mean routes of each stage's test answers, [R, stages, blocks, M]."""
        stages = stages_of(self.job.condition)
        n = self.setting.test // len(stages)
        means = [self.stacked.routes(self.stream(s, n, TEST)(), self.tasks(s, n)).mean((2, 3)) for s in stages]
        return torch.stack(means, 1)

    @torch.no_grad()
    def routes(self) -> list[dict[str, float]]:
        """What each run's routes of test answers tell, in bits; means over blocks."""
        n = self.setting.test
        tasks = self.tasks(0, n)
        told = []
        for weights in self.stacked.routes(self.stream(0, n, TEST)(), tasks):  # [blocks, n, K, M] of a run
            lengths = torch.full((n,), weights.shape[2])
            told.append(told_by(dict(enumerate(weights.flatten(1, 2))), lengths, tasks))
        return told


def finetune(
    setting: Setting, job: Job, seeds: Sequence[int], bases: Sequence[nn.Module], advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Train and measure an arm; one record per seed."""
    runs = Runs(setting, job, seeds, bases)
    start = time.perf_counter()
    matrix = runs.train(advance)
    seconds = (time.perf_counter() - start) / len(seeds)
    trainable = runs.copies * sum(p[0].numel() for p in runs.stacked.learned.values())
    measured = {
        "validation": runs.losses(VALIDATION),
        "test": runs.losses(TEST),
        "exact": runs.exact(TEST),
    }
    told: list[dict[str, float]] = [{} for _ in seeds]
    if runs.arm.is_routed and not matrix:
        with shuffled(runs.stacked.template, setting.test):
            measured["shuffled"] = runs.losses(TEST)
        told = runs.routes()
    records = []
    for i, seed in enumerate(seeds):
        record = {**job._asdict(), "seed": seed, "trainable": trainable, "seconds": seconds}
        record |= {name: finite(sum(means)[i].item() / len(means)) for name, means in measured.items()} | told[i]
        if matrix:  # [stages, tasks]
            record["matrix"] = [[finite(loss[i].item()) for loss in row] for row in matrix]
        if runs.usages:  # [stages, tasks, blocks, M]
            usage = torch.stack([usage[i] for usage in runs.usages]).double()  # a float would be written in 17 digits
            record["usage"] = usage.round(decimals=4).tolist()
        records.append(record)
    return records


def finite(loss: float) -> float:
    """A run that diverged has an infinite loss."""
    return loss if isfinite(loss) else inf
