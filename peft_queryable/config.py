"""Configuration of a Queryable LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import LoraConfig
from peft.utils import PeftType

from .card import update_card
from .method.router import RouterSettings
from .version import __version__

RoutingScope = Literal["auto", "causal", "prompt", "sequence"]  # "auto" and the names in method/scope.py
ROUTING_SCOPES = get_args(RoutingScope)
QUERY_TERMS = ("state", "depth", "instruction")

# Initialisations of LoraConfig, and what they do to the base weight W and the update B A.
MOVING_INITIALISATIONS = ("olora", "pissa")  # move a part of W into B A, and do the same again when loaded
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", *MOVING_INITIALISATIONS)

# What of LoraConfig has no meaning here, and why.
_VARIANT = "it replaces the LoRA update B A by one that has no rank-space operator to route"
_PREPROCESSED = (
    "it moves a part of the base weight into B A that only its preprocessing knows, so a saved adapter would not fit "
    "its base model, and cannot be converted to one that does; use 'pissa' or 'olora', which loading repeats"
)
_LOFTQ = (
    "it replaces the base weight by a quantised copy, which PEFT makes on an accelerator only; load the base model "
    "quantised, and leave the initialisation at its default"
)
_UNSUPPORTED_INITIALISATIONS = {
    "mica": _VARIANT,
    "corda": _PREPROCESSED,
    "lora_ga": _PREPROCESSED,
    "loftq": _LOFTQ,
    "pissa_niter": (
        "its random decomposition comes out differently when the adapter is loaded, which then does not fit its base "
        "model; use 'pissa', which is exact"
    ),
}
_UNSUPPORTED_FIELDS = {
    "corda_config": _PREPROCESSED,
    "lora_ga_config": _PREPROCESSED,
    "loftq_config": _LOFTQ,
    "use_dora": _VARIANT,
    "velora_config": _VARIANT,
    "alora_invocation_tokens": _VARIANT,
    "use_qalora": _VARIANT,
    "monteclora_config": _VARIANT,
    "use_bdlora": _VARIANT,
    "arrow_config": _VARIANT,
    "kasa_config": _VARIANT,
    "rank_pattern": "one bank of r x r atoms serves every adapted module, so all of them have the same rank r",
    "layer_replication": "replicated layers would share the place of the layer they copy in the routing blocks",
    "target_parameters": "only nn.Linear and transformers Conv1D modules can be adapted, not bare parameters",
    "megatron_config": "Megatron's parallel layers split the rank space across processes",
}


@dataclass
class QueryableLoraConfig(LoraConfig):
    """Configuration of Queryable LoRA (https://arxiv.org/abs/2605.08423).

    All fields of [`peft.LoraConfig`] that leave a plain LoRA keep their meaning; the update `B A` becomes
    `B (I + g S) A` (Eq. 1). Every field is explained by its `help` metadata; docs/method.md has the method.

    Raises:
        ValueError: if a field is out of range, or if a `LoraConfig` field is set that cannot work here.
    """

    num_atoms: int = field(
        default=16,
        metadata={"help": "Number M of r x r atoms in the bank shared by the whole model (16: the paper's LLM runs)."},
    )
    top_k: int | None = field(
        default=4,
        metadata={
            "help": "Number k of atoms a route mixes (Eq. 37); None mixes all of them (4: the paper's LLM runs). "
            "With 1 the router gets no gradient: a softmax over one logit is constant."
        },
    )
    num_blocks: int = field(
        default=4,
        metadata={"help": "Number B of blocks that the layers of each stack are split into; one route per block."},
    )
    router_dim: int = field(
        default=32,
        metadata={"help": "Width d_k of queries and keys (32: keeps the adapter below the paper's size on Qwen2.5)."},
    )
    routing_scope: RoutingScope = field(
        default="auto",
        metadata={
            "help": "Tokens averaged into the state that routes token t (Eq. 15): 'causal', those up to t; 'prompt', "
            "those before the first supervised token; 'sequence', all of them; 'auto', 'causal' unless it is known "
            "that nothing predicts a later token, as in encoders and vision towers. Padding never counts."
        },
    )
    attention_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T_attn of the routing logits (Eq. 34)."}
    )
    depth_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T_dep of the attention over earlier blocks (Eq. 28)."}
    )
    language_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T_lang of the instruction's prior over atoms (Eq. 33)."}
    )
    instruction_dim: int | None = field(
        default=None,
        metadata={
            "help": "Width d_c of instruction embeddings; None takes it from `instruction_encoder`, and without that "
            "the adapter has no instruction parameters and takes no instruction."
        },
    )
    instruction_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Encoder e(c) of instructions given as text: 'backbone', the mean hidden state of the base model, "
            "'backbone-centred', its centred state after a prompt that asks what the text means, or a "
            "sentence-transformers model by its Hub id or folder. None: instructions come as embeddings."
        },
    )
    instruction_encoder_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `instruction_encoder` on the Hub."}
    )
    default_instruction: str | None = field(
        default=None,
        metadata={
            "help": "Text of the adapter's default instruction: a record that `set_default_instruction` writes, "
            "together with the embedding among the weights."
        },
    )
    instruction_strength: float = field(
        default=1.0, metadata={"help": "Strength tau of the instruction's prior over atoms (Eq. 36)."}
    )
    instruction_query_weight: float = field(
        default=1.0, metadata={"help": "Weight lambda of the instruction in the block query (Eq. 2)."}
    )
    query_terms: tuple[str, ...] = field(
        default=QUERY_TERMS,
        metadata={
            "help": "Terms of the block query beside the block's prior (Eqs. 2, 29): any of 'state', 'depth' and "
            "'instruction'; a term left out has no parameters, nor has 'depth' where each stack is one block."
        },
    )
    init_gate: float = field(
        default=0.5,
        metadata={"help": "Initial value of every gate g = sigmoid(eta), between 0 and 1 (the paper states none)."},
    )
    init_atom_scale: float = field(
        default=1.0,
        metadata={
            "help": "Initial standard deviation of the atoms' entries, times sqrt(r) (the paper states none). With 0 "
            "the router learns only once the atoms have."
        },
    )
    init_router_scale: float = field(
        default=1.0,
        metadata={
            "help": "Initial standard deviation of the entries of keys and block priors (the paper states none). "
            "RMSNorm hides the scale of keys, so with less they turn faster under the same learning rate, and the "
            "input has more of a say beside the prior."
        },
    )
    peft_queryable_version: str | None = field(
        default=None,
        metadata={"help": "Version of peft_queryable that made the adapter; filled in where it is None."},
    )

    def __post_init__(self) -> None:
        self._refuse_unsupported()  # before PEFT asks for what they need, or warns that it is missing
        is_saved = self.peft_queryable_version is not None
        if self.default_instruction is not None and not is_saved:
            raise ValueError(
                "`default_instruction` is written by `set_default_instruction(model, text)`, which embeds the text "
                "too: make the model without it, and call that."
            )
        super().__post_init__()
        self.peft_type = PeftType.QUERYABLE_LORA
        if self.peft_queryable_version is None:
            self.peft_queryable_version = __version__
        if isinstance(self.query_terms, str):
            raise ValueError(f"`query_terms` must be a list or tuple of terms, got {self.query_terms!r}.")
        self.query_terms = tuple(self.query_terms)  # JSON has lists only
        self._check_types()
        self._check_ranges()

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them: `query_terms` is a list."""
        return {**super().to_dict(), "query_terms": list(self.query_terms)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and make the model card true that a `PeftModel` has just left in `save_directory`."""
        super().save_pretrained(save_directory, **kwargs)
        update_card(Path(save_directory))

    def router_settings(self, num_blocks: int, longest_stack: int) -> RouterSettings:
        """The settings of the adapter's router.

        Args:
            num_blocks: number of blocks in all stacks of the model together.
            longest_stack: number of blocks in the stack that has most.
        """
        # With these, B A is not zero at the start, and the model equals its base only while S = 0.
        starts_at_zero = self.init_lora_weights in ("orthogonal", *MOVING_INITIALISATIONS)
        return RouterSettings(
            rank=self.r,
            num_atoms=self.num_atoms,
            top_k=self.top_k,
            num_blocks=num_blocks,
            longest_stack=longest_stack,
            dim=self.router_dim,
            instruction_dim=self.instruction_dim,
            attention_temperature=self.attention_temperature,
            depth_temperature=self.depth_temperature,
            language_temperature=self.language_temperature,
            instruction_strength=self.instruction_strength,
            instruction_query_weight=self.instruction_query_weight,
            query_terms=self.query_terms,
            atom_scale=0.0 if starts_at_zero else self.init_atom_scale,
            router_scale=self.init_router_scale,
        )

    def _refuse_unsupported(self) -> None:
        init = self.init_lora_weights
        for name, reason in _UNSUPPORTED_INITIALISATIONS.items():
            if isinstance(init, str) and init.startswith(name):
                raise ValueError(f"QueryableLoraConfig does not support `init_lora_weights={init!r}`: {reason}.")
        if init not in INITIALISATIONS:
            raise ValueError(f"`init_lora_weights` must be one of {INITIALISATIONS}, got {init!r}.")
        for name, reason in _UNSUPPORTED_FIELDS.items():
            if value := getattr(self, name):
                raise ValueError(f"QueryableLoraConfig does not support `{name}` (got {value!r}): {reason}.")

    def _check_types(self) -> None:
        for name in ("instruction_encoder", "instruction_encoder_revision", "default_instruction"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"`{name}` must be a string or None, got {value!r}. Pass an encoder of your own to "
                    "`set_default_instruction`, `use_instructions` or `InstructionCollator`, and its width as "
                    "`instruction_dim`."
                )

    def _check_ranges(self) -> None:
        for name in ("r", "num_atoms", "num_blocks", "router_dim", "top_k", "instruction_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name in ("top_k", "instruction_dim")):
                raise ValueError(f"`{name}` must be an integer, got {value!r}.")
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_atoms:
            raise ValueError(
                f"`top_k` must be between 1 and `num_atoms`={self.num_atoms}, or None for all atoms, got {self.top_k}."
            )
        if self.router_dim == 1:
            raise ValueError("`router_dim` must be at least 2, got 1: of one number RMSNorm leaves the sign alone.")
        for name in ("attention_temperature", "depth_temperature", "language_temperature", "init_router_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("instruction_strength", "instruction_query_weight", "init_atom_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.init_lora_weights == "eva" and self.eva_config.rho != 1:
            raise ValueError(
                f"`eva_config.rho` must be 1, got {self.eva_config.rho}: more gives modules different ranks, and one "
                "bank of r x r atoms serves them all. Pass `eva_config=EvaConfig(rho=1.0)`."
            )
        if not 0 < self.init_gate < 1:
            raise ValueError(f"`init_gate` must be between 0 and 1, both excluded, got {self.init_gate}.")
        if self.routing_scope not in ROUTING_SCOPES:
            raise ValueError(f"`routing_scope` must be one of {ROUTING_SCOPES}, got {self.routing_scope!r}.")
        if unknown := [term for term in self.query_terms if term not in QUERY_TERMS]:
            raise ValueError(f"`query_terms` must be among {QUERY_TERMS}, got {unknown}.")
        takes_instruction = self.instruction_dim is not None or self.instruction_encoder is not None
        is_in_query = "instruction" in self.query_terms and self.instruction_query_weight > 0
        if takes_instruction and not is_in_query and self.instruction_strength == 0:
            raise ValueError(
                "With `instruction_strength=0`, and no instruction in the query (`instruction_query_weight`, "
                "`query_terms`), an instruction would change nothing. Pass `instruction_strength=1.0`, or "
                "`instruction_dim=None` and `instruction_encoder=None`."
            )
