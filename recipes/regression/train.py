"""Pre-training and post-training of many runs at once, as in the paper's Sec. 4.1 and B.3.

A run is a function and a seed. Runs of one method have tensors of the same shapes, so they train as one stacked model,
each on data, batches and gradients of its own: AdamW works element by element, so the results are those of training
one after another.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from backbones import BACKBONES
from baselines import attach
from functions import FUNCTIONS
from torch import Tensor, nn, vmap
from torch.func import functional_call, stack_module_state

MEASUREMENTS = 100  # points of a learning curve


@dataclass(frozen=True)
class Setting:
    """What Sec. 4.1 and B.3 fix; a field that only one of them states is used for both.

    Args:
        backbone: one of `BACKBONES`.
        target_train: target examples for adaptation.
        target_test: target examples held out; Sec. 4.1 does not tell their number.
    """

    backbone: str
    target_train: int
    target_test: int = 800
    source_train: int = 2400  # of 3,000; the rest is for testing
    source_test: int = 600
    pretrain_epochs: int = 300
    epochs: int = 5000
    pretrain_lr: float = 3e-3  # for the MLP too, for which B.3 states none
    lr: float = 5e-4
    batch_size: int = 64


SETTINGS = {"wide": Setting("wide", target_train=1200), "deep": Setting("deep", target_train=400)}


class Run(NamedTuple):
    function: str
    seed: int


class Data(NamedTuple):
    """Examples of R runs: points [R, n, 2] and values [R, n]."""

    x: Tensor
    y: Tensor

    def rows(self, index: Tensor) -> "Data":
        """Each run's examples of its row of `index` [R, m]."""
        return Data(self.x.take_along_dim(index.unsqueeze(-1), 1), self.y.take_along_dim(index, 1))


def sample(runs: Sequence[Run], train: int, test: int, target: bool, device: str) -> tuple[Data, Data]:
    """Independent examples to train on and to test on, the same for every method."""
    samples = []
    for run in runs:
        generator = torch.Generator().manual_seed(2 * run.seed + target)
        samples.append(FUNCTIONS[run.function].sample(train + test, generator, target))
    x, y = (torch.stack(parts).to(device) for parts in zip(*samples, strict=True))
    return Data(x[:, :train], y[:, :train]), Data(x[:, train:], y[:, train:])


class Stacked:
    """R models of one structure as one: [R, n, 2] -> [R, n]. Tensors of the models are copied, not changed."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.parameters, self.buffers = stack_module_state(models)  # [R, ...] each
        self.template = models[0].eval()  # nothing here trains differently, but VB-LoRA checks its logits' values
        self.learned = {name: p for name, p in self.parameters.items() if p.requires_grad}

    def __call__(self, x: Tensor) -> Tensor:
        return vmap(self._one)(self.parameters, self.buffers, x)

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        # Shared modules have one name among the parameters; tied names would leave stacked tensors in the template.
        return functional_call(self.template, (parameters, buffers), (x,), tie_weights=False)

    def errors(self, data: Data) -> Tensor:
        """Mean squared error of each run, [R]."""
        return (self(data.x) - data.y).square().mean(1)

    def gradient_norms(self) -> Tensor:
        """Norm of the gradient of each layer's own trainable tensors, [layers, R]; shared banks are no layer's."""
        squares: dict[int, Tensor] = {}
        for name, parameter in self.learned.items():
            if layer := re.search(r"\blayers\.(\d+)\.", name):
                square = parameter.grad.square().flatten(1).sum(1)
                squares[int(layer[1])] = squares.get(int(layer[1]), 0) + square
        return torch.stack([squares[layer] for layer in sorted(squares)]).sqrt()


class Training:
    """AdamW on stacked models, an epoch at a time; each run shuffles by its own seed.

    Compiled, a step of tiny layers takes about half its time, and the first two epochs a minute or two.
    """

    def __init__(
        self, models: Sequence[nn.Module], runs: Sequence[Run], data: Data, lr: float, batch_size: int, compiled: bool
    ) -> None:
        self.model, self.data, self.batch_size = Stacked(models), data, batch_size
        torch.compiler.reset()  # of the models before these
        self.errors = torch.compile(self.model.errors, dynamic=False, disable=not compiled)
        self.optimizer = torch.optim.AdamW(self.model.learned.values(), lr=lr, fused=True)
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


def pretrain(
    setting: Setting, runs: Sequence[Run], device: str, compiled: bool, advance: Callable[[], object]
) -> list[nn.Module]:
    """A backbone for each run, trained on the source function. `advance` is called after every epoch."""
    models = []
    for run in runs:
        torch.manual_seed(run.seed)
        models.append(BACKBONES[setting.backbone]().to(device))
    data, _ = sample(runs, setting.source_train, setting.source_test, target=False, device=device)
    training = Training(models, runs, data, setting.pretrain_lr, setting.batch_size, compiled)
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
        `gradient_norms` of the layers and their `concentration`, the largest over the mean.
    """
    models = []
    for run, backbone, instruction in zip(runs, backbones, instructions, strict=True):
        torch.manual_seed(run.seed)
        models.append(attach(method, backbone, instruction).to(device))
    data, test = sample(runs, setting.target_train, setting.target_test, target=True, device=device)
    training = Training(models, runs, data, setting.lr, setting.batch_size, compiled)
    points, norms = [training.point(0, test)], []
    for epoch in range(1, setting.epochs + 1):
        training.epoch()
        if epoch % math.ceil(setting.epochs / MEASUREMENTS) == 0 or epoch == setting.epochs:
            points.append(training.point(epoch, test))
            norms.append(training.model.gradient_norms())
        advance()
    trainable = sum(p[0].numel() for p in training.model.learned.values())
    return [
        {"method": method, **run._asdict(), "trainable": trainable, **summary(curve, torch.stack(norms)[..., i])}
        for i, (run, curve) in enumerate(zip(runs, map(list, zip(*points, strict=True)), strict=True))
    ]


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
