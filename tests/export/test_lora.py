"""Fixed routes, the LoRA that is exported, and the merged model are one, in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.fixed import close, random_routes, trained
from helpers.models import (
    ARCHITECTURES,
    LLAMA_PROJECTIONS,
    gpt2,
    llama,
    opt,
    outputs,
    text,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_queryable import (
    Routes,
    export_lora,
    fix_routes,
)
from peft_queryable.tuner.layer import QueryableLoraLayer


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


pytestmark = [
    pytest.mark.filterwarnings("ignore:The export carries:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. . LoRA tensor.*invalid shape:peft.utils.warning.PeftWarning"
    ),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


FORMS = (
    {name: (a.build, a.inputs, {"target_modules": a.targets}) for name, a in ARCHITECTURES.items()}
    | {
        f"llama {name}": (llama, text, {"target_modules": LLAMA_PROJECTIONS} | fields)
        for name, fields in {
            "prompt": {"routing_scope": "prompt"},
            "rslora, alpha_pattern": {
                "use_rslora": True,
                "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp.down_proj": 5},
            },
            "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
            "tokens": {"trainable_token_indices": [3, 5, 9]},
            "layers": {"layers_to_transform": [1, 3]},
            "regex": {"target_modules": r".*layers\.[13].*(q|down)_proj"},
            "orthogonal": {"init_lora_weights": "orthogonal"},
            "instruction": {"instruction_dim": 5},
            "all-linear": {"target_modules": "all-linear"},
        }.items()
    }
    | {
        "opt bias": (opt, text, {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
        "opt lora_bias": (opt, text, {"target_modules": ["q_proj", "fc1"], "lora_bias": True, "lora_alpha": 3}),
        "gpt2 fan_in_fan_out": (gpt2, text, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    }
)


@pytest.mark.filterwarnings("ignore:.*has the routing scope 'prompt':UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_export_and_merge_equal_fixed_routes(form, tmp_path):
    build, make_inputs, fields = FORMS[form]
    base, inputs = build(), make_inputs()
    model = trained(copy.deepcopy(base), **fields)
    routes, routed = random_routes(model), outputs(model, inputs)
    with fix_routes(model, routes):
        fixed = outputs(model, inputs)
    assert (fixed - routed).abs().max() > 1e-4
    close(outputs(model, inputs), routed)

    export_lora(model, tmp_path / "lora", routes)
    exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert exported.peft_config["default"].peft_type == "LORA"
    close(outputs(exported, inputs), fixed)

    with fix_routes(model, routes):
        model.merge_adapter()
    close(outputs(model, inputs), fixed)  # outside of the block too: it is in the weights
    model.unmerge_adapter()
    close(outputs(model, inputs), routed)
    with fix_routes(model, routes):
        merged = model.merge_and_unload(safe_merge=True)
    close(outputs(merged, inputs), fixed)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())
    assert "generate" not in vars(merged)


def other_gate(layer, operator):
    return torch.eye(len(operator)) + (operator - torch.eye(len(operator))) * 1.01


MISTAKES = {
    "gate": other_gate,
    "transposition": lambda layer, operator: operator.T,
    "no identity": lambda layer, operator: operator - torch.eye(len(operator)),
    "scaling": lambda layer, operator: operator * 1.01,
}


@pytest.mark.parametrize("mistake", [*MISTAKES, "block"])
def test_a_mistake_shows(mistake, tmp_path, monkeypatch):
    """The comparison above fails if gate, scaling, block or transposition are wrong."""
    base, inputs = llama(), text()
    model = trained(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS)
    routes, right = random_routes(model), QueryableLoraLayer.rank_operator
    with fix_routes(model, routes):
        fixed = outputs(model, inputs)
    if mistake == "block":
        weights = list(routes.weights.values())
        routes = Routes(dict(enumerate([weights[1], weights[0], *weights[2:]])))
    else:
        monkeypatch.setattr(
            QueryableLoraLayer, "rank_operator", lambda self, *args: MISTAKES[mistake](self, right(self, *args))
        )
    export_lora(model, tmp_path / "lora", routes)
    exported = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with pytest.raises(AssertionError):
        close(outputs(exported, inputs), fixed)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_moved_base_weights(init, tmp_path):
    """No LoRA on the original base equals the adapter: the export is refused, the merged model is right."""
    base = llama().float()  # which is what PEFT can decompose
    model, inputs = trained(base, target_modules=["q_proj"], init_lora_weights=init).double(), text()
    routes = random_routes(model)
    with pytest.raises(ValueError, match=f"'{init}'.*moved a part of the base weights"):
        export_lora(model, tmp_path / "lora", routes)
    assert list(tmp_path.iterdir()) == []
    with fix_routes(model, routes):
        fixed = outputs(model, inputs)
        close(outputs(model.merge_and_unload(), inputs), fixed)


def test_folders(tmp_path, monkeypatch):
    """The adapter's own folder, and one that holds anything, are refused; an error leaves nothing behind."""
    model = trained(llama(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(ValueError, match="holds an adapter of the type QUERYABLE_LORA"):
        export_lora(model, tmp_path / "adapter", random_routes(model))
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match="is not empty"):
        export_lora(model, tmp_path / "full", random_routes(model))
    monkeypatch.setattr("peft_queryable.export.lora.write_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_lora(model, tmp_path / "out", random_routes(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "full"]


def test_what_the_export_says(tmp_path):
    """The card and routes.json name source, routes and losses; engines that refuse a part are named in a warning."""
    model = trained(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    routes = Routes(random_routes(model).weights, source="a test")
    with pytest.warns(UserWarning, match=r"carries \['modules_to_save'\], which vLLM refuses"):
        export_lora(model, tmp_path / "lora", routes, losses={"routed": 1.0, "fixed": 1.5})
    said = json.loads((tmp_path / "lora" / "routes.json").read_text())
    assert said["source"] == "a test" and said["losses"] == {"routed": 1.0, "fixed": 1.5}
    close(torch.tensor(said["weights"]["2"]), routes.weights[2])
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "a test" in card and "| 1.0000 | 1.5000 |" in card


def test_transformers_loads_the_export(tmp_path, any_peft):
    """`from_pretrained(OUT)` and `load_adapter` of transformers answer as the model under fixed routes."""
    base, inputs = llama(), text()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = trained(base, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM")
    routes = random_routes(model)
    export_lora(model, tmp_path / "lora", routes)
    with fix_routes(model, routes):
        fixed = outputs(model, inputs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float64)
    close(outputs(loaded, inputs), fixed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    loaded.load_adapter(str(tmp_path / "lora"))
    close(outputs(loaded, inputs), fixed)
