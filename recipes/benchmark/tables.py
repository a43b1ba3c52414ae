"""The tables of a model: times beside LoRA's with their quartiles, sizes, operations and memory."""

import statistics

from recipes.benchmark.methods import INSTRUCTED, SCOPES
from recipes.common.report import markdown_table

NAMES = {
    "base": "base model",
    "lora": "LoRA",
    "dora": "DoRA",
    "lily": "Lily",
    "vblora": "VB-LoRA",
    "xlora": "X-LoRA",
    **{scope: f"ours, `{scope}`" for scope in SCOPES},
    **{method: f"ours, `{method.partition('+')[0]}`, instruction" for method in INSTRUCTED},
}
WORK_NAMES = {
    "prefill": "prefill",
    "decode_1": "decoding, batch 1",
    "decode_8": "decoding, batch 8",
    "train": "training step",
    "train_checkpointed": "training step, checkpointed",
}
FAILED = "cannot"  # the JSON has the error
TIME_TARGETS = {"sequence": 1.00, "prompt": 1.00, "causal": 1.03}
MEMORY_TARGET, ARITHMETIC_TARGET, INSTRUCTION_TARGET = 1.02, 1.006, 1.01


def quartiles(seconds: dict[str, list[float]], method: str, baseline: str) -> list[float]:
    """Lower quartile, median and upper quartile, over the rounds, of the ratio of `method` to `baseline`."""
    ratios = [a / b for a, b in zip(seconds[method], seconds[baseline], strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def judged(ratio: float, target: float | None, spread: str = "") -> str:
    """A ratio, and whether it meets its target."""
    if target is None:
        return f"{ratio:.3f}{spread}"
    return f"{ratio:.3f}{spread}, {'meets' if ratio <= target else '**misses**'} {target:.3f}"


def time_cell(times: dict, method: str, baseline: str, target: float | None) -> str:
    if {method, baseline} & times["failed"].keys():
        return FAILED
    if method not in times["seconds"]:
        return ""
    low, median, high = quartiles(times["seconds"], method, baseline)
    return judged(median, target, f" ({low:.3f} to {high:.3f})")


def absolute(work: str, times: dict) -> str:
    """What LoRA takes by itself, for comparing machines."""
    if "lora" in times["failed"]:
        return FAILED
    seconds = statistics.median(times["seconds"]["lora"])
    batch = work.removeprefix("decode_")
    return f"{int(batch) / seconds:.1f} tokens/s" if batch != work else f"{seconds * 1000:.0f} ms"


def time_tables(sections: dict, model: str, mode: str, methods: list[str], works: list[str]) -> str:
    times = {work: sections[f"{model}/{mode}/{work}"] for work in works}
    plain = [method for method in methods if method not in INSTRUCTED]
    rows = [["LoRA takes", *(absolute(work, times[work]) for work in works)]]
    rows += [
        [NAMES[method], *(time_cell(times[work], method, "lora", TIME_TARGETS.get(method)) for work in works)]
        for method in plain
        if method != "lora"
    ]
    text = markdown_table([f"time / LoRA's: {model}, {mode}", *map(WORK_NAMES.get, works)], rows)
    instructed = [method for method in methods if method in INSTRUCTED and method.partition("+")[0] in methods]
    rows = [
        [
            NAMES[method],
            *(time_cell(times[work], method, method.partition("+")[0], INSTRUCTION_TARGET) for work in works),
        ]
        for method in instructed
    ]
    header = ["time / the same scope's without an instruction", *map(WORK_NAMES.get, works)]
    return text + (f"\n\n{markdown_table(header, rows)}" if rows else "")


def size_table(sections: dict, model: str, methods: list[str], works: list[str]) -> str:
    sizes = sections[f"{model}/sizes"]
    memory = {work: sections[f"{model}/memory/{work}"] for work in works}
    header = [
        f"size: {model}",
        "trainable parameters",
        "on disk, kB",
        "time to load / LoRA's",
        *(f"operations / LoRA's: {WORK_NAMES[work]}" for work in sizes["flops"]),
        *(f"peak memory / LoRA's: {WORK_NAMES[work]}" for work in works),
    ]
    rows = []
    for method in methods:
        is_ours = method in (*SCOPES, *INSTRUCTED)
        on_disk = f"{sizes['bytes'][method] / 1000:,.0f}" if method in sizes["bytes"] else ""
        row = [NAMES[method], f"{sizes['trainable'][method]:,}", on_disk]
        row.append(time_cell(sizes, method, "lora", None))
        for flops in sizes["flops"].values():
            row.append(ratio_cell(flops, method, ARITHMETIC_TARGET if is_ours else None))
        for work in works:
            has_target = is_ours and work.startswith("train")
            row.append(ratio_cell(memory[work]["bytes"], method, MEMORY_TARGET if has_target else None))
        rows.append(row)
    absolutes = [f"{memory[work]['bytes']['lora'] / 2**20:,.0f} MiB" for work in works]
    operations = [f"{flops['lora'] / 1e9:,.1f} G" for flops in sizes["flops"].values()]
    load = f"{statistics.median(sizes['seconds']['lora']):.2f} s"
    return markdown_table(header, [["LoRA takes", "", "", load, *operations, *absolutes], *rows])


def ratio_cell(numbers: dict[str, float], method: str, target: float | None) -> str:
    return judged(numbers[method] / numbers["lora"], target) if method in numbers else ""


def report(results: dict, model: str) -> str:
    """The tables of one model, in Markdown."""
    settings, sections = results["settings"], results["sections"]
    methods, works = settings["methods"], settings["works"]
    parts = [time_tables(sections, model, mode, methods, works) for mode in settings["modes"]]
    parts.append(size_table(sections, model, methods, works))
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
