"""Adapters on a backbone, by name: PEFT's, ours, and the reconstructions."""

from peft import LilyConfig, LoraConfig, PeftConfig, VBLoRAConfig, get_peft_model
from torch import Tensor, nn

from peft_queryable import QueryableLoraConfig, set_default_instruction
from recipes.regression.backbones import MLP, Transformer
from recipes.regression.reconstructed import GENERATED, attach_generated
from recipes.regression.settings import ALPHA, RANK
from recipes.regression.variants import VARIANTS, Variant

INSTRUCTION_DIM = 32  # what LoRA's number of parameters and 10% more leave room for in the MLP
METHODS = ("soap", "lora", "dora", "lily", "vblora", "replora", "hyra", "doran", "queryable", "instruction")
OURS = ("queryable", "instruction", *VARIANTS)


def attach(method: str, backbone: Transformer | MLP, instruction: Tensor | None = None) -> nn.Module:
    """`backbone`, changed in place, with a new adapter whose parameters alone are trainable.

    Args:
        method: one of `METHODS` or `VARIANTS`; with "soap" there is no adapter, and everything is trainable.
        instruction: an embedding [1, INSTRUCTION_DIM], for the method of that name only.
    """
    if method == "soap":
        return backbone.requires_grad_(True)
    backbone.requires_grad_(False)
    if method in GENERATED:
        return attach_generated(backbone, *GENERATED[method])
    model = get_peft_model(backbone, config(method, backbone))
    if method == "instruction":
        set_default_instruction(model, instruction)
    VARIANTS.get(method, Variant()).prepare(model)
    return model


def config(method: str, backbone: Transformer | MLP) -> PeftConfig:
    """The configuration of one of PEFT's methods or of ours, with LoRA's number of parameters within 10%."""
    wide = isinstance(backbone, Transformer)
    targets = {"target_modules": list(backbone.targets)}
    low_rank = targets | {"r": RANK, "lora_alpha": ALPHA}
    if method == "lora":
        return LoraConfig(**low_rank)
    if method == "dora":
        return LoraConfig(**low_rank, use_dora=True)
    if method == "lily":
        return LilyConfig(
            **targets, **({"r": 32, "stride_A": 4, "num_B": 2} if wide else {"r": 16, "stride_A": 2, "num_B": 8})
        )
    if method == "vblora":  # the vectors' length has to divide every width
        return VBLoRAConfig(
            **targets,
            r=RANK,
            **({"vector_length": 256, "num_vectors": 209} if wide else {"vector_length": 32, "num_vectors": 30}),
        )
    ours = {
        **low_rank,
        "num_atoms": 8,  # with the next two: B.3
        "top_k": 2,
        "num_blocks": 4,
        "router_dim": 8,  # leaves room for the instruction
        "routing_scope": "sequence",  # the paper's pooling; `auto` cannot know that no coordinate predicts another
        "instruction_dim": INSTRUCTION_DIM if method == "instruction" else None,
    }
    return QueryableLoraConfig(**{**ours, **VARIANTS.get(method, Variant()).config})
