"""torch.compile: one full graph, the same numbers, and no more recompilations than plain LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import CACHE, adapted, llama, randomise, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import GenerationConfig

# torch.compile itself makes instances of an autograd function that has a vmap rule, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SHAPES = ((2, 6), (3, 6), (2, 9), (4, 12))  # batch sizes and lengths
SCOPES = ("causal", "prompt", "sequence")


def build(scope: str | None) -> nn.Module:
    """Two layers in two blocks; None for plain LoRA."""
    base = llama(num_hidden_layers=2)
    if scope is None:
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    else:
        model = adapted(base, target_modules="all-linear", routing_scope=scope, num_blocks=2)
    randomise(model)
    return model.train()


def losses(model: nn.Module, call: nn.Module) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Loss and gradients of a step on each shape, through `call`."""
    torch.manual_seed(1)
    steps = []
    for batch, length in SHAPES:
        ids = token_ids(batch, length)
        labels = ids.clone()
        labels[:, :3] = -100
        loss = call(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        loss.backward()
        steps.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    return steps


def graphs(scope: str | None) -> int:
    """Number of graphs that the steps compile to, checked to be equal to eager mode."""
    torch._dynamo.reset()
    counters.clear()
    model = build(scope)
    compiled = losses(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for (loss, gradients), (eager_loss, eager_gradients) in zip(compiled, losses(model, model), strict=True):
        torch.testing.assert_close(loss, eager_loss)
        for gradient, expected in zip(gradients, eager_gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def lora_graphs() -> int:
    return graphs(None)


@pytest.mark.parametrize("scope", SCOPES)
def test_training_step(scope, lora_graphs):
    """A training step in one full graph, over batch sizes and lengths."""
    assert graphs(scope) <= lora_graphs


@pytest.mark.parametrize("scope", SCOPES)
def test_generation_with_a_static_cache(scope):
    """generate compiles its decoding step for a static cache; the tokens are those of eager mode."""
    torch._dynamo.reset()
    model, ids = build(scope).eval(), token_ids(2, 6)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    eager = model.generate(ids, generation_config=GenerationConfig(**settings))
    config = GenerationConfig(**settings, cache_implementation="static")
    config.compile_config = torch_compile_config()
    counters.clear()
    compiled = model.generate(ids, generation_config=config)
    assert counters["stats"]["unique_graphs"] == 1  # whatever the number of steps, as plain LoRA
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_call_that_makes_its_own_cache(scope):
    """One full graph fills a new cache; eager steps go on from it, and a copy of it carries a state of its own."""
    torch._dynamo.reset()
    model, ids = build(scope).eval(), token_ids(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=True)
        result = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, use_cache=True)
        torch.testing.assert_close(result.logits, expected.logits)
        caches = [copy.deepcopy(result[CACHE]), result[CACHE], expected[CACHE]]
        steps = [model(input_ids=ids[:, :1], **{CACHE: cache}).logits for cache in caches]
    for step in steps[:2]:
        torch.testing.assert_close(step, steps[2])


def torch_compile_config():
    """Compile on the CPU too, which generate does not do by itself."""
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    config._compile_all_devices = True
    return config
