"""What recipes/instruction_sft.py shows at its end: a table and a picture of the routes."""

import matplotlib

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt
import numpy as np
from sft_report import markdown

plt.rcParams["svg.hashsalt"] = "peft_queryable"  # the same file for the same figure

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
    """A row for each kind of instruction: means over the tasks, then each task's exact match."""
    tasks = list(held_out["right"])
    rows = [["instruction", "held-out loss", "exact match", *tasks, "route moved"]]
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
    return markdown(rows)


def distance(routes, others) -> float:
    """Share of the weights that lies on other atoms, mean over blocks: 0 for equal routes, 1 for disjoint ones."""
    return np.abs(np.subtract(routes, others)).sum(-1).mean() / 2


def plot_routes(held_out: dict, path) -> None:
    """Mean weight of every atom in every block, a row for each instruction."""
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
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
