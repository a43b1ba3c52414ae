"""Timing side by side: every method works in every round, and what a method cannot do is recorded as a result."""

import gc
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recipes.benchmark.shapes import Setup, sharing
from recipes.benchmark.work import WARM_UP, Run, clocked


def paired(runs: dict[str, Callable[[], Run]], rounds: int) -> dict:
    """Seconds of each run in each round, whose order is drawn anew, and the errors of those that cannot run.

    Args:
        runs: what makes the run, by method.
        rounds: number of rounds, after the runs that warm up.
    """
    ready, failed = {}, {}
    for method, make in runs.items():
        try:
            run = make()
            for _ in range(WARM_UP):
                run()
            ready[method] = run
        except Exception as error:  # of any kind: it is a result
            failed[method] = f"{type(error).__name__}: {error}"
    seconds: dict[str, list[float]] = {method: [] for method in ready}
    gc.collect()
    gc.freeze()  # else a collection walks through the models of all methods, at the cost of the one that runs
    order = random.Random(0)
    for _ in range(rounds):
        for method in order.sample(list(ready), len(ready)):
            seconds[method].append(ready[method]())
    gc.unfreeze()
    return {"seconds": seconds, "failed": failed}


def load_times(models: dict[str, nn.Module], base: nn.Module, setup: Setup, rounds: int) -> dict:
    """Seconds that saved adapters take to load onto a model, and the bytes of their weights."""
    with TemporaryDirectory() as folder:
        runs = {}
        for method, model in models.items():
            if method not in ("base", "xlora"):  # X-LoRA's folder holds base weights, too
                model.save_pretrained(f"{folder}/{method}")
                runs[method] = partial(loading, base, f"{folder}/{method}", setup)
        sizes = {m: sum(f.stat().st_size for f in Path(folder, m).rglob("*.safetensors")) for m in runs}
        return paired(runs, rounds) | {"bytes": sizes}


def loading(base: nn.Module, folder: str, setup: Setup) -> Run:
    return lambda: clocked(partial(PeftModel.from_pretrained, sharing(base), folder), setup)()


def flops(run: Run) -> int:
    """Operations of matrix products and attention, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
