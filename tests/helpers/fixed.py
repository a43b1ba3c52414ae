"""Adapters of real size, routes for them, and what equal means in float64."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers.models import adapted
from peft_queryable import Routes

ATOL = 1e-12


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def random_routes(model: PeftModel, name: str = "default") -> Routes:
    """Other weights in every block, so that a block taken for another shows."""
    settings = model.base_model.queryable_lora_router[name].settings
    weights = torch.rand(settings.num_blocks, settings.num_atoms).softmax(-1)
    return Routes(dict(enumerate(weights)), name)


def trained(model: nn.Module, **fields) -> PeftModel:
    model = adapted(model, **fields)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    return model
