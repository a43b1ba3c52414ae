"""A callback for the trainers of transformers and TRL: what the routes are like, among the metrics of training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .calls.record import RoutedCall
from .card import card_of
from .findings import findings
from .metrics import concentration, drift, gates, gradient_norms
from .statistics import Readings, RouteStatistics
from .tracing import record_routing, routed_tuner


class RoutingCallback(TrainerCallback):
    """Logs what the routes are like, as `routing/...` beside the loss, and warns once of what is wrong with them.

        SFTTrainer(..., peft_config=QueryableLoraConfig(...), callbacks=[RoutingCallback()])

    Of every `every`-th step, all routes that the loss depends on are counted: of all its micro batches and of all
    processes, without padding, generation and reference models. Nothing waits for the device until the trainer logs,
    and then the last counted step is in the same entry, for every reporter: the values of
    [`RouteStatistics.summary`], `gate_mean`, `gradient_concentration` (after clipping, which leaves it as it is; not
    under FSDP and DeepSpeed), and with an `eval_batch` `drift`, the share of weight that has moved to other atoms
    since the last entry, and `drift_from_start`. An entry for which no step was counted has none of them.

    It also keeps TRL from writing a model card whose code cannot load the adapter: ours takes its place.

    Args:
        every: of the steps, count the first and every `every`-th after it.
        eval_batch: arguments of the model's forward, the same each time. It is run without gradients each time that
            routes are logged, on every process; take a few rows.

    Attributes:
        usages: by step that was logged, the mean route [M], for `plots.plot_training`.

    Raises:
        ValueError: for an `every` below 1; in training, if the model has no Queryable LoRA adapter.
    """

    def __init__(self, every: int = 10, eval_batch: Mapping[str, Any] | None = None) -> None:
        if every < 1:
            raise ValueError(f"`RoutingCallback` takes `every` of 1 or more, got {every}.")
        self.every, self.eval_batch = every, eval_batch
        self.trainer: Trainer | None = None
        self.warned: set[str] = set()
        self.first: Tensor | None = None  # routes of `eval_batch`, [N, M], block after block
        self.last: Tensor | None = None
        self.usages: dict[int, Tensor] = {}  # by step, the mean route [M], for `plots.plot_training`
        self._forget()

    def _forget(self) -> None:
        """Begin a new entry."""
        self.recording = ExitStack()
        self.calls: list[RoutedCall] = []
        self.statistics = RouteStatistics()
        self.norms: Tensor | None = None  # [layers]

    # Events, in their order

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._join(_calling_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._join(_calling_trainer())
        self.model = model
        self.tuner = routed_tuner(model)
        self.adapter_name = self.tuner.active_adapters[0]
        self.recording.close()  # of a training that was interrupted
        self._forget()
        if self.eval_batch is not None:
            self.first = self.last = self._eval_routes()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.statistics = RouteStatistics()  # of several steps it would take what training moved for the input's
            hooks = self.tuner.model_hooks
            recorders = (*hooks.call.recorders, self._record)
            self.recording.enter_context(hooks.entered(recorders=recorders))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.calls or self.statistics.sums:
            norms = list(gradient_norms(self.model, self.adapter_name).values())
            self.norms = torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count()
        self.recording.close()

    # Their parts

    def _record(self, call: RoutedCall) -> None:
        if torch.is_grad_enabled() and call.adapter_name == self.adapter_name:  # else generation, or a reference
            self.calls.append(call)

    def _count(self) -> None:
        for call in self.calls:  # here rather than in the call, which torch.compile may be tracing
            self.statistics.add(call.weights, call.real)
        self.calls.clear()

    def _join(self, trainer: Trainer | None) -> None:
        """Have the trainer log what we know, and write our card in place of TRL's."""
        if trainer is None or trainer is self.trainer:
            return
        self.trainer = trainer
        trainer.log = self._logging(trainer)
        if hasattr(trainer, "create_model_card"):
            trainer.create_model_card = self._write_card

    def _logging(self, trainer: Trainer) -> Callable[..., None]:
        log = trainer.log

        def log_with_routes(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self.statistics.sums:  # a step's entry, not an evaluation's
                logs.update(self._entries(trainer.state.global_step))
            log(logs, *args, **kwargs)

        return log_with_routes

    def _entries(self, step: int) -> dict[str, float]:
        """What goes into the log; the only place that waits for the device, and for other processes."""
        readings = Readings(reduce(self.statistics.table(), "sum"))
        values = readings.summary()
        self.usages[step] = readings.usage.mean(0)
        if own := gates(self.model, self.adapter_name):
            values["gate_mean"] = sum(own.values()) / len(own)
        if self.norms is not None:
            values["gradient_concentration"] = concentration(self.norms).item()
        if self.last is not None and self.first is not None:
            routes = self._eval_routes()
            values["drift"] = drift(self.last, routes).item()
            values["drift_from_start"] = drift(self.first, routes).item()
            self.last = routes
        self._warn(findings(readings))
        self._forget()
        return {f"routing/{name}": value for name, value in values.items()}

    def _warn(self, found: dict[str, str]) -> None:
        for kind, text in found.items():
            if kind not in self.warned and (self.trainer is None or self.trainer.is_world_process_zero()):
                self.warned.add(kind)
                warnings.warn(text, stacklevel=2)

    def _eval_routes(self) -> Tensor:
        """Routes of `eval_batch`, block after block: [N, M] on the CPU. The model's mode stays as it is."""
        was_training, device = self.model.training, next(self.model.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (self.eval_batch or {}).items()}
        self.model.eval()
        with torch.no_grad(), record_routing(self.model) as trace:
            self.model(**moved)
        self.model.train(was_training)
        return torch.cat(list(trace.weights(self.adapter_name).values()))

    def _write_card(self, *args: Any, **kwargs: Any) -> None:
        """In place of the trainer's `create_model_card`."""
        trainer = self.trainer
        if trainer is not None and trainer.is_world_process_zero():
            folder = Path(str(trainer.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            card_of(trainer.model.peft_config[self.adapter_name]).save(folder / "README.md")


def _calling_trainer() -> Trainer | None:
    """The trainer whose event this is: transformers tells a callback everything but that."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]
