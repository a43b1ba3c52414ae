"""What the numbers of a run depend on: its settings, by which an interrupted run is recognised, and its command."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from recipes.benchmark.arguments import Arguments
from recipes.benchmark.cells import FAILED


def settings(args: Arguments) -> dict:
    """What the numbers depend on: the arguments, the machine and torch."""
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


def command(settings: dict) -> str:
    """The command of a run, by the arguments that differ from their defaults."""
    defaults = asdict(Arguments())
    chosen = {name: value for name, value in settings.items() if name in defaults and value != defaults[name]}
    words = [f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in chosen.items()]
    return " ".join(["python -m recipes.benchmark", *words])


def conditions(settings: dict) -> str:
    """The command, the machine and the sizes, as they stand above the tables."""
    return (
        f"```bash\n{command(settings)}\n```\n\n"
        f"{settings['machine']}, threads: {settings['threads']}, {settings['dtype']}, torch {settings['torch']}; "
        f"{settings['rounds']} rounds; {settings['batch']} rows of {settings['length']} tokens in prefill and "
        f"training, {settings['new_tokens']} new tokens after {settings['prompt']} in decoding. Ratios are medians "
        'over the rounds, with quartiles. "Within noise": the lower quartile meets the target, the median does not. '
        f'"{FAILED}": the method raises an error.'
    )
