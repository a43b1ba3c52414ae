"""What recipes/benchmark.py compares: models of real shapes, and adapters on them that share their weights."""

import copy
import math
from dataclasses import dataclass
from itertools import chain
from tempfile import TemporaryDirectory

import torch
from peft import LilyConfig, LoraConfig, PeftConfig, VBLoRAConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

from peft_queryable import QueryableLoraConfig

PROJECTIONS = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCOPES = ("sequence", "prompt", "causal")
INSTRUCTED = tuple(f"{scope}+instruction" for scope in SCOPES)
METHODS = ("base", "lora", "dora", "lily", "vblora", "xlora", *SCOPES, *INSTRUCTED)
INSTRUCTION_DIM = 768  # the paper's d_c
EXPERTS = 4  # LoRA adapters that X-LoRA mixes; as many as atoms that a route of ours does

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
    """A model, its adapters and the tokens that they work on; what a sweep changes one at a time.

    Args:
        model: one of `MODELS`.
        layers: number of its layers, or None for all.
        modules: number of kinds of projections that are adapted, in the order of `PROJECTIONS`.
        length: tokens of a row in prefill and training.
        batch: rows in prefill and training.
        prompt: tokens of a row before decoding.
        new_tokens: tokens of a row that are decoded.
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
    """A copy of `base` with the same tensors, so that methods side by side need the memory of one."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())})


def adapted(method: str, base: nn.Module, setup: Setup) -> nn.Module:
    """A copy of `base` with a new adapter, none of whose tensors is zero."""
    model = sharing(base)
    if method == "base":
        return model
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        if method == "xlora":
            adapted("lora", base, setup).save_pretrained(folder)
            model.config.use_cache = False  # X-LoRA insists
        model = get_peft_model(model, adapter_config(method, setup, folder))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def adapter_config(method: str, setup: Setup, folder: str) -> PeftConfig:
    """The adapter's configuration; X-LoRA mixes copies of the adapter in `folder`."""
    shape = setup.config
    targets = {"target_modules": list(PROJECTIONS[: setup.modules]), "task_type": "CAUSAL_LM"}
    low_rank = targets | {"r": setup.r, "lora_alpha": 2 * setup.r}
    if method == "lora":
        return LoraConfig(**low_rank)
    if method == "dora":
        return LoraConfig(**low_rank, use_dora=True)
    if method == "lily":  # PEFT's advice: layers share in fours, and the rank is a multiple of LoRA's
        return LilyConfig(**targets, r=4 * setup.r, stride_A=4, num_B=max(shape.num_hidden_layers // 4, 2))
    if method == "vblora":  # the vectors' length has to divide every width; the rest are PEFT's defaults
        key_width = shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads
        length = math.gcd(shape.hidden_size, shape.intermediate_size, key_width)
        return VBLoRAConfig(**targets, r=setup.r, vector_length=length)
    if method == "xlora":
        adapters = {str(i): folder for i in range(EXPERTS)}
        return XLoraConfig(hidden_size=shape.hidden_size, adapters=adapters, task_type="CAUSAL_LM")
    return QueryableLoraConfig(
        **low_rank,
        routing_scope=method.partition("+")[0],
        num_atoms=setup.num_atoms,
        top_k=setup.top_k,
        num_blocks=setup.num_blocks,
        instruction_dim=INSTRUCTION_DIM if method in INSTRUCTED else None,
    )
