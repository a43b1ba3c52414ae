"""What PEFT has beside PeftModel: reports and helpers that work, and those for LoRA alone, which are refused."""

import pytest
import torch
from helpers.models import TARGETS, adapted, llama, outputs, randomise, router_of, text, two_adapters
from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import convert_to_lora, save_as_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from torch import nn


def test_weights_in_place(model, folder, base):
    """What hotswapping is for: `set_peft_model_state_dict` puts the weights of an equal configuration into place."""
    other, inputs = adapted(base, target_modules=TARGETS, instruction_dim=5), text()
    atoms = router_of(other).atoms.weight
    set_peft_model_state_dict(other, load_peft_weights(folder, device="cpu"))
    assert router_of(other).atoms.weight is atoms
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))


def test_weights_of_another_configuration_in_place(model, folder):
    """Weights that do not fit are refused by name, and change nothing."""
    other, inputs = adapted(llama(), target_modules=TARGETS), text()
    randomise(other)
    expected = outputs(other, inputs)
    with pytest.raises(ValueError, match=r"does not fit adapter 'default'.*instruction"):
        set_peft_model_state_dict(other, load_peft_weights(folder, device="cpu"))
    assert torch.equal(outputs(other, inputs), expected)


REFUSED = {
    "hotswap": (lambda m, f: hotswap_adapter(m, f, "default", torch_device="cpu"), "Hotswapping only supports LORA"),
    "convert_to_lora": (lambda m, f: convert_to_lora(m, rank=4), "do not support LoRA conversion"),
    "save_as_lora": (lambda m, f: save_as_lora(f, m, rank=4), "do not support LoRA conversion"),
    "conversion at saving": (
        lambda m, f: m.save_pretrained(f, path_initial_model_for_weight_conversion=f),
        "not supported for QueryableLoraModel",
    ),
    "intruder dimensions": (lambda m, f: reduce_intruder_dimension(m), "not using LoRA"),
    "LoftQ": (lambda m, f: replace_lora_weights_loftq(m, str(f / "model.safetensors")), "No bnb LoRA module|4bits"),
    "another method": (lambda m, f: m.add_adapter("x", LoraConfig(target_modules=["q_proj"])), "different peft types"),
    "mixed": (lambda m, f: get_peft_model(llama(), m.peft_config["default"], mixed=True), "not compatible"),
    "weighted": (lambda m, f: m.add_weighted_adapter(["default"], [1.0], "x"), r"do not add up\..*set_adapter"),
}


@pytest.mark.parametrize("helper", REFUSED)
def test_helpers_of_lora_are_refused(model, folder, helper, base):
    """A helper that PEFT has for LoRA alone raises an error that says so, and changes nothing."""
    base.save_pretrained(folder)
    call, message = REFUSED[helper]
    inputs = text()
    expected = outputs(model, inputs)
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        call(model, folder)
    assert torch.equal(outputs(model, inputs), expected)


def test_status():
    """PEFT's reports see both adapters, what is active, and what trains."""
    model = two_adapters()
    status = model.get_model_status()
    assert status.adapter_model_type == "QueryableLoraModel"
    assert status.peft_types == {"one": "QUERYABLE_LORA", "two": "QUERYABLE_LORA"}
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["one"], ["one", "two"])
    assert status.requires_grad == {"one": True, "two": False}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert [layer.name for layer in model.get_layer_status()] == ["model.first", "model.second", "model.third"]


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 2.0])
def test_rescaling(multiplier):
    """`rescale_adapter_scale` scales the update of each module while it lasts."""
    model = adapted(nn.Sequential(nn.Linear(8, 5)), target_modules=["0"])
    randomise(model)
    inputs = {"input": torch.randn(2, 3, 8)}
    whole = outputs(model, inputs)
    with model.disable_adapter():
        base = outputs(model, inputs)
    with rescale_adapter_scale(model, multiplier):
        torch.testing.assert_close(outputs(model, inputs), base + multiplier * (whole - base))
    assert torch.equal(outputs(model, inputs), whole)
