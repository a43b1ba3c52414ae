"""How our time and memory beside LoRA's change as one size of the model or of its work grows."""

from recipes.benchmark.cells import NAMES, quartiles
from recipes.benchmark.methods import SCOPES
from recipes.common.report import markdown_table

GROWTH_KINDS = {"prefill": "time of prefill", "train": "time of a training step", "memory": "memory of training"}


def swept_values(results: dict) -> dict[str, list[int]]:
    """The values that were measured of each size."""
    values: dict[str, list[int]] = {name: [] for name in results["settings"]["sweeps"]}
    for key in results["sections"]:
        if key.startswith("growth/") and key.endswith("/memory"):
            values[key.split("/")[1]].append(int(key.split("/")[2]))
    return values


def growth_ratio(cell: dict, scope: str) -> float:
    """Time or memory of a scope beside LoRA's."""
    if "bytes" in cell:
        return cell["bytes"][scope] / cell["bytes"]["lora"]
    return quartiles(cell["seconds"], scope, "lora")[1]


def growth_table(results: dict) -> str:
    """Ratios to LoRA at the smallest and at the largest value of each size."""
    rows = []
    for name, values in swept_values(results).items():
        for scope in SCOPES:
            row = [f"{name} {values[0]} → {values[-1]}", NAMES[scope]]
            for kind in GROWTH_KINDS:
                cells = (results["sections"][f"growth/{name}/{value}/{kind}"] for value in (values[0], values[-1]))
                row.append(" → ".join(f"{growth_ratio(cell, scope):.3f}" for cell in cells))
            rows.append(row)
    return markdown_table(["size", "ratio to LoRA", *GROWTH_KINDS.values()], rows)
