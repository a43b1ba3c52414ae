"""What travels with a key/value cache: routes go on from it, whatever its kind and whatever is done to it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers.generation import NEW, PROMPT, SCOPES, decoder, full_logits, step_logits
from helpers.models import CACHE, MLP, VOCAB, adapted, llama, outputs, randomise, t5, text, token_ids
from helpers.paged import batching
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
    cache_utils,
)


@pytest.fixture(scope="module", params=SCOPES)
def model(request):
    return decoder(request.param)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_kinds(model, kind):
    """Token-by-token decoding on each kind of cache equals the full forward."""
    ids = token_ids(2, PROMPT + NEW)
    static = {"max_cache_len": PROMPT + NEW} if kind == "static" else {}
    cache = {"dynamic": DynamicCache, "static": StaticCache}[kind](config=model.config, **static)
    outputs(model, {"input_ids": ids[:, :PROMPT], CACHE: cache, "use_cache": True})
    steps = step_logits(model, ids, cache, PROMPT)
    torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT:], rtol=0, atol=1e-9)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="its fp8 backend is newer")
def test_quantised_cache(model):
    """A quantised cache, which rounds keys and values, moves logits no more than it moves plain LoRA's."""
    ids = token_ids(2, PROMPT + NEW)

    def error(model) -> float:
        cache = QuantizedCache("fp8", model.config)
        outputs(model, {"input_ids": ids[:, :PROMPT], CACHE: cache, "use_cache": True})
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
    outputs(model, {"input_ids": prefix, CACHE: cache, "use_cache": True})
    for _ in range(2):
        steps = step_logits(model, ids, copy.deepcopy(cache), PROMPT)
        torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT:], rtol=0, atol=1e-9)
    assert cache.get_seq_length() == PROMPT


def test_cache_operations(model):
    """Reorder, repeat, select, crop and reset do to the routing state what they do to keys and values."""
    ids = token_ids(3, PROMPT + 6)
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids[:, :PROMPT], CACHE: cache, "use_cache": True})
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
    outputs(model, {"input_ids": ids[:, :PROMPT], CACHE: cache, "use_cache": True})
    cache.reset()
    outputs(model, {"input_ids": rows[:, :PROMPT], CACHE: cache, "use_cache": True})
    torch.testing.assert_close(step_logits(model, rows, cache, PROMPT), expected[:, PROMPT:], rtol=0, atol=1e-9)


def test_foreign_cache_is_refused(model):
    """A cache filled without the adapter, or in part, names the adapter and the remedy."""
    ids = token_ids(1, PROMPT)
    cache = DynamicCache(config=model.config)
    with model.disable_adapter():
        outputs(model, {"input_ids": ids, CACHE: cache, "use_cache": True})
    with pytest.raises(ValueError, match=r"holds 8 tokens, but adapter 'default' routed 0 .* empty cache"):
        outputs(model, {"input_ids": ids[:, :1], CACHE: cache, "use_cache": True})
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids, CACHE: cache, "use_cache": True})
    with model.disable_adapter():
        outputs(model, {"input_ids": ids[:, :1], CACHE: cache, "use_cache": True})
    with pytest.raises(ValueError, match="holds 9 tokens, but adapter 'default' routed 8"):
        outputs(model, {"input_ids": ids[:, :1], CACHE: cache, "use_cache": True})


def test_cache_cropped_into_the_prompt(model):
    """A prompt that fixed the routes cannot be cut; running sums can."""
    ids = token_ids(1, PROMPT)
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids, CACHE: cache, "use_cache": True})
    cache.crop(-3)
    if model.base_model.model_hooks.active_plans()[0].scope.name == "prompt":
        with pytest.raises(ValueError, match="cropped to 5 tokens, into those"):
            step_logits(model, ids, cache, PROMPT - 3)
        return
    steps = step_logits(model, ids, cache, PROMPT - 3)
    torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT - 3 :], rtol=0, atol=1e-9)


def test_static_cache_cropped(model):
    """Beside a static cache only the last state is kept, so it cannot go back; routes of the prompt stay."""
    ids = token_ids(1, PROMPT + NEW)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    outputs(model, {"input_ids": ids[:, :PROMPT], CACHE: cache, "use_cache": True})
    step_logits(model, ids[:, : PROMPT + 2], cache, PROMPT)
    if not cache.is_croppable:  # before transformers 5.24
        return
    cache.crop(-1)
    if model.base_model.model_hooks.active_plans()[0].scope.name == "prompt":
        steps = step_logits(model, ids, cache, PROMPT + 1)
        torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT + 1 :], rtol=0, atol=1e-9)
        return
    with pytest.raises(ValueError, match="cropped to 9 tokens, but beside a StaticCache only the last token's state"):
        step_logits(model, ids, cache, PROMPT + 1)


