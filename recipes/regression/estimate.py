"""How long the runs would take here, by a few steps of each method."""

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from backbones import BACKBONES
from baselines import INSTRUCTION_DIM, attach
from settings import Run, Setting
from train import Training, optimizer, sample


def estimate(
    setting: Setting, methods: Sequence[str], runs: Sequence[Run], at_once: int, device: str, compiled: bool
) -> None:
    """Print the time of a step of each method, of one run and of `at_once` runs, and of all its runs by that."""
    print("| method | runs at once | ms a step | hours in all |\n|---|---|---|---|")
    for method in methods:
        for size in sorted({1, min(at_once, len(runs))}):
            seconds = step_seconds(method, setting, runs[:size], device, compiled)
            steps = setting.epochs * math.ceil(setting.target_train / setting.batch_size)
            hours = seconds * steps * math.ceil(len(runs) / size) / 3600
            print(f"| {method} | {size} | {1000 * seconds:.1f} | {hours:.1f} |", flush=True)


def step_seconds(
    method: str, setting: Setting, runs: Sequence[Run], device: str, compiled: bool, steps: int = 2
) -> float:
    """Seconds of a training step of stacked `runs`, after as many to warm up."""
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
