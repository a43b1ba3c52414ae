"""Denoisers of diffusers, told by their classes' names: which of their modules see which of the call's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
_PACKED = re.compile(r"text_lens|segment_ids|token_tags|shape_list|cap_feats|text_ind(ex|ic)es|input_ids")
# Parameters that say: later frames may be made from what this call gives.
_GOES_ON = re.compile(r"kv_caches?|enable_diffusion_forcing|chunk_\w+|latents_history\w*|clean_hidden_states")


def denoiser_of(model: nn.Module, owner: str) -> tuple[str, Any] | None:
    """Name and module of the denoiser of diffusers that holds module `owner` or is it; None outside of one."""
    parts, module = owner.split(".") if owner else [], model
    for depth in range(len(parts) + 1):
        if any(cls.__module__.startswith("diffusers.models.") for cls in type(module).__mro__):
            names = {*parameter_names(module)}
            if {"timestep", "timesteps", "t"} & names and {"hidden_states", "sample", "x"} & names:
                return ".".join(parts[:depth]), module
        if depth < len(parts):
            module = getattr(module, parts[depth])
    return None


def sees_text(model: nn.Module, owner: str, name: str) -> bool:
    """Whether module `name` of the stack of `owner` is one of a denoiser's that see the text alone."""
    found = denoiser_of(model, owner)
    pattern = None if found is None or found[0] != owner else _TEXT.get(type(found[1]).__name__)
    return pattern is not None and bool(re.fullmatch(pattern, name.removeprefix(owner + ".")))


def has_streams(model: nn.Module, owner: str) -> bool:
    """Whether the masks of a call of `owner` are not known to be about the tokens of its stack."""
    found = denoiser_of(model, owner)
    return found is not None and (found[0] == owner or type(found[1]).__name__ not in _TEXT)


def mixed_modules(model: nn.Module, owner: str, names: Sequence[str]) -> str:
    """A pattern of the modules `names` of a stack that may see a denoiser's text beside other tokens; "" for none."""
    found = denoiser_of(model, owner) if has_streams(model, owner) else None
    if found is None:
        return ""
    prefix, kind = found[0] and re.escape(found[0] + "."), type(found[1]).__name__
    pattern = prefix + (_MIXED.get(kind, "(?!)") if kind in _TEXT else ".*")
    return pattern if any(re.fullmatch(pattern, name) for name in names) else ""


def generates_nothing_later(denoiser: nn.Module) -> bool:
    """Whether it is known that no later frame is made from what a call of a denoiser gives."""
    return not any(map(_GOES_ON.fullmatch, parameter_names(denoiser)))


def check_scope(model: nn.Module, name: str, scope: str) -> None:
    """Raise a ValueError if module `name` is a denoiser's and `scope`, a `routing_scope`, gives each token a route."""
    found = denoiser_of(model, name.rpartition(".")[0])
    if found is None or not (scope == "causal" or (scope == "auto" and not generates_nothing_later(found[1]))):
        return
    raise ValueError(
        f"{type(found[1]).__name__} is a denoiser, whose modules see different tokens (of an image, of a text, of "
        f"both), so that `routing_scope={scope!r}`, which gives each token a route of its own here, cannot serve "
        "them. Use `routing_scope='sequence'`, with which each sequence has one route; it sees all frames of the call."
    )


def packing(model: nn.Module, name: str) -> str | None:
    """The parameter of a denoiser that keeps it from being known which tokens its module `name` sees, if any."""
    found = denoiser_of(model, name.rpartition(".")[0])
    return None if found is None else next(filter(_PACKED.fullmatch, parameter_names(found[1])), None)
