"""Pre-training and post-training of many runs at once, as in the paper's Sec. 4.1 and B.3.

A run is a function and a seed. Runs of one method train as one stacked model; the results are those of training one
after another.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from backbones import BACKBONES
from baselines import OURS, attach
from functions import FUNCTIONS
from pytorch_optimizer import SOAP
from routing import route_statistics
from settings import Run, Setting
from stacked import Data, EachRun, Stacked, adamw
from torch import Tensor, nn
from torch.optim import Optimizer
from variants import VARIANTS, Variant

MEASURED_EVERY = 50  # epochs


def sample(runs: Sequence[Run], train: int, test: int, target: bool, device: str) -> tuple[Data, Data]:
    """Independent examples to train on and to test on, the same for every method."""
    samples = []
    for run in runs:
        generator = torch.Generator().manual_seed(2 * run.seed + target)
        samples.append(FUNCTIONS[run.function].sample(train + test, generator, target))
    x, y = (torch.stack(parts).to(device) for parts in zip(*samples, strict=True))
    return Data(x[:, :train], y[:, :train]), Data(x[:, train:], y[:, train:])


def optimizer(method: str | None, lr: float, learned: Mapping[str, Tensor]) -> Optimizer | EachRun:
    """What trains stacked tensors: AdamW, or SOAP for the full fine-tuning of that name; None is pre-training."""
    if method == "soap":
        return EachRun(list(learned.values()), partial(SOAP, lr=lr))
    variant = VARIANTS.get(method, Variant())
    return adamw(learned, lr, variant.lr_factors, variant.weight_decays)


class Training:
    """Stacked models in training, an epoch at a time; each run shuffles by its own seed.

    Compiled, a step of tiny layers takes about half its time, and the first two epochs a minute or two.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        runs: Sequence[Run],
        data: Data,
        make_optimizer: Callable[[Mapping[str, Tensor]], Optimizer | EachRun],
        setting: Setting,
        compiled: bool,
    ) -> None:
        torch.set_float32_matmul_precision(setting.matmul_precision)
        self.model, self.data, self.batch_size = Stacked(models), data, setting.batch_size
        torch.compiler.reset()  # of the models before these
        self.errors = torch.compile(self.model.errors, dynamic=False, disable=not compiled)
        self.optimizer = make_optimizer(self.model.learned)
        self.generators = [torch.Generator().manual_seed(run.seed) for run in runs]

    def epoch(self) -> None:
        n = self.data.x.shape[1]
        order = torch.stack([torch.randperm(n, generator=generator) for generator in self.generators])
        for index in order.to(self.data.x.device).split(self.batch_size, 1):
            self.optimizer.zero_grad()
            self.errors(self.data.rows(index)).sum().backward()
            self.optimizer.step()

    @torch.no_grad()
    def point(self, epoch: int, test: Data) -> list[list[float]]:
        """A point (epoch, training error, test error) of each run's learning curve."""
        errors = self.model.errors(self.data).tolist(), self.model.errors(test).tolist()
        return [[epoch, *pair] for pair in zip(*errors, strict=True)]

    @torch.no_grad()
    def routes(self) -> list[dict[str, float]]:
        """What each run's routes of its training examples tell."""
        return route_statistics(self.model.routes(self.data.x))


def pretrain(
    setting: Setting, runs: Sequence[Run], device: str, compiled: bool, advance: Callable[[], object]
) -> list[nn.Module]:
    """A backbone for each run, trained on the source function. `advance` is called after every epoch."""
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
        A record a run: what it was; `trainable` parameters; the lowest `train` and `test` errors of its curve (B.3)
        and the last ones; the `curve`, from before the first epoch on; and at every later point of it the
        `gradient_norms` of the layers, their `concentration`, the largest over the mean, and for our adapters what
        the `routes` tell.
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
    """What a record says of a learning curve and of gradient norms [points, layers]."""
    _, train, test = zip(*curve[1:], strict=True)
    return {
        "train": min(filter(math.isfinite, train), default=math.inf),
        "test": min(filter(math.isfinite, test), default=math.inf),
        "last_train": train[-1],
        "last_test": test[-1],
        "curve": curve,
        "gradient_norms": norms.tolist(),
        "concentration": (norms.amax(1) / norms.mean(1)).tolist(),
    }
