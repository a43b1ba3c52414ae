"""The model card that a saved adapter comes with: its metadata, its code, and what it leaves alone."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.models import ARCHITECTURES, adapted, llama, mlp, outputs, randomise
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from peft_queryable import QueryableLoraConfig, __version__, model_card
from peft_queryable.version import INSTALL

TEMPLATE_LINE = "[More Information Needed]"


def named_llama(name: str = "user/base"):
    """A tiny Llama that says it came from the Hub."""
    base = llama()
    base.name_or_path = base.config._name_or_path = name
    return base


def saved_card(model: PeftModel, folder: Path) -> ModelCard:
    model.save_pretrained(folder, save_embedding_layers=False)  # True and "auto" ask the Hub about the base model
    return ModelCard.load(folder / "README.md")


def test_saving_leaves_a_true_card(tmp_path):
    """`save_pretrained` leaves metadata, the method, how to install it and the configuration; nothing is unfilled."""
    model = adapted(named_llama(), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", num_blocks=2)
    card = saved_card(model, tmp_path)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "user/base",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:user/base", "peft", "queryable-lora", "transformers"],
    }
    for text in ("`B (I + g S) A`", "https://arxiv.org/abs/2605.08423", INSTALL, "- PEFT 0."):
        assert text in card.text
    assert TEMPLATE_LINE not in card.text
    assert "- `num_blocks`: 2\n" in card.text
    assert '- `target_modules`: ["q_proj", "v_proj"]\n' in card.text
    assert f'- `peft_queryable_version`: "{__version__}"\n' in card.text


def test_the_card_lists_every_field_of_the_method(tmp_path):
    """Each field that `LoraConfig` lacks is listed with the value in adapter_config.json."""
    card = saved_card(adapted(llama(), target_modules=["q_proj"], instruction_dim=5, top_k=None), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    listed = {name: json.loads(value) for name, value in re.findall(r"^- `(\w+)`: (.*)$", card.text, re.MULTILINE)}
    assert listed.items() <= saved.items()
    assert saved.keys() - LoraConfig().to_dict().keys() <= listed.keys()


@pytest.mark.parametrize(
    ("name", "task_type"),
    [("llama", "CAUSAL_LM"), ("llama", None), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("vit", None)],
)
def test_the_code_on_the_card_loads_the_adapter(name, task_type, tmp_path):
    """The snippet, with the folder in the adapter's place, gives the same model, bit by bit."""
    architecture = ARCHITECTURES[name]
    architecture.build().save_pretrained(tmp_path / "base")
    base = type(architecture.build()).from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=architecture.targets, task_type=task_type)
    randomise(model)
    card = saved_card(model, tmp_path / "adapter")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert code.startswith("import peft_queryable")
    namespace: dict = {}
    exec(code.replace("path-or-name-of-this-adapter", str(tmp_path / "adapter")), namespace)
    inputs = architecture.inputs()
    assert torch.equal(outputs(namespace["model"], inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", ["base", "/no/longer/here"])
def test_a_folder_is_no_base_model_on_the_hub(name, tmp_path, monkeypatch):
    """A base model from this machine is in the code, and not in the metadata, which the Hub would refuse."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    card = saved_card(adapted(named_llama(name), target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path)
    assert card.data.base_model is None
    assert card.data.tags == ["peft", "queryable-lora", "transformers"]
    assert f'from_pretrained("{name}")' in card.text
    assert f"huggingface.co/{name}" not in card.text


def test_the_revision_of_the_base_is_in_the_code(tmp_path):
    """A base model of a certain revision is loaded in that revision."""
    model = adapted(named_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM", revision="v2")
    assert 'from_pretrained("user/base", revision="v2")' in saved_card(model, tmp_path).text


def test_an_unknown_base_is_left_to_the_reader(tmp_path):
    """For a model that nothing can be loaded from by name the snippet says what belongs there."""
    card = saved_card(adapted(mlp(), target_modules=["first"]), tmp_path)
    assert "base_model = ...  # the model that the adapter was trained on\n" in card.text
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["peft", "queryable-lora"]}


def test_saving_again_brings_the_card_up_to_date(tmp_path):
    """Another adapter saved in the same folder is described, and text and metadata around our part stay."""
    card = saved_card(adapted(named_llama(), target_modules=["q_proj"]), tmp_path)
    card.text = card.text.replace("<!-- Written", "My words.\n\n<!-- Written", 1) + "\nMore of my words."
    card.data.license = "mit"
    card.save(tmp_path / "README.md")
    card = saved_card(adapted(named_llama("user/other"), target_modules=["q_proj"], r=2), tmp_path)
    assert "- `r`: 2\n" in card.text and "- `r`: 4\n" not in card.text
    assert card.text.count("# Queryable LoRA adapter") == 1
    assert card.text.startswith("\nMy words.\n\n<!--") and card.text.endswith("\nMore of my words.")
    assert (card.data.license, card.data.base_model) == ("mit", "user/other")
    assert "queryable-lora" in card.data.tags


def test_a_card_of_the_user_stays(tmp_path):
    """A card that someone wrote keeps its text, and gets PEFT's metadata, as with any adapter."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My adapter\n\nMy words.\n")
    card = saved_card(adapted(named_llama(), target_modules=["q_proj"]), tmp_path)
    lora = get_peft_model(named_llama(), LoraConfig(target_modules=["q_proj"]))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: mit\n---\n# My adapter\n\nMy words.\n")
    theirs = saved_card(lora, tmp_path / "lora")
    assert card.text == theirs.text
    assert card.text.startswith("# My adapter\n\nMy words.")
    assert {*card.data.to_dict()} == {*theirs.data.to_dict()}


def test_a_configuration_alone_writes_no_card(tmp_path):
    """Saving a configuration writes adapter_config.json and nothing else, and leaves a README.md that is there."""
    QueryableLoraConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    (tmp_path / "README.md").write_text("# A project\n")
    QueryableLoraConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# A project\n"


def test_model_card_of_a_folder(tmp_path):
    """`model_card` describes the adapter whatever README.md its folder has."""
    model = adapted(named_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved = saved_card(model, tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A trainer's card\n")
    card = model_card(tmp_path)
    card.save(tmp_path / "README.md")
    assert card.data.to_dict() == saved.data.to_dict()
    assert card.text.strip() in saved.text
    again = saved_card(copy.deepcopy(model), tmp_path)
    assert again.text.strip() == saved.text.strip()


def test_model_card_of_another_method_is_refused(tmp_path):
    """`model_card` of plain LoRA, or of a folder without an adapter, is a ValueError that names it."""
    with pytest.raises(ValueError, match=r"adapter_config\.json.*nothing"):
        model_card(str(tmp_path / "nothing"))
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has the type LORA: `model_card` takes QUERYABLE_LORA"):
        model_card(tmp_path)
