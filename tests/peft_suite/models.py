"""Tiny random models under the names of the Hub that PEFT's tests ask for, in an offline cache of huggingface_hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from helpers.words import tokenizer

COMMIT = "0" * 40

DECODER = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
ENCODER = DECODER | {"num_hidden_layers": 5, "hidden_size": 32, "intermediate_size": 37}
GROUPED = DECODER | {"num_key_value_heads": 2}
OPT = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT = {"vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128, "bos_token_id": 98}
BART = {
    "vocab_size": 1024,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 128,
}
T5 = {
    "vocab_size": 1024,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 5,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}

# By name on the Hub: the model's class and its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", ENCODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 4}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", GROUPED),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        OPT | {"hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 12},  # sizes that a test expects
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", GROUPED),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", ENCODER),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", ENCODER | RELATIVE),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", ENCODER | RELATIVE),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GROUPED),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]},
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        ENCODER,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", ENCODER),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        GROUPED | {"pad_token_id": 0},
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GROUPED),
}


def build(name: str) -> tf.PreTrainedModel:
    """The model called `name`; a new one equals it."""
    class_name, fields = MODELS[name]
    model_class: Any = getattr(tf, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(model_class.config_class(**fields)).eval()


def fill_cache(cache: Path, report: Callable[[str], None] = print) -> None:
    """Save the models that are not there yet into `cache`, as huggingface_hub would have left them."""
    for name in MODELS:
        repository = cache / f"models--{name.replace('/', '--')}"
        if not (repository / "refs" / "main").exists():
            report(f"making {name}")
            build(name).save_pretrained(repository / "snapshots" / COMMIT)
            tokenizer().save_pretrained(repository / "snapshots" / COMMIT)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(COMMIT)
