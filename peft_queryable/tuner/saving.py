"""What a checkpoint must hold: PEFT loads non-strictly, and would leave random weights where it holds nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

ROUTER = "queryable_lora_router"
_RENAMED = {"prior": "block_prior", "instruction": "default_instruction"}  # since checkpoint format 1
_PARTS = {"lora_A", "lora_B", "queryable_lora_gate", ROUTER}
_CONVERSION = (
    "import sys; from safetensors.torch import load_file, save_file; tensors = load_file(sys.argv[1]); "
    + f"names = {_RENAMED}; "
    + "save_file({'.'.join(names.get(p, p) if '_router.' in k else p for p in k.split('.')): t "
    + "for k, t in tensors.items()}, sys.argv[1], {'format': 'pt'})"
)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], adapter_name: str) -> None:
    """Check the tensors of a checkpoint before they are loaded.

    Args:
        found: the checkpoint's tensors, by the names that the model gives them.
        expected: those of the adapter.
        adapter_name: the adapter.

    Raises:
        ValueError: if a tensor is missing, left over, of another shape or not finite, or if the checkpoint is of an
            earlier format.
    """
    if any(key.endswith(f"{ROUTER}.{name}.weight") for key in found for name in _RENAMED):
        raise ValueError(
            f"The checkpoint of adapter {adapter_name!r} has format 1, of before the first release: two of its "
            "tensors have been renamed since. Convert its file once, without loss:\n"
            f'python -c "{_CONVERSION}" ADAPTER/adapter_model.safetensors'
        )
    problems = [f"{key}: missing" for key in expected if key not in found]
    problems += [f"{key}: the adapter has no such tensor" for key in found.keys() - expected if _is_ours(key)]
    problems += [
        f"{key}: {tuple(found[key].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    problems.sort(key=lambda problem: ROUTER not in problem)  # the router first: without it nothing is routed
    if problems:
        raise ValueError(
            f"The checkpoint does not fit adapter {adapter_name!r}; {len(problems)} of its tensors are missing, left "
            f"over or of another shape: {'; '.join(_some(problems))}. Load it with the `adapter_config.json` it was "
            "saved with, onto the base model it was trained on; if the file is damaged, download it again."
        )
    if broken := [key for key, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"The checkpoint of adapter {adapter_name!r} has NaN or infinite values in {len(broken)} of its tensors: "
            f"{', '.join(_some(broken))}. Load one from before the training diverged; if the file is damaged, "
            "download it again."
        )


def _is_ours(key: str) -> bool:
    """Whether a tensor is the method's or LoRA's, by a part of its name: a base model may have a `lora_head`."""
    return not _PARTS.isdisjoint(key.split("."))


def _some(items: list[str]) -> list[str]:
    return items if len(items) <= 5 else [*items[:5], "..."]
