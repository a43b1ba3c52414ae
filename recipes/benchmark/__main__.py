# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Time and memory of Queryable LoRA against PEFT's LoRA and its relatives, measured in pairs in one process.

# Everything that docs/speed.md shows, measured on this machine and written into the page
python -m recipes.benchmark --write_docs

# Compiled, on a GPU. Methods that torch.compile does not take are slow to fail, so name the others
python -m recipes.benchmark --device cuda --dtype bfloat16 --modes eager compile \
    --methods base lora sequence prompt causal

# Where the time goes: the operators of a step, beside plain LoRA's
python -m recipes.benchmark --profile --models SmolLM2-135M --methods causal --works decode_1

# A tiny model and few rounds, to see that it runs
python -m recipes.benchmark --quick

The same command goes on where an interrupted run stopped.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from recipes.benchmark.arguments import QUICK, Arguments
from recipes.benchmark.conditions import conditions, read_results, settings
from recipes.benchmark.growth import growth_table
from recipes.benchmark.plan import sections, setups
from recipes.benchmark.plots import plot_growth, plot_ratios
from recipes.benchmark.profile import write_profiles
from recipes.benchmark.tables import report
from recipes.common.report import fill_place


def main(args: Arguments) -> None:
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # all methods share the code of the base model
    if args.profile:
        write_profiles(setups(args), args.methods, args.works, args.modes, output)
        return
    results = read_results(output / "benchmark.json", settings(args))
    measurements = sections(args)
    for name in tqdm(measurements, desc="benchmark"):
        if name not in results["sections"]:
            results["sections"][name] = measurements[name]()
            (output / "benchmark.json").write_text(json.dumps(results, indent=1))
    places, figures = {}, []
    if args.works != ["none"]:
        further = " --modes compile" if args.modes == ["compile"] else ""
        further += f" --threads {args.threads}" if args.threads > 1 else ""
        places = {f"--device {args.device} --models {m}{further}": report(results, m) for m in args.models}
        figures = [plot_ratios(results, model, output) for model in args.models]
    if args.sweeps != ["none"]:
        places[f"--device {args.device} --sweeps"] = growth_table(results)
        figures.append(plot_growth(results, output))
    texts = [f"{conditions(results['settings'])}\n\n{text}" for text in places.values()]
    (output / "benchmark.md").write_text("\n\n".join(texts) + "\n")
    print(*texts, sep="\n\n")
    if args.write_docs:
        for place, text, figure in zip(places, texts, figures, strict=True):
            fill_place("speed.md", f"recipes.benchmark {place}", text, {figure.name: figure})


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
