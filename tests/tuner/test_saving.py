"""Saving and loading: files, dtypes, what trains beside the adapter, and damaged checkpoints."""

import copy

import pytest
import torch
import transformers
from helpers.adapter_files import KEYS, reconfigure, rewrite
from helpers.models import (
    ARCHITECTURES,
    BANK,
    INSTRUCTION,
    LLAMA_PROJECTIONS,
    ROUTER_KEY,
    TARGETS,
    adapted,
    assert_one_router,
    bert,
    llama,
    outputs,
    randomise,
    sgd,
    text,
    train_step,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peft_queryable import QueryableLoraConfig

# Saving and loading


def test_the_file_holds_the_bank_once(folder, model):
    """adapter_model.safetensors has the tensors of the state dict, each bank tensor under one key."""
    saved = load_file(folder / "adapter_model.safetensors")
    assert {key.removeprefix(ROUTER_KEY) for key in saved if key.startswith(ROUTER_KEY)} == {
        f"{name}.weight" for name in BANK | INSTRUCTION
    }
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    learned = {key: tensor for key, tensor in saved.items() if key != f"{ROUTER_KEY}default_instruction.weight"}
    assert sum(tensor.numel() for tensor in learned.values()) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_loading_gives_the_same_model(model, folder, low_cpu_mem_usage, base):
    """A loaded adapter computes the same logits, bit by bit, through one router, and can be trained on."""
    loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True).eval()
    assert_one_router(loaded)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    theirs = [train_step(each.train(), inputs, sgd(each)) for each in (model, loaded)]
    assert theirs[0] == theirs[1]
    assert torch.equal(outputs(loaded.eval(), inputs), outputs(model.eval(), inputs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_of_every_architecture(name, tmp_path):
    """Whatever the architecture and its stacks, a saved adapter loads to the same outputs, bit by bit."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    model = adapted(copy.deepcopy(base), target_modules=architecture.targets, routing_scope="sequence", top_k=None)
    randomise(model)
    model.save_pretrained(tmp_path)
    inputs = architecture.inputs()
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path).eval(), inputs), outputs(model, inputs))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_loading_into_bfloat16(model, folder, low_cpu_mem_usage, base):
    """Into a bfloat16 base the adapter loads in float32, without rounding, and the bank stays one."""
    base = base.to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_one_router(loaded)
    saved = load_file(folder / "adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(loaded).items():
        assert tensor.dtype == torch.float32
        rounds = low_cpu_mem_usage and not name.startswith(
            ROUTER_KEY
        )  # PEFT moves a layer's tensors to the base's dtype
        assert torch.equal(tensor, saved[name].to(torch.bfloat16).float() if rounds else saved[name])
    assert outputs(loaded, text()).dtype == torch.bfloat16


def test_saving_from_bfloat16(tmp_path, base):
    """An adapter of a bfloat16 base is saved in float32 and loads onto one to the same logits, bit by bit."""
    base, inputs = llama().bfloat16(), text()
    model = adapted(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS)
    randomise(model)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_narrow_adapters_load_without_autocast(model, folder, low_cpu_mem_usage, base):
    """With `autocast_adapter_dtype=False` the whole adapter has the base's 16 bits, as FSDP asks."""
    base = base.to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(
        base, folder, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert_one_router(loaded)
    assert outputs(loaded, text()).isfinite().all()
    assert {tensor.dtype for tensor in get_peft_model_state_dict(loaded).values()} == {torch.bfloat16}


def test_auto_model(tmp_path):
    """AutoPeftModelForCausalLM finds the base model by the configuration and loads the same model."""
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM")
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_one_router(loaded)
    inputs = text()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


@pytest.mark.parametrize(
    ("build", "extra"),
    [(bert, {"task_type": "SEQ_CLS"}), (llama, {"modules_to_save": ["lm_head"]}), (bert, {"bias": "lora_only"})],
    ids=["task head", "modules_to_save", "bias"],
)
def test_what_trains_beside_the_adapter_is_saved(build, extra, tmp_path):
    """Heads, `modules_to_save` and biases train, are saved and come back, as with LoRA."""
    base = build()
    targets = ["query", "value"] if build is bert else ["q_proj"]
    model = adapted(copy.deepcopy(base), target_modules=targets, **extra)
    randomise(model)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    inputs = text()
    expected = outputs(model, inputs)
    assert not torch.allclose(outputs(base, inputs), expected, atol=1e-3)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path).eval(), inputs), expected)


def test_saving_one_of_two_adapters(model, tmp_path, base):
    """Each adapter is saved in a folder of its own, with its own bank, and loads alone or beside the other."""
    model.add_adapter("other", QueryableLoraConfig(r=2, num_atoms=3, top_k=2, router_dim=4, target_modules=["v_proj"]))
    randomise(model, "other")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "other" / "adapter_model.safetensors")[ROUTER_KEY + "atoms.weight"].shape == (3, 2, 2)
    inputs = text()
    model.set_adapter("other")
    alone = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "other").eval()
    assert torch.equal(outputs(alone, inputs), outputs(model, inputs))
    beside = PeftModel.from_pretrained(base, tmp_path)
    beside.load_adapter(tmp_path / "other", "second")
    beside.set_adapter("second")
    assert_one_router(beside, "second")
    assert torch.equal(outputs(beside.eval(), inputs), outputs(model, inputs))


