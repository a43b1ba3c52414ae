"""The arguments of a module's call by name, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from types import MethodType
from typing import Any

from torch import Tensor, nn

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "hidden_states")


def parameter_names(module: nn.Module) -> Sequence[str]:
    """Names of the parameters of the module's `forward`, in order."""
    if "forward" in vars(module):  # patched for this module alone, as accelerate does
        return tuple(inspect.signature(module.forward).parameters)
    return _names_without_self(type(module).forward)


@cache
def _names_without_self(forward: Callable) -> Sequence[str]:
    """Of a class's `forward`: reading signatures would be a large part of the time that an adapter takes to load."""
    return tuple(inspect.signature(MethodType(forward, object())).parameters)


def bind(names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name; `names` are those of the function's parameters."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def leading_tensor(arguments: dict[str, Any]) -> Tensor:
    """The argument that tells a call's rows and tokens: token ids or hidden states if there are any, else the first.

    Raises:
        ValueError: for a call without any tensor.
    """
    named = [arguments.get(name) for name in TOKEN_ARGUMENTS]
    for value in (*named, *arguments.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError("A call without any tensor among its arguments cannot be routed: its batch size is not known.")
