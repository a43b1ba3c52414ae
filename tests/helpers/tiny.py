"""A tiny model of any class of transformers: its default configuration, with small numbers by the names of fields."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from helpers.models import VOCAB, token_ids

WIDTH, HEADS = 32, 4
LENGTH = 12
LAYERS = r"(num_|n_|encoder_|decoder_|hidden_)(layers?|blocks)$|^(depth|layers|n_layer)$"
# The first pattern found in a field's name gives its size; a field that none is found in stays as it is.
SIZES = {
    r"(image_size|resolution|crop_size|encoder_stride)$": 8,
    r"patch_size$": 4,
    r"qk_head_dim$": 16,
    r"(qk_(nope|rope)|v)_head_dim$": 8,
    r"(mamba|linear)_.*(num|n)_heads$|^mamba_num_heads$|^n_mamba_heads$": 8,
    r"mamba_d_ssm$": 64,
    r"(head_dim|d_kv|d_head|head_size|kv_channels|dim_head|rotary_dim|mamba_headdim|attention_head_dim)$": 8,
    r"(key_value|kv|query).*(heads|groups)$": 2,
    r"^(upsample_groups|num_conv_pos_embedding_groups)$": 4,
    r"(heads?|num_heads)$": HEADS,
    r"(d_state|state_size|n_groups?|topk_group|num_expert_group)$": 1,
    r"experts?_per_tok(en)?$|moe_topk$|moe_k$|num_experts_per_topk$|moe_top_?k$|num_selected_experts|topk_experts": 2,
    r"experts$|^moe_num_experts$|expert_num$": 4,
    r"lora_rank$|time_step_rank$|dt_rank$|_rank$": 8,
    r"vocab_size(_per_layer_input)?$|vocab_size_base$": VOCAB,
    r"(intermediate_size|intermediate_size_mlp|ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|mlp_dim)$": 48,
    r"(feed_forward_size|ffn_hidden_size|expert_dim)$": 48,
    r"hidden_size_per_layer_input$": 8,
    r"(hidden_size|d_model|n_embd|embe?d?_dim|embedding_(size|dim)|hidden_dim|output_dim)$": WIDTH,
    r"proj(ection)?_(dim|size)$": WIDTH,
    r"(hidden_size_global|cross_hidden_size|cross_attention_hidden_size|attention_hidden_size|lru_width)$": WIDTH,
    LAYERS: 2,
    r"(chunk_size|chunk_length|block_size)$": 4,
    r"(n_positions|n_ctx|max_(source_|target_)?position(_embedding)?s|max_seq_len|seq_len)$": 64,
    r"num_mel_bins$": 8,
}


# What the names of fields do not tell, by the name of the class: fields of its configuration, "." between nested ones.
FIELDS: dict[str, dict[str, Any]] = {
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 4},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "XLMWithLMHeadModel": {"causal": True},
    "FlaubertWithLMHeadModel": {"causal": True},
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "Gemma3ForConditionalGeneration": {"vision_config.vision_use_head": False},
    "MllamaForCausalLM": {"cross_attention_layers": [1]},
    "MllamaForConditionalGeneration": {
        "text_config.cross_attention_layers": [1],
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.vision_output_dim": 2 * WIDTH,
    },
    "Mamba2ForCausalLM": {"num_heads": 8},
    "Mistral4ForCausalLM": {"qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    "CohereCompassForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "DiaForConditionalGeneration": {"decoder_config.num_channels": 1},
    "Kosmos2ForConditionalGeneration": {"latent_query_num": 4},
}


FLOAT32 = (  # these know no float64
    "XGLMForCausalLM",
    "Inkling2ForCausalLM",
    "Inkling2ForConditionalGeneration",
    "Inkling2LoopForCausalLM",
    "Inkling2LoopForConditionalGeneration",
)


def tiny_config(cls: type) -> PretrainedConfig:
    """The default configuration of the model class `cls`, made tiny, of a decoder where it can be one."""
    config = cls.config_class()
    shrink(config)
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    for name, value in FIELDS.get(cls.__name__, {}).items():
        owner, _, field = name.rpartition(".")
        setattr(operator.attrgetter(owner)(config) if owner else config, field, value)
    return config


def shrink(config: PretrainedConfig) -> None:
    """Write `SIZES` into a configuration and those in it."""
    fields = vars(config)
    layers = {v for k, v in fields.items() if isinstance(v, int) and re.search(LAYERS, k) and v > 2}
    for name, value in list(fields.items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "padding_idx"):
            setattr(config, name, {"pad_token_id": 0, "padding_idx": 0, "eos_token_id": 2}.get(name, 1))
        elif isinstance(value, (list, tuple)) and len(value) in layers:
            setattr(config, name, type(value)(_two_kinds(value)))
        elif isinstance(value, dict):
            _shrink_rope(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            size = next((size for pattern, size in SIZES.items() if re.search(pattern, name)), value)
            setattr(config, name, min(size, value))
    if "kv_lora_rank" in fields:  # latent attention has keys and values for every head
        config.num_key_value_heads = config.num_attention_heads
    if fields.get("head_dim", 0) is None:
        config.head_dim = WIDTH // HEADS
    config.use_cache = False  # of two layers both may be recurrent, whose caches tell no length
    config._experts_implementation = "eager"  # grouped products know no float64


def _two_kinds(values: Any) -> list:
    """The first value and the first other one, in their order."""
    other = next((value for value in values if value != values[0]), values[-1])
    return [values[0], other]


def _shrink_rope(parameters: dict) -> None:
    if "rope_theta" in parameters:
        parameters["mrope_section"] = [2, 1, 1]  # of half a head
        if parameters.get("partial_rotary_factor") == 0.5:
            parameters["mrope_section"] = [1, 1, 0]
    for value in parameters.values():
        if isinstance(value, dict):
            _shrink_rope(value)


def tiny(name: str) -> nn.Module:
    """A tiny random model of the class called `name`, in float64 where it can be."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(tiny_config(cls)).eval()
    return model if name in FLOAT32 else model.double()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of a call of a tiny model: token ids, and what else it cannot do without."""
    parameters = inspect.signature(model.forward).parameters
    given = {"input_ids": token_ids(2, LENGTH)} if "input_ids" in parameters else {}
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        given["decoder_input_ids"] = token_ids(2, LENGTH)
    for name, make in INPUTS.get(type(model).__name__, {}).items():
        given[name] = make()
    return {name: value for name, value in given.items() if value is not None}


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8).double()


def frames(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, *shape).double()


INPUTS: dict[str, dict[str, Callable[[], Tensor | None]]] = {
    "BlipForConditionalGeneration": {"pixel_values": images},
    "BlipForQuestionAnswering": {"pixel_values": images, "decoder_input_ids": lambda: token_ids(2, LENGTH)},
    "PaliGemmaForConditionalGeneration": {"token_type_ids": lambda: (torch.arange(LENGTH) >= 1).long().expand(2, -1)},
    "UdopForConditionalGeneration": {"bbox": lambda: torch.zeros(2, LENGTH, 4).double()},
    "CanaryForConditionalGeneration": {"input_features": frames(32, 8)},
    "CohereAsrForConditionalGeneration": {"input_features": frames(32, 8)},
    "SeamlessM4TForSpeechToText": {"input_features": frames(16, 160)},
    "SeamlessM4Tv2ForSpeechToText": {"input_features": frames(16, 160)},
    "SpeechEncoderDecoderModel": {"input_values": frames(800), "decoder_input_ids": lambda: token_ids(2, LENGTH)},
    "SpeechT5ForSpeechToText": {"input_values": frames(800)},
    "IdeficsForVisionText2Text": {
        "pixel_values": lambda: torch.randn(2, 1, 3, 8, 8).double(),
        "image_attention_mask": lambda: torch.ones(2, LENGTH, 1, dtype=torch.long),
    },
    "Kosmos2ForConditionalGeneration": {
        "pixel_values": images,
        "image_embeds_position_mask": lambda: (torch.arange(LENGTH) < 4).expand(2, -1),
    },
    "EncoderDecoderModel": {"decoder_input_ids": lambda: token_ids(2, LENGTH)},
    "VisionEncoderDecoderModel": {"pixel_values": images, "decoder_input_ids": lambda: token_ids(2, LENGTH)},
    "WhisperForConditionalGeneration": {"input_features": frames(8, 128)},
    "Speech2TextForConditionalGeneration": {"input_features": frames(16, 80)},
}
