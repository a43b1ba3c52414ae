"""Adapters on models that accelerate keeps in part on the CPU or on disk: their own tensors stay loaded."""

from __future__ import annotations

from typing import Any

from accelerate.utils import has_offloaded_params
from torch import nn


def onload(module: nn.Module) -> None:
    """Load for good what accelerate offloaded of `module`, which it would load only while a part is called.

    The tensors of an adapter are few, and read beside each other: a route reads the whole router and the factors A of
    several projections.

    Raises:
        ValueError: if accelerate holds no copy of a tensor.
    """
    for part in module.modules():
        if has_offloaded_params(part):
            hook: Any = part._hf_hook
            try:
                hook.pre_forward(part)
            except KeyError as error:
                raise ValueError(
                    f"`device_map` sends {error} of the adapter to disk, where PEFT has not saved it. In the map, "
                    "give `base_model.queryable_lora_router` a device, or 'cpu'."
                ) from error
            hook.offload = False