# Caches that cannot carry routing


def static_routes() -> nn.Module:
    """A decoder whose routes depend on no token."""
    model = adapted(llama(eos_token_id=VOCAB - 1, pad_token_id=0), target_modules="all-linear", query_terms=[])
    randomise(model)
    return model


def test_continuous_batching_of_static_routes():
    """Routes that depend on no token allow it, and it gives the tokens of `generate`, as LoRA's."""
    lora = get_peft_model(
        llama(eos_token_id=VOCAB - 1, pad_token_id=0), LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    randomise(lora)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=VOCAB - 1, pad_token_id=0)
    for tested in (lora.eval(), static_routes()):
        prompts = [[3, 4, 5], [6, 7, 8, 9]]
        results = tested.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=batching()
        ).values()
        for prompt, result in zip(prompts, results, strict=True):
            alone = tested.generate(input_ids=torch.tensor([prompt]), generation_config=config)
            assert result.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["past_key_values", "cache", "mems", "state"])
def test_foreign_caches_are_refused(name):
    """A cache of another kind than transformers' is refused by its name, unless routes depend on no token."""

    class Recurrent(MLP):
        def forward(self, x, past_key_values=None, cache=None, mems=None, state=None):
            return super().forward(x)

    inputs = {"x": torch.randn(2, 3, 8), name: (torch.randn(2, 3),)}
    model = adapted(Recurrent(), target_modules=["first"])
    with pytest.raises(ValueError, match=f"The call's `{name}` is a cache of type tuple, .* `use_cache=False`"):
        model(**inputs)
    adapted(Recurrent(), target_modules=["first"], query_terms=[])(**inputs)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_names_of_a_cache(name):
    """A cache is found under either name, whichever the signature has; two caches are refused."""

    class Cached(MLP):
        def forward(self, x, past_key_values=None, cache=None):
            return super().forward(x)

    model, x = adapted(Cached(), target_modules=["first"], routing_scope="causal"), torch.randn(2, 3, 8)
    filled = DynamicCache()
    model(x, **{name: filled})
    assert filled.queryable_lora[("default", "the model")].length == 3
    with pytest.raises(ValueError, match=r"two caches, `cache` and `past_key_values`, .* adapter 'default'"):
        model(x, past_key_values=DynamicCache(), cache=DynamicCache())
    model(x, past_key_values=(same := DynamicCache()), cache=same)


def test_static_routes_need_no_history():
    """Routes that depend on no token go on from a cache that was filled without the adapter's knowing."""
    model, ids = static_routes().double(), token_ids(2, PROMPT + NEW)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :PROMPT], **{CACHE: cache})
        steps = model(input_ids=ids[:, PROMPT:], **{CACHE: cache}).logits
    torch.testing.assert_close(steps, outputs(model, {"input_ids": ids})[:, PROMPT:], rtol=0, atol=1e-9)


# The life of a cache


def test_a_cache_dies_when_it_is_dropped(model):
    """Routing on a cache makes no cycle: the memory of keys and values must not wait for the garbage collector."""
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": token_ids(2, PROMPT), CACHE: cache, "use_cache": True})
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_copies_of_a_cache_are_their_own(model):
    """A deep copy or pickle of a cache goes on by itself, whatever is done to the original."""
    ids = token_ids(2, PROMPT + NEW)
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids[:, :PROMPT], CACHE: cache, "use_cache": True})
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    cache.reset()
    for copied in copies:
        steps = step_logits(model, ids, copied, PROMPT)
        torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT:], rtol=0, atol=1e-9)
        copied.crop(tokens_to_remove=-1)


def test_memory_is_not_put_on_the_decoders_cache():
    """Cross-attention reads all of its memory in the first call, and has nothing to carry."""
    model = adapted(t5(), target_modules="all-linear")
    with torch.no_grad():
        cache = model(**text(), decoder_input_ids=token_ids(length=3), use_cache=True)[CACHE]
    assert {stack for _, stack in cache.queryable_lora} == {"decoder"}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_static_sliding_windows_are_refused_past_the_window(scope, steps):
    """A static cache of sliding layers alone hides which tokens are padding once the window is full."""
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model = adapted(MistralForCausalLM(config), target_modules="all-linear", routing_scope=scope)
    settings = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="sliding window in a static cache"):
        model.generate(token_ids(1, 8), cache_implementation="static", disable_compile=True, **settings)
    model.generate(token_ids(1, 8), **settings)
