"""TRL's trainers in the tests: what they warn of, those that generate, and data for the others."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from helpers.models import llama
from helpers.words import words

QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def prompts(count: int) -> list[str]:
    """Prompts of three words."""
    return [words(i, 3) for i in range(count)]


def preferences(count: int) -> dict[str, list]:
    """Columns of answers that are preferred to others."""
    return {
        "prompt": prompts(count),
        "chosen": [" " + words(20 + i, 3 + i % 2) for i in range(count)],
        "rejected": [" " + words(40 + i, 3) for i in range(count)],
    }


def judgements(count: int) -> dict[str, list]:
    """Columns of answers that are good or bad by turns."""
    return {
        "prompt": prompts(count),
        "completion": [" " + words(20 + i, 3 + i % 2) for i in range(count)],
        "label": [i % 2 == 0 for i in range(count)],
    }


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**llama().config.to_diff_dict() | {"num_labels": 1}))
    model.config.pad_token_id = 0
    return model
