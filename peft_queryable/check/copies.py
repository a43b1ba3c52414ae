"""Copies of a model to check it on, which share its base weights and leave it as it was."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import MOVING_INITIALISATIONS
from ..tuner.layer import QueryableLoraLayer


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """The adapted modules of `model`, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QueryableLoraLayer)]


def shared_copy(model: PeftModel, with_adapters: bool = False) -> PeftModel:
    """A copy of `model` in eval mode, which shares the parameters of the base; those of the adapters if asked to."""
    own: set[int] = set()
    if not with_adapters:
        own |= {id(parameter) for parameter in model.base_model.queryable_lora_router.parameters()}
        for _, layer in layers_of(model):
            for part in (layer.lora_A, layer.lora_B, layer.queryable_lora_gate):
                own |= {id(parameter) for parameter in part.parameters()}
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in own}
    return copy.deepcopy(model, memo).eval()


def mix_all_atoms(model: PeftModel) -> PeftModel:
    """Turn top-k off in `model`, where a tie between two atoms makes a jump of a rounding."""
    for router in model.base_model.queryable_lora_router.values():
        router.settings = replace(router.settings, top_k=None)
    return model


@torch.no_grad()
def randomise(model: PeftModel) -> None:
    """Give what the active adapters of `model` learn random values that keep the size of what passes through.

    Every tensor is normal with standard deviation 1/sqrt(n), n its last dimension; B a quarter of that, over the
    adapter's scaling, so that the update is a part of the base model's output.
    """
    tuner = model.base_model
    for name in tuner.active_adapters:
        tensors = dict(tuner.queryable_lora_router[name].named_parameters())
        tensors.pop("default_instruction.weight", None)  # given, not learned
        for tensor in tensors.values():
            _fill(tensor)
        for layer in [layer for _, layer in layers_of(model) if name in layer.lora_A]:
            _fill(layer.lora_A[name].weight)
            _fill(layer.lora_B[name].weight, 0.25 / layer.scaling[name])
            _fill(layer.queryable_lora_gate[name].weight)


def _fill(tensor: Tensor, scale: float = 1.0) -> None:
    nn.init.normal_(tensor, std=scale / math.sqrt(tensor.shape[-1]))


def plain_lora(model: PeftModel) -> PeftModel:
    """A copy of `model` with plain LoRA in its place, of the same A and B, and nothing of this library at work."""
    plain = shared_copy(model, with_adapters=True)
    tuner = plain.base_model
    tuner.model_hooks.remove(tuner.model)
    tuner.stacks.remove()
    for _, layer in layers_of(plain):
        layer.forward = partial(_plain_forward, layer)
    return plain


def _plain_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W h + (alpha / r) B A h, as PEFT's LoRA computes it."""
    output = layer.base_layer(x, *args, **kwargs)
    result = output
    for name in layer.active_adapters:
        if name in layer.lora_A and not layer.disable_adapters:
            states = layer.lora_A[name](x.to(layer.lora_A[name].weight.dtype))
            result = result + layer.lora_B[name](states) * layer.scaling[name]
    return result.to(output.dtype)


def reloaded(model: PeftModel) -> PeftModel:
    """The active adapters of `model` saved, and loaded onto a copy of its base."""
    names = model.base_model.active_adapters
    base = shared_copy(model, with_adapters=True).base_model.unload()
    is_float32 = next(layer for _, layer in layers_of(model)).lora_A[names[0]].weight.dtype == torch.float32
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=names, save_embedding_layers=False)
        folders = {name: Path(folder) if name == "default" else Path(folder, name) for name in names}
        first, *others = names
        loaded = PeftModel.from_pretrained(base, folders[first], first, autocast_adapter_dtype=is_float32)
        for name in others:
            loaded.load_adapter(folders[name], name, autocast_adapter_dtype=is_float32)
    loaded.base_model.set_adapter(names)
    return mix_all_atoms(loaded.eval())


def moves_base(model: PeftModel) -> bool:
    """Whether making an adapter changed the base weights, so that there is no copy of those it is loaded onto."""
    return any(config.init_lora_weights in MOVING_INITIALISATIONS for config in model.peft_config.values())
