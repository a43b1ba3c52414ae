"""Which modules can be adapted; the others are refused by name, before anything is changed for them."""

from __future__ import annotations

from typing import Any

from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layer import QueryableLoraLayer


def check_target(model: nn.Module, name: str, target: nn.Module) -> None:
    """Raise a ValueError, with the reason and a remedy, if module `target` called `name` cannot be adapted."""
    if reason := _refusal(model, name, target):
        raise ValueError(
            f"Module {name!r} cannot be adapted: {reason}. Leave it out of `target_modules`, or name it in "
            "`exclude_modules`."
        )


def _refusal(model: nn.Module, name: str, target: nn.Module) -> str | None:
    base_layer: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(target, BaseTunerLayer) and not isinstance(target, QueryableLoraLayer):
        return f"it already carries an adapter of type {type(target).__name__}"
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter on it would do nothing"
    if not _is_linear(base_layer):
        return (
            f"it is of type {type(base_layer).__name__}, and Queryable LoRA adapts torch.nn.Linear, Conv1D and the "
            "quantised linear layers that PEFT knows (docs/quantised.md)"
        )
    if has_offloaded_params(base_layer):
        return (
            "accelerate keeps its weight on the CPU or on disk, and PEFT would make the adapter there, without data; "
            "the first adapter of a model can be loaded, by `PeftModel.from_pretrained` with a `device_map`"
        )
    if ".experts." in f".{name}.":
        return "it belongs to an expert, which gets loose tokens: their sequence, and so their route, is not known"
    if _reads_positions(model, name):
        return "with `share_att_key` it also projects the relative position embeddings, which belong to no sequence"
    if not isinstance(model, PreTrainedModel):
        return None
    head: Any = model.get_output_embeddings()
    if base_layer is (head.get_base_layer() if isinstance(head, BaseTunerLayer) else head):
        return (
            "it is the language model's head, which runs outside the routed layers and, in generation, on a part of "
            "the tokens only; `modules_to_save` trains it in full"
        )
    return None


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Linear, Conv1D)):  # most quantised layers are: bitsandbytes', torchao's, ...
        return True
    # The others are not torch's; torchao may quantise the weight of an nn.Embedding, which stays one.
    is_foreign = not type(layer).__module__.startswith("torch.")
    return is_foreign and resolve_quantization_backend(layer) is not None


def _reads_positions(model: nn.Module, name: str) -> bool:
    """Whether the attention of DeBERTa-v2 or SEW-D applies module `name` to its relative position embeddings too."""
    parent, _, child = name.rpartition(".")
    attention = model.get_submodule(parent)
    if not getattr(attention, "relative_attention", False):
        return False
    return getattr(attention, "share_att_key", False) and child in ("query_proj", "key_proj")
