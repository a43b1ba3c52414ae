"""Models of one structure as one: their losses, and a training in which each learns as it would alone."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from peft_queryable import record_routing
from recipes.language.skills import PROMPT

CLIP = 1.0  # largest norm of a gradient, as in transformers' Trainer
WARM_UP = 0.05  # of all steps; then the rate falls to zero in a straight line


class Stacked:
    """R models of one structure as one, on copies of their tensors; each has lines of its own, [R, n, 15].

    Args:
        models: the models.
        inputs: what a call gets beside its lines [R, n, 15], of tasks [n]: by name, tensors [n, ...] for all models,
            or `instruction_embeds` [R, n, d].
        routing: a context for calls, by the model and the tasks.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        inputs: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda lines, tasks: {},
        routing: Callable[[nn.Module, Tensor], AbstractContextManager[None]] = lambda model, tasks: nullcontext(),
    ) -> None:
        self.parameters, self.buffers = stack_module_state(models)  # [R, ...] each
        self.template, self.inputs, self.routing = models[0], inputs, routing
        self.learned = {name: p for name, p in self.parameters.items() if p.requires_grad}

    def map(self, function: Callable[[Tensor, Tensor], Tensor], lines: Tensor, tasks: Tensor) -> Tensor:
        """`function` of each model's logits of the answers [n, 6, V] and the answers [n, 6].

        Args:
            function: what to return of one model.
            lines: [R, n, 15].
            tasks: [n], the same for all models.
        """

        def one(logits: Tensor, lines: Tensor) -> Tensor:
            return function(logits[:, PROMPT:], lines[:, PROMPT + 1 :])

        return self._each(one, lines, tasks)

    def routes(self, lines: Tensor, tasks: Tensor) -> Tensor:
        """The routes of the answers by block, [R, blocks, n, K, M]; the models must be ours, and routed by tokens.

        K is 1 where one route serves a line, and else 6.
        """
        with record_routing(self.template) as trace:

            def one(logits: Tensor, lines: Tensor) -> Tensor:
                weights = torch.stack(list(trace.calls[-1].weights.values()))
                return weights[:, :, PROMPT:] if weights.shape[2] > 1 else weights

            return self._each(one, lines, tasks)

    def _each(self, function: Callable[[Tensor, Tensor], Tensor], lines: Tensor, tasks: Tensor) -> Tensor:
        """`function` of each model's logits [n, 14, V] and lines [n, 15]."""

        def one(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], lines: Tensor, given: dict[str, Tensor]
        ) -> Tensor:
            # Shared modules have one name among the parameters; tied names would leave stacked tensors behind.
            inputs = {"input_ids": lines[:, :-1], **given}
            output = functional_call(self.template, (parameters, buffers), (), inputs, tie_weights=False)
            return function(output.logits, lines)

        with self.routing(self.template, tasks):
            given = self.inputs(lines, tasks)
            dims = {name: 0 if name == "instruction_embeds" else None for name in given}
            return vmap(one, (0, 0, 0, dims))(self.parameters, self.buffers, lines, given)

    def losses(self, lines: Tensor, tasks: Tensor) -> Tensor:
        """Mean loss of each line's answers, [R, n]."""
        return self.map(answer_loss, lines, tasks)


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """[n] of logits [n, 6, V] and answers [n, 6]."""
    return F.cross_entropy(logits.transpose(1, 2), answers, reduction="none").mean(1)


def is_exact(logits: Tensor, answers: Tensor) -> Tensor:
    """Whether all answers of a line are the likeliest, [n] of 0 and 1."""
    return (logits.argmax(-1) == answers).all(1).float()


def train(
    stacked: Stacked,
    lr: float,
    steps: int,
    lines: Callable[[], Tensor],
    tasks: Tensor,
    advance: Callable[[], object],
    lr_factors: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """AdamW with warm-up and decay; AdamW works element by element, so stacked runs train as they would alone.

    Args:
        stacked: the models in training.
        lr: highest learning rate.
        steps: number of steps.
        lines: makes the lines of a step, [R, n, 15].
        tasks: their tasks, [n].
        advance: called after every step.
        lr_factors: by part of a tensor's name, what its learning rate is multiplied by.
    """
    learned = list(stacked.learned.values())
    groups = defaultdict(list)
    for name, p in stacked.learned.items():
        groups[next((factor for part, factor in lr_factors.items() if part in name), 1.0)].append(p)
    params = [{"params": group, "lr": lr * factor} for factor, group in groups.items()]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0, fused=True)
    warm_up = max(round(WARM_UP * steps), 1)
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up)))
    for _ in range(steps):
        optimizer.zero_grad()
        stacked.losses(lines(), tasks).mean(1).sum().backward()
        clip_each(learned)
        optimizer.step()
        scheduler.step()
        advance()


def clip_each(learned: Sequence[Tensor]) -> None:
    """Scale each run's gradient to a norm of `CLIP` at most. The router has none where routes are given."""
    gradients = [p.grad for p in learned if p.grad is not None]
    norms = sum(gradient.flatten(1).square().sum(1) for gradient in gradients).sqrt()
    for gradient in gradients:
        gradient *= (CLIP / norms).clamp(max=1).view(-1, *[1] * (gradient.ndim - 1))
