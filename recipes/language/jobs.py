"""What is left to do of a command, as tasks for the workers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Queue

import torch
from torch import nn

from recipes.common.workers import Workers
from recipes.language.arguments import JobArguments, Setting
from recipes.language.base import new_base, pretrain
from recipes.language.records import add, finished
from recipes.language.runs import Job, finetune
from recipes.language.skills import stages_of


def chunks(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (seeds[i : i + size] for i in range(0, len(seeds), size))


def base_path(args: JobArguments, seed: int) -> Path:
    """A quick command has bases of its own, so that no full one takes them."""
    return Path(args.output_dir, f"{'quick-' if args.quick else ''}base-{seed}.pt")


def pretrain_missing(args: JobArguments, setting: Setting, seeds: Sequence[int], workers: Workers) -> None:
    """Make the bases that no earlier command has made."""
    left = [seed for seed in seeds if not base_path(args, seed).exists()]
    tasks = [partial(pretrain_some, args, setting, some) for some in chunks(left, args.at_once)]
    list(workers.results(tasks, setting.base_steps, "pre-training", "step"))  # the tasks write the bases


def pretrain_some(args: JobArguments, setting: Setting, seeds: Sequence[int], steps: Queue) -> None:
    models = pretrain(seeds, setting.base_steps, setting.base_batch, partial(steps.put, 1))
    for seed, model in zip(seeds, models, strict=True):
        unfinished = base_path(args, seed).with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        unfinished.rename(base_path(args, seed))


def base(args: JobArguments, seed: int) -> nn.Module:
    model = new_base()
    model.load_state_dict(torch.load(base_path(args, seed)))
    return model


def missing_runs(jobs: Sequence[Job], seeds: Sequence[int], results: Path, setting: Setting) -> dict[Job, list[int]]:
    """The seeds of each job that `results` has no record of."""
    done = finished(results, asdict(setting))
    return {job: left for job in jobs if (left := [seed for seed in seeds if (*job, seed) not in done])}


def finetune_missing(
    args: JobArguments, setting: Setting, missing: Mapping[Job, Sequence[int]], results: Path, workers: Workers
) -> None:
    """Train the missing runs, job after job, and write their records to `results` as they end."""
    tasks = [
        partial(finetune_some, args, setting, job, seeds)
        for job, left in missing.items()
        for seeds in chunks(left, args.at_once)
    ]
    for records in workers.results(tasks, setting.steps, "fine-tuning", "step"):
        add(results, asdict(setting), records)


def finetune_some(args: JobArguments, setting: Setting, job: Job, seeds: Sequence[int], steps: Queue) -> list[dict]:
    stages = len(stages_of(job.condition))
    share = setting.steps / (setting.steps if stages == 1 else stages * setting.stage_steps)
    done = 0.0

    def advance() -> None:  # every task counts as `steps` steps
        nonlocal done
        done += share
        while done >= 1 - 1e-9:
            steps.put(1)
            done -= 1

    return finetune(setting, job, seeds, [base(args, seed) for seed in seeds], advance)
