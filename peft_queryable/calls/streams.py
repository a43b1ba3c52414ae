"""Calls about two kinds of tokens: those of the layers, and a text or another memory with a mask of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import Plan
from .tokens import hides

_TEXT_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
_MASK = re.compile(r"(.*attention|encoder|encoder_hidden_states|hidden_states|text_embedding|img)_masks?(_\w+)?")
_CACHE = re.compile(r"kv_caches?")


def text_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a call's memory, `encoder_hidden_states` [B, S, d], would have if it were the tokens."""
    mask = next((arguments[name] for name in _TEXT_MASKS if arguments.get(name) is not None), None)
    return {"hidden_states": arguments["encoder_hidden_states"], "attention_mask": mask}


def without_masks(arguments: Mapping[str, Any], plans: Sequence[Plan], denoiser: str) -> dict[str, Any]:
    """The arguments of a denoiser's call without its masks, which hide none of the tokens that `plans` route.

    Asks masks for their values, and so waits for their device, unless they are known to be about the text alone.

    Raises:
        ValueError: if a mask hides tokens of a module that sees them, or for a call that goes on from a cache.
    """
    nested = [value for value in arguments.values() if isinstance(value, Mapping)]
    given = {name: value for values in (*nested, arguments) for name, value in values.items() if value is not None}
    masks = {name: value for name, value in given.items() if _MASK.fullmatch(name) and isinstance(value, Tensor)}
    mixed = next((plan.mixed for plan in plans if plan.mixed), "")
    if plans and (cache := next(filter(_CACHE.fullmatch, given), None)) is not None:
        raise ValueError(f"{denoiser} keeps tokens in `{cache}`, which cannot carry routing. Call it without.")
    for name, mask in masks.items() if plans and not torch.compiler.is_compiling() else ():
        if (mixed or name not in _TEXT_MASKS) and hides(mask):
            remedy = "" if mixed in ("", ".*") else f", or pass `exclude_modules=r'{mixed}'`"
            raise ValueError(
                f"`{name}` {list(mask.shape)} of {denoiser} hides tokens, and it is not known which they are of those "
                f"that each adapted module sees. Pass rows without padding, one at a time if need be{remedy}."
            )
    return {name: value for name, value in arguments.items() if name not in masks}
