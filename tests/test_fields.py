"""Every field of PEFT's LoraConfig, one by one: what it does to a plain LoRA, it does to ours; or it is refused."""

import copy
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.fields import PAGE, SUPPORTED_FIELDS, SUPPORTED_INITIALISATIONS, page
from helpers.models import (
    LLAMA_PROJECTIONS,
    VOCAB,
    adapted,
    bert,
    close_gates,
    gpt2,
    llama,
    opt,
    outputs,
    router_of,
    text,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.config import _UNSUPPORTED_FIELDS, _UNSUPPORTED_INITIALISATIONS, INITIALISATIONS
from peft_queryable.tuner.layer import QueryableLoraLayer


@dataclass
class Case:
    """Fields given to LoRA and to ours, on a model.

    Args:
        fields: of the configuration.
        build: makes the base model.
        targets: `target_modules`, unless the fields name them.
    """

    fields: dict[str, Any]
    build: Any = llama
    targets: list[str] = field(default_factory=lambda: LLAMA_PROJECTIONS)


def tied() -> nn.Module:
    """A Llama whose head is its embedding."""
    return llama(tie_word_embeddings=True)


CASES = {
    "r": Case({"r": 2}),
    "target_modules": Case({"target_modules": r".*layers\.[13].*(q|down)_proj"}),
    "target_modules all-linear": Case({"target_modules": "all-linear"}),
    "exclude_modules": Case({"exclude_modules": ["k_proj", "layers.2.mlp.up_proj"]}),
    "exclude_modules regex": Case({"exclude_modules": r".*layers\.0\..*"}),
    "lora_alpha": Case({"lora_alpha": 3}),
    "lora_dropout": Case({"lora_dropout": 0.4}),
    "fan_in_fan_out": Case({"fan_in_fan_out": True}, gpt2, ["c_attn", "c_proj"]),
    "bias all": Case({"bias": "all"}, opt, ["q_proj", "fc1"]),
    "bias lora_only": Case({"bias": "lora_only"}, opt, ["q_proj", "fc1"]),
    "use_rslora": Case({"use_rslora": True}),
    "modules_to_save": Case({"modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save of a task": Case({"task_type": "SEQ_CLS"}, bert, ["query", "value"]),
    "layers_to_transform": Case({"layers_to_transform": [1, 3]}),
    "layers_to_transform one": Case({"layers_to_transform": 2}),
    "layers_pattern": Case({"layers_pattern": "h", "layers_to_transform": [0, 1]}, gpt2, ["c_attn"]),
    "alpha_pattern": Case({"alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp.down_proj": 5}}),
    "trainable_token_indices": Case({"trainable_token_indices": [3, 5, 9]}),
    "trainable_token_indices by name": Case({"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}),
    "trainable_token_indices tied": Case({"trainable_token_indices": [3, 5, 9]}, tied),
    "ensure_weight_tying": Case({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied),
    "ensure_weight_tying of the head": Case({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, tied),
    "lora_bias": Case({"lora_bias": True, "lora_alpha": 3}, opt, ["q_proj", "fc1"]),
    "qalora_group_size": Case({"qalora_group_size": 4}),
    "megatron_core": Case({"megatron_core": "nowhere"}),
}

# Fields that do nothing to a model's outputs, or have more to them, and the test of each.
TESTED_ELSEWHERE = {
    "task_type": "ecosystem/test_tasks.py::test_task_type",
    "peft_type": "test_config.py::test_defaults_are_public_api",
    "auto_mapping": "test_fields.py::test_auto_mapping",
    "peft_version": "test_fields.py::test_field_is_saved",
    "base_model_name_or_path": "ecosystem/test_tasks.py::test_task_type",
    "revision": "test_fields.py::test_field_is_saved",
    "inference_mode": "test_fields.py::test_inference_mode",
    "init_lora_weights": "tuner/test_initialisation.py::test_the_model_starts_as_its_base",
    "eva_config": "tuner/test_initialisation.py::test_eva",
    "runtime_config": "test_fields.py::test_runtime_config_is_not_saved",
}


def pair(case: Case) -> tuple[nn.Module, PeftModel, PeftModel]:
    """The base model of `case`, ours with random weights and closed gates, and PEFT's LoRA with the same weights."""
    base = case.build().double()
    fields = {"r": 4, "target_modules": case.targets} | case.fields
    ours = adapted(copy.deepcopy(base), **copy.deepcopy(fields))
    for parameter in filter(lambda p: p.requires_grad, ours.parameters()):
        nn.init.normal_(parameter, std=0.3)
    close_gates(ours)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(**copy.deepcopy(fields))).eval()
    lora.load_state_dict({k: tensor for k, tensor in ours.state_dict().items() if "queryable_lora" not in k})
    return base, ours, lora


def without_ours(names) -> set[str]:
    return {name for name in names if "queryable_lora" not in name}


# PEFT warns of fields that the base model has no use for, and of a LoRA's bias that it takes for a lost shard.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. 8 LoRA tensor.* invalid shape:peft.utils.warning.PeftWarning"
    ),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]


@pytest.mark.parametrize("name", CASES)
def test_field_does_what_it_does_to_lora(name):
    """With closed gates, outputs in training and evaluation and what trains and is saved are those of LoRA."""
    base, ours, lora = pair(CASES[name])
    inputs = text()
    assert not torch.allclose(outputs(ours, inputs), outputs(base, inputs), atol=1e-3)
    for training in (True, False):
        for model in (ours, lora):
            model.train(training)
        results = []
        for model in (ours, lora):
            torch.manual_seed(1)
            results.append(outputs(model, inputs))
        torch.testing.assert_close(*results)
    ours_trained, theirs = ({n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, lora))
    assert without_ours(ours_trained) == theirs
    assert without_ours(get_peft_model_state_dict(ours)) == set(get_peft_model_state_dict(lora))


@pytest.mark.parametrize("name", CASES)
def test_field_is_loaded(name, tmp_path):
    """A saved adapter loads to the same outputs, bit by bit, and to the same configuration."""
    base, ours, _ = pair(CASES[name])
    ours.save_pretrained(tmp_path)
    inputs = text()
    expected = outputs(ours, inputs)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, inputs), expected)
    for field_name in CASES[name].fields:
        assert getattr(loaded.peft_config["default"], field_name) == getattr(ours.peft_config["default"], field_name)


def test_every_field_is_accounted_for():
    """Each field of PEFT's LoraConfig is in the table, and has a test or a refusal: a new one must be given one."""
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names == SUPPORTED_FIELDS.keys() | _UNSUPPORTED_FIELDS.keys()
    assert not SUPPORTED_FIELDS.keys() & _UNSUPPORTED_FIELDS.keys()
    assert {name.partition(" ")[0] for name in CASES} | TESTED_ELSEWHERE.keys() == SUPPORTED_FIELDS.keys()
    for place in TESTED_ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()


def test_every_initialisation_is_accounted_for():
    """Each value that PEFT's LoraConfig names is in the table, as supported or refused."""
    (init,) = (field for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights")
    named = {name.partition("_[")[0] for name in re.findall(r"['\"](.+?)['\"]", str(init.type))}
    assert len(named) >= 9
    assert named <= SUPPORTED_INITIALISATIONS.keys() | _UNSUPPORTED_INITIALISATIONS.keys()
    assert {str(value) for value in INITIALISATIONS} == SUPPORTED_INITIALISATIONS.keys()


def test_the_docs_have_the_table():
    """docs/fields.md is what `python tests/helpers/fields.py` writes."""
    assert PAGE.read_text() == page()


# What is specific to one field


@pytest.mark.parametrize(
    ("layers", "num_blocks", "expected"),
    [([1, 3], 4, {1: 0, 3: 1}), ([0, 1, 3], 2, {0: 0, 1: 0, 3: 1}), (2, 4, {2: 0})],
    ids=str,
)
def test_blocks_are_made_of_the_adapted_layers(layers, num_blocks, expected):
    """`layers_to_transform` leaves blocks of the layers it names, and no prior for any other."""
    model = adapted(llama(), target_modules=["q_proj", "up_proj"], layers_to_transform=layers, num_blocks=num_blocks)
    blocks = {
        int(name.split(".layers.")[1].partition(".")[0]): module.places["default"].block
        for name, module in model.named_modules()
        if isinstance(module, QueryableLoraLayer)
    }
    assert blocks == expected
    assert len(router_of(model).block_prior.weight) == len(set(expected.values()))


def test_only_the_named_tokens_train():
    """`trainable_token_indices` moves the embeddings of its tokens, and of no other."""
    model = adapted(llama(), target_modules=["q_proj"], trainable_token_indices=[3, 5]).train()
    before = model.get_input_embeddings()(torch.arange(VOCAB)).detach()
    inputs = text()
    inputs["input_ids"][:, :2] = torch.tensor([3, 5])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = (model.get_input_embeddings()(torch.arange(VOCAB)) != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_tied_weights_stay_tied(layer, tmp_path):
    """With `ensure_weight_tying` embedding and head train and load as one tensor, whichever is named."""
    base = tied()
    model = adapted(
        copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=[layer], ensure_weight_tying=True
    ).train()
    inputs = text()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(tmp_path)
    for each in (model, PeftModel.from_pretrained(base, tmp_path)):
        assert each.get_input_embeddings().weight is each.get_output_embeddings().weight


@pytest.mark.parametrize("setting", [True, False])
def test_fan_in_fan_out_is_read_off_the_module(setting):
    """Whatever the field says, Conv1D and Linear are told apart, by initialisations that read their weights too."""
    for build, targets in ((gpt2, ["c_attn", "c_proj"]), (llama, ["q_proj", "down_proj"])):
        model, inputs = build(), text()
        expected = outputs(model, inputs)
        model = adapted(model, target_modules=targets, init_lora_weights="pissa", fan_in_fan_out=setting)
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_inference_mode():
    """With `inference_mode` nothing trains, the bank included."""
    model = adapted(llama(), target_modules=["q_proj"], inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("name", "value"), [("revision", "abc"), ("peft_version", "0.21.0")])
def test_field_is_saved(name, value, tmp_path):
    """What PEFT notes about an adapter is saved and loaded with it."""
    QueryableLoraConfig(**{name: value}).save_pretrained(tmp_path)
    assert getattr(QueryableLoraConfig.from_pretrained(tmp_path), name) == value


def test_auto_mapping(folder):
    """Without a task type, PEFT notes the class of the base model."""
    auto_mapping = QueryableLoraConfig.from_pretrained(folder).auto_mapping
    assert auto_mapping["base_model_class"] == "LlamaForCausalLM"


def test_runtime_config_is_not_saved(tmp_path):
    """`runtime_config` is of the process, not of the adapter, as in LoRA."""
    QueryableLoraConfig().save_pretrained(tmp_path)
    assert "runtime_config" not in (tmp_path / "adapter_config.json").read_text()


# What PEFT saves beside the adapter


@pytest.mark.parametrize(
    ("setting", "resized", "is_saved"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_save_embedding_layers(setting, resized, is_saved, tmp_path):
    """Resized embeddings are saved with the adapter and come back, as the argument of `save_pretrained` says."""
    llama().save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        if resized:
            model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        return model

    model = adapted(base(), target_modules=["q_proj"])
    nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=setting)
    saved = without_ours(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any("embed_tokens" in name for name in saved) == is_saved
    loaded, inputs = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval(), text()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs)) == is_saved
