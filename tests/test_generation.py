"""Generation: cached, uncached and one full forward give one answer, whatever the decoding and the cache."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers.models import adapted, llama, outputs, randomise, token_ids
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
    cache_utils,
)

PROMPT, NEW = 8, 10
SCOPES = ("causal", "prompt")
DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


def no_stop(**kwargs) -> GenerationConfig:
    """Ten new tokens, none of which ends a text."""
    return GenerationConfig(max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **kwargs)


@pytest.fixture(scope="module", params=SCOPES)
def model(request):
    """A tiny Llama in float64 with a trained-looking adapter."""
    torch.manual_seed(0)
    model = adapted(llama().double(), target_modules="all-linear", routing_scope=request.param)
    randomise(model)
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three prompts, one of them padded on the left."""
    ids, mask = token_ids(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def full_logits(model, ids: Tensor, prompt: int = PROMPT) -> Tensor:
    """Logits of one forward over unpadded `ids`, of which `prompt` tokens are the prompt."""
    is_prompt = (torch.arange(ids.shape[1]) < prompt).expand_as(ids)
    return outputs(model, {"input_ids": ids, "prompt_mask": is_prompt})


def step_logits(model, ids: Tensor, cache, start: int) -> Tensor:
    """Logits of `ids` from position `start` on, one token a call, on top of `cache`."""
    steps = [
        outputs(model, {"input_ids": ids[:, i : i + 1], "past_key_values": cache, "use_cache": True})
        for i in range(start, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("decoding", DECODING)
def test_cached_equals_uncached(model, batch, decoding):
    """Tokens with and without a cache are the same, for a padded batch."""
    ids = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        ids.append(model.generate(**batch, generation_config=no_stop(use_cache=use_cache, **DECODING[decoding])))
    assert torch.equal(*ids)


def test_generated_logits_equal_full_forward(model):
    """Logits of every step are those of one forward over the result."""
    ids = token_ids(3, PROMPT)
    result = model.generate(
        ids, generation_config=no_stop(do_sample=False, output_logits=True, return_dict_in_generate=True)
    )
    logits = full_logits(model, result.sequences)[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(result.logits, 1), logits.float())  # generate keeps float32


def test_prompt_lookup(model):
    """Prompt-lookup decoding, which verifies and crops, gives greedy decoding's tokens."""
    ids = token_ids(1, 4).repeat(1, 3)  # repetition makes candidates
    greedy = model.generate(ids, generation_config=no_stop(do_sample=False))
    lookup = model.generate(ids, generation_config=no_stop(do_sample=False, prompt_lookup_num_tokens=3))
    assert torch.equal(greedy, lookup)


def test_assisted_decoding(model):
    """Assisted decoding by the base model gives greedy decoding's tokens."""
    ids = token_ids(1, PROMPT)
    assistant = llama().double()
    greedy = model.generate(ids, generation_config=no_stop(do_sample=False))
    assisted = model.generate(ids, generation_config=no_stop(do_sample=False), assistant_model=assistant)
    assert torch.equal(greedy, assisted)


def test_second_generate_knows_nothing_of_the_first(model):
    ids, other = token_ids(2, PROMPT), token_ids(3, PROMPT + 3)
    first = model.generate(ids, generation_config=no_stop(do_sample=False))
    model.generate(other, generation_config=no_stop(do_sample=False))
    assert torch.equal(first, model.generate(ids, generation_config=no_stop(do_sample=False)))


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


@pytest.mark.parametrize("implementation", ["static"])
def test_cache_implementations_of_generate(model, batch, implementation):
    """`cache_implementation` changes no token."""
    plain = model.generate(**batch, generation_config=no_stop(do_sample=False))
    config = no_stop(do_sample=False, cache_implementation=implementation, disable_compile=True)
    assert torch.equal(plain, model.generate(**batch, generation_config=config))


@pytest.mark.parametrize("scope", SCOPES)
def test_sliding_window(scope):
    """A model whose attention forgets: routes still see the whole text, cached as uncached."""
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
    )
    model = adapted(MistralForCausalLM(config).double(), target_modules="all-linear", routing_scope=scope)
    randomise(model)
    ids = token_ids(2, PROMPT)
    result = model.generate(
        ids, generation_config=no_stop(do_sample=False, output_logits=True, return_dict_in_generate=True)
    )
    logits = full_logits(model, result.sequences)[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(result.logits, 1), logits.float())  # generate keeps float32


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


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_prefill(model, batch, chunk):
    """Chunked prefill is exact where routes are causal, and refused where the last chunk would change the first."""
    config = no_stop(do_sample=False, prefill_chunk_size=chunk)
    if model.base_model.call.active_plans()[0].scope == "prompt":
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**batch, generation_config=config)
        return
    plain = model.generate(**batch, generation_config=no_stop(do_sample=False))
    assert torch.equal(plain, model.generate(**batch, generation_config=config))


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
    if model.base_model.call.active_plans()[0].scope == "prompt":
        with pytest.raises(ValueError, match="cropped to 5 tokens, into those"):
            step_logits(model, ids, cache, PROMPT - 3)
        return
    steps = step_logits(model, ids, cache, PROMPT - 3)
    torch.testing.assert_close(steps, full_logits(model, ids)[:, PROMPT - 3 :], rtol=0, atol=1e-9)


def test_exception_leaves_no_state(model):
    """A call that fails half-way changes nothing for the next one."""
    ids = token_ids(2, PROMPT)
    expected = full_logits(model, ids)
    layer = model.base_model.model.model.layers[2]
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, prompt_mask=torch.zeros_like(ids))
    hook.remove()
    assert all(stack.context is None for stack in model.base_model.stacks.values())
    assert torch.equal(full_logits(model, ids), expected)


def test_threads_with_a_model_each():
    """Two models in two threads do not see each other."""
    models, ids, expected = [], token_ids(2, PROMPT), []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(adapted(llama().double(), target_modules="all-linear"))
        randomise(models[-1])
        expected.append(outputs(models[-1], {"input_ids": ids}))
    differences: list[float] = []

    def run(model, reference):
        for _ in range(20):
            differences.append((outputs(model, {"input_ids": ids}) - reference).abs().max().item())

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 40
    assert max(differences) < 1e-12


def test_two_threads_in_one_model_are_refused():
    """A call that begins while another thread's is open raises; the open one ends as it would."""
    model, ids = adapted(llama(), target_modules="all-linear"), token_ids(2, PROMPT)
    randomise(model)
    expected = outputs(model, {"input_ids": ids})
    is_open, may_end, results = threading.Event(), threading.Event(), []

    def pause(*_):
        is_open.set()
        assert may_end.wait(30)

    hook = model.base_model.model.model.norm.register_forward_pre_hook(pause)  # after the last adapted module
    thread = threading.Thread(target=lambda: results.append(outputs(model, {"input_ids": ids})))
    thread.start()
    assert is_open.wait(30)
    hook.remove()
    with pytest.raises(RuntimeError, match="Two threads"):
        model(ids)
    may_end.set()
    thread.join()
    assert torch.equal(results[0], expected)


def test_sequence_scope_in_a_decoder_is_fixed_at_prefill():
    """In scope `sequence` the route of the prompt stays, with a cache or without."""
    model = adapted(llama().double(), target_modules="all-linear", routing_scope="sequence")
    randomise(model)
    ids = token_ids(2, PROMPT)
    cached, uncached = (
        model.generate(ids, generation_config=no_stop(do_sample=False, use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
