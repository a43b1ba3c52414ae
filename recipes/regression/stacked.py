"""R models of one structure as one model, and optimizers of their stacked tensors.

Runs of one method have tensors of the same shapes, so they train as one stacked model. Each has its own data, batches
and gradients.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn, vmap
from torch.func import functional_call, stack_module_state
from torch.optim import Optimizer

from peft_queryable import record_routing


class Data(NamedTuple):
    """Examples of R runs: points [R, n, 2] and values [R, n]."""

    x: Tensor
    y: Tensor

    def rows(self, index: Tensor) -> "Data":
        """The examples of each run that its row of `index` [R, m] names."""
        return Data(self.x.take_along_dim(index.unsqueeze(-1), 1), self.y.take_along_dim(index, 1))


class Stacked:
    """R models of one structure as one: [R, n, 2] -> [R, n]. It works on copies of their tensors."""

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

    def routes(self, x: Tensor) -> Tensor:
        """Weights over the atoms by run, block and example, [R, B, n, M]; the adapters must be ours."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            with record_routing(self.template) as trace:
                self._one(parameters, buffers, x)
            return torch.stack(list(trace.weights().values()))

        return vmap(one)(self.parameters, self.buffers, x)

    def gradient_norms(self) -> Tensor:
        """Norm of the gradient of each layer's own trainable tensors, [layers, R]; a shared bank belongs to none."""
        squares: dict[int, Tensor] = {}
        for name, parameter in self.learned.items():
            if layer := re.search(r"\blayers\.(\d+)\.", name):
                square = parameter.grad.square().flatten(1).sum(1)
                squares[int(layer[1])] = squares.get(int(layer[1]), 0) + square
        return torch.stack([squares[layer] for layer in sorted(squares)]).sqrt()


def adamw(
    learned: Mapping[str, Tensor], lr: float, lr_factors: Mapping[str, float], weight_decays: Mapping[str, float]
) -> Optimizer:
    """AdamW, which works element by element, so stacked runs train as they would alone.

    Args:
        learned: stacked tensors by name.
        lr: learning rate.
        lr_factors: by part of a tensor's name, what its learning rate is multiplied by.
        weight_decays: by part of a tensor's name, its weight decay, where it is not AdamW's default of 0.01.
    """
    groups = defaultdict(list)
    for name, parameter in learned.items():
        factor, decay = (
            next((value for part, value in values.items() if part in name), default)
            for values, default in ((lr_factors, 1.0), (weight_decays, 0.01))
        )
        groups[lr * factor, decay].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()], fused=True
    )


class EachRun:
    """An optimizer that treats stacked tensors [R, ...] as R tensors, which one that looks at whole matrices needs.

    Args:
        stacked: what to optimize, in place.
        make: makes the optimizer of a list of parameters.
    """

    def __init__(self, stacked: Sequence[Tensor], make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        self.stacked = stacked
        self.views = [[nn.Parameter(row) for row in tensor.detach()] for tensor in stacked]  # share their memory
        self.optimizer = make([view for views in self.views for view in views])

    def zero_grad(self) -> None:
        for tensor in self.stacked:
            tensor.grad = None

    def step(self) -> None:
        for tensor, views in zip(self.stacked, self.views, strict=True):
            for view, gradient in zip(views, tensor.grad, strict=True):
                view.grad = gradient
        self.optimizer.step()
