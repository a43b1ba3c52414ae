"""What the commands share: loading what a command line names, and reading texts."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from .config import QueryableLoraConfig

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load(options: argparse.Namespace) -> tuple[PeftModel, str]:
    """The model, and where its tokenizer is: an adapter on its base, or a base with a new adapter."""
    try:
        config = PeftConfig.from_pretrained(options.name)
    except ValueError:  # no adapter: a base model
        model = base_class(options.name, None).from_pretrained(options.name, dtype=options.dtype)
        new = QueryableLoraConfig(target_modules="all-linear", routing_scope=options.scope)
        return get_peft_model(model.to(options.device), new), options.name
    base = options.base or config.base_model_name_or_path
    model = base_class(base, config).from_pretrained(base, dtype=options.dtype).to(options.device)
    has_tokenizer = Path(options.name, "tokenizer_config.json").exists()
    return PeftModel.from_pretrained(model, options.name), options.name if has_tokenizer else base


def base_class(base: str, config: PeftConfig | None) -> Any:
    """transformers' class of a base model: as the adapter's configuration says, or else its own."""
    mapping = getattr(config, "auto_mapping", None) or {}
    if config is not None and config.task_type in TASKS:
        return getattr(transformers, TASKS[config.task_type])
    if "base_model_class" in mapping:
        return getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
    architectures = transformers.AutoConfig.from_pretrained(base).architectures
    return getattr(transformers, architectures[0]) if architectures else transformers.AutoModelForCausalLM


def read(path: str, rows: int) -> list[dict[str, Any]]:
    """The first `rows` lines of a JSON Lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(rows), strict=False)]


def encode(tokenizer: Any, lines: list[dict[str, Any]], length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], padded on the right, and `prompt_mask` where lines have prompts."""
    rows, prompts = [], []
    for line in lines:
        prompt = tokenizer(as_text(tokenizer, line["prompt"], True))["input_ids"] if "prompt" in line else []
        text = as_text(tokenizer, line.get("completion") or line.get("messages") or line.get("text", ""), False)
        ids = (prompt + tokenizer(text, add_special_tokens=not prompt)["input_ids"])[:length]
        rows.append(torch.tensor(ids))
        prompts.append(torch.arange(len(ids)) < len(prompt))
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    batch = {
        "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0),
        "attention_mask": mask,
    }
    return {**batch, "prompt_mask": pad(prompts, batch_first=True)} if any(map(torch.any, prompts)) else batch


def as_text(tokenizer: Any, value: Any, is_prompt: bool) -> str:
    """A text as it is; messages by the tokenizer's template, a completion's by their contents."""
    if isinstance(value, str):
        return value
    if is_prompt or len(value) > 1:
        return tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=is_prompt)
    return value[0]["content"]
