"""Denoisers of diffusers, told by their classes' names: which of their modules see which of the call's tokens."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..calls.arguments import parameter_names

_CROSS = r"caption_projection\..*|.*\.attn2\.to_[kv]"
_JOINT = r".*\.(add_[qkv]_proj|to_add_out)|.*\.(ff|norm1)_context\..*"
_TEXT = {  # by class, the modules that see the text alone, as `encoder_hidden_states` with its mask
    "HunyuanVideoTransformer3DModel": rf"context_embedder\..*|{_JOINT}",
    "LTXVideoTransformer3DModel": _CROSS,
    "MochiTransformer3DModel": rf"time_embed\.caption_proj|{_JOINT}",
    "PixArtTransformer2DModel": _CROSS,
    "QwenImageTransformer2DModel": rf"txt_in|.*\.txt_(mlp|mod)\..*|{_JOINT}",
    "SanaTransformer2DModel": _CROSS,
}
_MIXED = {  # of these classes, the modules that see text beside other tokens; their other modules see no text
    "HunyuanVideoTransformer3DModel": r"single_transformer_blocks\..*",
    "MochiTransformer3DModel": r"time_embed\.pooler\.to_kv",
}
# Parameters that say: tokens of several kinds in one packed row, or padding told otherwise than by a mask.
_PACKED = re.compile(r"text_lens|segment_ids|token_tags|shape_list|cap_feats|padding_mask|text_ind(ex|ic)es|input_ids")
# Parameters that say: later frames may be made from what this call gives.
_GOES_ON = re.compile(r"kv_caches?|enable_diffusion_forcing|chunk_\w+|latents_history\w*|clean_hidden_states")


def denoiser_of(model: nn.Module, owner: str) -> tuple[str, Any] | None:
    """Name and module of the denoiser of diffusers that holds module `owner` or is it; None outside of one."""
    parts, module = owner.split(".") if owner else [], model
    for depth in range(len(parts) + 1):
        names = {*parameter_names(module)}
        is_own = any(cls.__module__.startswith("diffusers.models.") for cls in type(module).__mro__)
        if is_own and {"timestep", "timesteps", "t"} & names and {"hidden_states", "sample", "x"} & names:
            return ".".join(parts[:depth]), module
        if depth < len(parts):
            module = module.get_submodule(parts[depth])
    return None


def sees_text(model: nn.Module, owner: str, name: str) -> bool:
    """Whether module `name` of the stack of `owner` is one of a denoiser's that see the text alone."""
    prefix, local, kind = _within(model, owner, name)
    return prefix == owner and kind in _TEXT and bool(re.fullmatch(_TEXT[kind], local))


def is_mixed(model: nn.Module, owner: str, name: str) -> bool:
    """Whether module `name` of the stack of `owner` may see tokens of a denoiser that no mask is known to be about."""
    prefix, local, kind = _within(model, owner, name)
    if prefix is None:
        return False
    return kind not in _TEXT or (prefix == owner and bool(re.fullmatch(_MIXED.get(kind, "(?!)"), local)))


def generates_nothing_later(denoiser: nn.Module) -> bool:
    """Whether it is known that no later frame is made from what a call of a denoiser gives."""
    return not any(map(_GOES_ON.fullmatch, parameter_names(denoiser)))


def packing(model: nn.Module, name: str) -> str | None:
    """The parameter of a denoiser that keeps it from being known which tokens its module `name` sees, if any."""
    found = denoiser_of(model, name.rpartition(".")[0])
    return None if found is None else next(filter(_PACKED.fullmatch, parameter_names(found[1])), None)


def _within(model: nn.Module, owner: str, name: str) -> tuple[str | None, str, str]:
    """Name of the denoiser of a stack, the name of its module `name` inside it, and its class's name."""
    found = denoiser_of(model, owner)
    if found is None:
        return None, name, ""
    prefix, denoiser = found
    return prefix, name[len(prefix) + 1 :] if prefix else name, type(denoiser).__name__
