"""Exports by name, made from the adapter's folder alone, and the plugin that gives them to vLLM."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.fixed import trained
from helpers.models import LLAMA_PROJECTIONS, llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_queryable import (
    InstructionEncoder,
    export_lora,
    instruction_routes,
    set_default_instruction,
)
from peft_queryable.export import on_demand, vllm
from peft_queryable.export.on_demand import Exports

DIM = 5
TENSORS = "adapter_model.safetensors"


class Letters(InstructionEncoder):
    """In the place of a sentence-transformers model: a random vector for each text."""

    def __init__(self, name: str = "letters", revision: str | None = None) -> None:
        self.name, self.revision = name, revision

    def encode(self, texts: list[str]) -> torch.Tensor:
        seeds = [sum(map(ord, text)) for text in texts]
        return torch.stack([torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


FIELDS = {
    "instructed": {"query_terms": ("instruction",), "instruction_dim": DIM, "instruction_encoder": "letters"},
    "static": {"query_terms": ()},
    "routed": {},
    "backbone": {"query_terms": ("instruction",), "instruction_encoder": "backbone"},
    "centred": {"query_terms": ("instruction",), "instruction_encoder": "backbone-centred"},
    "saved": {"query_terms": (), "modules_to_save": ["lm_head"]},
}


@pytest.fixture
def exports(tmp_path, monkeypatch) -> Exports:
    """Adapters of every kind, in the folder `adapters`."""
    monkeypatch.setattr("peft_queryable.encoders.SentenceEncoder", Letters)
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    for name, fields in FIELDS.items():
        base = AutoModelForCausalLM.from_pretrained("base")
        model = trained(base, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM", **fields)
        model.save_pretrained(Path("adapters", name))
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained("adapters/plain")
    return Exports(Path("adapters"), Path("exports"))


def loaded(name: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), f"adapters/{name}").eval()


def assert_same(folder: Path, expected: Path) -> None:
    """Both hold the same LoRA, to the bit."""
    actual, other = load_file(folder / TENSORS), load_file(expected / TENSORS)
    assert actual.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in actual.items())
    assert (folder / "adapter_config.json").read_text() == (expected / "adapter_config.json").read_text()


def test_exports_are_those_of_the_whole_model(exports):
    """Without the base model's weights, an export is the same, of an instruction, a default and no routes at all."""
    for text in ("Add the numbers.", "Sort."):
        model = loaded("instructed")
        export_lora(model, f"expected/{text}", instruction_routes(model, text))
        assert_same(exports.find(f"instructed@{text}"), Path("expected", text))
    first, second = (load_file(exports.find(f"instructed@{t}") / TENSORS) for t in ("Add the numbers.", "Sort."))
    assert any(not torch.allclose(first[key], second[key], atol=1e-3) for key in first)
    export_lora(loaded("static"), "expected/static")
    assert_same(exports.find("static"), Path("expected/static"))
    model = loaded("instructed")
    set_default_instruction(model, "Sort.")
    model.save_pretrained("adapters/ready")
    export_lora(loaded("ready"), "expected/ready")
    assert_same(exports.find("ready"), Path("expected/ready"))


def test_the_base_needs_no_weights(exports):
    """The configuration of the base model is enough."""
    os.remove("base/model.safetensors")
    assert (exports.find("instructed@Sort.") / TENSORS).exists()


def test_groups(exports):
    """What lies in the adapter's `groups` is found by its name, of any adapter."""
    model = loaded("instructed")
    export_lora(model, "adapters/routed/groups/legal", instruction_routes(model, "Sort."))
    assert exports.find("routed@legal") == Path("adapters/routed/groups/legal")
    assert not Path("exports").exists()


def test_made_once(exports, monkeypatch):
    """Eight threads that ask for one name get one export, and a changed adapter gets another."""
    made, start = [], threading.Barrier(8)

    def counted(*arguments) -> None:
        made.append(arguments)
        export_lora(*arguments)

    def ask(_: int) -> Path | None:
        start.wait()
        return exports.find("instructed@Sort.")

    monkeypatch.setattr(on_demand, "export_lora", counted)
    with ThreadPoolExecutor(8) as pool:
        (found,) = set(pool.map(ask, range(8)))
    assert len(made) == 1
    assert [path.name for path in Path("exports").iterdir()] == [found.name]
    Path("adapters/instructed", TENSORS).write_bytes(changed("instructed"))
    assert exports.find("instructed@Sort.") != found and len(made) == 2


def changed(name: str) -> bytes:
    """The tensors of the adapter with other values."""
    model = loaded(name)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.save_pretrained("changed")
    return Path("changed", TENSORS).read_bytes()


