"""Which modules can be adapted; the others are refused by name, before anything is changed for them."""

from __future__ import annotations

import re
import warnings
from difflib import get_close_matches
from typing import Any

from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..calls.arguments import parameter_names
from ..config import QueryableLoraConfig
from .denoisers import check_scope, packing
from .layer import QueryableLoraLayer
from .layout import find_stacks, path_to

_SEQUENCE_FIRST = ("fsmt", "xlnet")  # the models of transformers whose layers get [tokens, batch, features]
_SQUARES = "its mask hides padding from padding alone, so that it does not tell which of its patches are padding"
_WINDOWS = "its encoder fills rows up to whole windows and passes some activations as [tokens, batch, features]"
_STREAMS = "its decoder runs a stream of predictions per n-gram beside the tokens, in the same dimension"
_UNKNOWN_OWNERS = {
    "LongformerEncoder": _WINDOWS,
    "LEDEncoder": _WINDOWS,
    "ProphetNetDecoder": _STREAMS,
    "MllamaVisionModel": _SQUARES,
}
_POSITIONS = re.compile(
    r"linear_pos|pos_proj|relative_k_proj|pos_(q|key|query)_proj|(gru_)?rel_pos(_[xy])?_(bias|linear)"
)


def check_target(
    model: nn.Module, config: QueryableLoraConfig, name: str, target: nn.Module, left_out: dict[str, str] | None
) -> bool:
    """Whether module `target` called `name` can be adapted.

    Args:
        model: the base model.
        config: the adapter's configuration.
        name: the module's name in it.
        target: the module.
        left_out: where `target_modules="all-linear"` asks for what can be adapted, by name the reasons of what cannot;
            None where the configuration names its modules.

    Raises:
        ValueError: if it cannot, though the configuration names it, or for a reason that is not of the module's kind.
    """
    check_scope(model, name, config.routing_scope)
    obstacle = _obstacle(target)
    reason = obstacle or _refusal(model, config, name, target)
    if obstacle or (reason is not None and left_out is None):
        kind = re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))  # the same module of all layers and experts
        raise ValueError(
            f"Module {name!r} cannot be adapted: {reason}. Leave it out of `target_modules`, or pass "
            f"`exclude_modules=r'{kind}'`."
        )
    if reason is not None and left_out is not None:
        left_out[name] = reason
    return reason is None


def report_left_out(config: QueryableLoraConfig, left_out: dict[str, str], is_any_adapted: bool) -> None:
    """Write what "all-linear" left out into `exclude_modules`, which is saved, and warn once.

    Raises:
        ValueError: if nothing is left to adapt.
    """
    if not left_out:
        return
    name, reason = next(iter(left_out.items()))
    if not is_any_adapted:
        raise ValueError(f"`target_modules='all-linear'` finds nothing that can be adapted. {name!r}: {reason}.")
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"({config.exclude_modules})", *map(re.escape, left_out)])
    else:
        config.exclude_modules = sorted({*(config.exclude_modules or []), *left_out})
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"{_some(names)}: {reason}" for reason, names in by_reason.items()]
    warnings.warn(
        f"`target_modules='all-linear'` leaves out {len(left_out)} modules it cannot adapt: {'; '.join(lines)}.",
        stacklevel=2,
    )


def warn_unknown_names(model: nn.Module, target_modules: Any) -> None:
    """Warn of names in `target_modules` that no module has: PEFT adapts the rest in silence."""
    if not isinstance(target_modules, list | tuple | set):
        return
    names = [name for name, _ in model.named_modules()]
    last_parts = {name.rpartition(".")[-1] for name in names}
    for asked in sorted(target_modules):
        if not any(f".{name}".endswith(f".{asked}") for name in names):
            guesses = "".join(
                f" ({close}?)" for close in get_close_matches(asked.rpartition(".")[-1], last_parts, n=1)
            )
            warnings.warn(
                f"The model has no module called {asked!r}{guesses}, which `target_modules` "
                "names: only the others are adapted.",
                stacklevel=2,
            )


def warn_experts(model: nn.Module) -> None:
    """Warn of experts whose weights are bare parameters, which no `target_modules` reaches."""
    names = [
        name
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]
    if names:
        warnings.warn(
            f"The experts of this model keep their weights in bare parameters ({_some(names)}), "
            "so they are not adapted: which sequence a token of an expert belongs to is not known. Attention "
            "and other shared layers are.",
            stacklevel=2,
        )


def warn_choice(config: QueryableLoraConfig, adapter_name: str) -> None:
    """Warn of routes that are one atom whatever the router says of its weight, so that it cannot learn."""
    if 1 in (config.num_atoms, config.top_k):
        field = "num_atoms" if config.num_atoms == 1 else "top_k"
        warnings.warn(
            f"With `{field}=1` a route of adapter {adapter_name!r} is one atom with weight 1, so the router gets no "
            "gradient and stays as it was initialised. To train it, pass `top_k=2` or more, or None, and as many "
            "`num_atoms`.",
            stacklevel=2,
        )


