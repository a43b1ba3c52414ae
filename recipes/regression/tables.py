# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Tables and pictures of finished runs of recipes/regression/run.py, which calls it at its end.

python recipes/regression/tables.py outputs/regression/deep.jsonl

# Into docs/regression.md, too
python recipes/regression/tables.py outputs/regression/deep.jsonl --write_docs

Errors are means over the seeds, with their standard deviation; in brackets, the paper's. Comparisons are paired by
seed: a seed has the same backbone and the same examples for every method.
"""

import json
import statistics
import sys
from math import exp, isfinite, log, nan
from pathlib import Path

from functions import FUNCTIONS
from paper import FIGURES
from plots import NAMES, plot_curves, plot_gradients, plot_routes
from scipy.stats import ttest_1samp, wilcoxon
from train import SETTINGS
from variants import VARIANTS

DOCS = Path(__file__).parents[2] / "docs"
OURS = ("queryable", "instruction")
NOT_PEFT = ("soap",)
Results = dict[str, dict[str, dict[int, dict]]]  # records by method, function and seed


def read(path: Path) -> Results:
    results: Results = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        results.setdefault(record["method"], {}).setdefault(record["function"], {})[record["seed"]] = record
    return {method: results[method] for method in (*NAMES, *VARIANTS) if method in results}


def errors(results: Results, method: str, function: str, kind: str) -> list[float]:
    """Errors of a method by seed; `kind` is "train" or "test"."""
    runs = results[method].get(function, {})
    return [runs[seed][kind] for seed in sorted(runs)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def error_table(results: Results, setting: str, kind: str) -> str:
    """Mean errors and standard deviations, the best adapter's in bold, and the paper's figures."""
    figures = FIGURES[setting, kind]
    rows = []
    for function in FUNCTIONS:
        found = {method: errors(results, method, function, kind) for method in results}
        means = {method: statistics.mean(values) for method, values in found.items() if values}
        row = [function]
        for method, values in found.items():
            if not values:
                row.append("")
                continue
            is_spread = len(values) > 1 and isfinite(means[method])
            text = f"{means[method]:.4g}" + (f" ± {statistics.stdev(values):.2g}" if is_spread else "")
            rivals = [means[other] for other in means if other not in NOT_PEFT]
            text = f"**{text}**" if method not in NOT_PEFT and means[method] == min(rivals) else text
            row.append(text + (f" [{figures[method][function]:g}]" if method in figures else ""))
        if means:
            rows.append(row)
    return markdown([f"{kind} error", *map(NAMES.get, results)], rows)


def comparison(results: Results, method: str) -> str:
    """`method` beside LoRA, paired by seed, function by function and in all."""
    rows, logs, best, no_worse, better = [], [], 0, 0, 0
    others = [other for other in results if other not in (*OURS, *NOT_PEFT)]
    for function in FUNCTIONS:
        train, lora = (errors(results, m, function, "train") for m in (method, "lora"))
        test, lora_test = (errors(results, m, function, "test") for m in (method, "lora"))
        if len(train) != len(lora) or len(train) < 2:
            continue
        ratios = [log(a) - log(b) for a, b in zip(train, lora, strict=True)]
        differences = [a - b for a, b in zip(test, lora_test, strict=True)]
        mean = statistics.mean(differences)
        # A diverged run is infinitely far away, and leaves no spread to speak of.
        margin = statistics.stdev(differences) / len(differences) ** 0.5 if isfinite(mean) else 0.0
        rivals = [e for e in (errors(results, other, function, "train") for other in others) if e]
        is_best = all(statistics.mean(train) < statistics.mean(rival) for rival in rivals)
        best, no_worse, better = best + is_best, no_worse + (mean <= margin), better + (mean < 0)
        logs += ratios
        p = ttest_1samp(ratios, 0).pvalue if all(map(isfinite, ratios)) else nan
        verdict = "better" if mean < 0 else "within one standard error" if mean <= margin else "worse"
        ratio, difference = f"{exp(statistics.mean(ratios)):.3g}", f"{mean:+.3g} ± {margin:.2g}"
        rows.append([function, ratio, f"{p:.2g}", "yes" if is_best else "no", difference, verdict])
    header = [f"{NAMES[method]} and LoRA", "train error, ratio", "p (paired t of logs)", "best in training error"]
    table = markdown([*header, "test error, difference", "test"], rows)
    if not rows:
        return table
    return (
        f"{table}\n\nIn training error best on {best} of {len(rows)}; in test error no worse than LoRA, within one "
        f"standard error, on {no_worse}, and better on {better}. Over all {len(logs)} pairs the ratio of training "
        f"errors is {exp(statistics.mean(logs)):.3g} (p = {wilcoxon(logs).pvalue:.2g}, Wilcoxon's signed-rank test)."
    )


def is_stuck(run: dict) -> bool:
    """Whether a run lowered the training error by less than a tenth."""
    return run["train"] > 0.9 * run["curve"][0][1]


def first_gradient(runs: list[dict]) -> str:
    """Median of the first adapted layer's gradient norm at the first point of the curves."""
    return f"{statistics.median(run['gradient_norms'][0][0] for run in runs):.1e}"


