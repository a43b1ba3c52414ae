"""Fixed routes: the model under them, the LoRA that is exported, and the merged model are one, in float64."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.models import (
    ARCHITECTURES,
    LLAMA_PROJECTIONS,
    adapted,
    gpt2,
    llama,
    opt,
    outputs,
    randomise,
    text,
    two_adapters,
)
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from peft_queryable import (
    QueryableLoraConfig,
    Routes,
    export_lora,
    fix_routes,
    instruction_routes,
    mean_routes,
    record_routing,
    set_fixed_routes,
    use_instructions,
)
from peft_queryable.tuner.layer import QueryableLoraLayer

ATOL = 1e-12
pytestmark = [
    pytest.mark.filterwarnings("ignore:The export carries:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. . LoRA tensor.*invalid shape:peft.utils.warning.PeftWarning"
    ),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def random_routes(model: PeftModel, name: str = "default") -> Routes:
    """Other weights in every block, so that a block taken for another shows."""
    settings = model.base_model.queryable_lora_router[name].settings
    weights = torch.rand(settings.num_blocks, settings.num_atoms).softmax(-1)
    return Routes(dict(enumerate(weights)), name)


def trained(model: nn.Module, **fields) -> PeftModel:
    model = adapted(model, **fields)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    return model


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


def test_rows_have_routes_of_their_own():
    """A list fixes one set for each row; beams of `generate` follow their row."""
    model, inputs = trained(llama(), target_modules=LLAMA_PROJECTIONS), text()
    sets = [random_routes(model) for _ in range(2)]
    alone = []
    for row, routes in enumerate(sets):
        with fix_routes(model, routes):
            alone.append(outputs(model, {k: v[row : row + 1] for k, v in inputs.items()}))
    with fix_routes(model, sets):
        close(outputs(model, inputs), torch.cat(alone))
        with pytest.raises(ValueError, match="2 sets of routes were given for a call of batch size 1"):
            outputs(model, {k: v[:1] for k, v in inputs.items()})
        with pytest.raises(ValueError, match="fixed at 2 sets"):
            model.merge_adapter()
        beams = model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
        uncached = model.generate(
            **inputs, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False
        )
    assert torch.equal(beams, uncached)


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
def test_generation_is_the_exports(scope, tmp_path):
    base = llama(initializer_range=0.5)
    model = trained(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
    routes, ids = random_routes(model), text()["input_ids"]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    set_fixed_routes(model, routes)
    export_lora(model, tmp_path / "lora")
    fixed = model.generate(input_ids=ids, **arguments)
    chunked = model.generate(input_ids=ids, prefill_chunk_size=2, **arguments)
    set_fixed_routes(model, None)
    exported = PeftModel.from_pretrained(base, tmp_path / "lora").eval().generate(input_ids=ids, **arguments)
    assert torch.equal(fixed, exported)
    assert torch.equal(chunked, exported)
    assert not torch.equal(model.generate(input_ids=ids, **arguments), fixed)


def test_a_training_step_with_checkpointing():
    """Loss and gradients with checkpointing equal those without; whatever the router learns from gets a zero."""
    model, inputs = trained(llama(), target_modules=LLAMA_PROJECTIONS).train(), text()
    set_fixed_routes(model, random_routes(model))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        close(gradient, plain[name])
        assert (gradient.abs().max() > 0) == ("router" not in name or "atoms" in name), name


def test_mixed_batch_and_several_adapters():
    """Rows of a fixed adapter use its routes, those of another its router; two fixed adapters merge together."""
    model = two_adapters()
    inputs = {"x": torch.randn(4, 8)}
    routes = random_routes(model, "one")
    names = ["two", "one", "__base__", "one"]
    with fix_routes(model, routes):
        mixed = model(**inputs, adapter_names=names)
        model.set_adapter("one", inference_mode=True)
        close(mixed[[1, 3]], outputs(model, inputs)[[1, 3]])
    model.set_adapter("two", inference_mode=True)
    close(mixed[0], outputs(model, inputs)[0])
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(NotImplementedError, match="cannot be merged"), fix_routes(model, routes):
        model.merge_adapter()
    with fix_routes(model, routes), fix_routes(model, random_routes(model, "two")):
        both = outputs(model, inputs)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"while .* are merged"):
            model(**inputs, adapter_names=names)
    close(outputs(model, inputs), both)
    with model.disable_adapter():
        base = outputs(model, inputs)
    model.unload()
    close(base, outputs(model.base_model.model, inputs))


def test_static_adapters_need_no_routes(tmp_path):
    """An adapter whose query has no terms exports and merges as it is."""
    base, inputs = llama(), text()
    model = trained(copy.deepcopy(base), target_modules=["q_proj", "up_proj"], query_terms=())
    expected = outputs(model, inputs)
    export_lora(model, tmp_path / "lora")
    close(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora"), inputs), expected)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    close(outputs(model, inputs), expected)
    synced = {n.replace(".base_layer", ""): p.data for n, p in model.named_parameters() if model.prefix not in n}
    target = copy.deepcopy(base)
    missing = target.load_state_dict({n.removeprefix("base_model.model."): p for n, p in synced.items()}, strict=True)
    assert not missing.missing_keys
    close(outputs(target, inputs), expected)  # what TRL sends to vLLM is the whole merged model
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in weights:
            close(parameter, weights[name])


def test_instruction_routes(tmp_path):
    """Exact where nothing but the instruction chooses; elsewhere a mean over calibration data, which is asked for."""
    inputs = text()
    model = trained(llama(), target_modules=["q_proj"], query_terms=("instruction",), instruction_dim=5)
    embedding = torch.randn(1, 5)
    with use_instructions(model, embedding):
        expected = outputs(model, inputs)
    routes = instruction_routes(model, embedding)
    with fix_routes(model, routes):
        close(outputs(model, inputs), expected)
        with pytest.raises(
            ValueError, match="An instruction was given, but the routes of adapter 'default' are fixed"
        ):
            model(**inputs, instruction_embeds=embedding)
    with use_instructions(model, embedding), fix_routes(model, routes), pytest.raises(ValueError, match="are fixed"):
        model(**inputs)
    with pytest.raises(ValueError, match="depend on the input"):
        export_lora(model, tmp_path / "lora")
    model = trained(llama(), target_modules=["q_proj"], instruction_dim=5)
    with pytest.raises(ValueError, match="depend on the tokens too"):
        instruction_routes(model, embedding)
    calibrated = instruction_routes(model, embedding, calibration=[inputs])
    with use_instructions(model, embedding), record_routing(model) as trace:
        model(**inputs)
    close(calibrated.weights, mean_routes(trace).weights)
    assert "given: mean of 10 routes" in calibrated.source


def test_means_by_group():
    """The mean of a group is that of its rows alone, without padding."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    with record_routing(model) as trace:
        model(**inputs)
        model(**{k: v.flip(0) for k, v in inputs.items()})
    groups = mean_routes(trace, by=["a", "b", "b", "a"])
    for row, group in enumerate("ab"):
        with record_routing(model) as alone:
            model(**{k: v[row : row + 1] for k, v in inputs.items()})
        close(groups[group].weights, mean_routes(alone).weights)
    with pytest.raises(ValueError, match="`by` has 3 groups, but model was called with 4 rows"):
        mean_routes(trace, by=["a", "b", "b"])


