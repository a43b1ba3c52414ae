"""Pictures of what recipes/benchmark.py measured."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt
from benchmark_growth import GROWTH_KINDS, growth_ratio, swept_values
from benchmark_methods import SCOPES
from benchmark_report import NAMES, WORK_NAMES, quartiles

plt.rcParams["svg.hashsalt"] = "peft_queryable"  # the same file for the same figure


def plot_ratios(results: dict, model: str, folder: Path) -> Path:
    """Ratios of a model to LoRA with their quartiles: a row for each mode, a column for each work."""
    settings, sections = results["settings"], results["sections"]
    modes = settings["modes"]
    works, methods = settings["works"], [method for method in settings["methods"] if method != "lora"]
    figure, grid = plt.subplots(
        len(modes),
        len(works),
        figsize=(3 * len(works), 3 * len(modes)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for mode, line in zip(modes, grid, strict=True):
        for work, axes in zip(works, line, strict=True):
            seconds = sections[f"{model}/{mode}/{work}"]["seconds"]
            for place, method in enumerate(methods):
                if {method, "lora"} <= seconds.keys():
                    low, median, high = quartiles(seconds, method, "lora")
                    axes.errorbar(median, place, xerr=[[median - low], [high - median]], fmt="o", color="C0")
            axes.axvline(1, color="grey", linewidth=1)
            axes.set_title(f"{model}, {mode}\n{WORK_NAMES[work]}", fontsize=9)
            axes.set_yticks(range(len(methods)), [NAMES[method].replace("`", "") for method in methods])
        line[0].invert_yaxis()
    figure.supxlabel("time / LoRA's")
    compiled = "" if "eager" in modes else "-compile"
    return saved(figure, folder / f"times-{settings['device']}-{model}{compiled}.svg")


def plot_growth(results: dict, folder: Path) -> Path:
    """Ratios to LoRA over each size that was swept."""
    values = swept_values(results)
    figure, grid = plt.subplots(
        len(values),
        3,
        figsize=(10, 2.4 * len(values)),
        sharex="row",
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for (name, swept), line in zip(values.items(), grid, strict=True):
        for kind, axes in zip(GROWTH_KINDS, line, strict=True):
            for scope in SCOPES:
                cells = [results["sections"][f"growth/{name}/{value}/{kind}"] for value in swept]
                axes.plot(swept, [growth_ratio(cell, scope) for cell in cells], marker="o", label=scope)
            axes.axhline(1, color="grey", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xlabel(name)
        line[0].set_ylabel("ratio to LoRA")
    for axes, title in zip(grid[0], GROWTH_KINDS.values(), strict=True):
        axes.set_title(title)
    grid[0][0].legend()
    return saved(figure, folder / f"growth-{results['settings']['device']}.svg")


def saved(figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
