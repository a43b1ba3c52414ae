"""Continuous batching, watched from outside: its tokens, the logits they were taken from, and what its cache did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from helpers.models import CACHE, VOCAB, adapted, llama, outputs, randomise

PAGE = 4  # tokens, the least that transformers takes
NEW = 10
METHODS = ("lora", "queryable")


def trained(method: str, base: nn.Module | None = None, scope: str = "causal", **kwargs) -> PeftModel:
    """A tiny Llama, or `base`, in float64 with a random adapter of real size."""
    torch.manual_seed(0)
    base = llama(max_position_embeddings=256) if base is None else base
    targets = {"target_modules": "all-linear"} | kwargs
    if method == "lora":
        model = get_peft_model(base.double(), LoraConfig(r=4, **targets)).eval()
    else:
        model = adapted(base.double(), routing_scope=scope, **targets)
    randomise(model)
    return model


def settings(**kwargs) -> GenerationConfig:
    """Greedy, ten new tokens, none of which ends a text."""
    fields = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB + 1, "pad_token_id": 0}
    return GenerationConfig(**(fields | kwargs))


def batching(**kwargs) -> ContinuousBatchingConfig:
    """Pages of four tokens, room for all requests, and steps of at most 16 tokens."""
    fields = {"page_size": PAGE, "num_blocks": 64, "max_batch_tokens": 16}
    return ContinuousBatchingConfig(**(fields | kwargs))


def prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, whose first `shared` tokens are the same."""
    start = torch.randint(3, VOCAB, (shared,)).tolist()
    return [start + torch.randint(3, VOCAB, (length - shared,)).tolist() for length in lengths]


@dataclass
class Watched:
    """What was seen of some requests.

    Attributes:
        logits: by request, those [V] that its new tokens were taken from, in order.
        segments: by step, the number of new tokens of each of its requests.
        events: how often the cache shared a prefix, copied blocks of a fork, dropped a request or moved one out.
    """

    logits: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    segments: list[list[int]] = field(default_factory=list)
    events: Counter = field(default_factory=Counter)


@contextmanager
def watch(model: PeftModel) -> Iterator[Watched]:
    """While the block lasts, see what continuous batching does with `model`."""
    seen, managers = Watched(), []

    def spy(patch: pytest.MonkeyPatch, cls: type, name: str, count) -> None:
        method = getattr(cls, name)

        def spied(self, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            seen.events[name] += count(result, *args)
            return result

        patch.setattr(cls, name, spied)

    def look(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if "cu_seq_lens_q" not in kwargs or not managers:  # a warm-up, before the start
            return
        batch = managers[-1].batch_processor.inputs_and_outputs.requests_in_batch
        seen.segments.append(kwargs["cu_seq_lens_q"].diff().tolist())
        new = [future.state.request_id for future in batch if future.has_new_token]
        for request, logits in zip(new, output.logits[0], strict=False):
            seen.logits[request].append(logits.clone())

    def note(manager, *args: Any, **kwargs: Any) -> None:
        managers.append(manager)
        start(manager, *args, **kwargs)

    start = ContinuousBatchingManager.start
    hook = model.get_base_model().register_forward_hook(look, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatchingManager, "start", note)
        spy(patch, PagedAttentionCache, "search_prefix_match", lambda length, *_: length)
        spy(patch, PagedAttentionCache, "perform_cache_copy", lambda _, pairs: sum(len(s) for s, _ in pairs.values()))
        spy(patch, RequestState, "create_equivalent_initial_request", lambda *_: 1)
        spy(patch, OffloadingManager, "_offload_to_cpu", lambda moved, *_: len(moved))
        yield seen
    hook.remove()


def alone(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The logits [n, V] from which a plain run takes each of `tokens` after `prompt`, token by token."""
    ids = torch.tensor([[*prompt, *tokens]])
    cache = DynamicCache(config=model.config)
    bounds = [0, *range(len(prompt), ids.shape[1])]
    steps = [
        outputs(model, {"input_ids": ids[:, a:b], CACHE: cache, "use_cache": True})[:, -1] for a, b in pairwise(bounds)
    ]
    return torch.cat(steps)


def check(model: nn.Module, given: Sequence[Sequence[int]], results: dict[str, Any], seen: Watched) -> None:
    """Every token was taken from the logits that a plain run of its request alone has."""
    children = len(results) // len(given)
    for number, (name, result) in enumerate(results.items()):
        assert result.error is None
        expected = alone(model, given[number // children], result.generated_tokens)
        torch.testing.assert_close(torch.stack(seen.logits[name]), expected, rtol=0, atol=1e-10)


def run(model: PeftModel, given: list[list[int]], config: GenerationConfig, batch: Any, **kwargs: Any) -> Watched:
    """Serve the requests `given`, and check each against itself alone; with a greedy `config`, `generate` too."""
    with watch(model) as seen:
        results = model.generate_batch(
            inputs=given, generation_config=config, continuous_batching_config=batch, **kwargs
        )
    check(model, given, results, seen)
    for prompt, result in zip(given, results.values(), strict=False) if not config.do_sample else ():
        tokens = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert result.generated_tokens == tokens.tolist()
    return seen
