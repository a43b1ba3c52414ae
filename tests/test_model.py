"""The tuner as a PEFT model: parameters, saving and loading, adapter management, copies, and gradients."""

import copy
import io
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    LAYERS,
    LLAMA_PROJECTIONS,
    MLP,
    VOCAB,
    adapted,
    bert,
    llama,
    mlp,
    outputs,
    randomise,
    t5,
    text,
    token_ids,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft_queryable import QueryableLoraConfig, QueryableLoraModel
from peft_queryable.layer import QueryableLoraLayer
from peft_queryable.router import Router

BANK = {"atoms", "keys", "prior", "state_query", "depth_value", "depth_query", "depth_key"}
INSTRUCTION = {"instruction_query", "instruction_prior"}
ROUTER_KEY = "base_model.queryable_lora_router."


def router_of(model: PeftModel, adapter: str = "default") -> Router:
    return model.base_model.queryable_lora_router[adapter]


def assert_one_router(model: PeftModel, adapter: str = "default") -> None:
    """All adapted modules of `adapter` route through the one router that the tuner owns, and it owns every tensor."""
    layers = [module for module in model.modules() if isinstance(module, QueryableLoraLayer)]
    layers = [layer for layer in layers if adapter in layer.lora_A]
    assert layers
    for layer in layers:
        assert layer.places[adapter].stack.plans[adapter].router is router_of(model, adapter)
    owned = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in router_of(model, adapter).parameters()} <= owned


def train_step(model: nn.Module, inputs: dict, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def base() -> nn.Module:
    """A tiny Llama."""
    return llama()


@pytest.fixture
def model(base) -> PeftModel:
    """A copy of `base` with a random adapter that takes instructions."""
    model = adapted(copy.deepcopy(base), target_modules=TARGETS, instruction_dim=5)
    randomise(model)
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The folder that `model` is saved in."""
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Parameters


def test_parameter_tree():
    """The state dict has A, B and a gate for each module, and the bank once, under names that carry the prefix."""
    model = adapted(MLP(), target_modules=["first", "third"], instruction_dim=5)
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    expected = {
        ROUTER_KEY + "atoms.weight": (6, 4, 4),
        ROUTER_KEY + "keys.weight": (6, 8),
        ROUTER_KEY + "prior.weight": (2, 8),
        ROUTER_KEY + "state_query.weight": (8, 4),
        ROUTER_KEY + "depth_value.weight": (8, 4),
        ROUTER_KEY + "depth_query.weight": (8, 8),
        ROUTER_KEY + "depth_key.weight": (8, 4),
        ROUTER_KEY + "instruction_query.weight": (8, 5),
        ROUTER_KEY + "instruction_prior.weight": (8, 5),
    }
    for name, width in (("first", 8), ("third", 16)):
        expected |= {
            f"base_model.model.{name}.lora_A.weight": (4, width),
            f"base_model.model.{name}.lora_B.weight": (16, 4),
            f"base_model.model.{name}.queryable_lora_gate.weight": (1,),
        }
    assert shapes == expected
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.replace(".default.", ".") for name in trainable} == set(expected)


def test_trainable_parameters_count_the_bank_once(capsys):
    """`print_trainable_parameters` says LoRA's number, a gate a module, and one router."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)
    bank = sum(p.numel() for p in router_of(model).parameters())
    model.print_trainable_parameters()
    expected = lora + LAYERS * len(LLAMA_PROJECTIONS) + bank
    assert f"trainable params: {expected:,} ||" in capsys.readouterr().out
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize(("instruction_dim", "total"), [(None, 4_402_728), (768, 4_451_880)])
def test_size_on_qwen(instruction_dim, total):
    """On Qwen2.5-0.5B's shapes the LoRA part is LoRA's, and the whole no more than the paper's (its Table 5)."""
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config)
    adapter = QueryableLoraConfig(r=8, target_modules=LLAMA_PROJECTIONS, num_atoms=16, instruction_dim=instruction_dim)
    model = get_peft_model(base, adapter, low_cpu_mem_usage=True)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    lora = sum(size for name, size in trainable.items() if "lora_A" in name or "lora_B" in name)
    assert lora == 4_399_104
    assert lora < sum(trainable.values()) == total <= 4_456_936  # the figures of the README
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_router_serves_all(name):
    """Whatever the architecture and its stacks, one router serves every adapted module."""
    architecture = ARCHITECTURES[name]
    assert_one_router(adapted(architecture.build(), target_modules=architecture.targets))


