"""What of PEFT's LoraConfig works here, and why the rest does not: the table behind docs/fields.md.

`python tests/helpers/fields.py` writes that page.
"""

from __future__ import annotations

from pathlib import Path

from peft_queryable.config import _UNSUPPORTED_FIELDS, _UNSUPPORTED_INITIALISATIONS

PAGE = Path(__file__).parents[2] / "docs" / "fields.md"

SUPPORTED_FIELDS = {
    "task_type": "all of PEFT's: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION, none",
    "peft_type": "always QUERYABLE_LORA",
    "auto_mapping": "as in LoRA",
    "peft_version": "as in LoRA",
    "base_model_name_or_path": "as in LoRA",
    "revision": "as in LoRA",
    "inference_mode": "as in LoRA; the bank is frozen with its adapter",
    "r": "the rank of A and B in every module, and of the atoms",
    "target_modules": "as in LoRA, for `nn.Linear` and `Conv1D`",
    "exclude_modules": "as in LoRA",
    "lora_alpha": "as in LoRA",
    "lora_dropout": "as in LoRA; it acts on the rank states, and so on the routes",
    "fan_in_fan_out": "has no effect: the adapted module decides it",
    "bias": "as in LoRA",
    "use_rslora": "as in LoRA",
    "modules_to_save": "as in LoRA",
    "init_lora_weights": "see below",
    "layers_to_transform": "as in LoRA; blocks are made of the adapted layers",
    "layers_pattern": "as in LoRA",
    "alpha_pattern": "as in LoRA",
    "trainable_token_indices": "as in LoRA",
    "eva_config": "only with `rho=1.0`: a larger value gives modules different ranks",
    "lora_bias": "as in LoRA",
    "ensure_weight_tying": "as in LoRA",
    "qalora_group_size": "has no effect: it belongs to `use_qalora`",
    "megatron_core": "has no effect: it belongs to `megatron_config`",
    "runtime_config": "has no effect: it moves DoRA's initialisation",
}

SUPPORTED_INITIALISATIONS = {
    "True": "A random, B zero",
    "False": "A and B random: a new adapter changes the model's outputs",
    "gaussian": "A normal, B zero",
    "orthogonal": "B A is zero although neither A nor B is; `r` must be even",
    "eva": "A from `initialize_lora_eva_weights`, B zero",
    "olora": "a part of the base weight is moved into B A; see below",
    "pissa": "as `olora`, by an exact singular value decomposition",
}

LIMITS = """\
With `orthogonal`, `olora` and `pissa`, B does not start at zero. The atoms do instead, whatever `init_atom_scale` is,
so that a new adapter leaves the model's outputs as they are.

`olora` and `pissa` change the base weights when the adapter is made, and again in the same way when it is loaded. As
with PEFT's own LoRA, load the adapter onto the base model that it was made for, in the same dtype. `disable_adapter`
and `unload` give the base model without the part that was moved, so it cannot serve as a reference for DPO.

Unlike PEFT's LoRA, such an adapter is refused next to any other, because the other would find its base weights
changed, and with `low_cpu_mem_usage=True`, because nothing can be decomposed then. After an attempt that was refused
half-way, load the base model again. `path_initial_model_for_weight_conversion` is refused, because no plain LoRA is
equal to a routed update.
"""


def page() -> str:
    """The text of docs/fields.md."""

    def rows(supported: dict[str, str], refused: dict[str, str]) -> list[str]:
        return [
            *(f"| `{name}` | yes | {note} |" for name, note in supported.items()),
            *(f"| `{name}` | refused | {reason} |" for name, reason in refused.items()),
        ]

    return "\n".join(
        [
            "# Fields of LoraConfig",
            "",
            "`QueryableLoraConfig` has all fields of PEFT's `LoraConfig`. Each works as in PEFT, has no effect, or is "
            "refused with a",
            "ValueError that says why. The tests check that this table is complete.",
            "",
            "| field | | |",
            "| --- | --- | --- |",
            *rows(SUPPORTED_FIELDS, _UNSUPPORTED_FIELDS),
            "",
            "## `init_lora_weights`",
            "",
            "| value | | |",
            "| --- | --- | --- |",
            *rows(SUPPORTED_INITIALISATIONS, _UNSUPPORTED_INITIALISATIONS),
            "",
            LIMITS,
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
