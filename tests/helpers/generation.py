"""Generation step by step, and the full forward that it has to equal."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from helpers.models import CACHE, adapted, llama, outputs, randomise

PROMPT, NEW = 8, 10
SCOPES = ("causal", "prompt")


def decoder(scope: str):
    """A tiny Llama in float64 with a trained-looking adapter, always the same."""
    torch.manual_seed(0)
    model = adapted(llama().double(), target_modules="all-linear", routing_scope=scope)
    randomise(model)
    return model


def no_stop(**kwargs) -> GenerationConfig:
    """Ten new tokens, none of which ends a text."""
    return GenerationConfig(max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **kwargs)


def full_logits(model, ids: Tensor, prompt: int = PROMPT) -> Tensor:
    """Logits of one forward over unpadded `ids`, of which `prompt` tokens are the prompt."""
    is_prompt = (torch.arange(ids.shape[1]) < prompt).expand_as(ids)
    return outputs(model, {"input_ids": ids, "prompt_mask": is_prompt})


def step_logits(model, ids: Tensor, cache, start: int) -> Tensor:
    """Logits of `ids` from position `start` on, one token per call, on top of `cache`."""
    steps = [
        outputs(model, {"input_ids": ids[:, i : i + 1], CACHE: cache, "use_cache": True})
        for i in range(start, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)
