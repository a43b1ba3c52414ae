# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Tables and pictures of finished runs of recipes/regression/run.py, which calls it at its end.

python recipes/regression/tables.py outputs/regression/deep.jsonl

# Into docs/regression.md, too
python recipes/regression/tables.py outputs/regression/deep.jsonl --write_docs

Errors are means over the seeds, with their standard deviation; in brackets, the paper's.
"""

import json
import statistics
import sys
from math import isfinite
from pathlib import Path

from comparisons import (
    NOT_PEFT,
    OURS,
    Results,
    comparison,
    errors,
    markdown,
    variant_table,
)
from functions import FUNCTIONS
from paper import FIGURES
from plots import NAMES, plot_curves, plot_gradients, plot_routes
from settings import SETTINGS
from variants import VARIANTS

DOCS = Path(__file__).parents[2] / "docs"


def read(path: Path) -> Results:
    results: Results = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        results.setdefault(record["method"], {}).setdefault(record["function"], {})[record["seed"]] = record
    return {method: results[method] for method in (*NAMES, *VARIANTS) if method in results}


def error_table(results: Results, setting: str, kind: str) -> str:
    """Mean errors and standard deviations, the best adapter's in bold, and the paper's figures."""
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
    return markdown([f"{kind} error", *map(NAMES.get, results)], rows)


def report(path: Path) -> str:
    """All tables of the runs in `path`, in Markdown, with pictures beside it."""
    results, setting = read(path), path.stem.removesuffix("-quick")
    parts = []
    if setting in SETTINGS:  # not a file of fewer epochs, which is of variants
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