def test_the_seed_determines_the_adapter():
    """The same seed gives the same state dict, another seed another one."""

    def state_dict(seed: int) -> dict:
        torch.manual_seed(0)
        base = llama()
        torch.manual_seed(seed)
        return get_peft_model_state_dict(adapted(base, target_modules=LLAMA_PROJECTIONS, instruction_dim=5))

    first, same, other = state_dict(1), state_dict(1), state_dict(2)
    constant = {name for name in first if "lora_B" in name or "lora_gate" in name}
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == (name in constant)


# Gradients


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_trainable_tensor_learns(scope, checkpointing):
    """No gradient is None in the first backward pass, and none is zero in the second."""
    model = adapted(
        llama(), target_modules=LLAMA_PROJECTIONS, routing_scope=scope, top_k=None, instruction_dim=5
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs, optimizer = text(), sgd(model)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :2] = -100
    inputs["instruction_embeds"] = torch.randn(2, 5)
    for check in (lambda grad: grad is not None, lambda grad: grad is not None and grad.any()):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and not check(p.grad)] == []
        optimizer.step()


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "t5"])
def test_no_gradient_is_missing(name):
    """No trainable tensor is without a gradient in any architecture, top-k and no instruction notwithstanding."""
    architecture = ARCHITECTURES[name]
    model = adapted(architecture.build(), target_modules=architecture.targets, top_k=1, instruction_dim=5).train()
    result = model(**architecture.inputs()).logits
    (result * torch.randn_like(result)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("terms", [(), ("state",), ("depth",), ("state", "depth")], ids=str)
def test_no_gradient_is_missing_without_terms(terms):
    """A query without some of its terms leaves no trainable tensor unused."""
    model = adapted(llama(), target_modules=["q_proj", "down_proj"], query_terms=terms, instruction_dim=5).train()
    train_step(model, text(), sgd(model))
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_only_the_adapter_trains():
    """A training step changes the adapter, and no bit of the base model."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, optimizer = text(), sgd(model)
    losses = [train_step(model, inputs, optimizer) for _ in range(2)]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(".default." in name for name in changed)
    assert {name for name in before if ".default." in name} == changed
    assert losses[1] < losses[0]


# Saving and loading


def test_the_file_holds_the_bank_once(folder, model):
    """adapter_model.safetensors has the tensors of the state dict, each bank tensor under one key."""
    saved = load_file(folder / "adapter_model.safetensors")
    assert {key.removeprefix(ROUTER_KEY) for key in saved if key.startswith(ROUTER_KEY)} == {
        f"{name}.weight" for name in BANK | INSTRUCTION
    }
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    assert sum(tensor.numel() for tensor in saved.values()) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_loading_gives_the_same_model(model, folder, low_cpu_mem_usage, base):
    """A loaded adapter computes the same logits, bit by bit, through one router, and can be trained on."""
    loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True).eval()
    assert_one_router(loaded)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    theirs = [train_step(each.train(), text_from(inputs), sgd(each)) for each in (model, loaded)]
    assert theirs[0] == theirs[1]
    assert torch.equal(outputs(loaded.eval(), inputs), outputs(model.eval(), inputs))


def text_from(inputs: dict) -> dict:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


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


def rewrite(folder: Path, change) -> None:
    """Save the adapter's tensors again after `change` of their dict."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


A_LAYER = "base_model.model.model.layers.1.self_attn.q_proj."
KEYS = [*[f"{ROUTER_KEY}{name}.weight" for name in sorted(BANK | INSTRUCTION)]] + [
    A_LAYER + name + ".weight" for name in ("lora_A", "lora_B", "queryable_lora_gate")
]


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


# Base model, merging, unloading


def test_disabled_adapter_is_the_base(model, base):
    """Inside `disable_adapter` every bit is the base model's; after it, the adapter's again."""
    inputs = text()
    expected, at_work = outputs(base, inputs), outputs(model, inputs)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), expected)
    assert torch.equal(outputs(model, inputs), at_work)
    assert not torch.allclose(at_work, expected, atol=1e-2)


