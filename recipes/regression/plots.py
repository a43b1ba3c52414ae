"""Pictures of finished runs: learning curves, routes, and gradient norms by layer as in the paper's Figs. 3 and 4."""

from pathlib import Path

import numpy as np

from peft_queryable.plots import plot_parts
from recipes.common.figures import plt, save

NAMES = {
    "soap": "SOAP, all weights",
    "lora": "LoRA",
    "dora": "DoRA",
    "lily": "Lily",
    "vblora": "VB-LoRA",
    "replora": "RepLoRA",
    "hyra": "HyRA",
    "doran": "DoRAN",
    "queryable": "ours",
    "instruction": "ours, instruction",
}

POINTS = 30  # of a curve; more are not to be told apart in a panel, and make the picture large


def plot_curves(results: dict, path: Path) -> None:
    """Training error over epochs, as geometric means over the seeds: one panel per function, one line per method."""
    functions = list(dict.fromkeys(function for by_function in results.values() for function in by_function))
    figure, grid = plt.subplots(-(-len(functions) // 3), 3, figsize=(11, 9), squeeze=False, layout="constrained")
    for function, axes in zip(functions, grid.flat, strict=False):
        for place, (method, by_function) in enumerate(results.items()):
            if runs := list(by_function.get(function, {}).values()):
                curves = np.array(
                    [run["curve"][:: -(-len(run["curve"]) // POINTS)] for run in runs]
                )  # [seeds, points, 3]
                logs = np.log10(curves[..., 1])
                axes.plot(curves[0, :, 0], 10 ** logs.mean(0), label=NAMES[method], color=f"C{place}", linewidth=1)
                axes.fill_between(
                    curves[0, :, 0], 10 ** logs.min(0), 10 ** logs.max(0), color=f"C{place}", alpha=0.15, linewidth=0
                )
        axes.set(title=function, yscale="log", xlabel="epoch", ylabel="training error")
    for axes in grid.flat[len(functions) :]:
        axes.axis("off")
    grid[0, 0].legend(fontsize=7)
    save(figure, path.with_name(f"{path.stem}-curves.svg"))


def plot_gradients(results: dict, path: Path) -> None:
    """Medians over runs: gradient norms of the layers at the end, and over epochs the largest over the mean."""
    figure, (norms, concentration) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, by_function in results.items():
        runs = [run for by_seed in by_function.values() for run in by_seed.values()]
        last = np.array([run["gradient_norms"][-1] for run in runs])
        norms.plot(np.arange(1, last.shape[1] + 1), np.median(last, 0), marker=".", label=NAMES[method])
        epochs = [point[0] for point in runs[0]["curve"][1:]]
        concentration.plot(
            epochs, np.nanmedian([run["concentration"] for run in runs], 0), label=NAMES[method], linewidth=1
        )
    norms.set(yscale="log", xlabel="layer", ylabel="gradient norm after training")
    concentration.set(xlabel="epoch", ylabel="gradient concentration index")
    norms.legend(fontsize=7)
    save(figure, path.with_name(f"{path.stem}-gradients.svg"))


def plot_routes(results: dict, path: Path) -> None:
    """What decides our routes, over epochs: the three parts of the entropy of the atoms' use, means over all runs."""
    panels = {}
    for method in (method for method in ("queryable", "instruction") if method in results):
        runs = [run for by_seed in results[method].values() for run in by_seed.values()]
        epochs = [point[0] for point in runs[0]["curve"][1:]]
        parts = ("entropy", "by_input", "by_block")
        panels[NAMES[method]] = {
            part: np.mean([[point[part] for point in run["routes"]] for run in runs], 0) for part in parts
        }
    save(plot_parts(panels, epochs, "epoch"), path.with_name(f"{path.stem}-routes.svg"))
