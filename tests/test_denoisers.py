"""Denoisers of diffusers: whose tokens their modules see, and what of the text is padding."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.denoisers import (
    ATTENTION,
    DENOISER_SCALE,
    DENOISERS,
    MASKS,
    MISSING,
    PADDED,
    denoiser,
    double,
    row,
    shortened,
)
from helpers.models import adapted, randomise
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.filterwarnings("ignore"),  # of third parties, about models this small
]
QKV = ["to_q", "to_k", "to_v"]
ATOL = 1e-10


def lora(base: nn.Module, target_modules: list[str] | str) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=4, target_modules=target_modules)).eval()


@pytest.fixture(params=[lora, adapted], ids=["lora", "queryable"])
def method(request) -> Callable[..., nn.Module]:
    """Wraps a denoiser in float64 with a random adapter: plain LoRA is the control."""

    def wrap(name: str, targets: list[str] | str, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        model = request.param(DENOISERS[name][0]().double(), target_modules=targets, **kwargs)
        randomise(model, scale=DENOISER_SCALE)
        return model

    return wrap


def queryable(name: str, targets: list[str] | str = "all-linear", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = adapted(DENOISERS[name][0]().double(), target_modules=targets, **kwargs)
    randomise(model, scale=DENOISER_SCALE)
    return model


def given(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return double(DENOISERS[name][1]())


def padded(name: str) -> dict[str, Any]:
    """A call whose second row has a text of two tokens and padding."""
    inputs = given(name)
    mask = next(mask for mask in MASKS if mask in inputs)
    inputs[mask][1, 2:] = 0
    return inputs


def result(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=["qkv", "all"])
@pytest.mark.parametrize("name", DENOISERS)
def test_batch_mates(method, name, targets):
    """A row gives what it gives alone."""
    model, inputs = method(name, targets), given(name)
    together = result(model, inputs)
    for i in range(2):
        torch.testing.assert_close(result(model, row(inputs, i)), together[i : i + 1], rtol=0, atol=ATOL)


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=["qkv", "all"])
@pytest.mark.parametrize("name", PADDED)
def test_padded_texts(method, name, targets):
    """A text with padding gives what it gives without, and what stands in the padding does not count."""
    model, inputs = method(name, targets), padded(name)
    together = result(model, inputs)[1:]
    torch.testing.assert_close(result(model, shortened(row(inputs, 1), 2)), together, rtol=0, atol=ATOL)
    inputs["encoder_hidden_states"][1, 2:] += 3
    torch.testing.assert_close(result(model, inputs)[1:], together, rtol=0, atol=ATOL)
    inputs["encoder_hidden_states"][1, :2] += 3
    assert not torch.allclose(result(model, inputs)[1:], together)


@pytest.mark.parametrize("name", ["HunyuanVideo", "Mochi"])
def test_modules_that_see_image_and_text_with_padding_are_refused(name):
    """The first call with padding is refused, with a line that works; then padding does not count."""
    model = queryable(name)
    result(model, given(name))
    with pytest.raises(ValueError, match=r"`encoder_attention_mask` \[2, 3\] of .* hides tokens") as refused:
        result(model, padded(name))
    with model.disable_adapter():
        result(model, padded(name))
    pattern = re.search(r"exclude_modules=r'(.*)'`", str(refused.value))[1]
    model, inputs = queryable(name, exclude_modules=pattern), padded(name)
    alone = result(model, shortened(row(inputs, 1), 2))
    torch.testing.assert_close(result(model, inputs)[1:], alone, rtol=0, atol=ATOL)


def test_padding_in_other_denoisers_is_refused():
    """In a class whose modules are not known apart, no mask may hide anything."""
    base = denoiser(
        "Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        cross_attention_dim=8,
        norm_num_groups=2,
    )().double()
    model = adapted(base, target_modules=QKV)
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4).double(),
        "encoder_hidden_states": torch.randn(2, 3, 8).double(),
    }
    mask = torch.ones(2, 3)
    result(model, inputs | {"encoder_attention_mask": mask})
    mask[1, 2:] = 0
    with pytest.raises(ValueError, match=r"`encoder_attention_mask` \[2, 3\] of Transformer2DModel hides tokens"):
        result(model, inputs | {"encoder_attention_mask": mask})


@pytest.mark.parametrize("name", [name for name in DENOISERS if name != "DiT"])  # it drops labels in training
def test_gradient_checkpointing(method, name):
    """Checkpointing as diffusers does it changes no gradient."""
    model, inputs, gradients = method(name, "all-linear").train(), given(name), []
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.get_base_model().enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=ATOL)


def test_routes_per_token_are_refused():
    """A scope with a route per token is refused when the adapter is made, wherever `auto` would take it too."""
    base = DENOISERS["Flux"][0]()
    with pytest.raises(
        ValueError, match=r"FluxTransformer2DModel is a denoiser.*='causal'`.*`routing_scope='sequence'`"
    ):
        adapted(base, target_modules=QKV, routing_scope="causal")
    result(adapted(base, target_modules=QKV, routing_scope="sequence"), DENOISERS["Flux"][1]())
    base = denoiser(
        "SkyReelsV2Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        freq_dim=64,
    )()
    with pytest.raises(ValueError, match=r"`routing_scope='auto'`, which gives each token a route of its own here"):
        adapted(base, target_modules=QKV)


def test_packed_inputs_are_refused_by_name():
    """Where a denoiser is told of padding by other means than a mask, nothing of it can be adapted."""
    base = denoiser(
        "ErnieImageTransformer2DModel", hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=48
    )
    with pytest.raises(ValueError, match="its denoiser takes `text_lens`, and which tokens it sees"):
        adapted(base(), target_modules=QKV)


def test_caches_are_refused():
    """Tokens that a denoiser keeps from call to call had other routes."""
    base = denoiser(
        "Flux2Transformer2DModel",
        **ATTENTION | {"num_layers": 1},
        num_single_layers=1,
        in_channels=4,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 4, 4],
        timestep_guidance_channels=16,
    )
    model = adapted(base(), target_modules=QKV, routing_scope="sequence")
    with pytest.raises(ValueError, match="keeps tokens in `kv_cache`, which cannot carry routing"):
        model(**DENOISERS["Flux"][1](), kv_cache=object())
