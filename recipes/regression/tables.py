# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Tables and pictures of finished runs, which the recipe also makes at its end.

python -m recipes.regression.tables outputs/regression/deep.jsonl

# Put them into docs/regression.md as well
python -m recipes.regression.tables outputs/regression/deep.jsonl --write_docs

Errors are means over the seeds, with their standard deviation; the paper's are in brackets.
"""

import json
import statistics
import sys
from math import isfinite
from pathlib import Path

from recipes.common.report import fill_place, markdown_table
from recipes.regression.comparisons import NOT_PEFT, OURS, Results, comparison, errors, variant_table
from recipes.regression.functions import FUNCTIONS
from recipes.regression.paper import FIGURES
from recipes.regression.plots import NAMES, plot_curves, plot_gradients, plot_routes
from recipes.regression.settings import SETTINGS
from recipes.regression.variants import VARIANTS


def read(path: Path) -> Results:
    """The records in `path`, methods in the order of the tables."""
    results: Results = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        results.setdefault(record["method"], {}).setdefault(record["function"], {})[record["seed"]] = record
    return {method: results[method] for method in (*NAMES, *VARIANTS) if method in results}


def error_table(results: Results, setting: str, kind: str) -> str:
    """Mean errors with standard deviations and the paper's figures, ours first; the best adapter is in bold."""
    results = {method: results[method] for method in dict.fromkeys((*OURS, "lora", *results)) if method in results}
    figures = FIGURES.get((setting, kind), {})
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
    return markdown_table([f"{kind} error", *map(NAMES.get, results)], rows)


def report(path: Path) -> str:
    """All tables of the runs in `path`, in Markdown. Their pictures are saved beside it."""
    results, setting = read(path), path.stem.removesuffix("-quick")
    parts = []
    if setting in SETTINGS:  # a file of fewer epochs is for variants
        papers = {method: results[method] for method in NAMES if method in results}
        parts += [error_table(papers, setting, kind) for kind in ("train", "test")]
        if "lora" in results:
            parts += [comparison(results, method) for method in OURS if method in results]
        plot_curves(papers, path)
        plot_gradients(papers, path)
    if "queryable" in results:
        parts.append(variant_table(results))
        plot_routes(results, path)
    return "\n\n".join(parts) + "\n"


def write_docs(text: str, path: Path) -> None:
    """Put the tables and pictures of the runs in `path` into their place in docs/regression.md."""
    names = [f"{path.stem}-{kind}.svg" for kind in ("curves", "gradients", "routes")]
    figures = {f"regression-{name}": path.with_name(name) for name in names if path.with_name(name).exists()}
    fill_place("regression.md", f"recipes.regression {path.stem}", text, figures)


def main(path: Path, *options: str) -> None:
    text = report(path)
    print(text)
    if "--write_docs" in options:
        write_docs(text, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