def _some(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _obstacle(target: nn.Module) -> str | None:
    """What stands in the way of a module that could be adapted otherwise."""
    if isinstance(target, BaseTunerLayer) and not isinstance(target, QueryableLoraLayer):
        return f"it already carries an adapter of type {type(target).__name__}"
    if has_offloaded_params(_base_layer(target)):
        return (
            "accelerate keeps its weight on the CPU or on disk, and PEFT would make the adapter there, without data; "
            "the first adapter of a model can be loaded, by `PeftModel.from_pretrained` with a `device_map`"
        )
    return None


def _base_layer(target: Any) -> Any:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def _refusal(model: nn.Module, config: QueryableLoraConfig, name: str, target: nn.Module) -> str | None:
    base_layer = _base_layer(target)
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter on it would do nothing"
    if not _is_linear(base_layer):
        return (
            f"it is of type {type(base_layer).__name__}, and Queryable LoRA adapts torch.nn.Linear, Conv1D and the "
            "quantised linear layers that PEFT knows (docs/quantised.md)"
        )
    kind = type(base_layer)
    is_own = kind.__module__.startswith("transformers.models.") and kind.forward is not nn.Linear.forward
    if is_own and kind.__name__ != "FalconLinear":
        return f"its class {kind.__name__} computes something else than a linear layer, as a router or groups of heads"
    if ".experts." in f".{name}.":
        return "it belongs to an expert, which gets loose tokens: their sequence, and so their route, is not known"
    path, child = path_to(model, name), name.rpartition(".")[2]
    if reason := _unknown_layout(model, path, name):
        return reason
    if _POSITIONS.fullmatch(child):
        return "it projects positions, which belong to no sequence"
    if _reads_positions(path[-1], child):
        return "with `share_att_key` it also projects the relative position embeddings, which belong to no sequence"
    if _reads_unnamed_memory(model, name):
        return "it reads memory that the call of its layers does not get as `encoder_hidden_states`"
    if child == "kv_b_proj":  # of latent attention, whose cache holds what this module reads
        return "it projects the latents of cached tokens as well as the call's, whose routes are no longer known"
    if _reads_both(path[-1], child):
        return "it projects the encoder's output as well as the decoder's tokens, with one weight"
    speaker, head = _speaker(path)
    if base_layer is head:
        return (
            "it is the language model's head, which runs outside the routed layers and, in generation, on a part of "
            "the tokens only; `modules_to_save` trains it in full"
        )
    if {"state", "depth"} & {*config.query_terms} and _sees_last_tokens(path, speaker, head):
        return (
            "it belongs to the prediction head, which in generation (`logits_to_keep`) gets the last tokens alone, "
            "while its routes need all of them"
        )
    return None


def _speaker(path: list[nn.Module]) -> tuple[Any, Any]:
    """The outermost model on `path` that has an output layer, and that layer; None without one."""
    for module in path:
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        if head is not None:  # in BLIP it is the text decoder that has one and generates
            return module, _base_layer(head)
    return None, None


def _sees_last_tokens(path: list[nn.Module], speaker: Any, head: nn.Module) -> bool:
    """Whether a module on `path` stands beside the output layer `head`, where `generate` gives it the last tokens.

    It passes `logits_to_keep` to the models whose `forward` has it, and they cut before they call their head.
    """
    if speaker is None or not speaker.can_generate():
        return False
    if "logits_to_keep" not in parameter_names(speaker):
        return False
    return any(
        head in holder.children() and not any(isinstance(module, nn.ModuleList) for module in holder.modules())
        for holder in path[path.index(speaker) + 1 :]
    )


def _unknown_layout(model: nn.Module, path: list[nn.Module], name: str) -> str | None:
    """Why the rows and tokens of module `name` are not known from the call that it runs in."""
    if getattr(getattr(model, "config", None), "model_type", None) in _SEQUENCE_FIRST:
        return "its model passes activations as [tokens, batch, features], so that rows would be taken for tokens"
    for outer in path:
        layer: Any = outer
        if isinstance(outer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            if not layer.self_attn.batch_first:
                return (
                    "its activations are [tokens, batch, features], so that rows would be taken for tokens; make the "
                    "layer with `batch_first=True`"
                )
        elif reason := _UNKNOWN_OWNERS.get(type(outer).__name__):
            return reason
        elif "grid_thw" in parameter_names(outer):
            return "the patches of all images come packed in one dimension, so that each would be a sequence"
    if hasattr(path[-1], "qformer") and name.rpartition(".")[2] == "language_projection":  # of the BLIP-2 family
        return "it sees the queries of an image in a call that is about the tokens of a text"
    if name.rpartition(".")[2] == "enc_to_dec_proj":  # of encoder-decoders that are put together from two models
        return "it projects the encoder's output in a call that is about the decoder's tokens"
    if (parameter := packing(model, name)) is not None:
        return (
            f"its denoiser takes `{parameter}`, and which tokens it sees, and of them which are padding, is not known"
        )
    if type(path[-1]).__name__ == "MllamaModel":  # the projector between its vision model and its text model
        return _SQUARES
    return None


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Linear, Conv1D)):  # most quantised layers are: bitsandbytes', torchao's, ...
        return True
    # The others are not torch's; torchao may quantise the weight of an nn.Embedding, which stays one.
    is_foreign = not type(layer).__module__.startswith("torch.")
    return is_foreign and resolve_quantization_backend(layer) is not None


def _reads_positions(attention: nn.Module, child: str) -> bool:
    """Whether the attention of DeBERTa-v2 or SEW-D applies its `child` to its relative position embeddings too."""
    if not getattr(attention, "relative_attention", False):
        return False
    return getattr(attention, "share_att_key", False) and child in ("query_proj", "key_proj")


def _reads_both(attention: nn.Module, child: str) -> bool:
    """Whether the `child` of an attention makes keys or values of tokens and of memory alike, as in T5Gemma 2."""
    is_merged = "merged_attention_mask" in parameter_names(attention)
    return is_merged and child in ("k_proj", "v_proj")


def _reads_unnamed_memory(model: nn.Module, name: str) -> bool:
    """Whether module `name` projects memory of cross-attention that its stack's call does not name as usual."""
    (key,) = find_stacks(model, [name])
    if not key.reads_memory:
        return False
    return "encoder_hidden_states" not in parameter_names(model.get_submodule(key.owner))
