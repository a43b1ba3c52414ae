"""What the recipe shows at its end: a table, and a picture of the routes."""

from pathlib import Path

import numpy as np
import torch

from peft_queryable.metrics import drift
from peft_queryable.plots import plot_usage
from recipes.common.figures import save
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
        moves = np.mean([moved(results[task]["routes"], held_out["right"][task]["routes"]) for task in tasks])
        rows.append(
            [
                NAMES[kind],
                f"{np.mean([results[task]['held_out_loss'] for task in tasks]):.3f}",
                f"{np.mean([results[task]['exact_match'] for task in tasks]):.1%}",
                *(f"{results[task]['exact_match']:.0%}" for task in tasks),
                f"{moves:.2f}",
            ]
        )
    return markdown_table(["instruction", "held-out loss", "exact match", *tasks, "route moved"], rows)


def moved(routes: list, others: list) -> float:
    """Share of weight that lies on other atoms, mean over the blocks; both are mean routes [blocks, atoms]."""
    return float(drift(torch.tensor(others), torch.tensor(routes)))


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
    save(plot_usage({name: torch.tensor(routes) for name, routes in lines.items()}), path)
