"""The two phases of a run, as in the paper's Sec. 4.1 and B.3: pre-training, and adaptation to the target."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from peft_queryable.metrics import concentration
from recipes.regression.backbones import BACKBONES
from recipes.regression.baselines import OURS, attach
from recipes.regression.settings import Run, Setting
from recipes.regression.train import Training, optimizer, sample

MEASURED_EVERY = 50  # epochs


def pretrain(
    setting: Setting, runs: Sequence[Run], device: str, compiled: bool, advance: Callable[[], object]
) -> list[nn.Module]:
    """One backbone per run, trained on the source function. `advance` is called after every epoch."""
    models = []
    for run in runs:
        torch.manual_seed(run.seed)
        models.append(BACKBONES[setting.backbone]().to(device))
    data, _ = sample(runs, setting.source_train, setting.source_test, target=False, device=device)
    make_optimizer = partial(optimizer, None, setting.pretrain_lr)
    training = Training(models, runs, data, make_optimizer, setting, compiled)
    for _ in range(setting.pretrain_epochs):
        training.epoch()
        advance()
    for i, model in enumerate(models):
        model.load_state_dict({name: tensor[i] for name, tensor in training.model.parameters.items()})
    return models


def adapt(
    setting: Setting,
    method: str,
    runs: Sequence[Run],
    backbones: Sequence[nn.Module],
    instructions: Sequence[Tensor | None],
    device: str,
    compiled: bool,
    advance: Callable[[], object],
) -> list[dict]:
    """Train `method` on the target functions, from pre-trained backbones, which it changes.

    Returns:
        One record per run: what it was; its number of `trainable` parameters; the lowest `train` and `test` errors of
        its curve (B.3) and the last ones; the `curve`, which starts before the first epoch; and for each later point
        the `gradient_norms` of the layers, their `concentration` (the largest over the mean), and, for our adapters,
        the statistics of the `routes`.
    """
    models = []
    for run, backbone, instruction in zip(runs, backbones, instructions, strict=True):
        torch.manual_seed(run.seed)
        models.append(attach(method, backbone, instruction).to(device))
    data, test = sample(runs, setting.target_train, setting.target_test, target=True, device=device)
    training = Training(models, runs, data, partial(optimizer, method, setting.lr), setting, compiled)
    points, norms, routes = [training.point(0, test)], [], []
    for epoch in range(1, setting.epochs + 1):
        training.epoch()
        if epoch % MEASURED_EVERY == 0 or epoch == setting.epochs:
            points.append(training.point(epoch, test))
            norms.append(training.model.gradient_norms())
            routes.append(training.routes() if method in OURS else [None] * len(runs))
        advance()
    trainable = sum(p[0].numel() for p in training.model.learned.values())
    records = []
    for i, run in enumerate(runs):
        curve = [point[i] for point in points]
        measured = {**summary(curve, torch.stack(norms)[..., i]), "routes": [point[i] for point in routes]}
        records.append({"method": method, **run._asdict(), "trainable": trainable, **measured})
    return records


def summary(curve: list[list[float]], norms: Tensor) -> dict:
    """The part of a record that comes from a learning curve and from gradient norms [points, layers]."""
    _, train, test = zip(*curve[1:], strict=True)
    return {
        "train": min(filter(math.isfinite, train), default=math.inf),
        "test": min(filter(math.isfinite, test), default=math.inf),
        "last_train": train[-1],
        "last_test": test[-1],
        "curve": curve,
        "gradient_norms": norms.tolist(),
        "concentration": concentration(norms).tolist(),
    }
