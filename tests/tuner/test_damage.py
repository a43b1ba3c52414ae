"""Adapter folders that are damaged, foreign or newer than the plugin: clear errors, and nothing is unpickled.

Missing, misshaped and left-over tensors are in test_saving.py.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import KEYS, reconfigure, rewrite
from helpers.models import TARGETS, adapted, llama, outputs, randomise, text
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_queryable import QueryableLoraConfig, __version__


@pytest.fixture
def model() -> PeftModel:
    """A tiny Llama with a random adapter that takes instructions, and a trained head."""
    model = adapted(llama(), target_modules=TARGETS, instruction_dim=5, modules_to_save=["lm_head"])
    randomise(model)
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [*KEYS, "base_model.model.lm_head.weight"], ids=lambda key: key.split(".")[-2])
def test_a_tensor_that_is_not_finite_is_refused(folder, key, value):
    """One NaN or infinity in any tensor raises a ValueError that names the tensor."""

    def change(tensors: dict) -> None:
        tensors[key].view(-1)[-1] = value

    rewrite(folder, change)
    name = key.split(".")[-2]
    with pytest.raises(
        ValueError, match=rf"adapter 'default' has NaN or infinite values in 1 of its tensors: \S*{name}"
    ):
        PeftModel.from_pretrained(llama(), folder)


def test_many_tensors_that_are_not_finite(folder):
    """The error counts all of them and names five."""
    rewrite(folder, lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])
    count = len(load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=rf"in {count} of its tensors: (\S+, ){{5}}\.\.\.\. Load one from before"):
        PeftModel.from_pretrained(llama(), folder)


def test_narrow_tensors_are_finite(folder, model):
    """A checkpoint in bfloat16 is not damaged."""
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert outputs(PeftModel.from_pretrained(llama(), folder).eval(), text()).isfinite().all()


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "header too small"), (b"\xff" * 100, "header too large"), (pickle.dumps([1] * 100), "header too large")],
    ids=["empty", "garbage", "pickle"],
)
def test_a_file_of_another_kind_is_refused(folder, content, message):
    """What is no safetensors file is safetensors' error, a pickle under that name too."""
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(SafetensorError, match=message):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("keep", [8, 200, -1])
def test_a_file_cut_short_is_refused(folder, keep):
    """A file that was cut anywhere is safetensors' error."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SafetensorError, match="Error while deserializing header"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_an_error(folder, name):
    """Without its configuration or its weights a folder is PEFT's or the Hub client's error, which names it."""
    (folder / name).unlink()
    with pytest.raises(ValueError, match=str(folder)):
        PeftModel.from_pretrained(llama(), str(folder))


def test_a_configuration_cut_short_is_refused(folder):
    """JSON that ends too early is JSON's error."""
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(json.JSONDecodeError):
        PeftModel.from_pretrained(llama(), folder)


# Pickles


class Malice:
    """Unpickled, it makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_a_malicious_pickle_executes_nothing(folder):
    """PEFT reads adapter_model.bin with torch's restricted unpickler: code inside it is an error, and does not run."""
    (folder / "adapter_model.safetensors").unlink()
    harm = folder / "harm"
    torch.save({"base_model.x": Malice(harm)}, folder / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(llama(), folder)
    assert not harm.exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert harm.exists()  # it would have


def test_a_pickle_beside_safetensors_is_not_read(folder, model):
    """With both files in the folder, adapter_model.bin plays no part."""
    torch.save({"base_model.x": Malice(folder / "harm")}, folder / "adapter_model.bin")
    loaded = PeftModel.from_pretrained(model.unload(), folder).eval()
    assert loaded.active_adapters == ["default"]
    assert not (folder / "harm").exists()


def test_an_adapter_saved_as_a_pickle_gets_the_same_checks(model, tmp_path):
    """`safe_serialization=False` saves adapter_model.bin, as PEFT does; it loads, and damage in it is refused."""
    inputs = text()
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    tensors = torch.load(path)
    assert torch.equal(outputs(PeftModel.from_pretrained(model.unload(), tmp_path).eval(), inputs), expected)
    tensors[KEYS[0]][:] = float("nan")
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 of its tensors: \S*atoms"):
        PeftModel.from_pretrained(llama(), tmp_path)


# Configurations of other types and other versions


def test_an_unknown_type_is_an_error(folder):
    """A type of adapter that nothing has registered is PEFT's KeyError, with its name."""
    reconfigure(folder, peft_type="FOREIGN")
    with pytest.raises(KeyError, match="FOREIGN"):
        PeftModel.from_pretrained(llama(), folder)


def test_our_adapter_called_lora_is_warned_of(folder):
    """Under the type LORA, PEFT warns that it leaves out the fields of the method."""
    reconfigure(folder, peft_type="LORA")
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments .*'num_atoms'.* for class LoraConfig"):
        PeftConfig.from_pretrained(folder)


def test_another_type_beside_ours_is_refused(model, tmp_path):
    """Plain LoRA does not load beside a Queryable LoRA adapter."""
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(tmp_path, "other")


def test_a_newer_configuration_loads_without_the_fields_it_adds(folder, model):
    """Fields that this version does not know are PEFT's warning, which names them; the rest loads."""
    inputs = text()
    expected = outputs(model, inputs)
    reconfigure(folder, new_field=3, peft_queryable_version="99.0")
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['new_field'\] for class QueryableLoraConfig"
    ):
        loaded = PeftModel.from_pretrained(model.unload(), folder).eval()
    assert torch.equal(outputs(loaded, inputs), expected)
    assert loaded.peft_config["default"].peft_queryable_version == "99.0"


def test_the_configuration_states_its_version(folder):
    """adapter_config.json has this version; one from before the field existed gets it when it loads."""
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("peft_queryable_version") == __version__
    path.write_text(json.dumps(saved))
    assert QueryableLoraConfig.from_pretrained(folder).peft_queryable_version == __version__


def test_the_configuration_is_plain(folder):
    """Every field of adapter_config.json is a scalar, a list of scalars or null, but for PEFT's own mappings."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    mappings = {name for name, value in saved.items() if isinstance(value, dict)}
    assert mappings == {"alpha_pattern", "auto_mapping", "loftq_config", "rank_pattern"}
    for name in saved.keys() - mappings:
        for item in saved[name] if isinstance(saved[name], list) else [saved[name]]:
            assert item is None or isinstance(item, str | int | float | bool)
