"""Llama models and their LoRAs as GGUF files, in float32, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from torch import Tensor, nn

PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_model(model: nn.Module, path: Path) -> None:
    """Write a Llama whose tokens are `<0>`, `<1>`, and so on; the last ends a text."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([TokenType.NORMAL] * config.vocab_size)
    writer.add_eos_token_id(config.vocab_size - 1)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(*_tensor(name.removesuffix(".weight"), tensor, config, "weight"))
    _close(writer)


def write_lora(folder: Path, model: nn.Module, path: Path) -> None:
    """Write the plain LoRA of scale 1 in `folder`, for the Llama `model`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(next(t for k, t in tensors.items() if "lora_A" in k).shape[0]))
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        suffix = f"weight.{factor.lower()}"
        named, values = _tensor(module, tensor, model.config, suffix, is_input=factor == "lora_A")
        writer.add_tensor(named, values)
    _close(writer)


def _tensor(name: str, tensor: Tensor, config, suffix: str, is_input: bool = False):
    """GGUF's name of a tensor, and its values: llama.cpp pairs a head's rotary dimensions otherwise."""
    if name in OUTER:
        return f"{OUTER[name]}.{suffix}", tensor.float().numpy()
    _, _, layer, module = name.split(".", 3)
    if module.endswith(("q_proj", "k_proj")) and not is_input:
        heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return f"blk.{layer}.{PROJECTIONS[module]}.{suffix}", tensor.float().contiguous().numpy()


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
