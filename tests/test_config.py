"""The configuration: defaults, refusals, JSON, and LoraConfig fields that keep their meaning."""

import dataclasses
import json
import math

import pytest
from helpers.models import LLAMA_PROJECTIONS, llama
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, BdLoraConfig, LoraLayer
from peft.tuners.lora.config import CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.utils import PeftType

from peft_queryable import QueryableLoraConfig, __version__

DEFAULTS = {
    "num_atoms": 16,
    "top_k": 4,
    "num_blocks": 4,
    "router_dim": 32,
    "routing_scope": "auto",
    "attention_temperature": 1.0,
    "depth_temperature": 1.0,
    "language_temperature": 1.0,
    "instruction_dim": None,
    "instruction_encoder": None,
    "instruction_encoder_revision": None,
    "default_instruction": None,
    "instruction_strength": 1.0,
    "instruction_query_weight": 1.0,
    "query_terms": ("state", "depth", "instruction"),
    "init_gate": 0.5,
    "init_atom_scale": 1.0,
    "init_router_scale": 1.0,
    "peft_queryable_version": __version__,
}

OUT_OF_RANGE = [
    *[(name, value) for name in ("r", "num_atoms", "num_blocks", "router_dim") for value in (0, -1)],
    *[(name, 2.5) for name in ("r", "num_atoms", "num_blocks", "router_dim", "top_k", "instruction_dim")],
    *[("top_k", value) for value in (0, -1, 17)],
    ("query_terms", "state"),
    ("router_dim", 1),
    *[("instruction_dim", value) for value in (0, -1)],
    *[
        (name, value)
        for name in ("attention_temperature", "depth_temperature", "language_temperature", "init_router_scale")
        for value in (0.0, -1.0, math.nan)
    ],
    *[
        (name, value)
        for name in ("instruction_strength", "instruction_query_weight", "init_atom_scale")
        for value in (-0.1, math.nan)
    ],
    *[("init_gate", value) for value in (0.0, 1.0, -0.5, 1.5, math.nan)],
    *[("routing_scope", value) for value in ("token", "Causal", None)],
]

IN_RANGE = [
    {"num_atoms": 1, "top_k": 1},
    {"num_atoms": 3, "top_k": 3},
    {"top_k": None},
    {"num_blocks": 1},
    {"router_dim": 2},
    {"instruction_dim": 1},
    {"instruction_strength": 0.0, "instruction_query_weight": 0.0},
    {"init_gate": 1e-6},
    {"query_terms": ()},
    {"query_terms": ["depth"]},
    *[{"routing_scope": scope} for scope in ("auto", "causal", "prompt", "sequence")],
]

UNSUPPORTED = {
    "use_dora": True,
    "velora_config": VeloraConfig(),
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(),
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "rank_pattern": {"q_proj": 4},
    "layer_replication": [(0, 2)],
    "target_parameters": ["weight"],
    "megatron_config": {"tensor_parallel": 2},
    "corda_config": CordaConfig(),
    "lora_ga_config": LoraGAConfig(),
    "loftq_config": LoftQConfig(),
}


def own_fields() -> list[dataclasses.Field]:
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    return [field for field in dataclasses.fields(QueryableLoraConfig) if field.name not in inherited]


def test_defaults_are_public_api():
    """The fields beside LoraConfig's and their defaults are the listed ones."""
    config = QueryableLoraConfig()
    assert {field.name: getattr(config, field.name) for field in own_fields()} == DEFAULTS
    assert config.peft_type is PeftType.QUERYABLE_LORA


def test_inherited_defaults_are_those_of_lora():
    """A field of LoraConfig has LoRA's default."""
    ours, theirs = QueryableLoraConfig().to_dict(), LoraConfig().to_dict()
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"peft_type"}


@pytest.mark.parametrize("field", own_fields(), ids=lambda field: field.name)
def test_every_field_explains_itself(field):
    """Each field has a help text that is a sentence or more."""
    assert len(field.metadata["help"]) > 30
    assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range_is_refused(name, value):
    """A value out of range raises a ValueError that names the field and the value."""
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        QueryableLoraConfig(**{name: value})


@pytest.mark.parametrize("terms", [("state", "width"), ["width"]], ids=str)
def test_unknown_query_term_is_refused(terms):
    """A term that does not exist raises a ValueError that names it and those that do."""
    with pytest.raises(ValueError, match=r"`query_terms`.*'state', 'depth', 'instruction'.*\['width'\]"):
        QueryableLoraConfig(query_terms=terms)