@pytest.mark.parametrize("trainable", [True, False])
def test_disabling_keeps_what_trains(model, folder, trainable, base):
    """After `disable_adapter` A, B, gates and the bank are all as trainable as each other."""
    loaded = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    with loaded.disable_adapter():
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len({p.requires_grad for name, p in loaded.named_parameters() if ".default." in name}) == 1


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: model.merge_and_unload(),
        lambda model: model.base_model.merge_and_unload(safe_merge=True),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    ],
    ids=["merge_adapter", "safe merge", "merge_and_unload", "safe merge and unload", "layer"],
)
def test_merging_is_refused(model, merge):
    """Merging raises an error that says why and what to do, and changes nothing."""
    inputs = text()
    expected = outputs(model, inputs)
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*S.*`unload\(\)`"):
        merge(model)
    assert torch.equal(outputs(model, inputs), expected)


def test_unmerging_does_nothing(model):
    """`unmerge_adapter` is no error, and changes nothing: nothing is ever merged."""
    inputs = text()
    expected = outputs(model, inputs)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "t5", "mlp"])
def test_unload(name):
    """`unload` gives the base model back: its modules, its outputs, its methods, and no hooks."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    kinds, attributes = [type(module) for module in base.modules()], set(vars(base))
    inputs = architecture.inputs()
    expected = outputs(base, inputs)
    model = adapted(base, target_modules=architecture.targets)
    randomise(model)
    outputs(model, inputs)
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(outputs(unloaded, inputs), expected)
    assert [type(module) for module in unloaded.modules()] == kinds
    for module in unloaded.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert set(vars(unloaded)) <= attributes | {"peft_config"}


def test_unload_after_checkpointing():
    """After `unload` a model that was checkpointed trains with its own checkpoint function."""
    base = llama().train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    function = base.model.layers[0]._gradient_checkpointing_func
    model = adapted(base, target_modules=["q_proj"]).train()
    train_step(model, text(), sgd(model))
    unloaded = model.unload()
    assert unloaded.model.layers[0]._gradient_checkpointing_func is function


def test_generate_after_unload(model, base):
    """An unloaded model generates as the base does."""
    ids = token_ids(1, 3)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = base.generate(ids, **settings)
    assert torch.equal(model.unload().generate(ids, **settings), expected)


# Several adapters


def two_adapters() -> PeftModel:
    """An MLP with adapters `one` and `two`, of other ranks, banks, scopes and targets, both random."""
    config = QueryableLoraConfig(r=4, num_atoms=6, router_dim=8, target_modules=["first", "third"])
    model = get_peft_model(mlp(), config, adapter_name="one")
    other = QueryableLoraConfig(
        r=2, num_atoms=3, top_k=2, router_dim=4, target_modules=["second", "third"], routing_scope="causal"
    )
    model.add_adapter("two", other)
    randomise(model, "one")
    randomise(model, "two")
    return model.eval()


def alone(model: PeftModel, adapter: str) -> PeftModel:
    """A model with nothing but `adapter` of `model`, on the same base."""
    result = get_peft_model(
        copy.deepcopy(model).unload(), copy.deepcopy(model.peft_config[adapter]), adapter_name=adapter
    )
    missing, _ = result.load_state_dict(model.state_dict(), strict=False)
    assert not [name for name in missing if f".{adapter}." in name]
    return result.eval()


@pytest.mark.parametrize("adapter", ["one", "two"])
def test_set_adapter(adapter):
    """The adapter that is set is at work as if it were alone."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    expected = outputs(alone(model, adapter), inputs)
    model.set_adapter(adapter)
    assert model.active_adapter == adapter
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("adapter", ["one", "two"])
def test_set_adapter_says_what_trains(adapter):
    """All of the adapter that is set trains, its bank included, and nothing of the other one."""
    model = two_adapters()
    model.set_adapter(adapter)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if f".{adapter}." in name}
    assert any("queryable_lora_router" in name for name in trainable)


def test_set_requires_grad():
    """`set_requires_grad` freezes and thaws the whole of an adapter."""
    model = two_adapters()
    for requires_grad in (False, True):
        model.set_requires_grad("one", requires_grad)
        assert {p.requires_grad for name, p in model.named_parameters() if ".one." in name} == {requires_grad}
        assert {p.requires_grad for name, p in model.named_parameters() if ".two." in name} == {False}