def broken(change):
    def make(model):
        weights = dict(random_routes(model).weights)
        change(weights)
        return Routes(weights)

    return make


BAD_ROUTES = {
    "a block is missing": (broken(lambda w: w.pop(2)), r"blocks 0 to 3, got \[0, 1, 3\]"),
    "a block too many": (broken(lambda w: w.update({4: w[0]})), "blocks 0 to 3"),
    "atoms": (broken(lambda w: w.update({1: w[1][:-1]})), r"Block 1 .* shape \(5,\), but the adapter has 6 atoms"),
    "sum": (broken(lambda w: w.update({1: w[1] * 1.1})), "Block 1 .* of sum 1.1"),
    "negative": (broken(lambda w: w.update({3: torch.tensor([2.0, -1, 0, 0, 0, 0])})), "Block 3 .* least value -1"),
    "nan": (broken(lambda w: w.update({0: w[0] * torch.nan})), "Block 0 .* nan"),
    "adapter": (lambda model: Routes(random_routes(model).weights, "other"), "There is no adapter 'other'"),
    "none": (lambda model: None, r"depend on the input.*mean_routes\(trace\)"),
}


@pytest.mark.parametrize("case", BAD_ROUTES)
def test_bad_routes(case, tmp_path):
    """Routes that are not the router's raise, and nothing is written."""
    model, (make, message) = trained(llama(), target_modules=["q_proj"]), BAD_ROUTES[case]
    with pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path / "lora", make(model))
    assert list(tmp_path.iterdir()) == []
    if case != "none":
        with pytest.raises(ValueError, match=message), fix_routes(model, make(model)):
            pass


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


