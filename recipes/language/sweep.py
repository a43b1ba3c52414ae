# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""The paper's Fig. 5 on the tiny model: held-out loss against parameters over the rank r, the atoms M, and top-k.

# All 60 of them, three seeds each, told to the adapter alone
python -m recipes.language.sweep

# A part of them; the next command adds to it
python -m recipes.language.sweep --ranks 8 --seeds 5

# A few steps of two of them, to see that it runs
python -m recipes.language.sweep --quick

Every finished run is a line of OUTPUT/sweep.jsonl, and an interrupted command goes on after the last one.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from transformers import HfArgumentParser

from recipes.common.figures import plt, save
from recipes.common.report import fill_place, markdown_table
from recipes.common.workers import Workers
from recipes.language.arguments import JobArguments, setting_of
from recipes.language.arms import MIXING
from recipes.language.comparisons import TITLES, Runs, geometric_mean, interval, mean, ratio
from recipes.language.jobs import finetune_missing, missing_runs, pretrain_missing
from recipes.language.records import load
from recipes.language.runs import Job
from recipes.language.skills import CONDITIONS, stages_of
from recipes.language.tables import unbroken

DEFAULT = 8, 16, 4  # the paper's r, M and k on language models
QUICK = {"ranks": [8], "atoms": [16], "top_k": [2, 4], "seeds": 2}
TELLINGS = [condition for condition in CONDITIONS if len(stages_of(condition)) == 1]  # else records lack routes
Sizes = tuple[int, int, int]  # r, M, k


@dataclass
class SweepArguments(JobArguments):
    conditions: list[str] = field(
        default_factory=lambda: ["instruction"],
        metadata={"help": "How the task is told; a table and a picture for each.", "choices": TELLINGS},
    )
    ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Ranks r."})
    atoms: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Numbers of atoms M."})
    top_k: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Atoms of a route; those above M are left out."}
    )
    rate: float = field(default=0.005, metadata={"help": "Learning rate."})
    seeds: int = field(default=3, metadata={"help": "Runs of each size, with seeds 0, 1, ..."})
    write_docs: bool = field(default=False, metadata={"help": "Put tables and pictures into docs/language-models.md."})


def main(args: SweepArguments) -> None:
    setting = setting_of(args)
    results = Path(args.output_dir, f"{'quick-' if args.quick else ''}sweep.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    sizes = [(r, M, k) for r, M, k in product(args.ranks, args.atoms, args.top_k) if k <= M]
    jobs = [Job(condition, r, f"M{M}-k{k}", args.rate) for condition in args.conditions for r, M, k in sizes]
    missing = missing_runs(jobs, range(args.seeds), results, setting)
    with Workers(args.processes) as workers:
        pretrain_missing(args, setting, sorted({seed for left in missing.values() for seed in left}), workers)
        finetune_missing(args, setting, missing, results, workers)
    parts, figures = [], {}
    for condition in args.conditions:
        found = read(results, condition, args.rate)
        parts.append(f"#### {TITLES[condition]}, rate {args.rate:g}\n\n{table(found)}")
        picture = plot(found, results.with_name(f"{results.stem}-{condition}.svg"))
        figures[f"language-{picture.name}"] = picture
    text = "\n\n".join(parts)
    results.with_suffix(".md").write_text(text + "\n")
    print(text)
    if args.write_docs:
        fill_place("language-models.md", "recipes.language.sweep", text, figures)


def read(path: Path, condition: str, rate: float) -> dict[Sizes, Runs]:
    """Records of a condition at a rate, by size, then seed."""
    found: dict[Sizes, dict[int, dict]] = defaultdict(dict)
    for record in load(path):
        if (record["condition"], record["lr"]) == (condition, rate):
            num_atoms, top_k = map(int, MIXING.fullmatch(record["arm"]).groups())
            found[record["rank"], num_atoms, top_k][record["seed"]] = record
    return dict(sorted(found.items()))


def table(found: Mapping[Sizes, Runs]) -> str:
    """One row per size; ratios are to the paper's, paired by seed."""
    usual = found.get(DEFAULT, {})
    rows = [
        [
            *map(str, sizes),
            f"{mean(runs, 'trainable'):,.0f}",
            f"{geometric_mean(runs, 'test'):.3f}",
            "" if sizes == DEFAULT or (found_ratio := ratio(runs, usual)) is None else unbroken(str(found_ratio)),
            f"{mean(runs, 'exact'):.2f}",
            *(f"{mean(runs, name):.2f}" for name in ("mi_task", "entropy")),
            f"{mean(runs, 'dead'):.1f}",
            f"{len(runs)}",
        ]
        for sizes, runs in found.items()
    ]
    usual_name = unbroken("/ that of r = {}, M = {}, k = {}".format(*DEFAULT))
    routes = ["task, bits", "entropy, bits", "dead atoms"]
    return markdown_table(["r", "M", "k", "parameters", "loss", usual_name, "exact", *routes, "n"], rows)


def plot(found: Mapping[Sizes, Runs], path: Path) -> Path:
    """Loss, with its interval over seeds, against parameters: a colour per top-k, a marker per M."""
    colors = {k: f"C{place}" for place, k in enumerate(sorted({k for _, _, k in found}))}
    markers = dict(zip(sorted({num_atoms for _, num_atoms, _ in found}), "os^Dvp*", strict=False))
    beside = {k: 1.008 ** (place - (len(colors) - 1) / 2) for place, k in enumerate(colors)}  # k adds no parameters
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    points = [(mean(runs, "trainable"), geometric_mean(runs, "test")) for runs in found.values()]
    for ((_, num_atoms, k), runs), (parameters, loss) in zip(found.items(), points, strict=True):
        axes.plot([parameters * beside[k]] * 2, interval(runs, "test"), color=colors[k], linewidth=0.8, alpha=0.6)
        axes.plot(parameters * beside[k], loss, markers[num_atoms], color=colors[k], markersize=5)
    axes.plot(*zip(*front(points), strict=True), "--", color="grey", linewidth=1, zorder=0)
    handles = [axes.plot([], [], "o", color=color, label=f"k = {k}")[0] for k, color in colors.items()]
    handles += [axes.plot([], [], mark, color="grey", label=f"M = {n}")[0] for n, mark in markers.items()]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="held-out loss")
    return save(figure, path)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one is better than in both: fewer parameters, a lower loss."""
    chosen: list[tuple[float, float]] = []
    for point in sorted(points):
        if not chosen or point[1] < chosen[-1][1]:
            chosen.append(point)
    return chosen


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(SweepArguments).parse_args_into_dataclasses()
    if arguments.quick:
        vars(arguments).update(QUICK)
    main(arguments)
