"""What is compared: adapters, by name. All of them work around the same weights of a model."""

import math
from tempfile import TemporaryDirectory

import torch
from peft import LilyConfig, LoraConfig, PeftConfig, VBLoRAConfig, XLoraConfig, get_peft_model
from torch import nn

from peft_queryable import QueryableLoraConfig
from recipes.benchmark.shapes import PROJECTIONS, Setup, sharing

SCOPES = ("sequence", "prompt", "causal")
INSTRUCTED = tuple(f"{scope}+instruction" for scope in SCOPES)
METHODS = ("base", "lora", "dora", "lily", "vblora", "xlora", *SCOPES, *INSTRUCTED)
COUNTED = ("lora", *SCOPES)  # whose launches and growth are shown
INSTRUCTION_DIM = 768  # the paper's d_c
EXPERTS = 4  # LoRA adapters that X-LoRA mixes: as many as a route of ours mixes atoms


def adapted(method: str, base: nn.Module, setup: Setup) -> nn.Module:
    """A copy of `base` with a new adapter; tensors that start at zero get random values."""
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
