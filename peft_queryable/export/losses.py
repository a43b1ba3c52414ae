"""What fixing routes costs: the mean loss of a causal language model routed, fixed, and with S = 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from ..instruction import tuner_of, use_instructions
from ..routes import Routes, fix_routes

IGNORED = -100


def losses(
    model: PeftModel, routes: Routes, batches: Iterable[Mapping[str, Tensor]], instruction: str | None, progress: Any
) -> dict[str, float]:
    """Mean loss per supervised token: "routed", "fixed" and "S = 0", which is the LoRA without its atoms.

    Args:
        model: a causal language model with the adapter of `routes` active.
        routes: the fixed routes.
        batches: each with `input_ids` and `attention_mask` [B, T] and, where rows have prompts, `prompt_mask`.
        instruction: what the routed adapter follows; None for its default.
        progress: wraps the batches, as tqdm does.
    """
    hooks, name = tuner_of(model).model_hooks, routes.adapter_name
    nothing = torch.stack([torch.zeros_like(w) for w in routes.weights.values()])[None]
    totals, count = {"routed": 0.0, "fixed": 0.0, "S = 0": 0.0}, 0
    for batch in progress(batches):
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        if "prompt_mask" in batch:
            targets = targets.masked_fill(batch["prompt_mask"].bool(), IGNORED)
        count += int((targets[:, 1:] != IGNORED).sum())
        if instruction is None:
            totals["routed"] += _loss(model, batch, targets)
        else:
            with use_instructions(model, instruction):
                totals["routed"] += _loss(model, batch, targets)
        with fix_routes(model, routes):
            totals["fixed"] += _loss(model, batch, targets)
        with hooks.entered(routes={name: nothing}):
            totals["S = 0"] += _loss(model, batch, targets)
    return {name: total / max(count, 1) for name, total in totals.items()}


@torch.no_grad()
def _loss(model: PeftModel, batch: Mapping[str, Tensor], targets: Tensor) -> float:
    """Sum of the losses of the tokens `targets` [B, T], -100 where they do not count."""
    logits = model(**batch).logits[:, :-1].float()
    return F.cross_entropy(
        logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    ).item()
