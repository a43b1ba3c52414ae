"""Several adapters of one model: active, disabled, deleted, loaded beside each other, frozen and thawed."""

import copy

import pytest
import torch
from models import adapted, assert_one_router, learned, llama, mlp, outputs, randomise, text
from peft import PeftModel, get_peft_model
from torch import nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.layer import QueryableLoraLayer


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
    assert len({p.requires_grad for p in learned(loaded)}) == 1


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
    assert {p.requires_grad for p in learned(model, "one")} == {True}


def test_a_further_adapter_is_frozen_until_it_is_set():
    """`add_adapter` changes neither what trains nor the outputs."""
    model = adapted(mlp(), target_modules=["first"])
    randomise(model)
    inputs = {"x": torch.randn(2, 3, 8)}
    expected = outputs(model, inputs)
    model.add_adapter("other", QueryableLoraConfig(r=2, target_modules=["first", "second"]))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    assert all(p.requires_grad for p in learned(model))
    assert torch.equal(outputs(model, inputs), expected)


def test_loaded_adapters_are_frozen(model, folder, base):
    """A loaded adapter is frozen, bank included; `is_trainable=True` and `set_adapter` thaw all of it."""
    frozen = PeftModel.from_pretrained(base, folder)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen.set_adapter("default")
    thawed = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    for each in (frozen, thawed):
        assert {p.requires_grad for p in learned(each)} == {True}


def test_a_frozen_adapter_beside_a_trained_one(model, folder):
    """An adapter loaded beside a trained one stays frozen, and leaves the trained one as it was."""
    model.load_adapter(folder, "reference")
    assert {p.requires_grad for name, p in model.named_parameters() if ".reference." in name} == {False}
    assert {p.requires_grad for p in learned(model)} == {True}
    assert_one_router(model, "reference")
    inputs = text()
    expected = outputs(model, inputs)
    model.set_adapter("reference")
    assert torch.equal(outputs(model, inputs), expected)


def test_weighted_adapters_are_refused(model):
    """LoRA's `add_weighted_adapter` raises an error that says why, and what to do."""
    with pytest.raises(NotImplementedError, match=r"do not add up\..*`model\.base_model\.set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
