"""Models of real shapes with random weights, and the sizes of what they work on."""

import copy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

PROJECTIONS = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Shapes of HuggingFaceTB/SmolLM2-135M and Qwen/Qwen2.5-0.5B, from their config.json
MODELS = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Setup:
    """A model, its adapters and the tokens that they work on. A sweep changes one of these at a time.

    Args:
        model: one of `MODELS`.
        layers: number of its layers, or None for all.
        modules: number of kinds of projections that are adapted, in the order of `PROJECTIONS`.
        length: tokens per row in prefill and training.
        batch: rows in prefill and training.
        prompt: tokens per row before decoding.
        new_tokens: tokens per row that are decoded.
    """

    model: str
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    layers: int | None = None
    r: int = 8  # with the next three: the paper's LLM runs
    num_atoms: int = 16
    top_k: int = 4
    num_blocks: int = 4
    modules: int = len(PROJECTIONS)
    length: int = 256
    batch: int = 2
    prompt: int = 64
    new_tokens: int = 16

    @property
    def config(self):
        config = copy.deepcopy(MODELS[self.model])
        config.num_hidden_layers = self.layers or config.num_hidden_layers
        return config


def base_model(setup: Setup) -> nn.Module:
    """The model with random weights, which never ends a text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(setup.config, dtype=getattr(torch, setup.dtype))
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.to(setup.device).requires_grad_(False)


def sharing(base: nn.Module) -> nn.Module:
    """A copy of `base` with the same tensors, so that all methods together need the memory of one model."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())})
