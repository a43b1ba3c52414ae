"""PEFT's task types: each trains with its head, is saved and loads, by PEFT's class for the task and by any other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers.models import LLAMA_PROJECTIONS, VOCAB, adapted, outputs, randomise, text, token_ids
from peft import AutoPeftModel, PeftModel
from torch import Tensor, nn

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BERT = transformers.BertConfig(**SIZES, num_attention_heads=4)
LLAMA = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
T5 = transformers.T5Config(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
MODERNBERT = transformers.ModernBertConfig(
    **SIZES, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
)


@dataclass(frozen=True)
class Task:
    """A task type on a model.

    Args:
        name: `task_type`.
        auto: name, after its prefix, of transformers' class for the task.
        config: the model's configuration.
        targets: `target_modules`.
        labels: makes the arguments that give a loss.
        head: module that trains beside the adapter, None for none.
    """

    name: str
    auto: str
    config: Any
    targets: str | list[str]
    labels: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    head: str | None = None


def classes(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"labels": torch.tensor([0, 1])}


def tags(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"labels": torch.randint(0, 2, (2, 6))}


def spans(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}


def same_tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"labels": inputs["input_ids"]}


def other_tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"labels": token_ids(length=4)}


def nothing(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


QUERY = ["query", "value", "dense"]
TASKS = [
    Task("CAUSAL_LM", "ForCausalLM", LLAMA, "all-linear", same_tokens),
    Task("SEQ_2_SEQ_LM", "ForSeq2SeqLM", T5, "all-linear", other_tokens),
    Task("SEQ_CLS", "ForSequenceClassification", BERT, QUERY, classes, "classifier"),
    Task("SEQ_CLS", "ForSequenceClassification", LLAMA, "all-linear", classes, "score"),
    Task("SEQ_CLS", "ForSequenceClassification", MODERNBERT, "all-linear", classes, "classifier"),
    Task("TOKEN_CLS", "ForTokenClassification", BERT, QUERY, tags, "classifier"),
    Task("TOKEN_CLS", "ForTokenClassification", LLAMA, LLAMA_PROJECTIONS, tags, "score"),
    Task("QUESTION_ANS", "ForQuestionAnswering", BERT, QUERY, spans, "qa_outputs"),
    Task("FEATURE_EXTRACTION", "ForFeatureExtraction", BERT, ["query", "value"], nothing),
]


def first_output(model: nn.Module, inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """The loss, or hidden states of a model without one."""
    return model(**inputs, **labels)[0]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.config.model_type}")
def test_task_type(task, tmp_path):
    """The class is PEFT's for the task, adapter and head train, and both loaders give the same model, bit by bit."""
    auto = (
        transformers.AutoModel if task.name == "FEATURE_EXTRACTION" else getattr(transformers, f"AutoModel{task.auto}")
    )
    auto.from_config(task.config).save_pretrained(tmp_path / "base")
    base = auto.from_pretrained(tmp_path / "base")
    instruction = {"instruction_embeds": torch.randn(2, 5)}
    model = adapted(base, target_modules=task.targets, task_type=task.name, instruction_dim=5).train()
    assert type(model) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task.name]
    randomise(model)

    inputs = text()
    labels = task.labels(inputs)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = {
        name.partition(".modules_to_save")[0].rpartition(".")[2] for name in trainable if "modules_to_save" in name
    }
    assert heads == ({task.head} if task.head else set())
    first_output(model, inputs | instruction, labels).sum().backward()
    assert [name for name, p in trainable.items() if p.grad is None] == []
    torch.optim.SGD(trainable.values(), lr=0.1).step()

    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = first_output(model, inputs | instruction, labels)
        for loaded in (
            getattr(peft, f"AutoPeftModel{task.auto}").from_pretrained(tmp_path / "adapter"),
            PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
        ):
            assert type(loaded) is type(model)
            assert torch.equal(first_output(loaded.eval(), inputs | instruction, labels), expected)


def test_no_task_type(tmp_path):
    """Without a task type the class is PeftModel, and AutoPeftModel loads it by the class of its base model."""
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = adapted(base, target_modules="all-linear")
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded, inputs = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval(), text()
    assert type(loaded) is type(model) is PeftModel
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_every_task_type_is_tested():
    """The list above has all task types that PEFT knows."""
    assert {task.name for task in TASKS} == {task.value for task in peft.TaskType}
