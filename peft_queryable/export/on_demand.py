"""Exports made when somebody asks for them by a name, `ADAPTER@instruction`, from the adapter's folder alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig

from ..command import base_class
from ..config import QueryableLoraConfig
from ..encoders import BACKBONE
from ..routes import instruction_routes
from .lora import TENSORS, export_lora, refused_by_engines

GROUPS = "groups"  # folder of an adapter's folder
CONFIG = "adapter_config.json"


class Exports:
    """A folder of routed adapters, and a folder of the plain LoRAs that were made of them.

    | name | LoRA |
    | --- | --- |
    | `ADAPTER@GROUP` | the one in `adapters/ADAPTER/groups/GROUP`, made beforehand by the command |
    | `ADAPTER@TEXT` | the adapter under the instruction TEXT, made here and kept |
    | `ADAPTER` | the adapter under its default instruction, or one without routes of its own, made here and kept |

    An export appears in `folder` as a whole, by renaming, and is made once, however many threads ask for it. The
    base model's configuration is read, its weights are not.

    Args:
        adapters: has a folder for each routed adapter.
        folder: where the LoRAs go. Their names end in a digest of the adapter and the instruction.
    """

    def __init__(self, adapters: Path, folder: Path) -> None:
        self.adapters, self.folder, self.lock = adapters, folder, Lock()

    def find(self, name: str, base: str | None = None) -> Path | None:
        """The folder of the LoRA that `name` means; None if there is no routed adapter of this name.

        Args:
            name: as the table above says.
            base: the base model that is served; None for any.

        Raises:
            ValueError: if the adapter is of another base model, or if its routes are not known from `name` alone.
        """
        adapter, at, told = name.partition("@")
        source = self.adapters / adapter
        if not _is_folder_name(adapter) or not (source / CONFIG).exists():
            return None
        config: Any = PeftConfig.from_pretrained(str(source))
        if config.peft_type != "QUERYABLE_LORA":
            return None
        if base is not None and config.base_model_name_or_path != base:
            raise ValueError(
                f"Adapter {adapter!r} is of the base model {config.base_model_name_or_path!r}, but this serves "
                f"{base!r}. If they are the same, write that name into {source / CONFIG}."
            )
        if _is_folder_name(told) and (source / GROUPS / told / CONFIG).exists():
            return source / GROUPS / told
        text = told if at else None
        _check(config, adapter, text, source)
        made_of = (source / TENSORS).read_bytes() + (source / CONFIG).read_bytes() + repr(text).encode()
        target = self.folder / f"{adapter}-{hashlib.sha256(made_of).hexdigest()[:24]}"
        with self.lock:  # PEFT and transformers change global state while they load
            if not (target / CONFIG).exists():
                self._make(config, source, target, text)
        return target

    def _make(self, config: QueryableLoraConfig, source: Path, target: Path, text: str | None) -> None:
        model: Any = PeftModel.from_pretrained(_without_weights(config), str(source)).eval()
        if model.base_model.queryable_lora_router["default"].reads_states:
            raise ValueError(
                f"The routes of adapter {source.name!r} depend on the tokens, so it takes data to fix them. Make an "
                f"export beforehand, and ask for it as {source.name}@NAME: "
                f"`{_command(source)} --calibrate FILE.jsonl`."
            )
        routes = None if text is None else instruction_routes(model, text)
        try:
            export_lora(model, target, routes)
        except (OSError, ValueError):
            if not (target / CONFIG).exists():  # else another process has just made it
                raise


def _is_folder_name(text: str) -> bool:
    return text not in ("", "..") and Path(text).name == text


def _check(config: QueryableLoraConfig, adapter: str, text: str | None, source: Path) -> None:
    """Refuse what cannot be exported from the adapter's folder alone."""
    if carried := refused_by_engines(config):
        raise ValueError(
            f"Adapter {adapter!r} carries {carried}, which vLLM refuses in a LoRA. Serve the merged model: "
            f"`python -m peft_queryable.export {source} OUT --merge`."
        )
    if text is not None and config.instruction_encoder == BACKBONE:
        raise ValueError(
            f"Adapter {adapter!r} encodes instructions by its base model, whose weights are not loaded here. Make an "
            f"export beforehand, and ask for it as {adapter}@NAME: `{_command(source)} --instruction {text!r}`. Or "
            "train with a sentence encoder."
        )


def _command(source: Path) -> str:
    return f"python -m peft_queryable.export {source} {source / GROUPS / 'NAME'}"


def _without_weights(config: QueryableLoraConfig) -> nn.Module:
    """The base model with its modules, but one number in the place of each weight: it is never run."""
    base = config.base_model_name_or_path
    cls = base_class(base, config)
    make: Any = getattr(cls, "from_config", None) or cls._from_config
    with torch.device("meta"):
        model = make(AutoConfig.from_pretrained(base))
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            number = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(number, requires_grad=False))
    return model
