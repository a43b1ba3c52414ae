"""A run on a real model: training through TRL, and the measurements of the tiny one."""

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer

from peft_queryable import record_routing, use_instruction_column
from recipes.common.finetune import make_trainer
from recipes.common.minilm import minilm_folder
from recipes.language.arms import ARMS, adapter_config
from recipes.language.mixtures import WithTasks, condition_data
from recipes.language.records import Run
from recipes.language.routes import shuffled, told_by


@dataclass(frozen=True)
class RealSetting:
    """The models, how long adapters train, and on how many examples they are measured."""

    model: str
    encoder: str | None  # of instructions; all-MiniLM-L6-v2 if it is None
    steps: int
    batch: int
    validation: int  # items, each in eight languages, or as many examples of texts
    test: int
    bf16: bool  # mixed precision, else float32


def finetune(setting: RealSetting, run: Run, gsm8k: str, steps: Queue) -> dict[str, Any]:
    """Train and measure; `gsm8k` is where the data of that name are."""
    train, validation, test = condition_data(run.condition, setting.validation, setting.test, gsm8k)
    arm = ARMS[run.arm]
    is_instructed = run.condition.endswith("-instruction") and arm.is_routed
    is_told = is_instructed or arm.is_prompted
    kept = ["prompt", "completion", *["instruction"] * is_instructed, *["task"] * arm.takes_tasks]
    told = {"instruction_encoder": setting.encoder or str(minilm_folder())} if is_told else {}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            Path(folder),
            adapter_config(arm, run.rank, **told),
            train.select_columns(kept),
            training_arguments(setting, run),
            ModelConfig(model_name_or_path=setting.model, dtype="float32"),
            eval_dataset={"validation": validation.select_columns(kept), "test": test.select_columns(kept)},
        )
        model = trainer.model
        if is_told:
            use_instruction_column(trainer, "prompt" if arm.is_prompted else "instruction")
        if arm.takes_tasks:
            trainer.data_collator = WithTasks(trainer.data_collator)
        trainer.add_callback(StepCounter(steps))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        measured = measure(trainer, "test", test["task"], arm.is_routed)
        record = {
            **run._asdict(),
            "trainable": model.get_nb_trainable_parameters()[0],
            "seconds": seconds,
            "validation": measure(trainer, "validation", validation["task"], False)["test"],
            **measured,
        }
        if arm.is_routed:
            with shuffled(model, setting.batch):
                record["shuffled"] = measure(trainer, "test", test["task"], False)["test"]
    return record


def training_arguments(setting: RealSetting, run: Run) -> SFTConfig:
    return SFTConfig(
        max_steps=setting.steps,
        per_device_train_batch_size=setting.batch,
        per_device_eval_batch_size=setting.batch,
        learning_rate=run.lr,
        warmup_steps=setting.steps // 20,
        seed=run.seed,
        max_length=None,
        remove_unused_columns=False,  # else the trainer drops the instructions
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the workers' bar has the steps of all runs
        bf16=setting.bf16,
        gradient_checkpointing=False,  # PEFT's Poly forgets its tasks when a block is computed again
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class StepCounter(TrainerCallback):
    """Tells the workers' bar of every step."""

    def __init__(self, steps: Queue) -> None:
        self.steps = steps

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.put(1)


@torch.no_grad()
def measure(trainer: SFTTrainer, split: str, tasks: Sequence[int], has_routes: bool) -> dict[str, float]:
    """Mean loss of an answer's token, and the share of examples whose greedy answer is right, to its end.

    With `has_routes`, what the routes of answers tell besides, in bits; means over blocks.
    """
    model = trainer.model.eval()
    loss, tokens, exact, answers = 0.0, 0, 0, []
    routes: dict[int, list[Tensor]] = defaultdict(list)
    for batch in trainer.get_eval_dataloader(split):
        labels = batch.pop("labels")[:, 1:]
        with record_routing(model) if has_routes else nullcontext() as trace:
            logits = model(**batch).logits[:, :-1]
        is_answer = labels != -100
        loss += F.cross_entropy(logits[is_answer], labels[is_answer], reduction="sum").item()
        tokens += int(is_answer.sum())
        exact += int(((logits.argmax(-1) == labels) | ~is_answer).all(1).sum())
        answers.append(is_answer.sum(1).cpu())
        if has_routes:
            for block, weights in trace.calls[-1].weights.items():  # [B, 1 or T, M]
                per_token = weights.expand(-1, is_answer.shape[1] + 1, -1)[:, :-1]
                routes[block].append(per_token[is_answer.cpu()])
    measured = {"test": loss / tokens, "exact": exact / len(tasks)}
    if has_routes:
        whole = {block: torch.cat(parts) for block, parts in routes.items()}
        measured |= told_by(whole, torch.cat(answers), torch.tensor(tasks))
    return measured
