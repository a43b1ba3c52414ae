# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""When does the method beat LoRA on a language model? A tiny one, pre-trained here, and thousands of paired runs.

# All of it: seven ways of telling a task, eleven arms, two ranks, four rates, ten seeds
python -m recipes.language

# A part of it; the next command adds to it
python -m recipes.language --conditions first token --ranks 8 --arms lora lora-2r static scale-1 scale-0.3

# A few steps of three arms, to see that it runs
python -m recipes.language --quick

Every finished run is a line of OUTPUT/runs.jsonl, and an interrupted command goes on after the last one.
`python -m recipes.language.tables` makes the tables again.
"""

from itertools import product
from pathlib import Path

from transformers import HfArgumentParser

from recipes.common.workers import Workers
from recipes.language.arguments import FIRST_CHOOSING_SEED, QUICK, Arguments, setting_of
from recipes.language.jobs import finetune_missing, missing_runs, pretrain_missing
from recipes.language.runs import Job
from recipes.language.tables import report


def main(args: Arguments) -> None:
    setting = setting_of(args)
    name = ("quick-" if args.quick else "") + ("choosing" if args.choosing else "runs")
    results = Path(args.output_dir, f"{name}.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    first = FIRST_CHOOSING_SEED if args.choosing else 0
    seeds = range(first, first + args.seeds)
    jobs = [Job(*each) for each in product(args.conditions, args.ranks, args.arms, args.rates) if is_sensible(*each)]
    missing = missing_runs(jobs, seeds, results, setting)
    with Workers(args.processes) as workers:
        pretrain_missing(args, setting, sorted({seed for left in missing.values() for seed in left}), workers)
        finetune_missing(args, setting, missing, results, workers)
    text = report(results)
    results.with_suffix(".md").write_text(text)
    print(text)


def is_sensible(condition: str, rank: int, arm: str, lr: float) -> bool:
    """One LoRA per task is LoRA where there is one task, and forgets nothing by its making."""
    return not (arm in ("lora-each", "oracle") and condition in ("single", "sequence"))


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
