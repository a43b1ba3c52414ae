"""What is compared: LoRA and its relatives, our method, and our method with a part taken away."""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LilyConfig, LoraConfig, PeftConfig, PeftModel, PolyConfig, get_peft_model
from torch import Tensor, nn

from peft_queryable import QueryableLoraConfig, Routes, fix_routes
from recipes.language.skills import INSTRUCTIONS, PROMPT, TASKS


@dataclass(frozen=True)
class Arm:
    """One way to adapt the base.

    Args:
        label: its name in tables.
        factor: its rank, as a multiple of the comparison's.
        method: what makes its adapter.
        fields: of `method`.
        is_told: whether its routes are given: one atom per task.
        is_each: whether each task has an adapter of its own.
        is_prompted: whether the adapter's instruction is the prompt.
        lr_factors: by part of a tensor's name, what its learning rate is multiplied by, on the tiny model.
    """

    label: str
    factor: int = 1
    method: type[PeftConfig] = QueryableLoraConfig
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_told: bool = False
    is_each: bool = False
    is_prompted: bool = False
    lr_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.method is QueryableLoraConfig

    @property
    def is_routed(self) -> bool:
        """Whether its routes depend on the input."""
        return self.is_ours and not self.is_told and self.fields.get("query_terms") != ()

    @property
    def takes_tasks(self) -> bool:
        """Whether its calls are told the number of each example's task."""
        return self.method is PolyConfig


SHARED = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SCALING = 2.0  # alpha / r
SMALL_KEYS = {"init_router_scale": 0.3}
ARMS = {
    "lora": Arm("LoRA", method=LoraConfig),
    "lora-2r": Arm("LoRA, twice the rank", 2, LoraConfig),
    "lora-4r": Arm("LoRA, four times the rank", 4, LoraConfig),
    "dora": Arm("DoRA", method=LoraConfig, fields={"use_dora": True}),
    "lora-each": Arm("one LoRA per task", method=LoraConfig, is_each=True),
    # A for every three layers and ten B for all: of 30 layers, as many parameters as LoRA has
    "lily": Arm("Lily", 3, LilyConfig, {"stride_A": 3, "num_B": 10, "scaling": SCALING}),
    "poly": Arm("Poly, given the task", method=PolyConfig, fields={"n_tasks": len(TASKS), "n_skills": 4}),
    "static": Arm("ours, static", fields={"query_terms": ()}),
    "scale-1": Arm("ours, keys at 1", fields={"init_router_scale": 1.0}),
    "scale-0.3": Arm("ours, keys at 0.3", fields=SMALL_KEYS),
    "prompted": Arm("ours, told the prompt", is_prompted=True),
    "prompt": Arm("ours, scope `prompt`", fields={"routing_scope": "prompt"}),
    "oracle": Arm("ours, one atom per task", is_told=True),
    # Variants, to choose defaults by
    "scale-0.1": Arm("ours, keys at 0.1", fields={"init_router_scale": 0.1}),
    "router-10": Arm("router's rate x 10", lr_factors={"router.default.atoms": 1.0, "router": 10.0}),
    "temperature-0.3": Arm("keys at 0.3, T_attn 0.3", fields=SMALL_KEYS | {"attention_temperature": 0.3}),
    "atoms-0.3": Arm("keys at 0.3, atoms at 0.3", fields=SMALL_KEYS | {"init_atom_scale": 0.3}),
    "atoms-3": Arm("keys at 0.3, atoms at 3", fields=SMALL_KEYS | {"init_atom_scale": 3.0}),
    "gate-0.9": Arm("keys at 0.3, gates at 0.9", fields=SMALL_KEYS | {"init_gate": 0.9}),
    "all-atoms": Arm("keys at 0.3, all atoms mixed", fields=SMALL_KEYS | {"top_k": None}),
    "64-atoms": Arm("keys at 0.3, 64 atoms", fields=SMALL_KEYS | {"num_atoms": 64}),
}
MIXING = re.compile(r"M(\d+)-k(\d+)")  # names of arms of a sweep
STACKED = tuple(name for name, arm in ARMS.items() if arm.method in (LoraConfig, QueryableLoraConfig))
SHOWN = STACKED[: STACKED.index("oracle") + 1]


def find(name: str) -> Arm:
    """The arm called `name`: one of `ARMS`, or ours with so many atoms, and top-k, as "M16-k4"."""
    if name in ARMS:
        return ARMS[name]
    num_atoms, top_k = map(int, MIXING.fullmatch(name).groups())
    return Arm(f"ours, M = {num_atoms}, k = {top_k}", fields={"num_atoms": num_atoms, "top_k": top_k})


def attach(arm: Arm, base: nn.Module, rank: int, condition: str) -> PeftModel:
    """`base`, changed in place, with a new adapter."""
    told = {}
    if arm.is_prompted:
        told["instruction_dim"] = base.config.hidden_size
    elif takes_instruction(arm, condition):
        told["instruction_dim"] = INSTRUCTIONS.shape[1]
    return get_peft_model(base, adapter_config(arm, rank, **told))


def adapter_config(arm: Arm, rank: int, **instruction: Any) -> PeftConfig:
    """What makes the arm's adapter; `instruction` has the instruction's fields, if the arm takes one."""
    rank *= arm.factor
    scaled = {"lora_alpha": SCALING * rank} if hasattr(arm.method, "lora_alpha") else {}
    return arm.method(r=rank, **SHARED, **scaled, **arm.fields, **instruction)


def takes_instruction(arm: Arm, condition: str) -> bool:
    return condition == "instruction" and arm.is_routed


def inputs(
    arm: Arm, condition: str, prompt_states: Callable[[Tensor], Tensor] | None, lines: Tensor, tasks: Tensor
) -> dict[str, Tensor]:
    """What calls of the arm's R models get beside their lines [R, n, 15], of `tasks` [n], as `Stacked` takes it.

    `prompt_states` makes the instructions of an arm that is told the prompt.
    """
    given = {}
    if prompt_states is not None:
        given["instruction_embeds"] = prompt_states(lines)
    elif takes_instruction(arm, condition):
        given["instruction_embeds"] = INSTRUCTIONS[tasks].expand(len(lines), -1, -1)
    if arm.fields.get("routing_scope") == "prompt":
        given["prompt_mask"] = (torch.arange(2 * PROMPT - 2) <= PROMPT).expand(len(tasks), -1)
    return given


def routing(arm: Arm, model: nn.Module, tasks: Tensor) -> AbstractContextManager[None]:
    """Within it, calls of lines whose tasks are `tasks` [n] have the arm's given routes, if it has any."""
    if not arm.is_told:
        return nullcontext()
    settings = model.base_model.queryable_lora_router["default"].settings
    one_hot = torch.eye(settings.num_atoms)
    return fix_routes(model, [Routes(dict.fromkeys(range(settings.num_blocks), one_hot[task])) for task in tasks])