def plateaus(results: Results) -> str:
    """How many runs a method leaves where they began, and the gradient that reaches the first adapted layer."""
    rows = []
    for method, by_function in results.items():
        runs = [run for by_seed in by_function.values() for run in by_seed.values()]
        stuck = sum(map(is_stuck, runs))
        rows.append([NAMES[method], f"{stuck} of {len(runs)}", first_gradient(runs)])
    gradient = f"first layer's gradient norm at epoch {runs[0]['curve'][1][0]}, median"
    return markdown(["method", "runs that lowered the training error by less than a tenth", gradient], rows)


def variant_table(results: Results) -> str:
    """Methods and variants beside ours, paired by function and seed, and what their routes are like at the end."""
    rows = []
    for method, by_function in results.items():
        pairs = [
            (by_function[function][seed], ours)
            for function, by_seed in results["queryable"].items()
            for seed, ours in by_seed.items()
            if seed in by_function.get(function, {})
        ]
        if not pairs:
            continue
        train, test = ([log(run[kind]) - log(ours[kind]) for run, ours in pairs] for kind in ("train", "test"))
        p = f"{wilcoxon(train).pvalue:.2g}" if any(train) else ""
        runs = [run for run, _ in pairs]
        state = f"{sum(map(is_stuck, runs))} of {len(runs)}", first_gradient(runs)
        routes = [run["routes"][-1] for run in runs]
        told = [f"{statistics.mean(r[part] for r in routes):.2f}" for part in routes[0]] if routes[0] else [""] * 4
        name = NAMES.get(method, f"`{method}`")
        rows.append([name, *(f"{exp(statistics.mean(logs)):.3g}" for logs in (train, test)), p, *state, *told])
    header = ["method", "train error / ours", "test error / ours", "p (Wilcoxon, train)", "stuck"]
    header.append(f"first layer's gradient norm, epoch {runs[0]['curve'][1][0]}")
    return markdown([*header, "entropy of a route", "by example", "by block", "dead atoms"], rows)


def report(path: Path) -> str:
    """All tables of the runs in `path`, in Markdown, with pictures beside it."""
    results, setting = read(path), path.stem.removesuffix("-quick")
    parts = []
    if setting in SETTINGS:  # not a file of fewer epochs, which is of variants
        papers = {method: results[method] for method in NAMES if method in results}
        parts += [*(error_table(papers, setting, kind) for kind in ("train", "test")), plateaus(papers)]
        if "lora" in results:
            parts += [comparison(results, method) for method in OURS if method in results]
        plot_curves(papers, path)
        plot_gradients(papers, path)
    if "queryable" in results:
        parts.append(variant_table({m: runs for m, runs in results.items() if m in ("lora", *OURS, *VARIANTS)}))
        plot_routes(results, path)
    return "\n\n".join(parts) + "\n"


def write_docs(text: str, path: Path) -> None:
    """Put the tables of the runs in `path` into their place in docs/regression.md, and the pictures beside it."""
    page, setting = DOCS / "regression.md", path.stem
    pictures = []
    for picture in (path.with_name(f"{setting}-{name}.svg") for name in ("curves", "gradients", "routes")):
        if picture.exists():
            (DOCS / f"regression-{picture.name}").write_text(picture.read_text())
            pictures.append(f"![{picture.stem}](regression-{picture.name})")
    start, end = (f"<!-- {edge} of recipes/regression/tables.py {setting} -->" for edge in ("start", "end"))
    before, _, rest = page.read_text().partition(start)
    _, found, after = rest.partition(end)
    assert found, f"{page} has no place for {setting}"
    page.write_text("\n\n".join([f"{before}{start}", text.strip(), *pictures, f"{end}{after}"]))


def main(path: Path, *options: str) -> None:
    text = report(path)
    print(text)
    if "--write_docs" in options:
        write_docs(text, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