def test_transformers_loads_the_export(tmp_path):
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


def test_routes_leave_with_their_adapter():
    """A further adapter of the same name is routed."""
    config = QueryableLoraConfig(r=4, num_atoms=6, top_k=3, router_dim=8, target_modules=["q_proj"])
    model, inputs = get_peft_model(llama(), config), text()
    model.add_adapter("second", copy.deepcopy(config))
    set_fixed_routes(model, random_routes(model, "second"))
    model.delete_adapter("second")
    model.add_adapter("second", copy.deepcopy(config))
    model.set_adapter("second")
    randomise(model, "second")
    with record_routing(model.eval()) as trace:
        outputs(model, inputs)
    assert (trace.weights("second")[0] == 0).any()  # top-k, as only a router chooses


def test_a_merged_adapter_takes_no_instruction():
    """In the weights it cannot follow one, so a call or a block that gives one raises."""
    model, inputs = trained(llama(), target_modules=["q_proj"], instruction_dim=5), text()
    embedding = torch.randn(1, 5)
    with fix_routes(model, random_routes(model)):
        model.merge_adapter()
    with pytest.raises(ValueError, match="are fixed"):
        model(**inputs, instruction_embeds=embedding)
    with pytest.raises(ValueError, match="are fixed"):
        model.generate(**inputs, instruction_embeds=embedding, max_new_tokens=1)
    with pytest.raises(ValueError, match="are fixed"), use_instructions(model, embedding):
        model(**inputs)
    model.unmerge_adapter()
    model(**inputs, instruction_embeds=embedding)


@pytest.mark.parametrize("leave", ["disable_adapter", "set_adapter"])
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_leaving_a_merged_adapter_unmerges_it(leave):
    """As with LoRA, disabling or setting adapters takes it out of the weights; from then on it is routed again."""
    base, inputs = llama(), text()
    plain = outputs(base, inputs)
    model = trained(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS)
    routed = outputs(model, inputs)
    with fix_routes(model, random_routes(model)):
        model.merge_adapter()
    if leave == "disable_adapter":
        with model.disable_adapter():
            close(outputs(model, inputs), plain)
    else:
        model.set_adapter("default")
    close(outputs(model, inputs), routed)


def test_conversion_of_pefts_own():
    """`convert_to_lora` takes an adapter with fixed routes, and approximates it; routed, it is refused."""
    model, inputs = trained(llama(), target_modules=["q_proj"], task_type="CAUSAL_LM"), text()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)
    with fix_routes(model, random_routes(model)):
        fixed = outputs(model, inputs)
        config, tensors = convert_to_lora(model, rank=4)
    lora = get_peft_model(model.unload(), config).eval()
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(outputs(lora, inputs), fixed, atol=1e-4, rtol=1e-4)


def test_caches_between_routed_and_fixed():
    """A cache that was filled routed goes on fixed; one that was filled fixed cannot go on routed, and says so."""
    model, ids = trained(llama(), target_modules=LLAMA_PROJECTIONS), text()["input_ids"]
    cache = DynamicCache(config=model.config)
    with fix_routes(model, random_routes(model)), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :4], past_key_values=cache).logits
        close(torch.cat([first, model(input_ids=ids[:, 4:], past_key_values=cache).logits], 1), whole)
    with pytest.raises(ValueError, match="The cache holds 6 tokens, but adapter 'default' routed 0"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        with fix_routes(model, random_routes(model)):
            assert model(input_ids=ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_threads():
    """A block holds in its own thread, routes that are set hold in all."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    routed, routes = outputs(model, inputs), random_routes(model)
    with ThreadPoolExecutor(1) as pool:
        with fix_routes(model, routes):
            fixed = outputs(model, inputs)
            close(pool.submit(outputs, model, inputs).result(), routed)
        set_fixed_routes(model, routes)
        close(pool.submit(outputs, model, inputs).result(), fixed)


def test_compiled():
    """Under fixed routes the model makes one graph, and gives the same."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    set_fixed_routes(model, random_routes(model))
    expected = outputs(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        close(compiled(**inputs).logits, expected)


def test_a_copy_keeps_its_routes():
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    set_fixed_routes(model, random_routes(model))
    expected = outputs(model, inputs)
    copied = copy.deepcopy(model)
    set_fixed_routes(model, None)
    close(outputs(copied, inputs), expected)
