"""transformers' continuous batching: every request as if it were alone, whatever the cache does with its blocks."""

from __future__ import annotations

import pytest
import torch
from helpers.models import LAYERS, VOCAB
from helpers.paged import METHODS, batching, prompts, run, settings, trained
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

pytestmark = pytest.mark.parametrize("method", METHODS)

WINDOW = 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
}


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_mixed_requests(method, scheduler):
    """Prompts in chunks, whole prompts and steps of decoding in one call."""
    seen = run(trained(method), prompts(3, 30, 7, 1, 21), settings(), batching(scheduler_type=scheduler))
    assert any(1 in step and max(step) > 1 for step in seen.segments)
    assert max(map(len, seen.segments)) > 3


def test_shared_prefix(method):
    """A request goes on from blocks that another has written."""
    seen = run(trained(method), prompts(15, 17, 19, shared=14), settings(), batching(max_requests_per_batch=1))
    assert seen.events["search_prefix_match"] >= 2 * 12


def test_samples_of_a_prompt(method):
    """Forks share whole blocks and get copies of the last one, and each goes its own way."""
    config = settings(do_sample=True, temperature=3.0, num_return_sequences=3)
    seen = run(trained(method), prompts(11, 14), config, batching(seed=0))
    assert seen.events["perform_cache_copy"] > 0


def test_eviction(method):
    """Requests that lose their blocks to others are computed again, in blocks that others have used."""
    seen = run(trained(method), prompts(9, 10, 11, 12), settings(), batching(num_blocks=12))
    assert seen.events["create_equivalent_initial_request"] > 0


def test_offloading(method, monkeypatch):
    """Blocks that are moved out and back take their tallies along."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))  # there is none to pin
    batch = batching(num_blocks=12, cpu_offload_space=0.01)
    seen = run(trained(method), prompts(9, 10, 11, 12), settings(), batch)
    assert seen.events["_offload_to_cpu"] > 0


def mixed_windows():
    types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=types, pad_token_id=0)).eval()


def windows():
    return MistralForCausalLM(MistralConfig(**SIZES)).eval()


@pytest.mark.parametrize("base", [mixed_windows, windows])
@pytest.mark.parametrize("samples", [1, 2])
def test_sliding_windows(method, base, samples):
    """Routes see all earlier tokens, those that keys and values of a window are no longer there for as well."""
    config = settings() if samples == 1 else settings(do_sample=True, temperature=3.0, num_return_sequences=samples)
    seen = run(trained(method, base()), prompts(3, 30, 7, 2, 13), config, batching(num_blocks=40))
    assert any(1 in step and max(step) > WINDOW for step in seen.segments)


def test_a_second_session(method):
    """A persistent manager shares blocks that an earlier session has written."""
    model, given = trained(method), prompts(15, 17, shared=14)
    run(model, given[:1], settings(), batching(), persistent_manager=True)
    seen = run(model, given[1:], settings(), batching(), persistent_manager=True)
    assert seen.events["search_prefix_match"] == 12
    model.destroy_cached_continuous_batching_manager()