def test_set_adapter_for_inference():
    """With `inference_mode=True` nothing trains."""
    model = two_adapters()
    model.set_adapter("two", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_contributions_add_up():
    """Two active adapters of a module add their two updates."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    for name in ("first", "second"):  # leave `third` alone adapted, so that its input is the same in all runs
        for parameter in getattr(model.base_model.model, name).lora_B.parameters():
            nn.init.zeros_(parameter)
    seen = []
    model.base_model.model.third.register_forward_hook(lambda module, args, output: seen.append(output))
    for active in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(active)
        outputs(model, inputs)
    with model.disable_adapter():
        outputs(model, inputs)
    one, two, both, base = seen
    assert not torch.allclose(one, two, atol=1e-2)
    torch.testing.assert_close(both - base, (one - base) + (two - base))


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning")
def test_delete_adapter():
    """A deleted adapter leaves nothing behind, and the other works as before."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    model.set_adapter("two")
    expected = outputs(model, inputs)
    model.delete_adapter("one")
    assert not [name for name in model.state_dict() if ".one." in name]
    assert "one" not in model.peft_config
    for stack in model.base_model.stacks.values():
        assert "one" not in stack.plans
    for layer in model.modules():
        assert not isinstance(layer, QueryableLoraLayer) or "one" not in layer.places
    assert torch.equal(outputs(model, inputs), expected)
    model.add_adapter("one", QueryableLoraConfig(r=3, num_atoms=4, target_modules=["first"]))
    model.set_adapter("one")
    outputs(model, inputs)


@pytest.mark.filterwarnings("ignore:Adapter two was active which is now deleted:UserWarning")
def test_delete_the_active_adapter():
    """When the active adapter is deleted PEFT makes the other active, and its bank then trains with it."""
    config = QueryableLoraConfig(r=4, target_modules=["first"])
    model = get_peft_model(mlp(), config, adapter_name="one")
    model.add_adapter("two", copy.deepcopy(config))
    model.set_adapter("two")
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert {p.requires_grad for name, p in model.named_parameters() if ".one." in name} == {True}


def test_a_further_adapter_is_frozen_until_it_is_set():
    """`add_adapter` changes neither what trains nor the outputs."""
    model = adapted(mlp(), target_modules=["first"])
    randomise(model)
    inputs = {"x": torch.randn(2, 3, 8)}
    expected = outputs(model, inputs)
    model.add_adapter("other", QueryableLoraConfig(r=2, target_modules=["first", "second"]))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".default." in name)
    assert torch.equal(outputs(model, inputs), expected)


def test_loaded_adapters_are_frozen(model, folder, base):
    """A loaded adapter is frozen, bank included; `is_trainable=True` and `set_adapter` thaw all of it."""
    frozen = PeftModel.from_pretrained(base, folder)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen.set_adapter("default")
    thawed = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    for each in (frozen, thawed):
        assert {p.requires_grad for name, p in each.named_parameters() if ".default." in name} == {True}


def test_a_frozen_adapter_beside_a_trained_one(model, folder):
    """An adapter loaded beside a trained one stays frozen, and leaves the trained one as it was."""
    model.load_adapter(folder, "reference")
    assert {p.requires_grad for name, p in model.named_parameters() if ".reference." in name} == {False}
    assert {p.requires_grad for name, p in model.named_parameters() if ".default." in name} == {True}
    assert_one_router(model, "reference")
    inputs = text()
    expected = outputs(model, inputs)
    model.set_adapter("reference")
    assert torch.equal(outputs(model, inputs), expected)


