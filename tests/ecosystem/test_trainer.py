"""Training with transformers' Trainer and TRL's SFTTrainer: checkpoints, resuming, reloading, labels."""

import pytest
import torch
import transformers
from datasets import Dataset
from helpers.models import LLAMA_PROJECTIONS, VOCAB, adapted, llama, outputs, text
from helpers.words import tokenizer
from peft import PeftModel, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_queryable import QueryableLoraConfig
from peft_queryable.method.scope import Pool

STEPS = 6


def examples() -> list[dict]:
    """Twelve sequences of different lengths, with prompts of two tokens."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, VOCAB, (4 + i % 3,), generator=generator) for i in range(12)]
    return [{"input_ids": row.tolist(), "labels": [-100, -100, *row[2:].tolist()]} for row in rows]


def trainer(folder, **kwargs) -> Trainer:
    """A Trainer of a new tiny Llama with an adapter, always the same, dropout included."""
    torch.manual_seed(0)
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, lora_dropout=0.1)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True)
    arguments = TrainingArguments(**(settings | kwargs))
    return Trainer(model, arguments, data_collator=collator, train_dataset=Dataset.from_list(examples()))


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_resuming_changes_nothing(tmp_path, checkpointing):
    """A run that is resumed from its checkpoint has the losses and weights of one that was never interrupted."""
    arguments = {"gradient_checkpointing": checkpointing}
    whole = trainer(tmp_path / "whole", **arguments)
    whole.train()
    interrupted = trainer(tmp_path / "interrupted", **arguments, num_train_epochs=1)
    interrupted.add_callback(StopAfter(3))
    interrupted.train()
    assert len(losses(interrupted)) == 3
    resumed = trainer(tmp_path / "interrupted", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "interrupted" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == STEPS
    expected = get_peft_model_state_dict(whole.model)
    for name, tensor in get_peft_model_state_dict(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name


class StopAfter(transformers.TrainerCallback):
    """Stops a run after some steps, as a crash would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_a_checkpoint_loads_as_an_adapter(tmp_path):
    """The folder of a checkpoint is an adapter's folder, and holds no base weights."""
    trained = trainer(tmp_path)
    base = llama()
    base.load_state_dict(copy_of_base(trained.model))
    trained.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    inputs = text()
    loaded = PeftModel.from_pretrained(base, checkpoint).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(trained.model.eval(), inputs))


def copy_of_base(model: PeftModel) -> dict:
    """State dict of the base model of `model`."""
    with_adapter = model.get_base_model().state_dict()
    return {
        name.replace(".base_layer", ""): tensor.clone() for name, tensor in with_adapter.items() if "lora_" not in name
    }


def test_accumulation_changes_nothing(tmp_path):
    """Two batches of two accumulated are one batch of four: same weights up to rounding."""
    states = []
    for name, batch, accumulation in (("one", 4, 1), ("two", 2, 2)):
        run = trainer(
            tmp_path / name,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
        )
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run.train()
        states.append(get_peft_model_state_dict(run.model))
    torch.testing.assert_close(states[0], states[1])


# TRL

PAIRS = [
    {"prompt": " ".join(f"w{3 + (i + j) % 40}" for j in range(3 + i % 3)), "completion": f" w{i + 3} w{i + 4}"}
    for i in range(8)
]


def sft_trainer(folder, scope: str, **kwargs) -> SFTTrainer:
    torch.manual_seed(0)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **kwargs,
    )
    config = QueryableLoraConfig(
        r=4, num_atoms=6, router_dim=8, target_modules=LLAMA_PROJECTIONS, routing_scope=scope, task_type="CAUSAL_LM"
    )
    return SFTTrainer(
        llama(),
        arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
        peft_config=config,
    )


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
def test_sft_trainer(tmp_path, scope):
    """SFTTrainer takes the configuration, trains all of the adapter with checkpointing on, saves, and it reloads."""
    trained = sft_trainer(tmp_path, scope)
    assert trained.args.gradient_checkpointing
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(trained.model).items()}
    base = llama()
    base.load_state_dict(copy_of_base(trained.model))
    trained.train()
    after = get_peft_model_state_dict(trained.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    trained.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = text()
    assert torch.equal(outputs(loaded, inputs), outputs(trained.model.eval(), inputs))


@pytest.mark.parametrize("scope", ["causal", "prompt"])
def test_checkpointing_changes_no_loss(tmp_path, scope):
    """SFTTrainer's losses are the same with gradient checkpointing, its default, and without."""
    runs = []
    for checkpointing in (True, False):
        run = sft_trainer(tmp_path / str(checkpointing), scope, gradient_checkpointing=checkpointing)
        run.train()
        runs.append(losses(run))
    assert len(runs[0]) == 3
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"])
def test_labels_reach_the_routing(tmp_path, monkeypatch, kwargs):
    """In scope `prompt` the tokens that a route sees are those that TRL's labels leave unsupervised, and no others."""
    seen = []
    original = Pool.__init__

    def spy(self, scope, tokens):
        original(self, scope, tokens)
        seen.append((scope.name, self.mask))

    monkeypatch.setattr(Pool, "__init__", spy)
    run = sft_trainer(tmp_path, "prompt", **kwargs)
    batch = next(iter(run.get_train_dataloader()))
    run.model.train()
    run.compute_loss(run.model, dict(batch)).backward()
    expected = batch["labels"] == -100
    if "attention_mask" in batch:
        expected &= batch["attention_mask"].bool()
    assert expected.any() and not expected.all()
    assert {scope for scope, _ in seen} == {"prompt"}
    for _, mask in seen:
        assert torch.equal(mask.squeeze(-1), expected)
