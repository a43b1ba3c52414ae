"""The plugin of vLLM that serves `ADAPTER@instruction`: docs/serving.md says how it is turned on."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

ADAPTERS, FOLDER = "PEFT_QUERYABLE_ADAPTERS", "PEFT_QUERYABLE_EXPORTS"


def register() -> None:
    """What vLLM's entry point `vllm.general_plugins` calls, in each of its processes.

    Nothing happens unless PEFT_QUERYABLE_ADAPTERS names a folder of routed adapters. PEFT_QUERYABLE_EXPORTS is the
    folder that the LoRAs go to; default: `exports` beside the other.

    Raises:
        ValueError: if there is no folder of adapters of that name.
    """
    adapters = os.environ.get(ADAPTERS)
    if adapters is None:
        return
    if not Path(adapters).is_dir():
        raise ValueError(f"{ADAPTERS} must name a folder that has a folder for each adapter, got {adapters!r}.")
    from vllm.lora.resolver import LoRAResolverRegistry

    folder = os.environ.get(FOLDER) or Path(adapters).absolute().parent / "exports"
    LoRAResolverRegistry.register_resolver("peft_queryable", resolver(Path(adapters), Path(folder)))


def resolver(adapters: Path, folder: Path) -> Any:
    """A `LoRAResolver` of vLLM's that finds and makes the exports of the routed adapters in `adapters`."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    from .on_demand import Exports  # here: vLLM calls `register` in processes that resolve nothing

    exports = Exports(adapters.absolute(), folder.absolute())

    class Resolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            found = await asyncio.to_thread(exports.find, lora_name, base_model_name)
            if found is None:
                return None
            number = int.from_bytes(hashlib.sha256(lora_name.encode()).digest()[:3], "big") + 1
            return LoRARequest(lora_name, number, str(found))

    return Resolver()
