"""Training many runs at once: a run is a function and a seed.

The runs of one method train as one stacked model; the results are those of training one after another.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_queryable import RouteStatistics
from recipes.regression.functions import FUNCTIONS
from recipes.regression.settings import Run, Setting
from recipes.regression.stacked import Data, EachRun, Stacked, adamw
from recipes.regression.variants import VARIANTS, Variant


def sample(runs: Sequence[Run], train: int, test: int, target: bool, device: str) -> tuple[Data, Data]:
    """Independent examples to train on and to test on, the same for every method."""
    samples = []
    for run in runs:
        generator = torch.Generator().manual_seed(2 * run.seed + target)
        samples.append(FUNCTIONS[run.function].sample(train + test, generator, target))
    x, y = (torch.stack(parts).to(device) for parts in zip(*samples, strict=True))
    return Data(x[:, :train], y[:, :train]), Data(x[:, train:], y[:, train:])


def optimizer(method: str | None, lr: float, learned: Mapping[str, Tensor]) -> Optimizer | EachRun:
    """What trains stacked tensors: AdamW, or SOAP for the method of that name. Pre-training has the method None."""
    if method == "soap":
        return EachRun(list(learned.values()), partial(SOAP, lr=lr))
    variant = VARIANTS.get(method, Variant())
    return adamw(learned, lr, variant.lr_factors, variant.weight_decays)


class Training:
    """Stacked models in training, one epoch at a time; each run shuffles by its own seed.

    Compiled, a step of tiny layers takes about half the time, and the first two epochs a minute or two.
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
        """Statistics of each run's routes of its training examples."""
        summaries = []
        for routes in self.model.routes(self.data.x):  # [blocks, n, M] of a run
            statistics = RouteStatistics()
            statistics.add(dict(enumerate(routes)))
            summaries.append(statistics.summary())
        return summaries
