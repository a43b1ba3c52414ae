"""The scope that `auto` takes in every stack of every model class of transformers, without any weights.

cd tests && python -m helpers.scopes    # writes helpers/scopes.txt, for the installed transformers; some minutes
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from peft_queryable.tuner.layout import find_stacks, resolve_scope, sees_all

TABLE = Path(__file__).with_name("scopes.txt")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_LAYERS += ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")


def model_classes() -> list[str]:
    """Names of all classes that transformers' auto classes know."""
    mappings = [names for name, names in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    values = [value for mapping in mappings for value in mapping.values()]
    names = {name for value in values for name in (value if isinstance(value, tuple | list) else [value])}
    return sorted(name for name in names if is_model(name))


def is_model(name: str) -> bool:
    """Whether transformers has a model of this name; some need packages that are not installed."""
    try:
        cls = getattr(transformers, name, None)
    except ImportError:
        return False
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel)


def shrink(config: PretrainedConfig) -> None:
    """Leave two layers in each stack, as far as the configuration's fields say how many there are."""
    for name in _LAYERS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(2, getattr(config, name)))
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:2])


def scopes(name: str) -> dict[str, str]:
    """By stack of a class with its default configuration, what `auto` means there; empty if it cannot be built."""
    cls = getattr(transformers, name)
    try:
        config = cls.config_class()
        shrink(config)
        with torch.device("meta"):
            model = cls(config)
    except Exception:  # configurations without defaults, and packages that are not installed
        return {}
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    keys = find_stacks(model, linear)
    auto = {key: resolve_scope("auto", sees_all(model, key.owner)).name for key in keys}
    return {str(key): "sequence" if key.reads_memory else auto[key] for key in keys}


def table(names: list[str]) -> list[str]:
    """For each class that can be built, a line with its name and the stacks of each scope."""
    lines = []
    for name in tqdm(names):
        if found := scopes(name):
            by_scope = {scope: [stack for stack, s in found.items() if s == scope] for scope in ("causal", "sequence")}
            parts = [f"{scope}: {', '.join(stacks)}" for scope, stacks in by_scope.items() if stacks]
            lines.append(" | ".join([name, *parts]))
    return lines


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    TABLE.write_text("\n".join(table(model_classes())) + "\n")
