"""What recipes/benchmark.py shows at its end: tables, pictures, and the page that holds them."""

import re
import statistics
from dataclasses import asdict
from pathlib import Path

from benchmark_methods import INSTRUCTED, SCOPES
from benchmark_plan import Arguments

DOCS = Path(__file__).parents[1] / "docs"
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


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quartiles(seconds: dict[str, list[float]], method: str, baseline: str) -> list[float]:
    """Lower quartile, median and upper quartile of the per-round ratios of `method` to `baseline`."""
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
    """What the ratios are to, for whoever wants to compare machines."""
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


def command(settings: dict) -> str:
    """The command of a run, by the arguments that differ from their defaults."""
    defaults = asdict(Arguments())
    chosen = {name: value for name, value in settings.items() if name in defaults and value != defaults[name]}
    words = [f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in chosen.items()]
    return " ".join(["python recipes/benchmark.py", *words])


def conditions(settings: dict) -> str:
    """What the numbers of a run depend on."""
    return (
        f"```bash\n{command(settings)}\n```\n\n"
        f"{settings['machine']}, threads: {settings['threads']}, {settings['dtype']}, torch {settings['torch']}; "
        f"{settings['rounds']} rounds; {settings['batch']} rows of {settings['length']} tokens in prefill and "
        f"training, {settings['new_tokens']} new tokens after {settings['prompt']} in decoding. Ratios are medians "
        f'over the rounds, with quartiles. "{FAILED}": the method raises an error.'
    )


def report(results: dict, model: str) -> str:
    """The tables of one model, in Markdown."""
    settings, sections = results["settings"], results["sections"]
    methods, works = settings["methods"], settings["works"]
    parts = [time_tables(sections, model, mode, methods, works) for mode in settings["modes"]]
    return "\n\n".join([*parts, size_table(sections, model, methods, works)])


def write_docs(text: str, figure: Path, place: str) -> None:
    """Put tables and a picture in their place in docs/speed.md, and the picture beside it."""
    (DOCS / figure.name).write_text(figure.read_text())
    page = DOCS / "speed.md"
    start, end = (f"<!-- {edge} of recipes/benchmark.py {place} -->" for edge in ("start", "end"))
    pattern = f"(?<={re.escape(start)}\n).*(?={re.escape(end)})"
    picture = f"![{figure.stem}]({figure.name})"
    new, count = re.subn(pattern, lambda _: f"\n{text}\n\n{picture}\n\n", page.read_text(), flags=re.DOTALL)
    assert count == 1, f"{page} has no place for {place}"
    page.write_text(new)
