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
    "lora_dropout": "as in LoRA; it acts on the state, and so on the route",
    "fan_in_fan_out": "has no effect: it is read off the module",
    "bias": "as in LoRA",
    "use_rslora": "as in LoRA",
    "modules_to_save": "as in LoRA",
    "init_lora_weights": "see below",
    "layers_to_transform": "as in LoRA; blocks are made of the adapted layers",
    "layers_pattern": "as in LoRA",
    "alpha_pattern": "as in LoRA",
    "trainable_token_indices": "as in LoRA",
    "eva_config": "with `rho=1.0` only: more gives modules different ranks",
    "lora_bias": "as in LoRA",
    "ensure_weight_tying": "as in LoRA",
    "qalora_group_size": "has no effect: it belongs to `use_qalora`",
    "megatron_core": "has no effect: it belongs to `megatron_config`",
    "runtime_config": "has no effect: it moves DoRA's initialisation",
}

SUPPORTED_INITIALISATIONS = {
    "True": "A random, B zero",
    "False": "A and B random: the model is not its base",
    "gaussian": "A normal, B zero",
    "orthogonal": "B A zero, and neither of them; `r` must be even",
    "eva": "A from `initialize_lora_eva_weights`, B zero",
    "olora": "B A is a part of the base weight, which is taken from it; see the limits",
    "pissa": "the same, from an exact singular value decomposition",
}

LIMITS = """\
Where B A does not start with B = 0 (`orthogonal`, `olora`, `pissa`) the atoms start at zero instead, whatever
`init_atom_scale` says, so that the model starts as its base.

`olora` and `pissa` change the base weights, and again in the same way when the adapter is loaded. So, as with PEFT's
own LoRA, load onto the base model that the adapter was made for, in the same dtype; `disable_adapter` and `unload`
give the base model less that part, which is no reference for DPO. Unlike PEFT's LoRA, such an adapter is refused
beside any other, which would find its base weights changed, and with `low_cpu_mem_usage=True`, where nothing can be
decomposed. After an attempt that was refused half-way, load the base model again.
`path_initial_model_for_weight_conversion` is refused: no plain LoRA is equal to a routed update.
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
            "`QueryableLoraConfig` has all fields of PEFT's `LoraConfig`. Those that leave a plain LoRA keep their "
            "meaning;",
            "the others raise a ValueError that says why. The tests check that this table is complete.",
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
