"""What is left to do of a command, as tasks for the workers, and the files that hold what is done."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor, nn

from recipes.common.workers import Workers
from recipes.regression.arguments import Arguments
from recipes.regression.backbones import BACKBONES
from recipes.regression.instructions import instruction
from recipes.regression.phases import adapt, pretrain
from recipes.regression.settings import Run, Setting


def chunks(runs: Sequence[Run], size: int) -> Iterator[Sequence[Run]]:
    return (runs[i : i + size] for i in range(0, len(runs), size))


def finished(path: Path, setting: Setting) -> set[tuple[str, str, int]]:
    """Method, function and seed of the runs that are in `path`."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(record["setting"] != asdict(setting) for record in records):
        raise SystemExit(f"{path} has runs of another setting: remove it, or name another --output_dir.")
    return {(record["method"], record["function"], record["seed"]) for record in records}


def name(args: Arguments) -> str:
    """What the files of a setting are called. A quick run has its own, so that no full run takes its backbones."""
    return args.setting + ("-quick" if args.quick else "")


def backbone_path(args: Arguments, run: Run) -> Path:
    return Path(args.output_dir, f"{name(args)}-{run.function}-{run.seed}.pt")


def pretrain_missing(args: Arguments, setting: Setting, runs: Sequence[Run], workers: Workers) -> None:
    """Make the backbones that no earlier command has made."""
    left = [run for run in runs if not backbone_path(args, run).exists()]
    tasks = [partial(pretrain_some, args, setting, chunk) for chunk in chunks(left, args.at_once)]
    list(workers.results(tasks, setting.pretrain_epochs, "pre-training"))  # the tasks write the backbones


def pretrain_some(args: Arguments, setting: Setting, runs: Sequence[Run], epochs: Queue) -> None:
    models = pretrain(setting, runs, args.device, args.compiled, partial(epochs.put, 1))
    for run, model in zip(runs, models, strict=True):
        unfinished = backbone_path(args, run).with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        unfinished.rename(backbone_path(args, run))


def backbone(args: Arguments, setting: Setting, run: Run) -> nn.Module:
    model = BACKBONES[setting.backbone]().to(args.device)
    model.load_state_dict(torch.load(backbone_path(args, run), map_location=args.device))
    return model


def adapt_missing(
    args: Arguments, setting: Setting, missing: Mapping[str, Sequence[Run]], results: Path, workers: Workers
) -> None:
    """Train each method's missing runs, and write their records to `results` as they end."""
    tasks = []
    for method, left in missing.items():
        for runs in chunks(left, args.at_once):
            texts = [instruction(run.function, args.encoder) if method == "instruction" else None for run in runs]
            tasks.append(partial(adapt_some, args, setting, method, runs, texts))
    for records in workers.results(tasks, setting.epochs, "adapting"):
        with results.open("a") as file:
            file.writelines(json.dumps({"setting": asdict(setting), **record}) + "\n" for record in records)


def adapt_some(
    args: Arguments,
    setting: Setting,
    method: str,
    runs: Sequence[Run],
    texts: Sequence[Tensor | None],
    epochs: Queue,
) -> list[dict]:
    backbones = [backbone(args, setting, run) for run in runs]
    return adapt(setting, method, runs, backbones, texts, args.device, args.compiled, partial(epochs.put, 1))
