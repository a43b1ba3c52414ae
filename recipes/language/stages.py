"""What routes do while one task comes after another: the paper's Figs. 6 to 9."""

import statistics
from collections.abc import Mapping
from math import log
from pathlib import Path

import torch
from torch import Tensor

from peft_queryable.metrics import atom_reuse, drift, jensen_shannon, symmetric_kl
from recipes.common.figures import plt, save
from recipes.common.report import markdown_table
from recipes.language.arms import find
from recipes.language.comparisons import Best, Runs


def stages_table(arms: Mapping[str, Best]) -> str:
    """One row per arm whose runs have usages; empty if there is none."""
    rows = []
    for arm, each in arms.items():
        told = [told_by_usage(torch.tensor(run["usage"])) for run in each.runs.values() if "usage" in run]
        if told:
            rows.append([find(arm).label, *(f"{statistics.mean(column):.3f}" for column in zip(*told, strict=True))])
    header = [
        "routes",
        "moved by its own stage",
        "by a later one",
        "differ between tasks, bits",
        "reuse of atoms, bits",
    ]
    return markdown_table(header, rows) if rows else ""


def told_by_usage(usage: Tensor) -> tuple[float, ...]:
    """Of one run's usages [stages, tasks, blocks, M]: what the columns of the table say, means over tasks.

    The share of a task's weight that moves to other atoms, by the task's own stage and by each later one (Figs. 7, 9);
    the mutual information of atom and task at the end, mean over blocks; and how evenly tasks share an atom (Fig. 8),
    at the end, by its part of all weight.
    """
    stages = range(1, len(usage))
    own = [drift(usage[task - 1, task], usage[task, task]).item() for task in stages]
    later = [drift(usage[stage - 1, task], usage[stage, task]).item() for stage in stages for task in range(stage)]
    by_block = usage[-1].double().transpose(0, 1)  # [blocks, tasks, M]
    end = usage[-1].double().mean(1)  # [tasks, M]
    reuse = (atom_reuse(end).nan_to_num() * end.mean(0)).sum() / end.mean(0).sum()
    return (
        statistics.mean(own),
        statistics.mean(later),
        jensen_shannon(by_block).mean().item() / log(2),
        reuse.item() / log(2),
    )


def plot_stages(runs: Runs, path: Path) -> None:
    """Means over seeds: usage by task at the end, what each stage moves, and the symmetric KL of each two tasks."""
    usages = torch.tensor([run["usage"] for run in runs.values()])  # [R, stages, tasks, blocks, M]
    stages, tasks = usages.shape[1:3]
    moved = [[[drift(u[s - 1, t], u[s, t]) for t in range(tasks)] for s in range(1, stages)] for u in usages]
    panels = {
        "usage at the end": (usages[:, -1].mean((0, 2)), "atom", "task"),
        "moved by the stage": (torch.tensor(moved).mean(0), "task", "stage"),
        "symmetric KL at the end": (symmetric_kl(usages[:, -1].mean((0, 2))), "task", "task"),
    }
    figure, grid = plt.subplots(1, len(panels), figsize=(9, 2.8), layout="constrained")
    for axes, (title, (values, x, y)) in zip(grid, panels.items(), strict=True):
        image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0)
        axes.set(title=title, xlabel=x, ylabel=y)
        figure.colorbar(image, ax=axes)
    grid[1].set_yticks(range(stages - 1), range(1, stages))  # before the first stage nothing has been measured
    save(figure, path)
