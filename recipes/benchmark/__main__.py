# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Time and memory of Queryable LoRA against PEFT's LoRA and its relatives, measured in pairs in one process.

# Everything that docs/speed.md shows of this machine, and the page itself
python recipes/benchmark.py --write_docs

# Compiled, on a GPU; methods that torch.compile does not take are slow to fail, so name the others
python recipes/benchmark.py --device cuda --dtype bfloat16 --modes eager compile \
    --methods base lora sequence prompt causal

# Where the time goes: the operators of a step, beside plain LoRA's
python recipes/benchmark.py --profile --models SmolLM2-135M --methods causal --works decode_1

# A tiny model and few rounds, to see that it runs
python recipes/benchmark.py --quick

An interrupted run goes on where it stopped if it is started with the same arguments.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from benchmark_growth import growth_table
from benchmark_plan import QUICK, Arguments, sections, setups
from benchmark_plots import plot_growth, plot_ratios
from benchmark_profile import write_profiles
from benchmark_report import conditions, report, write_docs
from tqdm import tqdm
from transformers import HfArgumentParser


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
        compiled = " --modes compile" if args.modes == ["compile"] else ""
        places = {f"--device {args.device} --models {m}{compiled}": report(results, m) for m in args.models}
        figures = [plot_ratios(results, model, output) for model in args.models]
    if args.sweeps != ["none"]:
        places[f"--device {args.device} --sweeps"] = growth_table(results)
        figures.append(plot_growth(results, output))
    texts = [f"{conditions(results['settings'])}\n\n{text}" for text in places.values()]
    (output / "benchmark.md").write_text("\n\n".join(texts) + "\n")
    print(*texts, sep="\n\n")
    if args.write_docs:
        for place, text, figure in zip(places, texts, figures, strict=True):
            write_docs(text, figure, place)


def settings(args: Arguments) -> dict:
    """What the numbers depend on, by which an earlier run is recognised."""
    chosen = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "write_docs")}
    machine = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    return chosen | {"machine": machine, "torch": str(torch.__version__)}


def read_results(path: Path, settings: dict) -> dict:
    """The results of an earlier run with these settings, or empty ones."""
    if not path.exists():
        return {"settings": settings, "sections": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{path} was measured with other settings: remove it, or name another --output_dir.")
    return results


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
