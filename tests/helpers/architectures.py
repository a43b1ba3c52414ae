"""Tiny random models of the supported architectures, each with inputs and what there is to check of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor, nn

from helpers.models import MLP, VOCAB, token_ids

Inputs = dict[str, Tensor]
LENGTH = 7
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


def text(length: int = LENGTH) -> Inputs:
    return {"input_ids": token_ids(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}


def images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 8, 8)}


def seq2seq() -> Inputs:
    return text() | {"decoder_input_ids": token_ids(2, 5)}


def speech() -> Inputs:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": token_ids(2, 5)}


def image_and_text() -> Inputs:
    ids = token_ids(2, LENGTH)
    ids[:, 1:5] = VOCAB - 1  # a token for each of the image's four patches
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | images()


@dataclass(frozen=True)
class Architecture:
    """An architecture and what to check of it.

    Args:
        build: makes the model.
        inputs: makes the keyword arguments of a call.
        scopes: routing scope that `auto` must choose, by the owner of the stack.
        targets: `target_modules`.
        generates: whether cached generation is to equal uncached.
        pads: whether rows may be padded.
        note: what the table of the docs says of it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    scopes: dict[str, str]
    targets: str | list[str] = "all-linear"
    generates: bool = False
    pads: bool = False
    note: str = ""


@dataclass(frozen=True)
class Decoder(Architecture):
    """A decoder of text: generates, and pads."""

    inputs: Callable[[], Inputs] = text
    scopes: dict[str, str] = field(default_factory=lambda: {"model": "causal"})
    generates: bool = True
    pads: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Decoder(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))),
    "Qwen2": Decoder(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER))),
    "Qwen3": Decoder(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8))),
    "Mistral": Decoder(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=5)), note="sliding window"
    ),
    "Gemma 2": Decoder(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8, sliding_window=5))),
    "Gemma 3": Decoder(lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=5))),
    "Phi-3": Decoder(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**DECODER)), note="fused qkv and gate_up"),
    "GPT-2": Decoder(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=32, eos_token_id=None)
        ),
        scopes={"transformer": "causal"},
        note="Conv1D, fused qkv",
    ),
    "GPT-NeoX": Decoder(
        lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"})
        ),
        scopes={"gpt_neox": "causal"},
        note="fused qkv",
    ),
    "OPT": Decoder(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=32,
                pad_token_id=0,
                eos_token_id=None,
            )
        ),
        scopes={"model.decoder": "causal"},
        note="flattened MLP",
    ),
    "Bloom": Decoder(
        lambda: tf.BloomForCausalLM(
            tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4, pad_token_id=0, eos_token_id=None)
        ),
        scopes={"transformer": "causal"},
        note="fused qkv",
    ),
    "Granite": Decoder(lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**DECODER))),
    "Granite 4 hybrid": Decoder(
        lambda: tf.GraniteMoeHybridForCausalLM(
            tf.GraniteMoeHybridConfig(
                **DECODER,
                shared_intermediate_size=48,
                num_local_experts=0,
                num_experts_per_tok=0,
                layer_types=["mamba", "attention", "mamba", "attention"],
                mamba_n_heads=8,
                mamba_d_head=8,
                mamba_d_state=8,
                mamba_n_groups=1,
            )
        ),
        note="Mamba 2 and attention, no experts",
    ),
    "LFM2": Decoder(
        lambda: tf.Lfm2ForCausalLM(
            tf.Lfm2Config(**DECODER, layer_types=["conv", "full_attention", "conv", "full_attention"])
        ),
        note="convolution and attention",
    ),
    "Falcon H1": Decoder(
        lambda: tf.FalconH1ForCausalLM(
            tf.FalconH1Config(**DECODER, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
        ),
        targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        note="attention and MLP; PEFT refuses Mamba's out_proj",
    ),
    "Mamba": Decoder(
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(
                hidden_size=32, num_hidden_layers=4, vocab_size=VOCAB, state_size=8, pad_token_id=0, eos_token_id=None
            )
        ),
        scopes={"backbone": "causal"},
        targets=["in_proj", "x_proj"],
        note="no attention",
    ),
    "BERT": Architecture(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
        text,
        {"bert.encoder": "sequence", "bert.pooler": "sequence", "": "sequence"},
        pads=True,
        note="pooler and classifier too",
    ),
    "RoBERTa": Architecture(
        lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**ENCODER)),
        text,
        {"roberta.encoder": "sequence", "": "sequence"},
        pads=True,
    ),
    "DeBERTa": Architecture(
        lambda: tf.DebertaModel(tf.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])),
        text,
        {"encoder": "sequence"},
        targets=["in_proj", "dense"],
        pads=True,
    ),
    "DeBERTa v2, v3": Architecture(
        lambda: tf.DebertaV2Model(
            tf.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True)
        ),
        text,
        {"encoder": "sequence"},
        targets=["value_proj", "dense"],
        pads=True,
        note="not query_proj, key_proj with `share_att_key`: they project relative positions too",
    ),
    "ViT": Architecture(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)), images, {"vit": "sequence", "": "sequence"}
    ),
    "T5": Architecture(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
        seq2seq,
        {"encoder": "sequence", "decoder": "causal", "decoder (cross-attention)": "sequence"},
        generates=True,
        pads=True,
    ),
    "BART": Architecture(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ, max_position_embeddings=32)),
        seq2seq,
        {"model.encoder": "sequence", "model.decoder": "causal", "model.decoder (cross-attention)": "sequence"},
        generates=True,
        pads=True,
    ),
    "Whisper": Architecture(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **SEQ2SEQ,
                max_source_positions=20,
                max_target_positions=32,
                num_mel_bins=8,
                bos_token_id=1,
                eos_token_id=2,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        speech,
        {"model.encoder": "sequence", "model.decoder": "causal", "model.decoder (cross-attention)": "sequence"},
    ),
    "LLaVA": Architecture(
        lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**VISION),
                text_config=tf.LlamaConfig(**DECODER),
                image_token_id=VOCAB - 1,
                vision_feature_layer=-1,
            )
        ),
        image_and_text,
        {
            "model.vision_tower.encoder": "sequence",
            "model.multi_modal_projector": "causal",
            "model.language_model": "causal",
        },
        generates=True,
        note="vision tower, projector and language model",
    ),
    "plain MLP": Architecture(
        MLP, lambda: {"x": torch.randn(5, 8)}, {"": "causal"}, targets=["first", "second", "third"]
    ),
}


