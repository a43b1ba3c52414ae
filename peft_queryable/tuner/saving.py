"""What a checkpoint must hold: PEFT loads non-strictly, and would leave random weights where it holds nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

ROUTER = "queryable_lora_router"


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], adapter: str) -> None:
    """Raise a ValueError unless the tensors `found` in a checkpoint are those `expected` of `adapter`, and finite."""
    problems = [f"{key}: missing" for key in expected if key not in found]
    problems += [f"{key}: the adapter has no such tensor" for key in found.keys() - expected if "lora_" in key]
    problems += [
        f"{key}: {tuple(found[key].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    problems.sort(key=lambda problem: ROUTER not in problem)  # the bank first: without it nothing is routed
    if problems:
        raise ValueError(
            f"The checkpoint does not fit adapter {adapter!r}; {len(problems)} of its tensors are missing, left over "
            f"or of another shape: {'; '.join(_some(problems))}. Load it with the `adapter_config.json` it was saved "
            "with, onto the base model it was trained on; if the file is damaged, fetch it again."
        )
    if broken := [key for key, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"The checkpoint of adapter {adapter!r} has NaN or infinite values in {len(broken)} of its tensors: "
            f"{', '.join(_some(broken))}. Load one from before the training diverged; if the file is damaged, fetch "
            "it again."
        )


def _some(items: list[str]) -> list[str]:
    return items if len(items) <= 5 else [*items[:5], "..."]
