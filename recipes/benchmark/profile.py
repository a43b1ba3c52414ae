"""Where the time goes: the operators of a step, ours beside plain LoRA's."""

from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from recipes.benchmark.methods import INSTRUCTED, SCOPES, adapted
from recipes.benchmark.shapes import Setup, base_model
from recipes.benchmark.work import WARM_UP, WORKS
from recipes.common.report import markdown_table

ROWS = 15


def write_profiles(setups: list[Setup], methods: list[str], works: list[str], modes: list[str], folder: Path) -> None:
    """Print and save one table per model, mode, work and method of ours."""
    for setup in setups:
        base = base_model(setup)
        for mode, work in product(modes, works):
            lora = operators("lora", base, setup, work, mode == "compile")
            for method in (method for method in methods if method in (*SCOPES, *INSTRUCTED)):
                text = comparison(lora, operators(method, base, setup, work, mode == "compile"))
                title = f"{setup.model}, {mode}, {work}: milliseconds of one run in {method} and in LoRA"
                (folder / f"profile-{setup.model}-{mode}-{work}-{method}.md").write_text(f"{title}\n\n{text}\n")
                print(f"\n{title}\n\n{text}")


def operators(method: str, base, setup: Setup, work: str, compiled: bool) -> dict[str, tuple[int, float]]:
    """Number of calls of each operator, and the milliseconds in it alone, on the device that runs it."""
    torch.compiler.reset()
    run = WORKS[work](adapted(method, base, setup), method, setup, compiled)
    for _ in range(WARM_UP):
        run()
    on_gpu = setup.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
    return {
        event.key: (event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000)
        for event in profiler.key_averages()
    }


def comparison(lora: dict, ours: dict) -> str:
    """The operators whose times differ most, and all of them together."""
    names = sorted(lora | ours, key=lambda name: -abs(ours.get(name, (0, 0))[1] - lora.get(name, (0, 0))[1]))
    pairs = {name: (lora.get(name, (0, 0.0)), ours.get(name, (0, 0.0))) for name in names}
    columns = zip(*pairs.values(), strict=True)
    total = [tuple(map(sum, zip(*column, strict=True))) for column in columns]
    rows = [
        [name, f"{b[0]:,}", f"{a[0]:,}", f"{b[1]:.1f}", f"{a[1]:.1f}", f"{b[1] - a[1]:+.1f}"]
        for name, (a, b) in [*list(pairs.items())[:ROWS], ("all", total)]
    ]
    return markdown_table(["operator", "calls", "LoRA's calls", "ms", "LoRA's ms", "difference"], rows)
