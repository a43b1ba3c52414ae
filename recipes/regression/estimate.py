"""How long the runs would take on this machine, by a few steps of each method."""

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from tqdm import tqdm

from recipes.common.report import markdown_table
from recipes.regression.backbones import BACKBONES
from recipes.regression.baselines import INSTRUCTION_DIM, attach
from recipes.regression.settings import Run, Setting
from recipes.regression.train import Training, optimizer, sample


def estimate(
    setting: Setting, methods: Sequence[str], runs: Sequence[Run], at_once: int, device: str, compiled: bool
) -> None:
    """Print, for each method, the time of a step of one run and of `at_once` runs, and what all runs would take."""
    rows = []
    for method in tqdm(methods, desc="estimating", unit="method"):
        for size in sorted({1, min(at_once, len(runs))}):
            seconds = step_seconds(method, setting, runs[:size], device, compiled)
            steps = setting.epochs * math.ceil(setting.target_train / setting.batch_size)
            hours = seconds * steps * math.ceil(len(runs) / size) / 3600
            rows.append([method, f"{size}", f"{1000 * seconds:.1f}", f"{hours:.1f}"])
    print(markdown_table(["method", "runs at once", "ms per step", "hours in all"], rows))


def step_seconds(
    method: str, setting: Setting, runs: Sequence[Run], device: str, compiled: bool, steps: int = 2
) -> float:
    """Seconds of a training step of stacked `runs`, after as many steps to warm up."""
    zero = torch.zeros(1, INSTRUCTION_DIM)
    models = [attach(method, BACKBONES[setting.backbone](), zero).to(device) for _ in runs]
    data, _ = sample(runs, steps * setting.batch_size, 1, target=True, device=device)
    training = Training(models, runs, data, partial(optimizer, method, setting.lr), setting, compiled)
    training.epoch()
    data.x.sum().item()  # waits for a GPU
    start = time.perf_counter()
    training.epoch()
    data.x.sum().item()
    return (time.perf_counter() - start) / steps
