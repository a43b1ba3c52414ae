"""Arms compared run by run: in every arm, a seed has the same base and the same examples."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import exp, inf, isfinite, log
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t

from recipes.language.arms import ARMS
from recipes.language.records import load

TITLES = {  # of comparisons, in the order of the tables
    "token": "Told by a token",
    "first": "Decided by the first symbol",
    "middle": "Decided by a symbol in the middle",
    "last": "Decided by the last symbol",
    "instruction": "Told to the adapter alone",
    "single": "One task",
    "sequence": "One task after another",
    "numbers-prompt": "Number words, the language told by the prompt",
    "numbers-examples": "Number words, the language told by examples",
    "numbers-instruction": "Number words, the language told to the adapter alone",
    "territories-prompt": "Territories, the language told by the prompt",
    "territories-examples": "Territories, the language told by examples",
    "territories-instruction": "Territories, the language told to the adapter alone",
    "gsm8k-prompt": "GSM8K",
    "articles-prompt": "Articles of five topics",
}
Runs = Mapping[int, dict]  # records by seed


class Ratio(NamedTuple):
    """A ratio of losses: its geometric mean over paired seeds, and the 95 % interval of that mean (t of the logs)."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.n > 1 else f"{self.mean:.2f}"


class Best(NamedTuple):
    """The runs of an arm at the rate that is best on validation data."""

    lr: float
    is_edge: bool  # whether it is the lowest or highest rate that was tried
    runs: Runs


def read(*paths: Path) -> dict[tuple[str, int], dict[str, dict[float, Runs]]]:
    """Records by condition and rank, then arm, rate and seed, in the order of the tables.

    Of a run that several files have, the last one counts.
    """
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in load(*paths):
        found[record["condition"], record["rank"]][record["arm"]][record["lr"]][record["seed"]] = record
    places = sorted(found, key=lambda place: (-place[1], list(TITLES).index(place[0])))
    return {place: {arm: found[place][arm] for arm in ARMS if arm in found[place]} for place in places}


def best(rates: Mapping[float, Runs]) -> Best:
    """The rate with the lowest geometric mean of validation losses, among those with most seeds."""
    most = max(map(len, rates.values()))
    means = {
        lr: statistics.mean(log(record["validation"]) for record in runs.values())
        for lr, runs in rates.items()
        if len(runs) == most
    }
    lr = min(means, key=means.__getitem__)
    return Best(lr, len(means) > 1 and lr in (min(means), max(means)), rates[lr])


def ratio(runs: Runs, others: Runs, name: str = "test", other_name: str = "test") -> Ratio | None:
    """Losses of `runs` over those of `others`, seed by seed; None without a common seed."""
    seeds = sorted(set(runs) & set(others))
    logs = [log(runs[seed][name]) - log(others[seed][other_name]) for seed in seeds]
    if not logs:
        return None
    if not all(map(isfinite, logs)):
        return Ratio(inf, inf, inf, len(logs))
    return Ratio(exp(statistics.mean(logs)), *_interval(logs), len(logs))


def interval(runs: Runs, name: str) -> tuple[float, float]:
    """The 95 % interval of the geometric mean over seeds, by the t distribution of the logs."""
    return _interval([log(record[name]) for record in runs.values()])


def _interval(logs: Sequence[float]) -> tuple[float, float]:
    if not all(map(isfinite, logs)):
        return inf, inf
    mean = statistics.mean(logs)
    half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
    return exp(mean - half), exp(mean + half)


def geometric_mean(runs: Runs, name: str) -> float:
    return exp(statistics.mean(log(record[name]) for record in runs.values()))


def mean(runs: Runs, name: str) -> float:
    return statistics.mean(record[name] for record in runs.values())


def forgetting(record: dict) -> float:
    """By how much the losses of tasks rise after their own stage, at the end; the mean over all but the last.

    Backward transfer, in losses, is the same with the other sign.
    """
    matrix = record["matrix"]
    return statistics.mean(matrix[-1][task] - matrix[task][task] for task in range(len(matrix) - 1))
