"""The arguments of a module's call by name, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_names(module: nn.Module) -> list[str]:
    """Names of the parameters of the module's `forward`, in order."""
    return list(inspect.signature(module.forward).parameters)


def bind(names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name; `names` are those of the function's parameters."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
