"""What the recipe shows at its end: a table, and a picture of the routes."""

from pathlib import Path

import numpy as np

from recipes.common.figures import plt, save
from recipes.common.report import markdown_table

NAMES = {
    "right": "right",
    "none": "none",
    "generic": "generic",
    "paraphrase": "paraphrase, never seen",
    "shuffled": "shuffled: another task's",
    "adversarial": "adversarial, never seen",
    "random": "random embedding, same norm",
}


def table(held_out: dict) -> str:
    """One row per kind of instruction: means over the tasks, then the exact match of each task."""
    tasks = list(held_out["right"])
    rows = []
    for kind, results in held_out.items():
        moved = np.mean([distance(results[task]["routes"], held_out["right"][task]["routes"]) for task in tasks])
        rows.append(
            [
                NAMES[kind],
                f"{np.mean([results[task]['held_out_loss'] for task in tasks]):.3f}",
                f"{np.mean([results[task]['exact_match'] for task in tasks]):.1%}",
                *(f"{results[task]['exact_match']:.0%}" for task in tasks),
                f"{moved:.2f}",
            ]
        )
    return markdown_table(["instruction", "held-out loss", "exact match", *tasks, "route moved"], rows)


def distance(routes, others) -> float:
    """Mean over blocks of the share of weight that lies on other atoms: 0 for equal routes, 1 for disjoint ones."""
    return np.abs(np.subtract(routes, others)).sum(-1).mean() / 2


def plot_routes(held_out: dict, path: Path) -> None:
    """Mean weight of every atom in every block, with one row per instruction."""
    tasks = list(held_out["right"])
    lines = {
        f"{task}: {kind}": held_out[kind][task]["routes"]
        for task in tasks
        for kind in ("right", "paraphrase", "adversarial")
    }
    lines |= {
        kind: np.mean([held_out[kind][task]["routes"] for task in tasks], axis=0) for kind in ("none", "generic")
    }
    lines["random"] = held_out["random"][tasks[0]]["routes"]
    routes = np.array(list(lines.values()))  # [lines, blocks, atoms]
    figure, panels = plt.subplots(1, routes.shape[1], figsize=(10, 4), sharey=True, layout="constrained")
    for block, axes in enumerate(np.atleast_1d(panels)):
        image = axes.imshow(routes[:, block], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set(title=f"block {block + 1}", xlabel="atom", yticks=range(len(lines)), yticklabels=lines)
    figure.colorbar(image, ax=panels, label="mean routing weight")
    save(figure, path)
