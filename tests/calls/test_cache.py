"""What travels with a key/value cache: routes go on from it, whatever its kind and whatever is done to it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.generation import NEW, PROMPT, SCOPES, decoder, full_logits, step_logits
from helpers.models import outputs, token_ids
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils


@pytest.fixture(scope="module", params=SCOPES)
def model(request):
    return decoder(request.param)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_kinds(model, kind):
    """Token-by-token decoding on each kind of cache equals the full forward."""
    ids = token_ids(2, PROMPT + NEW)
    static = {"max_cache_len": PROMPT + NEW} if kind == "static" else {}
    cache = {"dynamic": DynamicCache, "static": StaticCache}[kind](config=model.config, **static)
    outputs(model, {"input_ids": ids[:, :PROMPT], "past_key_values": cache, "use_cache": True})
    steps = step_logits(model, ids, cache, PROMPT)
    torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT:], rtol=0, atol=1e-9)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="its fp8 backend is newer")
def test_quantised_cache(model):
    """A quantised cache, which rounds keys and values, moves logits no more than it moves plain LoRA's."""
    ids = token_ids(2, PROMPT + NEW)

    def error(model) -> float:
        cache = QuantizedCache("fp8", model.config)
        outputs(model, {"input_ids": ids[:, :PROMPT], "past_key_values": cache, "use_cache": True})
        return (step_logits(model, ids, cache, PROMPT) - full_logits(model, ids)[:, PROMPT:]).std().item()

    lora = copy.deepcopy(model)
    for name, gate in lora.named_parameters():
        if "gate.default" in name and "queryable_lora" in name:
            torch.nn.init.constant_(gate, -torch.inf)
    assert 0 < error(model) < 2 * error(lora)


def test_shared_prefix(model):
    """A deep copy of a filled cache continues as the original would, and leaves it alone."""
    prefix, ids = token_ids(1, PROMPT), token_ids(1, PROMPT + 4)
    ids[:, :PROMPT] = prefix
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": prefix, "past_key_values": cache, "use_cache": True})
    for _ in range(2):
        steps = step_logits(model, ids, copy.deepcopy(cache), PROMPT)
        torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT:], rtol=0, atol=1e-9)
    assert cache.get_seq_length() == PROMPT


def test_cache_operations(model):
    """Reorder, repeat, select, crop and reset do to the routing state what they do to keys and values."""
    ids = token_ids(3, PROMPT + 6)
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids[:, :PROMPT], "past_key_values": cache, "use_cache": True})
    step_logits(model, ids, cache, PROMPT)
    cache.crop(-2)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    rows = ids[order][[0, 1]]
    expected = full_logits(model, rows)
    torch.testing.assert_close(
        step_logits(model, rows, cache, PROMPT + 4), expected[:, PROMPT + 4 :], rtol=0, atol=1e-9
    )
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids[:, :PROMPT], "past_key_values": cache, "use_cache": True})
    cache.reset()
    outputs(model, {"input_ids": rows[:, :PROMPT], "past_key_values": cache, "use_cache": True})
    torch.testing.assert_close(step_logits(model, rows, cache, PROMPT), expected[:, PROMPT:], rtol=0, atol=1e-9)


def test_foreign_cache_is_refused(model):
    """A cache filled without the adapter, or in part, names the adapter and the remedy."""
    ids = token_ids(1, PROMPT)
    cache = DynamicCache(config=model.config)
    with model.disable_adapter():
        outputs(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True})
    with pytest.raises(ValueError, match=r"holds 8 tokens, but adapter 'default' routed 0 .* empty cache"):
        outputs(model, {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True})
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True})
    with model.disable_adapter():
        outputs(model, {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True})
    with pytest.raises(ValueError, match="holds 9 tokens, but adapter 'default' routed 8"):
        outputs(model, {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True})


def test_cache_cropped_into_the_prompt(model):
    """A prompt that fixed the routes cannot be cut; running sums can."""
    ids = token_ids(1, PROMPT)
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True})
    cache.crop(-3)
    if model.base_model.model_hooks.active_plans()[0].scope.name == "prompt":
        with pytest.raises(ValueError, match="cropped to 5 tokens, into those"):
            step_logits(model, ids, cache, PROMPT - 3)
        return
    steps = step_logits(model, ids, cache, PROMPT - 3)
    torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT - 3 :], rtol=0, atol=1e-9)
