"""Files of a saved adapter, and how to damage them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from helpers.models import BANK, INSTRUCTION, ROUTER_KEY

A_LAYER = "base_model.model.model.layers.1.self_attn.q_proj."
# Tensors of the adapter in the fixture `folder`: those of the bank, and those of one layer.
KEYS = [*[f"{ROUTER_KEY}{name}.weight" for name in sorted(BANK | INSTRUCTION)]] + [
    A_LAYER + name + ".weight" for name in ("lora_A", "lora_B", "queryable_lora_gate")
]


def rewrite(folder: Path, change) -> None:
    """Save the adapter's tensors again after `change` of their dict."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder: Path, **fields) -> None:
    """Give `fields` of the saved configuration other values."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
