"""What the recipe shows at its end: a table, and the learning curves."""

from pathlib import Path

from peft_queryable.plots import plot_history
from recipes.common.figures import plt, save
from recipes.common.report import markdown_table

NAMES = {"base": "base model", "lora": "LoRA", "queryable": "queryable LoRA"}


def table(results: dict) -> str:
    """One row per method."""
    rows = []
    for method, numbers in results.items():
        seconds = numbers.get("seconds_per_step")
        rows.append(
            [
                NAMES[method],
                f"{numbers.get('trainable_parameters', 0):,}",
                f"{numbers['held_out_loss']:.3f}",
                f"{numbers['exact_match']:.1%}",
                "" if seconds is None else f"{seconds:.2f}",
            ]
        )
    header = ["", "trainable parameters", "held-out loss", "held-out exact match", "seconds per step"]
    return markdown_table(header, rows)


def plot_curves(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for method, numbers in results.items():
        if "losses" in numbers:
            axes.plot(*zip(*numbers["losses"], strict=True), label=NAMES[method])
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    save(figure, path, dpi=120)


def plot_routes(results: dict, path: Path) -> None:
    """What was logged of our routes over the steps, if anything was."""
    if routes := results.get("queryable", {}).get("routes"):
        save(plot_history(routes), path)
