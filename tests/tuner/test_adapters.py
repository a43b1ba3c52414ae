"""Several adapters of one model: active, disabled, deleted, loaded beside each other, frozen and thawed."""

import copy
import itertools
from contextlib import ExitStack

import pytest
import torch
from helpers.models import (
    adapted,
    alone,
    assert_one_router,
    learned,
    llama,
    mlp,
    outputs,
    randomise,
    text,
    token_ids,
    two_adapters,
)
from helpers.reference import Call, Tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.tuner.layer import QueryableLoraLayer


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


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_disabling_inside_disabling(model, base, depth):
    """`disable_adapter` may be nested; the adapter is back when the outermost ends."""
    inputs = text()
    expected, at_work = outputs(base, inputs), outputs(model, inputs)
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(model.disable_adapter())
        with model.disable_adapter():
            pass
        assert torch.equal(outputs(model, inputs), expected)
    assert torch.equal(outputs(model, inputs), at_work)


def test_disabling_as_a_switch(model, base):
    """`disable_adapter_layers` and `enable_adapter_layers` do the same until further notice, and freeze and thaw."""
    inputs = text()
    expected, at_work = outputs(base, inputs), outputs(model, inputs)
    for switch, result in (("disable_adapter_layers", expected), ("enable_adapter_layers", at_work)):
        getattr(model.base_model, switch)()
        assert torch.equal(outputs(model, inputs), result)
        assert {p.requires_grad for p in learned(model, "default")} == {result is at_work}


# Several adapters


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
        assert {p.requires_grad for p in learned(model, "one")} == {requires_grad}
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


THREE = {
    "one": QueryableLoraConfig(
        r=4, num_atoms=6, top_k=3, router_dim=8, target_modules=["q_proj", "k_proj", "down_proj"], num_blocks=3
    ),
    "two": QueryableLoraConfig(
        r=2,
        lora_alpha=5,
        num_atoms=3,
        top_k=2,
        num_blocks=1,
        router_dim=4,
        target_modules=["v_proj", "down_proj"],
        layers_to_transform=[1, 2],
        routing_scope="sequence",
    ),
    "three": QueryableLoraConfig(
        r=3, num_atoms=4, top_k=None, router_dim=4, target_modules=["k_proj", "o_proj"], routing_scope="prompt"
    ),
}