MARKS = {"passed": "yes", "skipped": "", "failed": "**no**"}
CHECKS = {
    "identity": "a new adapter changes nothing",
    "gradients": "all trainable tensors get a gradient",
    "reload": "a saved adapter reloads equal",
    "cache": "cached generation equals uncached",
    "padding": "padding changes nothing",
}


def write_table(outcomes: dict[str, str]) -> None:
    """Write docs/architectures.md from the outcome of each test, by its name with its parameter."""
    lines = [
        "# Architectures",
        "",
        "Tiny random models of each architecture, checked by `python -m pytest tests/test_architectures.py "
        "--write-table`, which wrote this page. An empty cell means that the check does not apply.",
        "",
        *(f"- {check}: {meaning}" for check, meaning in CHECKS.items()),
        "",
        f"| architecture | targets | {' | '.join(CHECKS)} | scope that `auto` takes, by stack | note |",
        f"|{' --- |' * (len(CHECKS) + 4)}",
    ]
    for name, architecture in ARCHITECTURES.items():
        marks = [MARKS[outcomes[f"test_{check}[{name}]"]] for check in CHECKS]
        targets = architecture.targets if isinstance(architecture.targets, str) else ", ".join(architecture.targets)
        scopes = ", ".join(f"{stack or 'the model'}: {scope}" for stack, scope in architecture.scopes.items())
        lines.append(f"| {name} | {targets} | {' | '.join(marks)} | {scopes} | {architecture.note} |")
    lines += [
        "",
        "These modules are refused by name when the adapter is made: language-model heads, embeddings, convolutions, "
        "`nn.MultiheadAttention`, experts whose input does not tell which sequence a token belongs to, and the "
        "query_proj and key_proj of DeBERTa v2 and SEW-D where they also project relative positions.",
        "",
    ]
    (Path(__file__).parents[2] / "docs" / "architectures.md").write_text("\n".join(lines))
