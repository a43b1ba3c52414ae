"""Pictures of the ratios to LoRA, and of how they grow."""

from pathlib import Path

from recipes.benchmark.cells import NAMES, WORK_NAMES, quartiles
from recipes.benchmark.growth import GROWTH_KINDS, growth_ratio, swept_values
from recipes.benchmark.methods import SCOPES
from recipes.common.figures import plt, save

SHOWN = (0.8, 1.4)  # ratios that the axes have room for


def plot_ratios(results: dict, model: str, folder: Path) -> Path:
    """Ratios to LoRA with their quartiles on one model: one row per mode, one column per work."""
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
                    if median > SHOWN[1]:  # it would flatten all others
                        axes.text(SHOWN[1], place, f"{median:.1f} \N{RIGHTWARDS ARROW} ", ha="right", va="center")
                    else:
                        axes.errorbar(median, place, xerr=[[median - low], [high - median]], fmt="o", color="C0")
            axes.set_xlim(SHOWN)
            axes.axvline(1, color="grey", linewidth=1)
            axes.set_title(f"{model}, {mode}\n{WORK_NAMES[work]}", fontsize=9)
            axes.set_yticks(range(len(methods)), [NAMES[method].replace("`", "") for method in methods])
        line[0].invert_yaxis()
    figure.supxlabel("time / LoRA's")
    further = "" if "eager" in modes else "-compile"
    further += f"-{settings['threads']}-threads" if settings["threads"] > 1 else ""
    return save(figure, folder / f"times-{settings['device']}-{model}{further}.svg")


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
    return save(figure, folder / f"growth-{results['settings']['device']}.svg")