@pytest.mark.parametrize(
    "active", [c for n in (1, 2, 3) for c in itertools.permutations(THREE, n) if n == 2 or [*c] == sorted(c)], ids=str
)
def test_active_adapters_add_up(active):
    """Whatever their ranks, banks, blocks, scopes and targets, at each module each active adapter adds what the loops
    of reference.py say it adds, in any order of activation.
    """
    base = llama().double()
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(THREE["one"]), "one", autocast_adapter_dtype=False)
    for name in ("two", "three"):
        model.add_adapter(name, copy.deepcopy(THREE[name]), autocast_adapter_dtype=False)
    for name in THREE:
        randomise(model, name)
    model.base_model.set_adapter(list(active))
    ids = token_ids(2, 5)
    tokens, parameters = Tokens(2, 5), dict(model.named_parameters())
    with torch.no_grad(), ExitStack() as stack:
        for name in active:
            scope = THREE[name].routing_scope.replace("auto", "causal")
            stack.enter_context(Call(parameters, THREE[name], scope, tokens, adapter=name).on(base))
        expected = base(ids).logits
    torch.testing.assert_close(outputs(model.eval(), {"input_ids": ids}), expected, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning")
def test_delete_adapter():
    """A deleted adapter leaves nothing behind, and the other works as before."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    model.set_adapter("two")
    expected = outputs(model, inputs)
    model.delete_adapter("one")
    assert not [name for name in model.state_dict() if ".one." in name]
    assert "one" not in model.peft_config
    for stack in model.base_model.stacks:
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


@pytest.mark.filterwarnings("ignore:Adapter two was active which is now deleted:UserWarning")
def test_one_adapter_takes_the_place_of_a_deleted_one():
    """Layers that the deleted adapter alone adapted have no say in which one is active then: it is one for all."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    model.add_adapter("alpha", QueryableLoraConfig(r=2, target_modules=["second"], num_atoms=4))
    randomise(model, "alpha")
    model.set_adapter("two")
    expected = outputs(alone(model, "alpha"), inputs)
    model.delete_adapter("two")
    assert model.active_adapters == ["alpha"]
    assert torch.equal(outputs(model.eval(), inputs), expected)


@pytest.mark.filterwarnings("ignore:Adapter two was active which is now deleted:UserWarning")
def test_others_stay_active_when_one_is_deleted():
    """Of several active adapters the others stay so."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    expected = outputs(alone(model, "one"), inputs)
    model.base_model.set_adapter(["one", "two"])
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert torch.equal(outputs(model, inputs), expected)


TRAINED_BESIDE = [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}]


@pytest.mark.parametrize("fields", TRAINED_BESIDE, ids=str)
@pytest.mark.parametrize("config_class", [LoraConfig, QueryableLoraConfig], ids=lambda config: config.__name__)
def test_delete_the_last_adapter(config_class, fields):
    """Without its last adapter the model is its base, whatever was trained beside it; as plain LoRA."""
    base, inputs = llama(), text()
    config = config_class(r=4, target_modules=["q_proj"], **fields)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomise(model)
    assert not torch.equal(outputs(model, inputs), outputs(base, inputs))
    model.delete_adapter("default")
    assert model.active_adapters == [] and model.peft_config == {}
    assert torch.equal(outputs(model.base_model, inputs), outputs(base, inputs))
    if not fields:  # else PEFT itself refuses another adapter in place of the last one
        model.add_adapter("other", config)
        model.set_adapter("other")
        randomise(model, "other")
        assert not torch.equal(outputs(model, inputs), outputs(base, inputs))
        assert {p.requires_grad for p in learned(model, "other")} == {True}


def test_deleting_another_adapter_thaws_nothing(model, folder, base):
    """A frozen adapter stays frozen, bank included, when one that is not active is deleted."""
    frozen = PeftModel.from_pretrained(base, folder)
    frozen.load_adapter(folder, "second")
    frozen.delete_adapter("second")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_an_adapter_may_come_back_under_its_name():
    """After `delete_adapter` another configuration of the same name is as in a model of its own."""
    model, inputs = two_adapters(), {"x": torch.randn(2, 3, 8)}
    model.delete_adapter("two")
    config = QueryableLoraConfig(r=3, num_atoms=5, router_dim=4, target_modules=["first", "second"], num_blocks=1)
    model.add_adapter("two", config)
    randomise(model, "two")
    model.set_adapter("two")
    assert torch.equal(outputs(model.eval(), inputs), outputs(alone(model, "two"), inputs))


def test_a_refused_adapter_leaves_nothing_behind(tmp_path):
    """After a refused `add_adapter` one of the same name adapts its own modules alone, and loads."""
    base, inputs = llama(), text()
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"])
    randomise(model)
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match="'lm_head' cannot be adapted"):
        model.add_adapter("other", QueryableLoraConfig(r=2, target_modules=["k_proj", "q_proj", "lm_head"]))
    assert not [name for name in model.state_dict() if ".other." in name]
    assert torch.equal(outputs(model, inputs), expected)
    model.add_adapter("other", QueryableLoraConfig(r=3, target_modules=["v_proj"]))
    randomise(model, "other")
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "other").eval()
    assert torch.equal(outputs(loaded, inputs), outputs(model.eval(), inputs))


def test_rename_by_loading(model, folder, base):
    """A saved adapter loads under any name, and is saved again with the same tensors."""
    renamed = PeftModel.from_pretrained(base, folder, adapter_name="better", is_trainable=True).eval()
    inputs = text()
    assert torch.equal(outputs(renamed, inputs), outputs(model, inputs))
    assert {p.requires_grad for p in learned(renamed, "better")} == {True}
    renamed.save_pretrained(folder.parent)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, folder.parent / "better"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("is_trainable", [True, False])
def test_load_adapter_trainable(model, folder, is_trainable):
    """`is_trainable` says whether the whole of an adapter that is loaded beside another trains."""
    model.load_adapter(folder, "second", is_trainable=is_trainable)
    assert {p.requires_grad for p in learned(model, "second")} == {is_trainable}


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
