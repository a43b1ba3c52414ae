"""Exports made when somebody asks for them by a name, `ADAPTER@instruction`, from the adapter's folder alone."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from ..command import base_class
from ..config import QueryableLoraConfig
from ..encoders import BACKBONE, CENTRED
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
            ValueError: if the adapter is of another base model, if its routes are not known from `name` alone, or if a
                file is missing or damaged. No text needs its paths to be read: vLLM hides paths from its clients.
        """
        adapter, at, told = name.partition("@")
        source = self.adapters / adapter
        if not _is_folder_name(adapter) or not _is_there(source / CONFIG):
            return None
        if _peft_type(source, adapter) != "QUERYABLE_LORA":
            return None
        config: Any = QueryableLoraConfig.from_pretrained(str(source))
        if base is not None and config.base_model_name_or_path != base:
            raise ValueError(
                f"Adapter {adapter!r} is of the base model {config.base_model_name_or_path!r}, but this serves "
                f"{base!r}. If they are the same, write that name into the adapter's {CONFIG}."
            )
        group = source / GROUPS / told
        if _is_folder_name(told) and _is_there(group / CONFIG):
            _peft_type(group, name)  # raises for a damaged file, of which vLLM would not say what is wrong
            _check_tensors(group, name)
            return group
        text = told if at else None
        _check(config, adapter, text)
        _check_tensors(source, adapter)
        made_of = (source / TENSORS).read_bytes() + (source / CONFIG).read_bytes() + repr(text).encode()
        target = self.folder / f"{adapter}-{hashlib.sha256(made_of).hexdigest()[:24]}"
        with self.lock:  # PEFT and transformers change global state while they load
            if not (target / CONFIG).exists():
                self._make(config, source, target, text)
        return target

    def _make(self, config: QueryableLoraConfig, source: Path, target: Path, text: str | None) -> None:
        model: Any = PeftModel.from_pretrained(_without_weights(config), str(source)).eval()
        router, adapter = model.base_model.queryable_lora_router["default"], source.name
        if router.reads_states:
            groups = sorted(path.parent.name for path in source.glob(f"{GROUPS}/*/{CONFIG}"))
            raise ValueError(
                f"The routes of adapter {adapter!r} depend on the tokens, so it takes data to fix them. Ask for an "
                f"export made beforehand as {adapter}@NAME; there are {groups}. To make one, in the folder of the "
                f"adapters: `{_command(adapter)} --calibrate FILE.jsonl`."
            )
        default = router.default_instruction
        if text is not None and default is None:
            raise ValueError(f"Adapter {adapter!r} takes no instruction. Ask for {adapter!r}, without '@'.")
        if text is None and default is not None and not default.weight.any():
            raise ValueError(f"Adapter {adapter!r} has no default instruction. Ask for {adapter}@TEXT.")
        routes = None if text is None else instruction_routes(model, text)
        try:
            export_lora(model, target, routes)
        except (OSError, ValueError):
            if not (target / CONFIG).exists():  # else another process has just made it
                raise


def _is_folder_name(text: str) -> bool:
    return text not in ("", "..") and Path(text).name == text


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # `path.exists()` raises where a name, which may be an instruction, is too long


def _peft_type(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / CONFIG).read_text()).get("peft_type")
    except ValueError as error:
        raise _damaged(CONFIG, name, error) from error


def _check_tensors(folder: Path, name: str) -> None:
    """Refuse a file whose header or length is wrong."""
    try:
        with safe_open(folder / TENSORS, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise _damaged(TENSORS, name, error) from error


def _damaged(file: str, name: str, error: Exception) -> ValueError:
    return ValueError(
        f"The file {file} of {name!r} is missing or damaged. Copy or make it anew. What went wrong: {error}"
    )


def _check(config: QueryableLoraConfig, adapter: str, text: str | None) -> None:
    """Refuse what cannot be exported from the adapter's folder alone."""
    if carried := refused_by_engines(config):
        raise ValueError(
            f"Adapter {adapter!r} carries {carried}, which vLLM refuses in a LoRA. Serve the merged model: "
            f"`python -m peft_queryable.export {adapter} OUT --merge`."
        )
    if text is not None and config.instruction_encoder in (BACKBONE, CENTRED):
        raise ValueError(
            f"Adapter {adapter!r} encodes instructions by its base model, whose weights are not loaded here. Make an "
            f"export in the folder of the adapters, and ask for it as {adapter}@NAME: `{_command(adapter)} "
            f"--instruction {text!r}`. Or train with a sentence encoder."
        )


def _command(adapter: str) -> str:
    return f"python -m peft_queryable.export {adapter} {adapter}/{GROUPS}/NAME"


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