# Damaged checkpoints


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ".".join(key.split(".")[-2:]))
@pytest.mark.parametrize("damage", ["missing", "misshaped"])
def test_damaged_tensor_is_refused(model, folder, key, damage, base):
    """A checkpoint that lacks a tensor, or has it in another shape, raises a ValueError that names the tensor."""

    def change(tensors: dict) -> None:
        tensor = tensors.pop(key)
        if damage == "misshaped":
            tensors[key] = torch.cat([tensor, tensor])

    rewrite(folder, change)
    name = ".".join(key.split(".")[-2:-1])
    with pytest.raises(ValueError, match=rf"adapter 'default'; 1 of its tensors.*{name}.*(missing|in the model)"):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8},
        {"r": 2},
        {"num_atoms": 7},
        {"num_blocks": 2},
        {"router_dim": 4},
        {"instruction_dim": 6},
        {"target_modules": [*TARGETS, "k_proj"]},
    ],
    ids=str,
)
def test_another_configuration_is_refused(model, folder, fields, base):
    """A checkpoint under a configuration of other shapes raises a ValueError that says what to do."""
    reconfigure(folder, **fields)
    with pytest.raises(ValueError, match=r"does not fit adapter 'default'.*`adapter_config\.json` it was saved with"):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction_dim": None},
        {"query_terms": ["state", "instruction"]},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_left_over_tensors_are_refused(model, folder, fields, base):
    """A checkpoint with tensors of the method that the configuration has no place for raises a ValueError."""
    reconfigure(folder, **fields)
    with pytest.raises(ValueError, match="does not fit adapter 'default'"):
        PeftModel.from_pretrained(base, folder)


class Headed(nn.Module):
    """A base model with a module called as a tensor of ours might be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lora_head = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_head(self.first(x))


@pytest.mark.parametrize("config_class", [LoraConfig, QueryableLoraConfig], ids=lambda config: config.__name__)
def test_a_module_may_be_called_lora(tmp_path, config_class):
    """A module that trains in full is none of the method's tensors, whatever its name; as plain LoRA."""
    config = config_class(r=2, target_modules=["first"], modules_to_save=["lora_head"])
    model = get_peft_model(Headed(), config)
    nn.init.normal_(model.base_model.model.lora_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Headed(), tmp_path)
    saved = get_peft_model_state_dict(model)
    assert "base_model.model.lora_head.weight" in saved
    torch.testing.assert_close(get_peft_model_state_dict(loaded), saved, rtol=0, atol=0)


def test_another_base_model_is_refused(folder):
    """A checkpoint for a base of other shapes raises a ValueError that names the first tensors."""
    with pytest.raises(
        ValueError, match=r"lora_A\.default\.weight: \(4, 32\) in the checkpoint, \(4, 64\) in the mod"
    ):
        PeftModel.from_pretrained(llama(hidden_size=64), folder)


def test_plain_lora_is_refused(model, folder, base):
    """A checkpoint of plain LoRA under our configuration has no bank, and is refused."""
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "queryable_lora" in key])
    with pytest.raises(ValueError, match=r"queryable_lora_\w+\.default\.[\w.]*: missing"):
        PeftModel.from_pretrained(base, folder)


def test_truncated_file_is_refused(model, folder, base):
    """A file cut short is an error of safetensors', not random weights."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="incomplete"):
        PeftModel.from_pretrained(base, folder)


def test_damaged_second_adapter_leaves_the_first(model, folder):
    """A refused second adapter leaves the first at work, and a good one loads afterwards under the same name."""
    inputs = text()
    expected = outputs(model, inputs)
    rewrite(folder, lambda tensors: tensors.pop(ROUTER_KEY + "keys.weight"))
    with pytest.raises(ValueError, match="does not fit adapter 'second'"):
        model.load_adapter(folder, "second")
    assert torch.equal(outputs(model, inputs), expected)
    model.save_pretrained(folder, selected_adapters=["default"])
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert torch.equal(outputs(model.eval(), inputs), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_damaged_first_adapter_leaves_the_base_usable(model, folder, base):
    """After a refused load onto a base model, a good adapter loads onto the same one, and takes its instruction."""
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    expected = outputs(model, inputs)
    good = folder.with_name("good")
    model.save_pretrained(good)
    rewrite(folder, lambda tensors: tensors.pop(ROUTER_KEY + "keys.weight"))
    with pytest.raises(ValueError, match="does not fit adapter 'default'"):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, good).eval(), inputs), expected)
