"""Several adapters in one batch (`adapter_names`): every row as if it ran alone under its own."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ARCHITECTURES, CACHE, adapted, llama, outputs, randomise, t5, token_ids
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from peft_queryable import QueryableLoraConfig

NAMES = ["two", "__base__", "one", "two", "one"]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def two_adapters(base: nn.Module, targets: list[str], scope: str = "auto", **kwargs) -> PeftModel:
    """Adapters `one` and `two`, random, of other ranks, banks and blocks, the second on fewer modules."""
    model = adapted(base, target_modules=targets, routing_scope=scope, **kwargs)
    for name, fewer in (("one", targets), ("two", targets[: max(len(targets) // 2, 1)])):
        r = 4 if name == "one" else 3
        config = QueryableLoraConfig(
            r=r, num_atoms=4 + r, router_dim=8, num_blocks=r - 2, target_modules=fewer, routing_scope=scope, **kwargs
        )
        model.add_adapter(name, config)
    model.set_adapter("one")
    model.delete_adapter("default")
    randomise(model, "one")
    randomise(model, "two")
    return model.eval()


def under(model: PeftModel, name: str, call):
    """`call()` with adapter `name` at work, or none for `__base__`."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name, inference_mode=True)
    return call()


def rows_alone(model: PeftModel, inputs: dict[str, Tensor], names: list[str]) -> Tensor:
    alone = [
        under(model, name, lambda row=row: outputs(model, {key: t[row : row + 1] for key, t in inputs.items()}))
        for row, name in enumerate(names)
    ]
    return torch.cat(alone)


