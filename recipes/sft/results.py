"""What recipes/sft.py shows at its end: a table and a picture."""

import matplotlib

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt

NAMES = {"base": "base model", "lora": "LoRA", "queryable": "queryable LoRA"}


def table(results: dict) -> str:
    rows = [["", "trainable parameters", "held-out loss", "held-out exact match", "seconds a step"]]
    for method, numbers in results.items():
        seconds = numbers.get("seconds_a_step")
        rows.append(
            [
                NAMES[method],
                f"{numbers.get('trainable_parameters', 0):,}",
                f"{numbers['held_out_loss']:.3f}",
                f"{numbers['exact_match']:.1%}",
                "" if seconds is None else f"{seconds:.2f}",
            ]
        )
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table that reads well as text, too; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_curves(results: dict, path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for method, numbers in results.items():
        if "losses" in numbers:
            axes.plot(*zip(*numbers["losses"], strict=True), label=NAMES[method])
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
