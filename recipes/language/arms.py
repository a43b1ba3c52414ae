"""What is compared: LoRA and its relatives, our method, and our method with a part taken away."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_queryable import QueryableLoraConfig, Routes, fix_routes
from recipes.language.skills import INSTRUCTIONS, PROMPT


@dataclass(frozen=True)
class Arm:
    """One way to adapt the base.

    Args:
        label: its name in tables.
        factor: its rank, as a multiple of the comparison's.
        lora: fields of `LoraConfig`; None if it is ours.
        ours: fields of `QueryableLoraConfig`.
        is_told: whether its routes are given: one atom per task.
        is_each: whether each task has an adapter of its own.
    """

    label: str
    factor: int = 1
    lora: Mapping[str, Any] | None = None
    ours: Mapping[str, Any] = field(default_factory=dict)
    is_told: bool = False
    is_each: bool = False

    @property
    def is_routed(self) -> bool:
        """Whether its routes depend on the input."""
        return self.lora is None and not self.is_told and self.ours.get("query_terms") != ()


ARMS = {
    "lora": Arm("LoRA", lora={}),
    "lora-2r": Arm("LoRA, twice the rank", 2, lora={}),
    "lora-4r": Arm("LoRA, four times the rank", 4, lora={}),
    "dora": Arm("DoRA", lora={"use_dora": True}),
    "lora-each": Arm("one LoRA per task", lora={}, is_each=True),
    "static": Arm("ours, static", ours={"query_terms": ()}),
    "scale-1": Arm("ours, keys at 1", ours={"init_router_scale": 1.0}),
    "scale-0.3": Arm("ours, keys at 0.3", ours={"init_router_scale": 0.3}),
    "prompt": Arm("ours, scope `prompt`", ours={"routing_scope": "prompt"}),
    "oracle": Arm("ours, one atom per task", is_told=True),
    # Variants, to choose defaults by
    "scale-0.1": Arm("ours, keys at 0.1", ours={"init_router_scale": 0.1}),
    "temperature-0.3": Arm("keys at 0.3, T_attn 0.3", ours={"init_router_scale": 0.3, "attention_temperature": 0.3}),
    "atoms-0.3": Arm("keys at 0.3, atoms at 0.3", ours={"init_router_scale": 0.3, "init_atom_scale": 0.3}),
    "atoms-3": Arm("keys at 0.3, atoms at 3", ours={"init_router_scale": 0.3, "init_atom_scale": 3.0}),
    "gate-0.9": Arm("keys at 0.3, gates at 0.9", ours={"init_router_scale": 0.3, "init_gate": 0.9}),
    "all-atoms": Arm("keys at 0.3, all atoms mixed", ours={"init_router_scale": 0.3, "top_k": None}),
    "64-atoms": Arm("keys at 0.3, 64 atoms", ours={"init_router_scale": 0.3, "num_atoms": 64}),
}
MIXING = re.compile(r"M(\d+)-k(\d+)")  # names of arms of a sweep
SHOWN = tuple(ARMS)[: tuple(ARMS).index("oracle") + 1]
SCALING = 2.0  # alpha / r of all arms


def find(name: str) -> Arm:
    """The arm called `name`: one of `ARMS`, or ours with so many atoms, and top-k, as "M16-k4"."""
    if name in ARMS:
        return ARMS[name]
    num_atoms, top_k = map(int, MIXING.fullmatch(name).groups())
    return Arm(f"ours, M = {num_atoms}, k = {top_k}", ours={"num_atoms": num_atoms, "top_k": top_k})


def attach(arm: Arm, base: nn.Module, rank: int, condition: str) -> PeftModel:
    """`base`, changed in place, with a new adapter."""
    told = {"instruction_dim": INSTRUCTIONS.shape[1]} if takes_instruction(arm, condition) else {}
    return get_peft_model(base, adapter_config(arm, rank, **told))


def adapter_config(arm: Arm, rank: int, **instruction: Any) -> LoraConfig | QueryableLoraConfig:
    """What makes the arm's adapter; `instruction` has the instruction's fields, if the arm takes one."""
    rank *= arm.factor
    shared = {"r": rank, "lora_alpha": SCALING * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if arm.lora is not None:
        return LoraConfig(**shared, **arm.lora)
    return QueryableLoraConfig(**shared, **instruction, **arm.ours)


def takes_instruction(arm: Arm, condition: str) -> bool:
    return condition == "instruction" and arm.is_routed


def inputs(arm: Arm, condition: str, tasks: Tensor) -> dict[str, Tensor]:
    """What a call of the arm's model gets beside its lines, whose tasks are `tasks` [n]."""
    given = {}
    if takes_instruction(arm, condition):
        given["instruction_embeds"] = INSTRUCTIONS[tasks]
    if arm.ours.get("routing_scope") == "prompt":
        positions = torch.arange(2 * PROMPT - 2)
        given["prompt_mask"] = (positions <= PROMPT).expand(len(tasks), -1)
    return given


def routing(arm: Arm, model: nn.Module, tasks: Tensor) -> AbstractContextManager[None]:
    """Within it, calls of lines whose tasks are `tasks` [n] have the arm's given routes, if it has any."""
    if not arm.is_told:
        return nullcontext()
    settings = model.base_model.queryable_lora_router["default"].settings
    one_hot = torch.eye(settings.num_atoms)
    return fix_routes(model, [Routes(dict.fromkeys(range(settings.num_blocks), one_hot[task])) for task in tasks])
