"""The model card of a saved adapter: what it is, how to load it, and its configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig

from .version import INSTALL

# By PEFT task type: transformers' class, and the pipeline tag where the Hub has one that is certain.
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
_ALWAYS_SHOWN = ("r", "lora_alpha")  # whatever LoRA's defaults are
_NEVER_SHOWN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type")
_ANY_ADAPTER = "path-or-name-of-this-adapter"
_BEGIN, _END = "<!-- Written by peft_queryable: begin -->", "<!-- Written by peft_queryable: end -->"


def model_card(adapter: str | Path) -> ModelCard:
    """The model card of a Queryable LoRA adapter, in place of one that knows nothing of the method.

    `save_pretrained` leaves it by itself. transformers' `push_to_hub` and TRL's trainers write theirs over it: give
    the trainer a [`RoutingCallback`], which keeps TRL from that, or end with `model_card(name).push_to_hub(name)`, or
    `model_card(folder).save(f"{folder}/README.md")`.

    Args:
        adapter: the folder the adapter was saved in, or its name on the Hub.

    Returns:
        a `huggingface_hub.ModelCard`; add to its `data` (licence, languages) and `text` what only you know.

    Raises:
        ValueError: if there is no `adapter_config.json`, or if it is not of the type QUERYABLE_LORA.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != "QUERYABLE_LORA":
        raise ValueError(f"{adapter} has the type {config.peft_type.value}: `model_card` takes QUERYABLE_LORA.")
    return card_of(config, _ANY_ADAPTER if Path(adapter).is_dir() else str(adapter))


def card_of(config: PeftConfig, name: str = _ANY_ADAPTER) -> ModelCard:
    """The card of an adapter with this configuration, whose code loads it from `name`."""
    data = ModelCardData()
    _describe(data, config)
    template = "---\n{{ card_data }}\n---\n\n{{ text }}\n"
    return ModelCard.from_template(data, template_str=template, text=_section(config, name))


def update_card(folder: Path) -> None:
    """Put ours in place of the unfilled card that PEFT has left in `folder`, or bring ours up to date.

    Args:
        folder: where an adapter has just been saved. A README.md that a user or a trainer wrote stays as it is.
    """
    path = folder / "README.md"
    unfilled = ModelCard.from_template(ModelCardData()).text.strip()  # what PEFT starts a card from
    replaced = re.compile(f"{re.escape(unfilled)}|{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
    if not path.exists() or not replaced.search(path.read_text(encoding="utf-8")):
        return
    card, config = ModelCard.load(path), PeftConfig.from_pretrained(str(folder))
    _describe(card.data, config)
    section = _section(config, _ANY_ADAPTER)
    card.text = replaced.sub(lambda match: section, card.text)
    card.save(path)


def _describe(data: ModelCardData, config: PeftConfig) -> None:
    """Correct the metadata in `data`."""
    base_class, pipeline = _base_class(config)
    data.library_name = "peft"
    data.base_model = public_base(config)
    data.pipeline_tag = data.pipeline_tag or pipeline
    tags = {tag for tag in data.tags or [] if not tag.startswith("base_model:adapter:")} | {"peft", "queryable-lora"}
    tags |= {f"base_model:adapter:{data.base_model}"} if data.base_model else set()
    data.tags = sorted(tags | ({"transformers"} if base_class else set()))


def _base_class(config: PeftConfig) -> tuple[str | None, str | None]:
    """transformers' class of the base model and the pipeline tag, as far as the configuration says."""
    mapping = config.auto_mapping or {}
    if mapping.get("parent_library", "").startswith("transformers."):
        return mapping["base_model_class"], None
    return _TASKS.get(config.task_type, (None, None))


def public_base(config: PeftConfig) -> str | None:
    """The base model's name on the Hub; None if it is a folder of this machine, which the Hub refuses in a card."""
    base = config.base_model_name_or_path
    return None if not base or Path(base).is_absolute() or Path(base).is_dir() else base


def _section(config: PeftConfig, adapter: str) -> str:
    base = public_base(config)
    of_base = f" of [{base}](https://huggingface.co/{base})" if base else ""
    fields = "\n".join(f"- `{name}`: {json.dumps(value)}" for name, value in _shown_fields(config).items())
    return f"""{_BEGIN}
# Queryable LoRA adapter

A [PEFT](https://huggingface.co/docs/peft) adapter{of_base}, trained with Queryable LoRA.

LoRA's update `B A` becomes `B (I + g S) A`, where `S` is a sparse mixture of a small bank of atoms that the whole
model shares ([arXiv 2605.08423](https://arxiv.org/abs/2605.08423)). A router chooses the mixture for each block of
layers from the input. With its routes fixed the adapter is a plain LoRA: `python -m peft_queryable.export`.

## Use

```bash
{INSTALL}
```

```python
{_snippet(config, adapter)}
```

## Configuration

{fields}
{_END}"""


def _snippet(config: PeftConfig, adapter: str) -> str:
    """The code that loads the adapter: with the base model where the configuration says what that is."""
    base, (base_class, _) = config.base_model_name_or_path, _base_class(config)
    lines = ["import peft_queryable  # registers the method with PEFT", "from peft import PeftModel"]
    if base and base_class:
        arguments = json.dumps(base) + (f", revision={json.dumps(config.revision)}" if config.revision else "")
        labels = "  # with the num_labels of the training" if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ""
        lines += [f"from transformers import {base_class}", ""]
        lines += [f"base_model = {base_class}.from_pretrained({arguments}){labels}"]
    else:
        lines += ["", "base_model = ...  # the model that the adapter was trained on"]
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(base_model, "{adapter}")'])


def _shown_fields(config: PeftConfig) -> dict[str, Any]:
    """The fields that differ from a plain LoRA's defaults, the method's own among them, as JSON has them."""
    values, lora = config.to_dict(), LoraConfig().to_dict()
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in values.items()
        if name in _ALWAYS_SHOWN or (name not in _NEVER_SHOWN and (name not in lora or value != lora[name]))
    }