@pytest.mark.parametrize("fields", IN_RANGE, ids=str)
def test_ends_of_the_ranges_are_taken(fields):
    """The extreme values that still make sense are no error."""
    config = QueryableLoraConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == (tuple(value) if name == "query_terms" else value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_lora_field_is_refused_with_a_reason(name):
    """A LoraConfig field that cannot work here raises a ValueError that names it and says why."""
    with pytest.raises(ValueError, match=rf"`{name}` \(got .*\): .{{20,}}\."):
        QueryableLoraConfig(task_type="CAUSAL_LM", **{name: UNSUPPORTED[name]})


@pytest.mark.parametrize("init", ["mica", "corda", "lora_ga", "loftq", "pissa_niter_4"])
def test_unsupported_initialisation_is_refused(init):
    """An initialisation that cannot work here raises a ValueError that names it and says why, before any warning."""
    with pytest.raises(ValueError, match=rf"`init_lora_weights='{init}'`: .{{20,}}\."):
        QueryableLoraConfig(init_lora_weights=init)


@pytest.mark.parametrize("init", ["MiCA", "PiSSA", "kaiming", "", None, 2])
def test_unknown_initialisation_is_refused(init):
    """A value that names no initialisation raises a ValueError with those that do."""
    with pytest.raises(ValueError, match=rf"`init_lora_weights` must be one of .*'gaussian'.*, got {init!r}"):
        QueryableLoraConfig(init_lora_weights=init)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but `eva_config` is not specified:UserWarning")
@pytest.mark.parametrize("eva_config", [None, EvaConfig(rho=1.5)], ids=["default", "1.5"])
def test_eva_with_several_ranks_is_refused(eva_config):
    """EVA's default moves rank from module to module: a ValueError says what to pass."""
    with pytest.raises(ValueError, match=r"`eva_config\.rho` must be 1, got (2\.0|1\.5).*`eva_config=EvaConfig"):
        QueryableLoraConfig(init_lora_weights="eva", eva_config=eva_config)


def test_every_lora_variant_is_refused():
    """A field that PEFT marks as a LoRA variant, none of which fits this layer, is among the refused."""
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants
    assert variants <= set(UNSUPPORTED)


EVERY_FIELD = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["v_proj", "q_proj"],
    "alpha_pattern": {"q_proj": 2},
    "use_rslora": True,
    "num_atoms": 6,
    "top_k": None,
    "num_blocks": 2,
    "router_dim": 8,
    "routing_scope": "prompt",
    "attention_temperature": 0.5,
    "depth_temperature": 2.0,
    "language_temperature": 0.25,
    "instruction_dim": 5,
    "instruction_encoder": "all-MiniLM-L6-v2",
    "instruction_encoder_revision": "main",
    "default_instruction": "Answer in one word.",
    "instruction_strength": 0.75,
    "instruction_query_weight": 0.1,
    "query_terms": ["state", "instruction"],
    "init_gate": 0.3,
    "init_atom_scale": 0.2,
    "init_router_scale": 0.3,
    "peft_queryable_version": "9.9",  # as in a saved one: a new one takes no `default_instruction`
}


@pytest.mark.parametrize("fields", [{}, EVERY_FIELD], ids=["defaults", "every field"])
@pytest.mark.parametrize("loader", [QueryableLoraConfig, PeftConfig], ids=lambda loader: loader.__name__)
def test_json_round_trip(tmp_path, fields, loader):
    """A saved configuration loads as an equal one of the same class, by our class and by PEFT's."""
    config = QueryableLoraConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is QueryableLoraConfig
    assert loaded.query_terms == config.query_terms
    saved, again = config.to_dict(), loaded.to_dict()
    saved["inference_mode"] = again["inference_mode"] = None  # PEFT saves True
    assert saved == again


def test_json_is_plain(tmp_path):
    """Our fields are scalars and lists in adapter_config.json, under their own names."""
    QueryableLoraConfig(**EVERY_FIELD).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "QUERYABLE_LORA"
    for field in own_fields():
        assert saved[field.name] == EVERY_FIELD[field.name]
        assert isinstance(saved[field.name], (int, float, str, list, type(None)))


@pytest.mark.parametrize("fields", [{}, EVERY_FIELD | {"target_modules": None}], ids=["defaults", "every field"])
def test_dictionary_is_what_the_file_holds(tmp_path, fields):
    """`to_dict` and the file agree, types included, as other configurations of PEFT do, and both make an equal one."""
    config = QueryableLoraConfig(**fields)
    config.save_pretrained(tmp_path)
    read = QueryableLoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert read == config.to_dict()
    assert QueryableLoraConfig(**read) == QueryableLoraConfig.from_peft_type(**config.to_dict()) == config


def test_damaged_json_is_refused(tmp_path):
    """What is refused in Python is refused in a file, too."""
    QueryableLoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"top_k": 4', '"top_k": 40'))
    with pytest.raises(ValueError, match="`top_k`"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5, r"layers.1.*down_proj": 3}}],
    ids=["plain", "use_rslora", "alpha_pattern"],
)
def test_scaling_is_that_of_lora(fields):
    """`lora_alpha`, `use_rslora` and `alpha_pattern` scale each module as in PEFT's LoRA."""
    common = {"r": 4, "lora_alpha": 12, "target_modules": LLAMA_PROJECTIONS, **fields}
    scalings = [
        {
            name: layer.scaling["default"]
            for name, layer in get_peft_model(llama(), config).named_modules()
            if isinstance(layer, LoraLayer)
        }
        for config in (QueryableLoraConfig(**common), LoraConfig(**common))
    ]
    assert scalings[0] == scalings[1]
    assert len(set(scalings[0].values())) == (3 if "alpha_pattern" in fields else 1)
