"""The tuner as a PEFT model: parameters, gradients, merging and unloading."""

import pytest
import torch
import transformers
from helpers.models import (
    ARCHITECTURES,
    LAYERS,
    LLAMA_PROJECTIONS,
    MLP,
    ROUTER_KEY,
    VOCAB,
    adapted,
    assert_one_router,
    llama,
    mlp,
    outputs,
    randomise,
    router_of,
    sgd,
    t5,
    text,
    token_ids,
    train_step,
)
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from peft_queryable import QueryableLoraConfig, QueryableLoraModel, use_instructions

# Parameters

DEPTH = {"depth_value", "depth_query", "depth_key"}


def test_parameter_tree():
    """The state dict has A, B and a gate for each module, and the bank once, under names that carry the prefix."""
    model = adapted(MLP(), target_modules=["first", "third"], instruction_dim=5)
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    expected = {
        ROUTER_KEY + "atoms.weight": (6, 4, 4),
        ROUTER_KEY + "keys.weight": (6, 8),
        ROUTER_KEY + "block_prior.weight": (2, 8),
        ROUTER_KEY + "state_query.weight": (8, 4),
        ROUTER_KEY + "depth_value.weight": (8, 4),  # and no more of depth: the second of two blocks has no choice
        ROUTER_KEY + "default_instruction.weight": (1, 5),
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
    assert {name.replace(".default.", ".") for name in trainable} == set(expected) - {
        ROUTER_KEY + "default_instruction.weight"
    }


SHORT_STACKS = {
    "one block": (llama, text, {"num_blocks": 1}, set()),
    "one layer": (llama, text, {"layers_to_transform": [2]}, set()),
    "two blocks": (llama, text, {"num_blocks": 2}, {"depth_value"}),
    "three blocks": (llama, text, {"num_blocks": 3}, DEPTH),
    "one block per stack": (t5, ARCHITECTURES["t5"].inputs, {"num_blocks": 1, "target_modules": ["q", "k"]}, set()),
    "two blocks per stack": (
        t5,
        ARCHITECTURES["t5"].inputs,
        {"num_blocks": 2, "target_modules": ["q"]},
        {"depth_value"},
    ),
}


@pytest.mark.parametrize("case", SHORT_STACKS)
def test_every_parameter_can_learn(case):
    """The router has the depth projections that some block of some stack learns from, and no others."""
    build, inputs, fields, expected = SHORT_STACKS[case]
    model = adapted(build(), **({"target_modules": ["q_proj", "v_proj"]} | fields)).train()
    randomise(model)
    model(**inputs()).logits.square().mean().backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in parameters if ".depth_" in name} == expected
    assert not [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]


def test_trainable_parameters_count_the_bank_once(capsys):
    """`print_trainable_parameters` says LoRA's number, a gate per module, and one router."""
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


def test_an_adapter_is_made_without_weights():
    """Under `torch.device("meta")`, as plain LoRA is."""
    with torch.device("meta"):
        model = adapted(llama(), target_modules=["q_proj"])
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
    constant = {name for name in first if "lora_B" in name or "lora_gate" in name or ".default_instruction." in name}
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


@pytest.mark.filterwarnings("ignore:With `top_k=1`")
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "t5"])
def test_no_gradient_is_missing(name):
    """No trainable tensor is without a gradient in any architecture, top-k and no instruction notwithstanding."""
    architecture = ARCHITECTURES[name]
    model = adapted(architecture.build(), target_modules=architecture.targets, top_k=1, instruction_dim=5).train()
    with use_instructions(model, None):
        model(**architecture.inputs())  # that there is none has to be said once
    result = model(**architecture.inputs()).logits
    (result * torch.randn_like(result)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("terms", [(), ("state",), ("depth",), ("state", "depth")], ids=str)
def test_no_gradient_is_missing_without_terms(terms):
    """A query without some of its terms leaves no trainable tensor unused."""
    model = adapted(llama(), target_modules=["q_proj", "down_proj"], query_terms=terms, instruction_dim=5).train()
    with use_instructions(model, None):
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


# Base model, merging, unloading


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


def test_the_tuner_is_what_peft_finds(model):
    """The PEFT model wraps our tuner, and a T5 gets the class of its task."""
    assert isinstance(model.base_model, QueryableLoraModel)
    seq2seq = adapted(t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    assert type(seq2seq).__name__ == "PeftModelForSeq2SeqLM"
    ids = seq2seq.generate(input_ids=token_ids(), max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2 and ids.max() < VOCAB


def test_direct_injection_is_refused():
    """`inject_adapter_in_model` makes no tuner to own the bank, so PEFT refuses it."""
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(QueryableLoraConfig(target_modules=["first"]), mlp())
