"""What routes do while one task comes after another: the paper's Figs. 6 to 9."""

import statistics
from collections.abc import Mapping
from itertools import pairwise
from math import log, log2
from pathlib import Path

import torch
from torch import Tensor

from peft_queryable.metrics import atom_reuse, drift, jensen_shannon, symmetric_kl
from recipes.common.figures import plt, save
from recipes.common.report import markdown_table
from recipes.language.arms import find
from recipes.language.comparisons import Best, Runs

LEAST = 1e-4  # of a usage in a divergence, which is infinite where one task alone uses an atom; records are as exact


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
    shares = moved(usage)
    is_later = torch.ones_like(shares).tril().bool()  # row s is stage s + 1
    by_block = usage[-1].double().transpose(0, 1)  # [blocks, tasks, M]
    end = usage[-1].double().mean(1)  # [tasks, M]
    reuse = (atom_reuse(end).nan_to_num() * end.mean(0)).sum() / end.mean(0).sum()
    return (
        shares.diagonal(1).mean().item(),
        shares[is_later].mean().item(),
        jensen_shannon(by_block).mean().item() / log(2),
        reuse.item() / log(2),
    )


def moved(usage: Tensor) -> Tensor:
    """The share of each task's weight that each stage but the first moves, [stages - 1, tasks].

    Args:
        usage: of one run, [stages, tasks, blocks, M].
    """
    stages = [[drift(*each) for each in zip(before, after, strict=True)] for before, after in pairwise(usage)]
    return torch.tensor(stages)


def separation(usage: Tensor) -> Tensor:
    """The symmetric KL of each two tasks' mean usages over blocks at the end, [tasks, tasks]: finite, in nats.

    Args:
        usage: of one run, [stages, tasks, blocks, M].
    """
    return symmetric_kl(usage[-1].double().mean(1).clamp(min=LEAST))


def plot_stages(runs: Runs, path: Path) -> None:
    """Usage by task after each stage, what each stage moves, the tasks' separation, and how tasks share each atom.

    What shows atoms is of the first seed, for the atoms of two seeds have nothing in common; the rest are means.
    """
    usages = [torch.tensor(runs[seed]["usage"]) for seed in sorted(runs)]  # [stages, tasks, blocks, M] each
    shown = usages[0].mean(2)  # [stages, tasks, M]
    figure = plt.figure(figsize=(11, 5.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    panels = above.subplots(1, len(shown), sharey=True)
    for stage, (axes, usage) in enumerate(zip(panels, shown, strict=True)):
        image = axes.imshow(usage.numpy(), aspect="auto", vmin=0, vmax=shown.max().item())
        axes.set(title=f"after stage {stage}", xlabel="atom")
    panels[0].set_ylabel("task")
    above.colorbar(image, ax=panels, label="usage")
    matrices = {
        "moved by the stage": (torch.stack([moved(usage) for usage in usages]).mean(0), "stage"),
        "symmetric KL at the end, nats": (torch.stack([separation(usage) for usage in usages]).mean(0), "task"),
    }
    *grid, atoms = below.subplots(1, 3)
    for axes, (title, (values, y)) in zip(grid, matrices.items(), strict=True):
        below.colorbar(axes.imshow(values.numpy(), aspect="auto", vmin=0), ax=axes)
        axes.set(title=title, xlabel="task", ylabel=y)
    grid[0].set_yticks(range(len(shown) - 1), range(1, len(shown)))  # before the first stage nothing has been measured
    end = shown[-1].double()  # [tasks, M]
    atoms.axhline(log2(len(end)), color="grey", linestyle="--", linewidth=1)
    reuse = atom_reuse(end) / log(2)  # NaN, which no dot shows, where no task uses the atom
    atoms.scatter(range(len(reuse)), reuse.numpy(), s=(10 + 300 * end.mean(0)).numpy())
    atoms.set(title="entropy of an atom's use, bits", xlabel="atom (size: usage)", ylim=(-0.1, log2(len(end)) + 0.2))
    save(figure, path)
