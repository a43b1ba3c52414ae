"""Write an adapter whose routes are fixed as a plain LoRA of PEFT, with B' = (alpha / r) B (I + g S) in place of B."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import MOVING_INITIALISATIONS, QueryableLoraConfig
from ..instruction import check_adapter, only_active, tuner_of
from ..routes import Routes, checked_weights
from ..tuner.merging import fixed_weights, static_weights
from ..tuner.model import QueryableLoraModel
from .card import write_card
from .folders import whole_folder

TENSORS = "adapter_model.safetensors"
_OURS = {"queryable_lora_gate", "queryable_lora_router"}


def export_lora(
    model: PeftModel,
    folder: str | Path,
    routes: Routes | None = None,
    adapter_name: str | None = None,
    losses: Mapping[str, float] | None = None,
) -> None:
    """Write the LoRA that an adapter is under fixed routes: a folder of PEFT's, of the same rank, without our package.

    The factors are computed in float64 and stored in the adapter's dtype. Everything else that the adapter carries
    (biases, modules trained in full, trained tokens) goes along. A card and `routes.json` say what it was made from.

    Args:
        model: a `PeftModel` with Queryable LoRA.
        folder: where to write; it must be empty or not exist. If something fails, nothing is written.
        routes: the routes. None for an adapter that has none of its own (`query_terms=()`), whose routes are fixed, or
            that reads nothing but an instruction and has a default one (`set_default_instruction`): then the export
            is the adapter under that one.
        adapter_name: default: the adapter of `routes`, or the active one.
        losses: mean losses by name, for the card.

    Raises:
        ValueError: if the adapter's routes depend on the input and none are given, if they do not fit, if the folder
            holds something, or if the initialisation moved a part of the base weights.
    """
    tuner = tuner_of(model)
    name = adapter_name or (only_active(tuner) if routes is None else routes.adapter_name)
    check_adapter(tuner, name)
    if routes is not None and routes.adapter_name != name:
        raise ValueError(f"The routes are of adapter {routes.adapter_name!r}, but {name!r} is to be exported.")
    config = tuner.peft_config[name]
    if config.init_lora_weights in MOVING_INITIALISATIONS:
        raise ValueError(
            f"Adapter {name!r} was made with `init_lora_weights={config.init_lora_weights!r}`, which moved a part of "
            "the base weights, so no LoRA on the original base equals it. Write the merged model: "
            "`model.merge_and_unload().save_pretrained(folder)` under `fix_routes`."
        )
    weights, source = known_weights(tuner, name, routes)
    hooks = tuner.model_hooks
    with hooks.entered(routes={**hooks.call.routes, name: weights[None]}):
        folded = {
            f"base_model.model.{key}.lora_B": (
                layer.folded(name, torch.float64),
                layer.scaling[name],
                layer.fan_in_fan_out,
            )
            for key, layer in tuner._layers(name).items()
        }
    with TemporaryDirectory() as temporary, whole_folder(folder) as written:
        model.save_pretrained(temporary, selected_adapters=[name])
        saved = Path(temporary) if name == "default" else Path(temporary, name)
        digest = hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()
        tensors = {k: t for k, t in load_file(saved / TENSORS).items() if _OURS.isdisjoint(k.split("."))}
        for key, (weight, scaling, _) in folded.items():
            tensors[f"{key}.weight"] = weight.to(tensors[f"{key}.weight"]).contiguous()
            if f"{key}.bias" in tensors:
                tensors[f"{key}.bias"] = scaling * tensors[f"{key}.bias"]
        is_conv = any(is_conv for _, _, is_conv in folded.values())
        lora = _lora_config(QueryableLoraConfig.from_pretrained(saved), is_conv)
        save_file(tensors, written / TENSORS, metadata={"format": "pt"})
        lora.save_pretrained(str(written))
        write_card(written, lora, weights.double().cpu(), source, digest, losses)
    _warn_engines(lora)


def known_weights(tuner: QueryableLoraModel, name: str, routes: Routes | None) -> tuple[Tensor, str]:
    """The weights [blocks, M] to export, and what they were made from.

    Raises:
        ValueError: if the adapter's routes depend on the input and none are given, or if those do not fit.
    """
    if routes is not None:
        return checked_weights(tuner, routes)[1][0], routes.source
    hooks, router = tuner.model_hooks, tuner.queryable_lora_router[name]
    weights = fixed_weights(hooks, name, router)
    if weights is not None:
        return weights, "fixed when exported" if name in hooks.call.routes else "static"
    # A default of 0 is none; in a block of instructions, the default is not what the adapter follows.
    default = router.default_instruction if hooks.call.instructions is None else None
    if router.reads_states or default is None or not default.weight.any():
        raise ValueError(
            f"The routes of adapter {name!r} depend on the input, so it is no LoRA until they are fixed. Give the "
            "routes: `export_lora(model, folder, mean_routes(trace))`, with a trace of `record_routing`, or "
            "`instruction_routes(model, text)`. One mean over several tasks is costly: see docs/serving.md."
        )
    text = tuner.peft_config[name].default_instruction
    return static_weights(router, None), "the default instruction" + ("" if text is None else f" {text!r}")


def _lora_config(config: QueryableLoraConfig, is_conv: bool) -> LoraConfig:
    """The configuration of a LoRA of scale 1 that is `config` in everything else."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoraConfig)}
    changes = {
        "peft_type": "LORA",
        "lora_alpha": config.r,
        "alpha_pattern": dict(config.rank_pattern),
        "use_rslora": False,
        "init_lora_weights": True,
        "eva_config": None,
        "fan_in_fan_out": is_conv,
        "inference_mode": True,
    }
    return LoraConfig(**(fields | changes))


def refused_by_engines(config: LoraConfig) -> list[str]:
    """What an adapter carries beside its factors that vLLM and llama.cpp take in no LoRA."""
    carried = [name for name in ("modules_to_save", "trainable_token_indices", "lora_bias") if getattr(config, name)]
    return carried + (["bias"] if config.bias != "none" else [])


def _warn_engines(config: LoraConfig) -> None:
    if carried := refused_by_engines(config):
        warnings.warn(
            f"The export carries {carried}, which vLLM refuses in a LoRA, and llama.cpp leaves out or refuses. "
            "PEFT and transformers load it. For other engines write the merged model: `--merge`, or "
            "`merge_and_unload` under `fix_routes`.",
            stacklevel=3,
        )
