"""Settings that TRL's trainers get in the tests."""

from __future__ import annotations

from helpers.models import LLAMA_PROJECTIONS
from peft_queryable import QueryableLoraConfig


def settings(tmp_path, **kwargs) -> dict:
    """Two steps of two examples, on the CPU, with the gradient checkpointing that TRL turns on."""
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
    } | kwargs


def config(**kwargs) -> QueryableLoraConfig:
    """An adapter of every projection of a Llama."""
    return QueryableLoraConfig(r=4, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM", **kwargs)
