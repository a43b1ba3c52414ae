"""The optimizers of `peft.optimizers`: which of them train an adapter, and how."""

from __future__ import annotations

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, randomise, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn


def build(**kwargs) -> PeftModel:
    torch.manual_seed(0)
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, **kwargs)
    randomise(model, scale=0.2)
    return model.train()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the parameters that one step moves."""
    ids = token_ids(2, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_loraplus():
    """B and the gates get the larger learning rate, A and the bank the plain one; each tensor is in one group."""
    model = build()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(trainable(model))
    for name, parameter in trainable(model).items():
        is_fast = "lora_B" in name or "queryable_lora_gate" in name
        assert rates[id(parameter)] == (16e-3 if is_fast else 1e-3), name
    assert step(model, optimizer) == set(trainable(model))


def test_riemannian():
    """Every tensor is trained, the bank by the plain optimizer; with closed gates, A and B step as plain LoRA's do."""
    model = build()
    assert step(model, create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)) == set(trainable(model))

    model = build()
    for name, parameter in trainable(model).items():
        if "queryable_lora_gate" in name:
            nn.init.constant_(parameter, -1e9)
    lora = get_peft_model(llama(), LoraConfig(r=4, target_modules=LLAMA_PROJECTIONS)).train()
    assert not lora.load_state_dict(model.state_dict(), strict=False).missing_keys
    for adapter in (model, lora):
        torch.manual_seed(1)
        step(adapter, create_riemannian_optimizer(adapter, torch.optim.SGD, lr=1e-2))
    stepped = trainable(model)
    for name, parameter in trainable(lora).items():
        torch.testing.assert_close(stepped[name], parameter, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2:UserWarning")
def test_lorafa_stops_in_its_first_step():
    """It pairs an adapter's tensors by their order and knows only A and B, so that a gate meets a frozen A."""
    model = build()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    with pytest.raises(TypeError, match="NoneType"):
        step(model, optimizer)
