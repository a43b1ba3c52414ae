"""The tables of recipes/regression, against numbers by hand and scipy's, and their places on the page."""

import json
import math
import statistics

from helpers.recipes import ROOT, cells
from scipy.stats import ttest_rel, wilcoxon

from recipes.common import report as common
from recipes.regression import tables
from recipes.regression.comparisons import comparison
from recipes.regression.paper import FIGURES


def finished(path, errors: dict[str, dict[str, list[float]]]) -> None:
    """Records of runs by method and function, whose training error and test error are one number per seed."""
    curve = {"curve": [[0, 1.0, 1.0], [1, 0.5, 0.5]], "gradient_norms": [[1.0, 2.0]], "concentration": [4 / 3]}
    told = [{"entropy": 0.5, "by_input": 0.25, "by_block": 0.125, "dead": 1}]
    routes = {method: {"routes": [None] if method == "lora" else told} for method in errors}
    records = [
        {"method": method, "function": function, "seed": seed, "train": error, "test": error + 1, **curve}
        | routes[method]
        for method, by_function in errors.items()
        for function, values in by_function.items()
        for seed, error in enumerate(values)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_tables_stand_beside_the_papers(tmp_path):
    path = tmp_path / "deep.jsonl"
    finished(path, {"lora": {"Ackley": [1.0, 3.0]}, "queryable": {"Ackley": [0.5, 1.2]}})
    text = cells(tables.report(path))
    assert "| train error | ours | LoRA |" in text
    assert "| Ackley | **0.85 ± 0.49** [0.113] | 2 ± 1.4 [13.124] |" in text
    assert f"| LoRA | {5**0.5:.3g} |" in text and "| 2 of 2 | 1.0e+00 |" in text and "| 1 of 2 | 1.0e+00 |" in text
    assert "| Ackley | **1.85 ± 0.49** [0.673] | 3 ± 1.4 [13.227] |" in text


def test_the_comparison_is_paired_by_seed(tmp_path):
    """Ratios, differences and tests against scipy's and by hand; the order of the lines does not matter."""
    path = tmp_path / "deep.jsonl"
    lora, ours = [1.0, 2.0, 4.0], [0.5, 2.5, 1.0]
    finished(path, {"lora": {"Levy": lora, "Ackley": ours}, "queryable": {"Levy": ours, "Ackley": lora}})
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    text = cells(comparison(tables.read(path), "queryable"))
    ratio = (0.5 * 1.25 * 0.25) ** (1 / 3)
    p = ttest_rel([math.log(e) for e in ours], [math.log(e) for e in lora]).pvalue
    margin = statistics.stdev([-0.5, 0.5, -3.0]) / 3**0.5
    assert f"| Levy | {ratio:.3g} | {p:.2g} | yes | -1 ± {margin:.2g} | better |" in text
    assert f"| Ackley | {1 / ratio:.3g} | {p:.2g} | no | +1 ± {margin:.2g} | within one standard error |" in text
    assert "best on 1 of 2" in text and "on 2, and better on 1." in text
    assert "Over all 6 pairs the ratio of training errors is 1 " in text


def test_single_runs_have_no_spread(tmp_path):
    path = tmp_path / "wide-short.jsonl"
    finished(path, {"lora": {"Ackley": [2.0], "Levy": [1.0]}, "queryable": {"Ackley": [1.0], "Levy": [3.0]}})
    text = cells(tables.report(path))
    assert "| Ackley | **1** | 2 |" in text  # and no figures of the paper, whose runs are longer
    assert "| Ackley | 0.5 | | yes | -1 | better |" in text
    assert "| Levy | 3 | | no | +2 | worse |" in text


def test_diverged_and_missing_runs_have_their_place(tmp_path):
    """A run that diverged counts as infinite, one that is not there is left out; neither stops the report."""
    path = tmp_path / "deep.jsonl"
    ours = {"Ackley": [0.5, 1.2], "Levy": [1.0, 2.0]}
    finished(
        path,
        {"lora": {"Ackley": [1.0, math.inf], "Levy": [3.0, 5.0]}, "dora": {"Levy": [0.1, 0.2]}, "queryable": ours},
    )
    text = cells(tables.report(path))
    assert "| Ackley | **0.85 ± 0.49** [0.113] | inf [13.124] | |" in text
    assert "| Ackley | 0 | | yes | -inf | better |" in text and "best on 1 of 2" in text


def test_variants_stand_beside_ours(tmp_path):
    path = tmp_path / "deep-500.jsonl"
    dense = {"Levy": [0.5, 3.0], "Ackley": [4.0]}
    unfinished = {"depth_only": {"Levy": [3.0]}, "state_only": {"Ackley": [4.0]}}
    finished(path, {"lora": {"Levy": [4.0, 4.0]}, "queryable": {"Levy": [1.0, 2.0]}, "all_atoms": dense} | unfinished)
    text = cells(tables.report(path))
    ratio, test = (0.5 * 1.5) ** 0.5, (1.5 / 2 * 4 / 3) ** 0.5  # the run without a partner is left out
    p = wilcoxon([math.log(0.5), math.log(1.5)]).pvalue
    routes = "0.50 | 0.25 | 0.12 | 1.00"
    assert f"| `all_atoms` | {ratio:.3g} | {test:.3g} | {p:.2g} | 1 of 2 | 1.0e+00 | {routes} |" in text
    assert f"| ours | 1 | 1 | | 2 of 2 | 1.0e+00 | {routes} |" in text
    assert "| `depth_only` | 3 | 2 | 1 |" in text and "state_only" not in text
    assert f"| LoRA | {8**0.5:.3g} |" in text and "[13.124]" not in text


def test_the_papers_figures():
    """Spot checks against the printed tables, by their corners."""
    assert FIGURES["wide", "train"]["lora"]["Ackley"] == 0.0754
    assert FIGURES["wide", "train"]["queryable"]["Styblinski-Tang"] == 0.3862
    assert FIGURES["wide", "test"]["dora"]["Dropwave"] == 374.8006
    assert FIGURES["deep", "train"]["hyra"]["Styblinski-Tang"] == math.inf
    assert FIGURES["deep", "test"]["soap"]["Rastrigin"] == 156.795


def test_the_page_takes_the_tables_of_a_setting(tmp_path, monkeypatch):
    page = tmp_path / "regression.md"
    page.write_text((ROOT / "docs/regression.md").read_text())
    monkeypatch.setattr(common, "DOCS", tmp_path)
    for name in ("curves", "gradients"):
        (tmp_path / f"deep-{name}.svg").write_text("<svg/>")
    for table in ("| a table |", "| another |"):
        tables.write_docs(table, tmp_path / "deep.jsonl")
    before, _, after = page.read_text().partition("| another |\n\n![deep-curves](regression-deep-curves.svg)\n")
    assert "## The deep setting" in before and "## Not done yet" in after
    assert "| a table |" not in before + after
    assert (tmp_path / "regression-deep-gradients.svg").read_text() == "<svg/>"
