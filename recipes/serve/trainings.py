"""The trainings that the table of recipes/serve/losses.py compares, and their held-out losses."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed
from trl import ModelConfig, SFTConfig

from peft_queryable import fix_routes, mean_routes, record_routing, use_instruction_column, use_instructions
from recipes.common.evaluate import completion_loss, encode
from recipes.common.finetune import finetune, make_trainer

Losses = dict[str, float]  # per completion token, by task


@dataclass
class Work:
    """What a command trains with, and its data by task.

    Args:
        calibrate: training examples of each task that means of routes are taken on.
        batch: examples per batch where losses are measured.
        training_args: for a training on all tasks.
        model_args: names the base model.
        configs: of a "queryable" adapter and of a "lora".
        train: training examples.
        test: held-out examples.
    """

    calibrate: int
    batch: int
    training_args: SFTConfig
    model_args: ModelConfig
    configs: dict[str, Any]
    train: dict[str, Dataset]
    test: dict[str, Dataset]

    def trained(self, config: Any, tasks: list[str], seed: int, share: float = 1) -> tuple[nn.Module, Any]:
        """A model trained on these tasks for a share of the steps that one of all tasks takes, and its tokenizer."""
        training = copy.copy(self.training_args)
        training.seed = training.data_seed = seed
        training.num_train_epochs *= share * len(self.train) / len(tasks)
        training.warmup_steps = math.ceil(share * training.warmup_steps)
        training.max_steps = math.ceil(share * training.max_steps) if training.max_steps > 0 else -1
        examples = Dataset.from_list([example for task in tasks for example in self.train[task]])
        follows = getattr(config, "instruction_encoder", None) is not None
        if not follows and "instruction" in examples.column_names:
            examples = examples.remove_columns("instruction")
        training.remove_unused_columns = not follows
        set_seed(seed)  # of the new adapter
        name = f"{config.peft_type.value}-{seed}-{'-'.join(tasks) if len(tasks) == 1 else 'all'}"
        trainer = make_trainer(Path(training.output_dir, name), config, examples, training, self.model_args)
        if follows:
            use_instruction_column(trainer)
        finetune(trainer)
        return trainer.model.eval(), trainer.processing_class

    def loss(self, model: nn.Module, tokenizer: Any, examples: Dataset) -> float:
        """Mean loss per completion token."""
        rows = sorted((encode(example, tokenizer) for example in examples), key=lambda row: len(row["input_ids"]))
        sums = torch.zeros(2)
        for start in range(0, len(rows), self.batch):
            sums += torch.tensor(completion_loss(model, tokenizer, rows[start : start + self.batch]))
        return (sums[0] / sums[1]).item()

    def instruction(self, model: nn.Module, task: str) -> AbstractContextManager:
        """The block in which calls follow the task's instruction, if the adapter takes any."""
        if self.configs["queryable"].instruction_encoder is None:
            return nullcontext()
        return use_instructions(model, self.train[task][0]["instruction"])


def queryable(work: Work, seed: int) -> dict[str, Losses]:
    """One adapter of all tasks: routed, fixed in two ways, and with its gates closed."""
    model, tokenizer = work.trained(work.configs["queryable"], list(work.train), seed)
    test = {task: partial(work.loss, model, tokenizer, examples) for task, examples in work.test.items()}
    found, routes = {"routed": {}, "means": {}, "mean": {}, "closed": {}}, {}
    with record_routing(model) as trace_of_all:
        for task, examples in work.train.items():
            with work.instruction(model, task), record_routing(model) as trace:
                work.loss(model, tokenizer, examples.select(range(min(work.calibrate, len(examples)))))
            routes[task] = mean_routes(trace)
    for task, measure in test.items():
        with work.instruction(model, task):
            found["routed"][task] = measure()
        with fix_routes(model, routes[task]):
            found["means"][task] = measure()
        with fix_routes(model, mean_routes(trace_of_all)):
            found["mean"][task] = measure()
    for name, parameter in model.named_parameters():
        if "queryable_lora_gate" in name:
            parameter.data.fill_(-1e4)  # its sigmoid is 0
    found["closed"] = {task: measure() for task, measure in test.items()}
    return found


def lora(work: Work, seed: int) -> dict[str, Losses]:
    model, tokenizer = work.trained(work.configs["lora"], list(work.train), seed)
    return {"lora": {task: work.loss(model, tokenizer, examples) for task, examples in work.test.items()}}


def each(work: Work, seed: int, name: str, is_long: bool) -> dict[str, Losses]:
    """A LoRA for each task."""
    share, found = 1 if is_long else 1 / len(work.train), {}
    for task, examples in work.test.items():
        model, tokenizer = work.trained(work.configs["lora"], [task], seed, share)
        found[task] = work.loss(model, tokenizer, examples)
    return {name: found}


METHODS: dict[str, Callable[[Work, int], dict[str, Losses]]] = {
    "queryable": queryable,
    "lora": lora,
    "each": partial(each, name="each", is_long=False),
    "each-long": partial(each, name="each-long", is_long=True),
}