def test_another_process_was_faster(exports, monkeypatch):
    """An export that appears while it is being made is taken; of one that fails, nothing is left."""

    def late(*arguments) -> None:
        export_lora(*arguments)
        export_lora(*arguments)

    monkeypatch.setattr(on_demand, "export_lora", late)
    assert (exports.find("instructed@Sort.") / TENSORS).exists()
    monkeypatch.setattr("peft_queryable.export.lora.write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exports.find("instructed@Add.")
    assert len(list(Path("exports").iterdir())) == 1


REFUSED = {
    "routed": r"depend on the tokens.*there are \[\].*export routed routed/groups/NAME --calibrate",
    "routed@Sort.": "depend on the tokens",
    "backbone@Sort.": "weights are not loaded here.*groups/NAME --instruction 'Sort.'",
    "centred@Sort.": "weights are not loaded here.*groups/NAME --instruction 'Sort.'",
    "instructed": "'instructed' has no default instruction. Ask for instructed@TEXT",
    "static@Sort.": "'static' takes no instruction. Ask for 'static'",
    "saved": r"carries \['modules_to_save'\].*--merge",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(exports, name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        exports.find(name)
    assert not Path("exports").exists() or not list(Path("exports").iterdir())


def test_groups_are_named(exports):
    """Who asks for a group that does not exist is told of those that do."""
    model = loaded("instructed")
    export_lora(model, "adapters/routed/groups/legal", instruction_routes(model, "Sort."))
    with pytest.raises(ValueError, match=r"there are \['legal'\]"):
        exports.find("routed@medical")


DAMAGED = {
    "instructed@Sort.": f"adapters/instructed/{TENSORS}",
    "routed@legal": f"adapters/routed/groups/legal/{TENSORS}",
    "routed@news": "adapters/routed/groups/news/adapter_config.json",
    "static": "adapters/static/adapter_config.json",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(exports, name):
    """A file that is cut off or missing is a ValueError that names it and no path, and nothing is made."""
    for group in ("legal", "news"):
        export_lora(loaded("static"), f"adapters/routed/groups/{group}")
    path = Path(DAMAGED[name])
    said = pytest.raises(ValueError, match=f"The file {path.name} of .* is missing or damaged. Copy or make it anew")
    path.write_bytes(path.read_bytes()[:-40])
    with said:
        exports.find(name)
    path.unlink()
    if path.name == TENSORS:  # without a configuration, it is no adapter
        with said:
            exports.find(name)
    assert not Path("exports").exists()


def test_long_names(exports):
    """A name that is too long for a folder is one of no adapter, and a text, of an adapter with groups too."""
    assert exports.find("n" * 300) is None
    assert exports.find("n" * 300 + "@Sort.") is None
    model, text = loaded("instructed"), "Sort the numbers. " * 20
    export_lora(model, "adapters/instructed/groups/legal", instruction_routes(model, "Sort."))
    export_lora(model, "expected", instruction_routes(model, text))
    assert_same(exports.find(f"instructed@{text}"), Path("expected"))


def test_what_is_not_ours(exports):
    """Other resolvers may know other names; a name leads out of no folder."""
    (Path("adapters") / "adapter_config.json").write_text(Path("adapters/static/adapter_config.json").read_text())
    for name in ("nobody", "nobody@Sort.", "plain", "", "..", "../adapters/static", "static/.", "@Sort."):
        assert exports.find(name) is None
    Path("adapters/later").mkdir()
    Path("adapters/later/adapter_config.json").write_text('{"peft_type": "LATER"}')
    assert exports.find("later") is None
    with pytest.raises(ValueError, match="takes no instruction"):
        exports.find("static@..")
    with pytest.raises(ValueError, match="is of the base model 'base', but this serves 'other'"):
        exports.find("static", "other")


@pytest.fixture
def engine(monkeypatch) -> dict:
    """What stands for vLLM: the two modules that the plugin imports. Returns its registry."""
    registry = {}

    class LoRAResolver:
        pass

    class LoRAResolverRegistry:
        @classmethod
        def register_resolver(cls, name, resolver) -> None:
            registry[name] = resolver

    @dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str = ""

    resolver, request = ModuleType("vllm.lora.resolver"), ModuleType("vllm.lora.request")
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = LoRAResolver, LoRAResolverRegistry
    request.LoRARequest = LoRARequest
    for module in (ModuleType("vllm"), ModuleType("vllm.lora"), resolver, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry


def test_plugin(exports, engine, monkeypatch):
    """It registers where a folder is named, and resolves names side by side."""
    vllm.register()
    assert not engine
    monkeypatch.setenv("PEFT_QUERYABLE_ADAPTERS", "nowhere")
    with pytest.raises(ValueError, match="must name a folder"):
        vllm.register()
    monkeypatch.setenv("PEFT_QUERYABLE_ADAPTERS", "adapters")
    vllm.register()
    resolver = engine["peft_queryable"]

    async def ask() -> list:
        names = ["instructed@Sort.", "instructed@Sort.", "instructed@Add.", "static", "nobody"]
        return await asyncio.gather(*(resolver.resolve_lora("base", name) for name in names))

    first, second, third, fourth, unknown = asyncio.run(ask())
    assert unknown is None
    assert first == second and first.lora_name == "instructed@Sort." and Path(first.lora_path).is_absolute()
    assert len({each.lora_path for each in (first, third, fourth)}) == 3
    assert len({each.lora_int_id for each in (first, third, fourth)}) == 3
    assert min(each.lora_int_id for each in (first, third, fourth)) > 0
    assert Path(first.lora_path).parent == Path("exports").absolute()
    assert_same(Path(first.lora_path), exports.find("instructed@Sort."))
