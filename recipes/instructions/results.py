# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""What the recipe shows: a table, and a picture of the routes.

# One table of several runs, which differ in --seed and --output_dir, and into docs/instructions.md
python -m recipes.instructions.results outputs/minilm-0 outputs/minilm-1 outputs/minilm-2 --write_docs all-MiniLM-L6-v2
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from peft_queryable.metrics import drift
from peft_queryable.plots import plot_usage
from recipes.common.figures import save
from recipes.common.report import fill_place, markdown_table, spread

NAMES = {
    "right": "right",
    "none": "none",
    "generic": "generic",
    "paraphrase": "paraphrase, never seen",
    "shuffled": "shuffled: another task's",
    "adversarial": "adversarial, never seen",
    "random": "random embedding, same norm",
}
Run = Mapping[str, Mapping[str, dict]]  # by kind of instruction and task, what was measured


def table(runs: Sequence[Run]) -> str:
    """One row per kind of instruction: means over tasks and runs, then the exact match of each task.

    Of several runs, the loss and the exact match come with the lowest and the highest of them.
    """
    first, *_ = runs[0]  # "right", or "none" where an adapter is told nothing
    tasks, rows = list(runs[0][first]), []
    for kind in runs[0]:
        by_task = {task: statistics.mean(run[kind][task]["exact_match"] for run in runs) for task in tasks}
        moves = [moved(run[kind][task]["routes"], run[first][task]["routes"]) for run in runs for task in tasks]
        rows.append(
            [
                NAMES[kind],
                spread([over_tasks(run[kind], "held_out_loss") for run in runs], ".3f"),
                spread([over_tasks(run[kind], "exact_match") for run in runs], ".1%"),
                *(f"{share:.0%}" for share in by_task.values()),
                f"{statistics.mean(moves):.2f}",
            ]
        )
    return markdown_table(["instruction", "held-out loss", "exact match", *tasks, "route moved"], rows)


def over_tasks(results: Mapping[str, dict], name: str) -> float:
    return statistics.mean(result[name] for result in results.values())


def moved(routes: list, others: list) -> float:
    """Share of weight that lies on other atoms, mean over the blocks; both are mean routes [blocks, atoms]."""
    return float(drift(torch.tensor(others), torch.tensor(routes)))


def plot_routes(run: Run, path: Path) -> None:
    """Mean weight of every atom in every block, with one row per instruction."""
    tasks = list(run["right"])
    lines = {
        f"{task}: {kind}": torch.tensor(run[kind][task]["routes"])
        for task in tasks
        for kind in ("right", "paraphrase", "adversarial")
    }
    for kind in ("none", "generic"):
        lines[kind] = torch.tensor([run[kind][task]["routes"] for task in tasks]).mean(0)
    lines["random"] = torch.tensor(run["random"][tasks[0]]["routes"])
    save(plot_usage(lines), path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.instructions.results", description="One table of runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="Output folders of finished runs.")
    parser.add_argument("--write_docs", metavar="NAME", help="Put the table into this place of docs/instructions.md.")
    args = parser.parse_args()
    text = table([json.loads((folder / "results.json").read_text())["held_out"] for folder in args.folders])
    print(text)
    if args.write_docs:
        fill_place("instructions.md", f"recipes.instructions {args.write_docs}", text, {})


if __name__ == "__main__":
    main()
