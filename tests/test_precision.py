"""Narrow dtypes: bf16 and fp16 bases, autocast, and adapters kept narrow or wide."""

from __future__ import annotations

import pytest
import torch
from helpers.models import adapted, llama, outputs, randomise, token_ids
from peft import LoraConfig, get_peft_model

from peft_queryable import QueryableLoraConfig
from peft_queryable.method.router import Router

DTYPES = (torch.bfloat16, torch.float16)
SCOPES = ("causal", "prompt", "sequence")


def build(dtype: torch.dtype, autocast_adapter_dtype: bool = True, config_class=QueryableLoraConfig, **kwargs):
    torch.manual_seed(0)
    config = config_class(r=4, target_modules="all-linear", **kwargs)
    model = get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    randomise(model, scale=0.2)
    return model


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dtype_an_adapter(dtype, autocast_adapter_dtype):
    """Bank, gates, A and B are of one dtype: float32, or the base model's if asked for."""
    model = build(dtype, autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for name, p in model.named_parameters() if ".default." in name} == {expected}


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_base_is_as_near_as_lora(dtype, scope, autocast_adapter_dtype):
    """Logits on a narrow base are as near to float32's as plain LoRA's are."""
    ids = token_ids(2, 8)

    def error(config_class, **kwargs) -> float:
        narrow = build(dtype, autocast_adapter_dtype, config_class, **kwargs)
        wide = build(torch.float32, True, config_class, **kwargs)
        wide.load_state_dict({name: t.float() for name, t in narrow.state_dict().items()})
        return (outputs(narrow, {"input_ids": ids}).float() - outputs(wide, {"input_ids": ids})).std().item()

    assert error(QueryableLoraConfig, routing_scope=scope) < 3 * error(LoraConfig)


@pytest.mark.parametrize("mode", ["bf16 base", "narrow adapter", "autocast"])
def test_router_maths_is_float32(mode, monkeypatch):
    """Queries, logits and weights are float32, whatever the model's dtype or autocast says."""
    seen = []
    forward = Router.forward

    def watch(self, block, state, means, instruction=None):
        weights = forward(self, block, state, means, instruction)
        seen.append((state.dtype, *(mean.dtype for mean in means), weights.dtype))
        return weights

    monkeypatch.setattr(Router, "forward", watch)
    model = build(torch.float32 if mode == "autocast" else torch.bfloat16, mode != "narrow adapter")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        outputs(model, {"input_ids": token_ids(2, 8)})
    assert seen and {dtype for call in seen for dtype in call} == {torch.float32}


@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_trains(scope):
    """Under bf16 autocast every trainable tensor gets a finite float32 gradient near the one without."""
    model = adapted(llama(), target_modules="all-linear", routing_scope=scope).train()
    randomise(model, scale=0.2)
    ids = token_ids(2, 8)
    labels = ids.masked_fill(torch.arange(8) < 3, -100)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    assert gradients[1].dtype == torch.float32 and gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
