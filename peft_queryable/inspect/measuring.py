"""The routes of an adapter on texts, with what is known of each: its group and its position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..command import encode
from ..metrics import adapted_layers, gates, gradient_norms, group_usage, information, layer_name
from ..statistics import RouteStatistics
from ..tracing import record_routing

BATCH = 8  # rows per call
POSITIONS = 16  # tokens that count as one position: of single ones there would be too few routes


@dataclass
class Measured:
    """Routes of an adapter on texts.

    Attributes:
        groups: names of the groups, in the order of their labels.
        weights: by block, [N, M].
        labels: by block, the group of each route, [N].
        positions: by block, the index of each route's stretch of 16 tokens, [N]; all 0 where one route serves a row.
        statistics: of all routes.
        tokens: those of the first text.
        first: by block, its routes, [T, M] or [1, M].
        gates: by module.
        gradient_norms: by layer; empty for models that are not trained on their own tokens.
    """

    groups: list[str]
    weights: dict[int, Tensor]
    labels: dict[int, Tensor]
    positions: dict[int, Tensor]
    statistics: RouteStatistics
    tokens: list[str]
    first: dict[int, Tensor]
    gates: dict[str, float]
    gradient_norms: dict[str, float]

    def usage(self) -> dict[str, Tensor]:
        """By group, the mean route of each block, [blocks, M]."""
        usages = torch.stack([group_usage(self.weights[b], self.labels[b]) for b in self.weights], 1)
        return dict(zip(self.groups, usages, strict=True))

    def by_group(self) -> list[float]:
        """What the group decides in each block, nats."""
        return [float(information(self.weights[b], self.labels[b])) for b in self.weights]

    def by_position(self) -> list[float]:
        """What the position decides in each block, nats."""
        return [float(information(self.weights[b], self.positions[b])) for b in self.weights]

    def chance(self) -> float:
        """What a group without meaning would seem to decide: the bias of `information`, nats."""
        weights = self.weights[min(self.weights)]
        used = max(int((routes > 0).any(0).sum()) for routes in self.weights.values())
        return (len(self.groups) - 1) * (used - 1) / (2 * len(weights))

    def gates_by_layer(self) -> dict[str, float]:
        """The mean gate of each layer."""
        found: dict[str, list[float]] = {}
        for name, gate in self.gates.items():
            found.setdefault(layer_name(name), []).append(gate)
        return {name: sum(values) / len(values) for name, values in found.items()}


def measure(model: Any, tokenizer: Any, lines: Sequence[dict[str, Any]], column: str | None, length: int) -> Measured:
    """Run `model` on `lines` of text, cut to `length` tokens each.

    Args:
        model: a `PeftModel` with one active adapter of ours.
        tokenizer: its tokenizer.
        lines: with text, messages, or prompt and completion.
        column: the column that names a line's group; None puts all into one.

    Raises:
        ValueError: for an empty file, or a line without the column.
    """
    names = groups_of(lines, column)
    groups, adapter_name = sorted(set(names)), model.active_adapters[0]
    found: dict[str, dict[int, list[Tensor]]] = {"weights": {}, "labels": {}, "positions": {}}
    statistics, first, tokens = RouteStatistics(), {}, []
    for start in range(0, len(lines), BATCH):
        batch = encode(tokenizer, list(lines[start : start + BATCH]), length)
        rows = torch.tensor([groups.index(name) for name in names[start : start + BATCH]])
        with torch.no_grad(), record_routing(model) as trace:
            model(**moved(batch, model))
        statistics_of = trace.statistics[adapter_name]
        for block in statistics_of.blocks:
            sums = statistics_of.sums[block]
            statistics.sums[block] = statistics.sums[block] + sums if block in statistics.sums else sums
        for call in (call for call in trace.calls if call.adapter_name == adapter_name):
            for block, weights in call.weights.items():
                real = torch.ones(weights.shape[:2], dtype=torch.bool) if call.real is None else call.real
                parts = {
                    "weights": weights[real],
                    "labels": rows[:, None].expand_as(real)[real],
                    "positions": (torch.arange(real.shape[1]) // POSITIONS).expand_as(real)[real],
                }
                for name, part in parts.items():
                    found[name].setdefault(block, []).append(part)
                if start == 0:
                    first[block] = call.row(block, 0)
        if start == 0:
            tokens = [tokenizer.decode([i]) for i in batch["input_ids"][0, batch["attention_mask"][0] == 1].tolist()]
    joined = {name: {b: torch.cat(parts[b]) for b in sorted(parts)} for name, parts in found.items()}
    norms = norms_of(model, encode(tokenizer, list(lines[:BATCH]), length), adapter_name)
    own = gates(model, adapter_name)
    return Measured(
        groups, **joined, statistics=statistics, tokens=tokens, first=first, gates=own, gradient_norms=norms
    )


def groups_of(lines: Sequence[dict[str, Any]], column: str | None) -> list[str]:
    """The name of each line's group."""
    if not lines:
        raise ValueError(
            "The data file has no lines. Each is a JSON object with text, messages, or prompt and completion."
        )
    for number, line in enumerate(lines, 1):
        if column is not None and column not in line:
            raise ValueError(f"Line {number} of the data has no column {column!r}, only {sorted(line)}.")
    return ["all" if column is None else str(line[column]) for line in lines]


def norms_of(model: Any, batch: dict[str, Tensor], adapter_name: str) -> dict[str, float]:
    """Gradient norms of the layers in language modelling on a batch; empty for other models."""
    if model.peft_config[adapter_name].task_type != "CAUSAL_LM":
        return {}
    prompt = batch.get("prompt_mask", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | prompt, -100)
    for layer in adapted_layers(model, adapter_name).values():
        for part in layer.adapter_layer_names:
            if adapter_name in getattr(layer, part):
                getattr(layer, part)[adapter_name].requires_grad_(True)  # PEFT loads adapters frozen
    model(**moved({**batch, "labels": labels}, model)).loss.backward()
    norms = {name: float(norm) for name, norm in gradient_norms(model, adapter_name).items()}
    model.zero_grad()
    return norms


def moved(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """`batch` on the model's device, with start tokens for a decoder beside an encoder."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if model.config.is_encoder_decoder and "labels" not in batch:
        start = torch.full_like(batch["input_ids"][:, :1], model.config.decoder_start_token_id)
        batch["decoder_input_ids"] = torch.cat([start, batch["input_ids"][:, :-1]], 1)
    return batch
