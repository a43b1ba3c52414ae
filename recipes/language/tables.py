# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Tables and pictures of finished runs, which the recipe also makes at its end.

python -m recipes.language.tables outputs/language/runs.jsonl

# Put them into docs/language-models.md as well
python -m recipes.language.tables outputs/language/runs.jsonl --write_docs

# One table of the runs of several machines
python -m recipes.language.tables machines/*/runs.jsonl
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from recipes.common.figures import plt, save
from recipes.common.report import fill_place, markdown_table
from recipes.language.arms import ARMS
from recipes.language.comparisons import TITLES, Best, best, forgetting, geometric_mean, mean, ratio, read
from recipes.language.stages import plot_stages, stages_table

RIVALS = {"lora": "LoRA", "lora-2r": "LoRA 2r", "static": "static"}


def table(arms: Mapping[str, Best]) -> str:
    """One row per arm, at its best rate."""
    rows, has_stages = [], any("matrix" in first(each) for each in arms.values())
    for arm, each in arms.items():
        runs = each.runs
        ratios = [ratio(runs, arms[rival].runs) if rival in arms and rival != arm else None for rival in RIVALS]
        row = [ARMS[arm].label, *("" if found is None else unbroken(str(found)) for found in ratios)]
        row += [f"{geometric_mean(runs, 'test'):.3f}", f"{mean(runs, 'exact'):.2f}"]
        row += [f"{statistics.mean(map(forgetting, runs.values())):.2f}"] if has_stages else []
        row += [f"{each.lr:g}{'*' if each.is_edge else ''}", f"{len(runs)}", f"{mean(runs, 'trainable'):,.0f}"]
        rows.append([*row, f"{mean(runs, 'seconds'):.1f}"])
    header = ["", *(unbroken(f"/ {rival}") for rival in RIVALS.values()), "loss", "exact"]
    return markdown_table(
        [*header, *(["forgotten"] if has_stages else []), "rate", "n", "parameters", "seconds"], rows
    )


def routes_table(arms: Mapping[str, Best]) -> str:
    """One row per arm whose routes depend on the input; empty if there is none, or if tasks came one after another."""
    rows = [
        [
            ARMS[arm].label,
            *(f"{mean(each.runs, name):.2f}" for name in ("mi_task", "mi_place", "entropy")),
            f"{mean(each.runs, 'dead'):.1f}",
            unbroken(str(ratio(each.runs, each.runs, "shuffled"))),
        ]
        for arm, each in arms.items()
        if "mi_task" in first(each)
    ]
    header = ["routes", "task, bits", "place, bits", "entropy, bits", "dead atoms", "loss, shuffled / own"]
    return markdown_table(header, rows) if rows else ""


def first(each: Best) -> dict:
    return next(iter(each.runs.values()))


def unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def plot(found: Mapping[tuple[str, int], Mapping[str, Best]], rank: int, path: Path) -> None:
    """Ratios to LoRA with their intervals: one panel per way of telling the task."""
    panels = {condition: arms for (condition, r), arms in found.items() if r == rank and "lora" in arms}
    if all(len(arms) == 1 for arms in panels.values()):  # nothing to compare
        return
    names = [arm for arm in ARMS if arm != "lora" and any(arm in arms for arms in panels.values())]
    figure, grid = plt.subplots(
        1, len(panels), figsize=(1.2 + 2.1 * len(panels), 1 + 0.3 * len(names)), sharey=True, squeeze=False
    )
    for axes, (condition, arms) in zip(grid[0], panels.items(), strict=True):
        axes.axvline(1, color="grey", linewidth=0.8)
        for place, arm in enumerate(names):
            if arm in arms and (found_ratio := ratio(arms[arm].runs, arms["lora"].runs)):
                color = "C0" if not ARMS[arm].is_ours else "C1"
                axes.plot(found_ratio[1:3], [place, place], color=color)
                axes.plot(found_ratio[0], place, "o", color=color)
        axes.set(title=fill(TITLES[condition], 24), xscale="log", xlabel="loss / LoRA")
        axes.title.set_fontsize(8)
        axes.set_xlim(1 / 12, 12)  # the interval of a few runs, some near zero, would leave no room for the others
        axes.set_xticks(ticks := [0.25, 1, 4], [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    grid[0, 0].set_yticks(range(len(names)), [ARMS[arm].label for arm in names])
    grid[0, 0].invert_yaxis()
    figure.tight_layout()
    save(figure, path.with_name(f"{path.stem}-r{rank}.svg"))


def report(*paths: Path) -> str:
    """All tables of the runs in `paths`, in Markdown. Their pictures are saved beside the first."""
    found = {place: {arm: best(rates) for arm, rates in arms.items()} for place, arms in read(*paths).items() if arms}
    for rank in {rank for _, rank in found}:
        plot(found, rank, paths[0])
    parts = []
    for (condition, rank), arms in found.items():
        tables = f"### {TITLES[condition]}, r = {rank}", table(arms), routes_table(arms), stages_table(arms)
        parts += [text for text in tables if text]
        if condition == "sequence":
            for arm, each in arms.items():
                if all("usage" in run for run in each.runs.values()):
                    plot_stages(each.runs, paths[0].with_name(f"{paths[0].stem}-r{rank}-{arm}.svg"))
    return "\n\n".join(parts)


def write_docs(text: str, path: Path) -> None:
    """Put the tables and pictures of the runs in `path` into their place in docs/language-models.md."""
    figures = {f"language-{each.name}": each for each in sorted(path.parent.glob(f"{path.stem}-r*.svg"), reverse=True)}
    fill_place("language-models.md", f"recipes.language {path.stem}", text, figures)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.language.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="of one name, with runs of one setting")
    parser.add_argument("--write_docs", action="store_true", help="put the tables into docs/language-models.md")
    options = parser.parse_args(arguments)
    if len(names := {path.name for path in options.files}) > 1:
        parser.error(f"files of one name make one table, got {', '.join(sorted(names))}")
    text = report(*options.files)
    print(text)
    if options.write_docs:
        write_docs(text, options.files[0])


if __name__ == "__main__":
    main()
