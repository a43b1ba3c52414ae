"""Tiny random models of the supported architectures, each with inputs and what there is to check of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor, nn

from helpers.denoisers import DENOISER_SCALE, DENOISERS, MISSING, PADDED, QWEN_IMAGE
from helpers.models import MLP, VOCAB, token_ids
from helpers.tiny import tiny_config

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
    ids = token_ids(2, LENGTH).clamp(max=VOCAB - 2)
    ids[:, 1:5] = VOCAB - 1  # a token for each of the image's four patches
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | images()


def waveform() -> Inputs:
    return {"input_values": torch.randn(2, 800)}


def pairs() -> Inputs:
    """As many texts as images, whose similarities are the output."""
    return text() | images()


def grids() -> Inputs:
    """An image of 16 patches in each row, packed in one dimension, as the Qwen-VL family gets them."""
    ids = token_ids(2, LENGTH).clamp(max=VOCAB - 2)
    ids[:, 1:5] = VOCAB - 1  # a token for every four patches
    patches = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    kinds = {"mm_token_type_ids": (ids == VOCAB - 1).long()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | patches | kinds


def small(name: str, **fields) -> nn.Module:
    """The class `name` of transformers, by its default configuration made tiny, with `fields` of it."""
    config = tiny_config(getattr(tf, name))
    for field_name, value in fields.items():
        setattr(config, field_name, value)
    return getattr(tf, name)(config)


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
        scale: of the random adapter.
        missing: why it cannot be tested here; None if it can.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    scopes: dict[str, str]
    targets: str | list[str] = "all-linear"
    generates: bool = False
    pads: bool = False
    note: str = ""
    scale: float = 0.3
    missing: str | None = None


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
        {"bert.encoder": "sequence", "bert.pooler": "sequence", "classifier": "sequence"},
        pads=True,
        note="pooler and classifier too",
    ),
    "RoBERTa": Architecture(
        lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**ENCODER)),
        text,
        {"roberta.encoder": "sequence", "classifier": "sequence"},
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
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
        images,
        {"vit": "sequence", "classifier": "sequence"},
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
    "Gemma": Decoder(lambda: small("GemmaForCausalLM")),
    "Cohere": Decoder(lambda: small("CohereForCausalLM")),
    "StarCoder 2": Decoder(lambda: small("Starcoder2ForCausalLM")),
    "SmolLM 3": Decoder(lambda: small("SmolLM3ForCausalLM")),
    "OLMo 2": Decoder(lambda: small("Olmo2ForCausalLM")),
    "GLM 4": Decoder(lambda: small("Glm4ForCausalLM")),
    "Mixtral": Decoder(
        lambda: small("MixtralForCausalLM"), note="mixture of experts: attention, and what all tokens share"
    ),
    "Qwen3-MoE": Decoder(
        lambda: small("Qwen3MoeForCausalLM"), note="mixture of experts: attention, and what all tokens share"
    ),
    "GPT-OSS": Decoder(
        lambda: small("GptOssForCausalLM"), note="mixture of experts: attention, and what all tokens share"
    ),
    "OLMoE": Decoder(
        lambda: small("OlmoeForCausalLM"), note="mixture of experts: attention, and what all tokens share"
    ),
    "DeepSeek V3": Decoder(
        lambda: small("DeepseekV3ForCausalLM"), note="mixture of experts: attention, and what all tokens share"
    ),
    "BERT, masked LM": Architecture(
        lambda: small("BertForMaskedLM", is_decoder=False),
        text,
        {"bert.encoder": "sequence", "cls.predictions.transform": "sequence"},
        pads=True,
    ),
    "ELECTRA": Architecture(
        lambda: small("ElectraForTokenClassification", is_decoder=False),
        text,
        {"electra.encoder": "sequence", "classifier": "sequence"},
        pads=True,
    ),
    "ModernBERT": Architecture(
        lambda: small("ModernBertForTokenClassification", is_decoder=False),
        text,
        {"model": "sequence", "head": "sequence", "classifier": "sequence"},
        pads=True,
    ),
    "DistilBERT": Architecture(
        lambda: small("DistilBertForSequenceClassification", dim=32),
        text,
        {"distilbert.transformer": "sequence", "pre_classifier": "sequence", "classifier": "sequence"},
        pads=True,
    ),
    "ALBERT": Architecture(
        lambda: small("AlbertForMaskedLM", is_decoder=False),
        text,
        {"albert.encoder": "sequence", "predictions": "sequence"},
        pads=True,
    ),
    "MPNet": Architecture(
        lambda: small("MPNetForMaskedLM", is_decoder=False),
        text,
        {"mpnet.encoder": "sequence", "lm_head": "sequence"},
        pads=True,
    ),
    "XLM-RoBERTa": Architecture(
        lambda: small("XLMRobertaForTokenClassification", is_decoder=False),
        text,
        {"classifier": "sequence", "roberta.encoder": "sequence"},
        pads=True,
    ),
    "DINOv2": Architecture(
        lambda: small("Dinov2ForImageClassification"), images, {"dinov2.encoder": "sequence", "classifier": "sequence"}
    ),
    "CLIP": Architecture(
        lambda: small("CLIPModel"),
        pairs,
        {
            "text_model.encoder": "causal",
            "vision_model.encoder": "sequence",
            "visual_projection": "causal",
            "text_projection": "causal",
        },
    ),
    "SigLIP": Architecture(
        lambda: small("SiglipModel"),
        pairs,
        {
            "text_model.encoder": "causal",
            "text_model.head": "causal",
            "vision_model.encoder": "sequence",
            "vision_model.head.mlp": "sequence",
        },
        note="without the attention-pooling head",
    ),
    "wav2vec 2.0": Architecture(
        lambda: small("Wav2Vec2ForCTC", conv_dim=[32] * 7),
        waveform,
        {"wav2vec2.feature_projection": "sequence", "wav2vec2.encoder": "sequence", "lm_head": "sequence"},
        note="waveforms of one length; save with `save_embedding_layers=False`, as LoRA",
    ),
    "HuBERT": Architecture(
        lambda: small("HubertForCTC", conv_dim=[32] * 7),
        waveform,
        {"hubert.feature_projection": "sequence", "hubert.encoder": "sequence", "lm_head": "sequence"},
        note="waveforms of one length; save with `save_embedding_layers=False`, as LoRA",
    ),
    "Audio Spectrogram Transformer": Architecture(
        lambda: small("ASTForAudioClassification", max_length=32),
        lambda: {"input_values": torch.randn(2, 32, 8)},
        {"audio_spectrogram_transformer": "sequence", "classifier": "sequence"},
    ),
    "PaliGemma": Architecture(
        lambda: small("PaliGemmaForConditionalGeneration", image_token_id=VOCAB - 1),
        image_and_text,
        {
            "model.vision_tower.encoder": "sequence",
            "model.multi_modal_projector": "causal",
            "model.language_model": "causal",
        },
        note="its own logits differ with and without a cache",
    ),
    "Gemma 3 with images": Architecture(
        lambda: small("Gemma3ForConditionalGeneration", image_token_id=VOCAB - 1, mm_tokens_per_image=4),
        lambda: image_and_text() | {"token_type_ids": torch.zeros(2, LENGTH, dtype=torch.long)},
        {
            "model.vision_tower.encoder": "sequence",
            "model.language_model": "causal",
        },
        generates=True,
    ),
    "BLIP-2": Architecture(
        lambda: small(
            "Blip2ForConditionalGeneration", image_token_index=VOCAB - 1, image_token_id=VOCAB - 1, num_query_tokens=4
        ),
        image_and_text,
        {
            "vision_model.encoder": "sequence",
            "qformer.encoder": "causal",
            "qformer.encoder (cross-attention)": "sequence",
            "language_model.model.decoder": "causal",
        },
        generates=True,
    ),
    "Qwen2-VL": Architecture(
        lambda: small("Qwen2VLForConditionalGeneration", image_token_id=VOCAB - 1),
        grids,
        {"model.language_model": "causal"},
        note="the language model alone",
    ),
    "Qwen2.5-VL": Architecture(
        lambda: small("Qwen2_5_VLForConditionalGeneration", image_token_id=VOCAB - 1),
        grids,
        {"model.language_model": "causal"},
        note="the language model alone",
    ),
    "Qwen3-VL": Architecture(
        lambda: small("Qwen3VLForConditionalGeneration", image_token_id=VOCAB - 1),
        grids,
        {"model.language_model": "causal"},
        note="the language model alone",
    ),
    "Idefics": Architecture(
        lambda: small("IdeficsForVisionText2Text"),
        lambda: (
            text()
            | {
                "pixel_values": torch.randn(2, 1, 3, 8, 8),
                "image_attention_mask": torch.ones(2, LENGTH, 1, dtype=torch.long),
            }
        ),
        {"model.vision_model.encoder": "causal", "model": "causal"},
        note="not the keys and values of images",
    ),
    "Llama 3.2 Vision": Architecture(
        lambda: small("MllamaForConditionalGeneration"),
        lambda: (
            text()
            | {
                "pixel_values": torch.randn(2, 1, 4, 3, 8, 8),
                "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
                "cross_attention_mask": torch.ones(2, LENGTH, 1, 4, dtype=torch.long),
            }
        ),
        {"model.language_model": "causal"},
        note="the language model, but not the keys and values of images",
    ),
    "plain MLP": Architecture(
        MLP, lambda: {"x": torch.randn(5, 8)}, {"": "causal"}, targets=["first", "second", "third"]
    ),
}


def add_denoisers() -> None:
    """Add those of diffusers, whose text forms a stack of its own where its padding is known."""
    notes = dict.fromkeys(PADDED, "texts with padding")
    notes |= dict.fromkeys(
        ("HunyuanVideo", "Mochi"), "texts with padding are refused where a module sees image and text"
    )
    for name, (build, inputs) in DENOISERS.items():
        scopes = {"": "sequence"} | ({"the model (cross-attention)": "sequence"} if name in notes else {})
        scopes |= {"context_embedder.token_refiner": "sequence"} if name == "HunyuanVideo" else {}
        targets = QWEN_IMAGE if name == "Qwen-Image" else "all-linear"  # nobody reads its last block's text
        ARCHITECTURES[name] = Architecture(
            build, inputs, scopes, targets, note=notes.get(name, ""), scale=DENOISER_SCALE, missing=MISSING
        )


add_denoisers()
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
    assert MISSING is None, MISSING
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
        "Diffusion transformers are diffusers' own: `pip install diffusers`. The modules that see the text alone form "
        "a stack of their own, listed as cross-attention, in the classes whose text may be padded.",
        "",
    ]
    (Path(__file__).parents[2] / "docs" / "architectures.md").write_text("\n".join(lines))