def test_weighted_adapters_are_refused(model):
    """LoRA's `add_weighted_adapter` does not exist here: banks do not add up."""
    with pytest.raises(AttributeError):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# Copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def checkpointed_deepcopy(model: nn.Module) -> nn.Module:
    """A deep copy of `model` after a training step with gradient checkpointing, which is then switched off."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**text()).logits.sum().backward()
    model.gradient_checkpointing_disable()
    return copy.deepcopy(model)


COPIES = [copy.deepcopy, through_pickle, through_torch_save, checkpointed_deepcopy]


@pytest.mark.parametrize("copied", COPIES, ids=lambda function: function.__name__)
def test_copies_are_independent(model, copied):
    """A copy computes the same, has one router of its own, and training it does not move the original."""
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    expected = outputs(model, inputs)
    other = copied(model)
    assert torch.equal(outputs(other, inputs), expected)
    assert_one_router(other)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    train_step(other.train(), text(), sgd(other))
    assert torch.equal(outputs(model, inputs), expected)
    assert not torch.allclose(outputs(other.eval(), inputs), expected)


@pytest.mark.parametrize("copied", COPIES, ids=lambda function: function.__name__)
def test_copies_generate_alone(model, copied):
    """A copy generates what the original does, instructed too, also when the original is changed and gone."""
    settings = {"input_ids": token_ids(1, 3), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings["instruction_embeds"] = 5 * torch.randn(1, 5)
    other = copied(model)
    expected = model.generate(**settings)
    randomise(model, scale=3.0)
    del model
    assert torch.equal(other.generate(**settings), expected)


def test_data_parallel_is_refused(model):
    """A replica of nn.DataParallel raises an error that names it and what to use."""
    replica = model.base_model.model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*DistributedDataParallel"):
        replica(token_ids())


def test_direct_injection_is_refused():
    """`inject_adapter_in_model` makes no tuner to own the bank, so PEFT refuses it."""
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(QueryableLoraConfig(target_modules=["first"]), mlp())


# Instructions


def test_instruction_moves_the_outputs(model):
    """An instruction changes the outputs of its row, and of no other."""
    inputs = text()
    plain = outputs(model, inputs)
    embeds = torch.stack([5 * torch.randn(5), torch.zeros(5)])
    instructed = outputs(model, inputs | {"instruction_embeds": embeds})
    assert not torch.allclose(instructed[0], plain[0], atol=1e-3)
    torch.testing.assert_close(instructed[1], plain[1])


def test_one_instruction_for_all_rows(model):
    """[1, d_c] is the same as a row for each example."""
    inputs, embeds = text(), torch.randn(1, 5)
    one = outputs(model, inputs | {"instruction_embeds": embeds})
    torch.testing.assert_close(one, outputs(model, inputs | {"instruction_embeds": embeds.expand(2, -1)}))


def test_an_instruction_is_for_one_call(model):
    """After a call with an instruction, or one that failed, the next call has none."""
    inputs = text()
    expected = outputs(model, inputs)
    outputs(model, inputs | {"instruction_embeds": torch.randn(2, 5)})
    assert torch.equal(outputs(model, inputs), expected)
    with pytest.raises(ValueError, match="instruction_embeds"):
        outputs(model, inputs | {"instruction_embeds": torch.randn(3, 5)})
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {}], ids=str)
def test_instructions_follow_generation(model, settings):
    """Each row keeps its own instruction through all steps, however often `generate` repeats rows."""
    ids, embeds = token_ids(2, 3), 5 * torch.randn(2, 5)
    settings = settings | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(input_ids=ids[row : row + 1], instruction_embeds=embeds[row : row + 1], **settings)
        for row in range(2)
    ]
    assert torch.equal(model.generate(input_ids=ids, instruction_embeds=embeds, **settings), torch.cat(alone))
    swapped = model.generate(input_ids=ids, instruction_embeds=embeds.flip(0), **settings)
    assert not torch.equal(swapped, torch.cat(alone))


@pytest.mark.parametrize(
    "embeds",
    [torch.randn(2, 4), torch.randn(5), torch.randn(2, 1, 5), torch.randn(3, 5), [[0.0] * 5] * 2],
    ids=["width", "one axis", "three axes", "rows", "list"],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_instruction_is_refused(model, embeds, call):
    """`instruction_embeds` of another shape or kind raises a ValueError that says what fits."""
    function = model if call == "forward" else partial(model.generate, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`instruction_embeds`.*(\[batch, 5\]|rows)"):
        function(input_ids=token_ids(), instruction_embeds=embeds)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_instruction_to_an_adapter_without(call):
    """An adapter that takes no instruction raises a ValueError that says so."""
    model = adapted(llama(), target_modules=["q_proj"])
    function = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=r"`instruction_embeds`.*'default' takes no instruction.*`instruction_dim"):
        function(input_ids=token_ids(), instruction_embeds=torch.randn(2, 5))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_doors_of_a_call(task_type):
    """Through PeftModel, its class for the task, the tuner or the base model, the same call gives the same logits."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, instruction_dim=5, task_type=task_type)
    randomise(model)
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    expected = outputs(model, inputs)
    for door in (model.base_model, model.base_model.model, model.get_base_model()):
        assert torch.equal(outputs(door, inputs), expected)
    positional = model(inputs["input_ids"], inputs["attention_mask"], instruction_embeds=inputs["instruction_embeds"])
    assert torch.equal(positional.logits, expected)


def test_the_tuner_is_what_peft_finds(model):
    """The PEFT model wraps our tuner, and a T5 gets the class of its task."""
    assert isinstance(model.base_model, QueryableLoraModel)
    seq2seq = adapted(t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    assert type(seq2seq).__name__ == "PeftModelForSeq2SeqLM"
    ids = seq2seq.generate(input_ids=token_ids(), max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2 and ids.max() < VOCAB
