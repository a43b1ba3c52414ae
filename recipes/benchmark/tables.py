"""The tables of a model: times beside LoRA's with their quartiles, sizes, operations and memory."""

import statistics

from recipes.benchmark.cells import NAMES, WORK_NAMES, absolute, quartiles, ratio_cell, time_cell
from recipes.benchmark.methods import INSTRUCTED, SCOPES
from recipes.common.report import markdown_table

TIME_TARGETS = {"sequence": 1.00, "prompt": 1.00, "causal": 1.02}
COMPILED_TARGETS = {"sequence": 1.03, "prompt": 1.03, "causal": 1.03}
LOAD_TARGET, MEMORY_TARGET, ARITHMETIC_TARGET, INSTRUCTION_TARGET = 1.1, 1.02, 1.006, 1.01


def time_table(sections: dict, model: str, mode: str, methods: list[str], works: list[str]) -> str:
    """Times beside LoRA's; those of our scopes beside their targets, too."""
    times = {work: sections[f"{model}/{mode}/{work}"] for work in works}
    targets = COMPILED_TARGETS if mode == "compile" else TIME_TARGETS
    rows = [["LoRA takes", *(absolute(work, times[work]) for work in works)]]
    for method in methods:
        target = targets.get(method)
        rows.append([NAMES[method], *(time_cell(times[work], method, "lora", target) for work in works)])
    return markdown_table([f"time / LoRA's: {model}, {mode}", *map(WORK_NAMES.get, works)], rows)


def instruction_table(sections: dict, model: str, mode: str, methods: list[str], works: list[str]) -> str:
    """Times with an instruction beside those of the same scope without."""
    times = {work: sections[f"{model}/{mode}/{work}"] for work in works}
    rows = []
    for method in methods:
        scope = method.partition("+")[0]
        rows.append([NAMES[method], *(time_cell(times[work], method, scope, INSTRUCTION_TARGET) for work in works)])
    header = ["time / the same scope's without an instruction", *map(WORK_NAMES.get, works)]
    return markdown_table(header, rows)


def size_table(sections: dict, model: str, methods: list[str], works: list[str]) -> str:
    """Parameters, files, operations, and the memory of training; elsewhere the base model's weights are the peak."""
    sizes = sections[f"{model}/sizes"]
    works = [work for work in works if work.startswith("train")] or works
    memory = {work: sections[f"{model}/memory/{work}"]["bytes"] for work in works}
    header = [
        f"size: {model}",
        "trainable parameters",
        "on disk, kB",
        "time to load / LoRA's",
        *(f"operations / LoRA's: {WORK_NAMES[work]}" for work in sizes["flops"]),
        *(f"peak memory / LoRA's: {WORK_NAMES[work]}" for work in works),
    ]
    load = f"{statistics.median(sizes['seconds']['lora']):.2f} s"
    operations = [f"{flops['lora'] / 1e9:,.1f} G" for flops in sizes["flops"].values()]
    rows = [["LoRA takes", "", "", load, *operations, *(f"{m['lora'] / 2**20:,.0f} MiB" for m in memory.values())]]
    for method in methods:
        is_ours = method in (*SCOPES, *INSTRUCTED)
        on_disk = f"{sizes['bytes'][method] / 1000:,.0f}" if method in sizes["bytes"] else ""
        row = [NAMES[method], f"{sizes['trainable'][method]:,}", on_disk]
        row.append(time_cell(sizes, method, "lora", LOAD_TARGET if is_ours else None))
        row += [ratio_cell(flops, method, ARITHMETIC_TARGET if is_ours else None) for flops in sizes["flops"].values()]
        row += [ratio_cell(memory[work], method, MEMORY_TARGET if is_ours else None) for work in works]
        rows.append(row)
    return markdown_table(header, rows)


def launch_table(sections: dict, model: str) -> str:
    """Kernel launches and bytes moved, counted."""
    counted = sections[f"{model}/sizes"]["launches"]
    header, lora = ["counted"], counted["lora"]
    for work in lora:
        header += [f"launches in a {work}", f"bytes moved in a {work}"]
    rows = []
    for method, works in counted.items():
        row = [NAMES[method]]
        for work, (calls, moved) in works.items():
            row += [f"{calls:,} ({calls / lora[work][0]:.3f})", f"{moved / 1e6:,.0f} MB ({moved / lora[work][1]:.3f})"]
        rows.append(row)
    return markdown_table(header, rows)


def report(results: dict, model: str) -> str:
    """The tables of one model, in Markdown: what is ours first."""
    settings, sections = results["settings"], results["sections"]
    methods, works = settings["methods"], settings["works"]
    scopes = [method for method in methods if method in SCOPES]
    instructed = [method for method in methods if method in INSTRUCTED and method.partition("+")[0] in methods]
    others = [method for method in methods if method not in ("lora", *SCOPES, *INSTRUCTED)]
    parts = []
    for mode in settings["modes"]:
        parts.append(time_table(sections, model, mode, scopes, works))
        if others:
            parts.append(time_table(sections, model, mode, others, works))
        if instructed:
            parts.append(instruction_table(sections, model, mode, instructed, works))
    parts += [size_table(sections, model, methods, works), launch_table(sections, model)]
    if f"{model}/callback" in sections:
        parts.append(callback_line(sections[f"{model}/callback"], model))
    return "\n\n".join(parts)


def callback_line(times: dict, model: str) -> str:
    """What `RoutingCallback` costs in a step that it counts, and with its default of every tenth."""
    low, median, high = quartiles(times["seconds"], "counted", "plain")
    return (
        f"A training step of {model} in scope `causal` whose routes `RoutingCallback` counts takes {median:.3f} "
        f"({low:.3f} to {high:.3f}) of one without; it counts every tenth, so training takes "
        f"{1 + (median - 1) / 10:.4f} of its time, target at most 1.01."
    )