def five_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` with five rows, all of them different where they are no masks."""
    return {key: torch.cat([t, t.flip(-1), t.roll(1, -1)])[:5] for key, t in inputs.items()}


@pytest.mark.parametrize("scope", ["auto", "causal", "sequence"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_equal_runs_alone(name, scope):
    """In every architecture, and whichever adapters are active, a row's output is that of its adapter."""
    architecture = ARCHITECTURES[name]
    model = two_adapters(architecture.build(), architecture.targets, scope, exclude_modules=architecture.exclude)
    inputs = five_rows(architecture.inputs())
    inputs = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    expected = rows_alone(model, inputs, NAMES)
    for active in ("one", "two"):
        model.set_adapter(active)
        result = outputs(model, inputs | {"adapter_names": NAMES})
        torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(outputs(model, inputs), outputs(model, inputs | {"adapter_names": ["two"] * 5}))


def test_prompts_of_rows():
    """In the scope `prompt`, each row keeps its own prompt."""
    model = two_adapters(llama(), ["q_proj", "v_proj", "down_proj"], "prompt")
    inputs = {"input_ids": token_ids(5, 7), "prompt_mask": torch.arange(7) < torch.tensor([[1], [2], [3], [4], [5]])}
    expected = rows_alone(model, inputs, NAMES)
    result = outputs(model, inputs | {"adapter_names": NAMES})
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)


def test_packed_rows():
    """Rows may hold several packed sequences each."""
    model = two_adapters(llama(), ["q_proj", "v_proj", "down_proj"], "sequence")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 3 + [[0, 1, 0, 1, 2, 3]] * 2)
    inputs = {"input_ids": token_ids(5), "position_ids": positions}
    expected = rows_alone(model, inputs, NAMES)
    result = outputs(model, inputs | {"adapter_names": NAMES})
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)


SETTINGS = [
    {},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"cache_implementation": "static"},
]


@pytest.mark.parametrize("scope", ["causal", "prompt"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("build", [llama, t5], ids=["llama", "t5"])
def test_generation(build, settings, scope):
    """`generate` gives each row what its adapter gives it alone, beams and returned sequences included."""
    if build is t5 and "cache_implementation" in settings:
        pytest.skip("T5 has no static cache")
    targets = ["q_proj", "v_proj", "o_proj"] if build is llama else ["q", "v", "wi"]
    model = two_adapters(build(), targets, scope)
    ids = token_ids(5)
    settings = settings | {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = [
        under(model, name, lambda row=row: model.generate(input_ids=ids[row : row + 1], **settings))
        for row, name in enumerate(NAMES)
    ]
    assert torch.equal(model.generate(input_ids=ids, adapter_names=NAMES, **settings), torch.cat(alone))


def test_beams_of_a_generation_config():
    """Beams are known whether they come as an argument or in a `GenerationConfig`."""
    model, ids = two_adapters(llama(), ["q_proj", "v_proj"]), token_ids(5)
    settings = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    config = type(model.generation_config)(**settings)
    assert torch.equal(model.generate(input_ids=ids, adapter_names=NAMES, generation_config=config), expected)


def test_what_is_trained_in_full_follows_its_row():
    """`modules_to_save` and `trainable_token_indices` belong to the row's adapter too."""
    model = two_adapters(
        llama(tie_word_embeddings=False),
        ["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=[3, 4, 5, 6],
    )
    inputs = {"input_ids": token_ids(5)}
    expected = rows_alone(model, inputs, NAMES)
    torch.testing.assert_close(outputs(model, inputs | {"adapter_names": NAMES}), expected, atol=1e-9, rtol=1e-9)
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False, **inputs}
    for row, name in enumerate(NAMES):
        one = under(model, name, lambda row=row: model.generate(**beams | {"input_ids": inputs["input_ids"][[row]]}))
        assert torch.equal(model.generate(**beams, adapter_names=NAMES)[[row]], one)


def test_instructions_of_rows():
    """Each row keeps its own instruction, or shares the only one."""
    model = two_adapters(llama(), ["q_proj", "v_proj"], instruction_dim=3)
    inputs = {"input_ids": token_ids(5), "instruction_embeds": torch.randn(5, 3)}
    expected = rows_alone(model, inputs, NAMES)
    torch.testing.assert_close(outputs(model, inputs | {"adapter_names": NAMES}), expected, atol=1e-9, rtol=1e-9)
    shared = inputs | {"instruction_embeds": inputs["instruction_embeds"][:1]}
    repeated = inputs | {"instruction_embeds": inputs["instruction_embeds"][:1].expand(5, -1)}
    first, second = (outputs(model, kwargs | {"adapter_names": NAMES}) for kwargs in (shared, repeated))
    torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_a_cache_belongs_to_the_adapters_of_its_rows(scope):
    """A cache is continued under the names it was filled with, and refused under others."""
    model, ids = two_adapters(llama(), ["q_proj", "v_proj"], scope), token_ids(5)

    def step(past, names, tokens):
        with torch.no_grad():
            return model(input_ids=tokens, **{CACHE: past}, adapter_names=names).logits

    cache = DynamicCache(config=model.config)
    step(cache, NAMES, ids[:, :4])
    if scope == "causal":
        expected = outputs(model, {"input_ids": ids, "adapter_names": NAMES})[:, 4:]
        torch.testing.assert_close(step(cache, NAMES, ids[:, 4:]), expected, atol=1e-9, rtol=1e-9)
    for others in (["one", *NAMES[1:]], ["one"] * 5, None):
        with pytest.raises(ValueError, match=r"adapter '(one|two)' routed 0 of them"):
            step(cache, others, ids[:, :1])
    cache.batch_select_indices(torch.tensor([3, 1, 2]))
    step(cache, [NAMES[row] for row in (3, 1, 2)], ids[:3, :1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "two", "three", "four", "one"], r"do not exist: \['four', 'three'\]"),
        (["one", "two"], "2 names for a batch of 5"),
        ([], "0 names for a batch of 5"),
        (["__base__"] * 3, "3 names for a batch of 5"),
    ],
    ids=["unknown", "too few", "none", "too few of the base model"],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_names_are_refused(names, message, call):
    """Wrong names raise an error, and leave the model as it was."""
    model, inputs = two_adapters(llama(), ["q_proj", "v_proj"]), {"input_ids": token_ids(5)}
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=names) if call == "forward" else model.generate(
            **inputs, max_new_tokens=2, adapter_names=names
        )
    assert torch.equal(outputs(model, inputs), expected)


def test_training_is_refused():
    """As in PEFT, several adapters in one batch are for inference."""
    model = two_adapters(llama(), ["q_proj", "v_proj"]).train()
    with pytest.raises(ValueError, match="for inference"):
        model(input_ids=token_ids(5), adapter_names=NAMES)
