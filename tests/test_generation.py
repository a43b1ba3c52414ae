"""Generation: cached, uncached and one full forward give one answer, whatever the decoding and the cache."""

from __future__ import annotations

import pytest
import torch
from helpers.generation import PROMPT, SCOPES, decoder, full_logits, no_stop
from helpers.models import adapted, bart, llama, randomise, t5, token_ids
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
)

DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


@pytest.fixture(scope="module", params=SCOPES)
def model(request):
    return decoder(request.param)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three prompts, one of them padded on the left."""
    ids, mask = token_ids(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


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


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_prefill(model, batch, chunk):
    """Chunked prefill is exact where routes are causal, and refused where the last chunk would change the first."""
    config = no_stop(do_sample=False, prefill_chunk_size=chunk)
    if model.base_model.model_hooks.active_plans()[0].scope.name == "prompt":
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**batch, generation_config=config)
        return
    plain = model.generate(**batch, generation_config=no_stop(do_sample=False))
    assert torch.equal(plain, model.generate(**batch, generation_config=config))


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


@pytest.mark.parametrize("helper", ["assistant", "lookup"])
@pytest.mark.parametrize("build", [t5, bart], ids=lambda build: build.__name__)
def test_assisted_decoding_of_encoder_decoders(build, helper):
    """Encoder-decoders draft and verify on a cache of two parts, and give the tokens of plain greedy decoding."""
    torch.manual_seed(0)
    model = adapted(build().double(), target_modules="all-linear")
    randomise(model)
    kwargs = {"assistant_model": build().double()} if helper == "assistant" else {"prompt_lookup_num_tokens": 2}
    settings = {"max_new_tokens": 8, "do_sample": False}
    ids = token_ids(1, 6)
    assert torch.equal(model.generate(ids, **settings, **kwargs), model.generate(ids, **settings))


def test_early_exit_drafts():
    """A model that drafts with its own first layers gives the tokens of plain greedy decoding."""
    model = decoder("causal")
    ids = token_ids(1, PROMPT)
    drafted = model.generate(ids, generation_config=no_stop(do_sample=False), assistant_early_exit=2)
    assert torch.equal(drafted, model.generate(ids, generation_config=no_stop(do_sample=False)))
