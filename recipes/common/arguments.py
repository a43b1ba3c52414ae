"""Arguments of the recipes that train through TRL: `--queryable_*` beside TRL's own, and the defaults of both."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig

from peft_queryable import QueryableLoraConfig
from peft_queryable.config import ROUTING_SCOPES

# Where the recipes differ from TRL's defaults; --config and arguments override these.
DEFAULTS = {
    "output_dir": "outputs/sft",
    "learning_rate": 1e-3,  # best for plain LoRA: held-out loss .340 at 5e-4, .278 at 1e-3, .313 at 3e-3
    "per_device_train_batch_size": 4,  # 100 steps of the default data, in 9 minutes for both methods on two cores
    "num_train_epochs": 1,
    "warmup_steps": 10,  # a tenth of these steps
    "lora_r": 8,  # "rank-8 updates" (paper, B: LLM runs)
    "lora_alpha": 16,  # "rank 8, scaling 16" (paper, B: regression; none is stated for LLMs)
    "lora_dropout": 0.0,  # "no adapter dropout" (paper, B)
    "lora_target_modules": ["all-linear"],  # "the attention and MLP projection modules" (paper, B)
    "gradient_checkpointing": False,  # the default model fits in memory, and recomputing costs a third more time
    "bf16": False,  # many CPUs have no fast bfloat16
    "dataloader_pin_memory": torch.accelerator.is_available(),  # torch warns where there is none
    "save_strategy": "no",  # the adapter is saved once, at the end
    "logging_steps": 5,  # 20 points per curve
}


def like(name: str, **metadata):
    """An argument with the default and the help of that field of `QueryableLoraConfig`."""
    source = QueryableLoraConfig.__dataclass_fields__[name]
    return field(default=source.default, metadata={**source.metadata, **metadata})


@dataclass
class QueryableArguments:
    queryable_num_atoms: int = like("num_atoms")
    queryable_top_k: int | None = like("top_k")
    queryable_num_blocks: int = like("num_blocks")
    queryable_router_dim: int = like("router_dim")
    queryable_routing_scope: str = like("routing_scope", choices=ROUTING_SCOPES)
    queryable_attention_temperature: float = like("attention_temperature")
    queryable_depth_temperature: float = like("depth_temperature")
    queryable_init_gate: float = like("init_gate")
    queryable_init_atom_scale: float = like("init_atom_scale")
    queryable_init_router_scale: float = like("init_router_scale")


def parse_recipe(parser, defaults):
    """The command line as one object per group, of which the last three are ours, ModelConfig and SFTConfig."""
    arguments = parser.parse(defaults)
    queryable_args, model_args, training_args = arguments[-3:]
    for name in ("use_dora", "lora_target_parameters"):
        if getattr(model_args, name):
            parser.error(f"--{name} has no counterpart in Queryable LoRA: the methods could not be compared")
    try:
        adapter_configs(model_args, queryable_args)
    except ValueError as error:
        parser.error(str(error))
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint not in (None, "true") and not Path(checkpoint).is_dir():
        parser.error(f"--resume_from_checkpoint takes `true` or the folder of a checkpoint, got {checkpoint!r}")
    return arguments


def adapter_configs(model_args, queryable_args):
    """The two configurations to compare, which differ in nothing but the method."""
    shared = {
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "target_modules": model_args.lora_target_modules,
        "modules_to_save": model_args.lora_modules_to_save,
        "use_rslora": model_args.use_rslora,
        "task_type": model_args.lora_task_type,
    }
    own = {name.removeprefix("queryable_"): value for name, value in asdict(queryable_args).items()}
    return {"lora": LoraConfig(**shared), "queryable": QueryableLoraConfig(**shared, **own)}
