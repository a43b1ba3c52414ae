"""The model card of an exported LoRA, and `routes.json`: what it was made from, and at what cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from ..card import public_base
from ..version import __version__


def write_card(
    folder: Path, config: Any, weights: Tensor, source: str, digest: str, losses: Mapping[str, float] | None
) -> None:
    """Write README.md and routes.json into `folder`.

    Args:
        folder: the export.
        config: its LoraConfig.
        weights: the fixed routes, [blocks, M].
        source: what they were made from.
        digest: SHA-256 of the routed adapter's file.
        losses: mean losses on held-out data; None if they were not measured.
    """
    record = {
        "peft_queryable_version": __version__,
        "routed_adapter_sha256": digest,
        "source": source,
        "losses": None if losses is None else dict(losses),
        "weights": dict(enumerate(weights.tolist())),
    }
    (folder / "routes.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    base = public_base(config)
    data = ModelCardData(library_name="peft", base_model=base, tags=["lora", "peft", "queryable-lora-export"])
    template = "---\n{{ card_data }}\n---\n\n{{ text }}\n"
    text = _text(source, digest, losses)
    ModelCard.from_template(data, template_str=template, text=text).save(folder / "README.md")


def _text(source: str, digest: str, losses: Mapping[str, float] | None) -> str:
    cost = "What fixing the routes costs in loss was not measured."
    if losses is not None:
        head, values = " | ".join(losses), " | ".join(f"{loss:.4f}" for loss in losses.values())
        cost = f"Mean loss per token on held-out data:\n\n| {head} |\n|{' --- |' * len(losses)}\n| {values} |"
    return f"""# LoRA, exported from a Queryable LoRA adapter

A plain LoRA of PEFT: it loads without peft_queryable. It is the routed adapter with its routes fixed, exactly;
where the router would have chosen other routes, the two differ.

- Routes: {source}.
- Routed adapter: SHA-256 of its tensors file {digest}.
- The weights over the atoms are in `routes.json`.

{cost}"""
