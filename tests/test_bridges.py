"""Encoder-decoders put together from two models, latents that read inputs, and masks of floats."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.architectures import ENCODER, VISION, waveform
from helpers.models import LLAMA_PROJECTIONS, VOCAB, adapted, llama, outputs, randomise, text, token_ids
from helpers.tiny import tiny_config
from peft import LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties, about models this small
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
GENERATION = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def lora(base: nn.Module, target_modules: Any = "all-linear", **kwargs: Any) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=4, target_modules=target_modules)).eval()


def queryable(base: nn.Module, target_modules: Any = "all-linear", **kwargs: Any) -> nn.Module:
    return adapted(base, target_modules=target_modules, **kwargs)


@pytest.fixture(params=[lora, queryable], ids=["lora", "queryable"])
def method(request) -> Callable[..., nn.Module]:
    """Wraps a model in float64 with a random adapter: plain LoRA is the control."""

    def wrap(base: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        model = request.param(base.double().eval(), *args, **kwargs)
        randomise(model)
        return model

    return wrap


def bert_decoder() -> tf.PretrainedConfig:
    return tf.BertConfig(**(ENCODER | SPECIAL), is_decoder=True, add_cross_attention=True)


def gpt2_decoder() -> tf.PretrainedConfig:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return tf.GPT2Config(**sizes, **SPECIAL, add_cross_attention=True)


def vision() -> tuple[str, tf.PretrainedConfig]:
    return "VisionEncoderDecoder", tf.ViTConfig(**(VISION | {"hidden_size": 16}))


def speech() -> tuple[str, tf.PretrainedConfig]:
    config = tiny_config(tf.Wav2Vec2Model)
    config.conv_dim, config.num_attention_heads = [32] * 7, 2
    config.hidden_size = config.output_hidden_size = 16
    return "SpeechEncoderDecoder", config


def encoder() -> tuple[str, tf.PretrainedConfig]:
    return "EncoderDecoder", tf.BertConfig(**(ENCODER | {"hidden_size": 16}))


INPUTS = {
    vision: lambda: {"pixel_values": torch.randn(2, 3, 8, 8).double()},
    speech: lambda: {name: x.double() for name, x in waveform().items()},
    encoder: text,
}


def bridge(build: Callable, decoder: Callable) -> nn.Module:
    """An encoder of 16 features and a decoder of 32, with `enc_to_dec_proj` between them."""
    name, config = build()
    config = getattr(tf, f"{name}Config").from_encoder_decoder_configs(config, decoder())
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = getattr(tf, f"{name}Model")(config)
    assert isinstance(model.enc_to_dec_proj, nn.Linear)
    return model


@pytest.mark.parametrize("decoder", [bert_decoder, gpt2_decoder], ids=["bert", "gpt2"])
@pytest.mark.parametrize("build", INPUTS, ids=lambda build: build.__name__)
def test_bridges(method, build, decoder):
    """Batch mates, a text's padding, the cache and beams change nothing."""
    model, inputs, ids = method(bridge(build, decoder)), INPUTS[build](), token_ids(2, 5)
    together = outputs(model, inputs | {"decoder_input_ids": ids})
    for i in range(2):
        length = int(inputs["attention_mask"][i].sum()) if "attention_mask" in inputs else None
        alone = {name: x[i : i + 1, :length] if length else x[i : i + 1] for name, x in inputs.items()}
        alone = outputs(model, alone | {"decoder_input_ids": ids[i : i + 1]})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-10)
    settings = GENERATION | {"output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(cached.logits, whole.logits, rtol=0, atol=1e-10)
    beams = [model.generate(**inputs, **GENERATION, num_beams=2, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)


def test_the_projection_between_the_models_is_refused_by_name():
    base = bridge(encoder, bert_decoder)
    with pytest.raises(ValueError, match=r"'enc_to_dec_proj' cannot be adapted: it projects the encoder's") as refused:
        adapted(base, target_modules=["query", "enc_to_dec_proj"])
    pattern = re.search(r"exclude_modules=r'(.*)'`", str(refused.value))[1]
    adapted(bridge(encoder, bert_decoder), target_modules=["query", "enc_to_dec_proj"], exclude_modules=pattern)


def perceiver(name: str) -> nn.Module:
    """Seven latents read up to twelve inputs."""
    sizes = {"d_latents": 32, "d_model": 32, "num_self_attends_per_block": 2, "vocab_size": VOCAB, "num_labels": 3}
    heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "max_position_embeddings": 12}
    return getattr(tf, name)(tf.PerceiverConfig(**sizes, **heads, num_latents=7))


@pytest.mark.parametrize("name", ["PerceiverForMaskedLM", "PerceiverForSequenceClassification"])
def test_latents(method, name):
    """Latents are no tokens: padding of the inputs hides none of them, and batch mates change nothing."""
    model, ids = method(perceiver(name)), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    together = outputs(model, {"inputs": ids, "attention_mask": mask})
    alone = outputs(model, {"inputs": ids[:1], "attention_mask": mask[:1]})
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-10)
    changed = ids.clone()
    changed[1, 7:] = 5
    after = outputs(model, {"inputs": changed, "attention_mask": mask})
    real = slice(0, 7) if after.ndim == 3 else slice(None)
    torch.testing.assert_close(after[1, real], together[1, real], rtol=0, atol=1e-10)


def test_the_keys_of_latents_are_refused_by_name():
    """The decoder reads latents, in a call with the mask of the inputs."""
    with pytest.raises(ValueError, match=r"decoding_cross_attention.attention.self.key' cannot be adapted: it reads"):
        adapted(perceiver("PerceiverForMaskedLM"), target_modules=r".*decoding.*\.key")


def test_masks_of_floats(method):
    """A mask [B, T] of floats with 0 and 1 is read as one of integers."""
    model, inputs = method(llama(), LLAMA_PROJECTIONS), text()
    floats = inputs | {"attention_mask": inputs["attention_mask"].double()}
    torch.testing.assert_close(outputs(model, floats), outputs(model, inputs), rtol=0, atol=0)


class Biased(nn.Module):
    """Two layers and attention between them, whose mask [B, T] is added to its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(hidden_states)
            hidden_states = (x @ x.mT + attention_mask[:, None]).softmax(-1) @ x
        return hidden_states


@pytest.mark.parametrize("hidden", [0, 2], ids=["nothing hidden", "two hidden"])
@pytest.mark.parametrize("lowest", [-torch.inf, -1e4])
def test_additive_masks_of_rows_are_refused(method, hidden, lowest):
    """An additive mask [B, T] would be read inside out: LoRA serves the model that takes one, ours refuses it."""
    model, x = method(Biased(), ["0", "1"], routing_scope="sequence"), torch.randn(2, 5, 8).double()
    mask = torch.zeros(2, 5).double()
    mask[1, 5 - hidden :] = lowest
    if not hidden:
        mask[1] = 0
    if "queryable" in model.peft_type.lower():
        with pytest.raises(ValueError, match=r"mask \[batch, tokens\] of floats must have 1 for real tokens"):
            model(hidden_states=x, attention_mask=mask)
        with model.disable_adapter():
            model(hidden_states=x, attention_mask=mask)
    else:
        together = model(hidden_states=x, attention_mask=mask)[1:, : 5 - hidden]
        alone = model(hidden_states=x[1:, : 5 - hidden], attention_mask=mask[1:, : 5 - hidden])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
