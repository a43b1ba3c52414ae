"""Methods compared run by run: for every method, a seed has the same backbone and the same examples."""

import statistics
from math import exp, isfinite, log

from scipy.stats import ttest_1samp, wilcoxon

from recipes.common.report import markdown_table
from recipes.regression.functions import FUNCTIONS
from recipes.regression.plots import NAMES

OURS = ("queryable", "instruction")
NOT_PEFT = ("soap",)
ROUTE_PARTS = ("entropy", "by_input", "by_block", "dead")
Results = dict[str, dict[str, dict[int, dict]]]  # records by method, function and seed


def errors(results: Results, method: str, function: str, kind: str) -> list[float]:
    """Errors of a method by seed; `kind` is "train" or "test"."""
    runs = results[method].get(function, {})
    return [runs[seed][kind] for seed in sorted(runs)]


def comparison(results: Results, method: str) -> str:
    """`method` and LoRA, paired by seed: function by function, and over all."""
    rows, logs, best, no_worse, better = [], [], 0, 0, 0
    others = [other for other in results if other not in (*OURS, *NOT_PEFT)]
    for function in FUNCTIONS:
        train, lora = (errors(results, m, function, "train") for m in (method, "lora"))
        test, lora_test = (errors(results, m, function, "test") for m in (method, "lora"))
        if not train or len(train) != len(lora):
            continue
        ratios = [log(a) - log(b) for a, b in zip(train, lora, strict=True)]
        differences = [a - b for a, b in zip(test, lora_test, strict=True)]
        mean = statistics.mean(differences)
        margin = standard_error(differences)
        rivals = [e for e in (errors(results, other, function, "train") for other in others) if e]
        is_best = all(statistics.mean(train) < statistics.mean(rival) for rival in rivals)
        best, no_worse, better = best + is_best, no_worse + (mean <= margin), better + (mean < 0)
        logs += ratios
        p = f"{ttest_1samp(ratios, 0).pvalue:.2g}" if len(ratios) > 1 and all(map(isfinite, ratios)) else ""
        verdict = "better" if mean < 0 else "within one standard error" if mean <= margin else "worse"
        ratio, spread = f"{exp(statistics.mean(ratios)):.3g}", f" ± {margin:.2g}" if margin else ""
        rows.append([function, ratio, p, "yes" if is_best else "no", f"{mean:+.3g}{spread}", verdict])
    header = [f"{NAMES[method]} and LoRA", "train error, ratio", "p (paired t of logs)", "best in training error"]
    table = markdown_table([*header, "test error, difference", "test"], rows)
    if not rows:
        return table
    return (
        f"{table}\n\nIn training error best on {best} of {len(rows)}; in test error no worse than LoRA, within one "
        f"standard error, on {no_worse}, and better on {better}. Over all {len(logs)} pairs the ratio of training "
        f"errors is {exp(statistics.mean(logs)):.3g} (p = {wilcoxon(logs).pvalue:.2g}, Wilcoxon's signed-rank test)."
    )


def standard_error(differences: list[float]) -> float:
    """Standard error of the mean; 0 where it has none: for a single run, and where a run has diverged."""
    if len(differences) == 1 or not all(map(isfinite, differences)):
        return 0.0
    return statistics.stdev(differences) / len(differences) ** 0.5


def is_stuck(run: dict) -> bool:
    """Whether a run lowered the training error by less than a tenth."""
    return run["train"] > 0.9 * run["curve"][0][1]


def first_gradient(runs: list[dict]) -> str:
    """Median of the first adapted layer's gradient norm at the first point of the curves."""
    return f"{statistics.median(run['gradient_norms'][0][0] for run in runs):.1e}"


def variant_table(results: Results) -> str:
    """Methods and variants beside ours, paired by function and seed, with statistics of their last routes."""
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
        told = [f"{statistics.mean(r[part] for r in routes):.2f}" for part in ROUTE_PARTS] if routes[0] else [""] * 4
        name = NAMES.get(method, f"`{method}`")
        rows.append([name, *(f"{exp(statistics.mean(logs)):.3g}" for logs in (train, test)), p, *state, *told])
    header = ["method", "train error / ours", "test error / ours", "p (Wilcoxon, train)", "stuck"]
    header.append(f"first layer's gradient norm, epoch {runs[0]['curve'][1][0]}")
    return markdown_table([*header, "entropy of a route", "by input", "by block", "dead atoms"], rows)
