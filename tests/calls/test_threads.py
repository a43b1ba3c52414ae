"""Threads and nested calls: every thread has its own call, and an inner call leaves the outer one as it was."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, outputs, randomise, text, token_ids
from helpers.words import tokenizer, words
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from peft_queryable import record_routing, use_instructions
from peft_queryable.encoders import BackboneEncoder

THREADS, CALLS = 4, 50


def routed(scope: str = "causal", **kwargs) -> nn.Module:
    model = adapted(llama(pad_token_id=0), target_modules=LLAMA_PROJECTIONS, routing_scope=scope, **kwargs)
    randomise(model)
    return model


def lora() -> nn.Module:
    model = get_peft_model(llama(pad_token_id=0), LoraConfig(r=4, target_modules=LLAMA_PROJECTIONS)).eval()
    randomise(model)
    return model


def assert_threads_agree(works: list[Callable[[], Tensor]], calls: int = CALLS) -> None:
    """Every thread gets in each of its calls, beside the other threads, what it gets alone."""
    alone = [work() for work in works]
    start = threading.Barrier(len(works))

    def repeat(work: Callable[[], Tensor]) -> list[Tensor]:
        start.wait()
        return [work() for _ in range(calls)]

    with ThreadPoolExecutor(len(works)) as pool:
        for expected, results in zip(alone, pool.map(repeat, works), strict=True):
            for result in results:
                torch.testing.assert_close(result, expected, rtol=0, atol=0)


MODELS = {"lora": lora} | {scope: lambda scope=scope: routed(scope) for scope in ("causal", "prompt", "sequence")}


@pytest.mark.parametrize("length", [0, 1], ids=["equal lengths", "different lengths"])
@pytest.mark.parametrize("name", MODELS)
def test_forwards(name, length):
    model = MODELS[name]()
    inputs = [{"input_ids": token_ids(2, 5 + length * i)} for i in range(THREADS)]
    assert_threads_agree([lambda i=i: outputs(model, i) for i in inputs])


@pytest.mark.parametrize("name", MODELS)
def test_generate(name):
    model = MODELS[name]()
    works = []
    for i in range(THREADS):
        ids = token_ids(1 + i % 2, 4 + i)
        works.append(lambda ids=ids: model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert_threads_agree(works, calls=10)


def test_mixed_batches():
    model = routed()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    randomise(model, "other")
    names = (["default", "other"], ["other", "__base__"], ["__base__", "default"], None)
    works = []
    for row_names in names:
        inputs = {"input_ids": token_ids(2, 5)} | ({} if row_names is None else {"adapter_names": row_names})
        works.append(lambda inputs=inputs: outputs(model, inputs))
    assert_threads_agree(works)


def test_instructions():
    model = routed(instruction_dim=5)
    inputs = text()

    def work(embeds: Tensor) -> Tensor:
        with use_instructions(model, embeds):
            return outputs(model, inputs)

    assert_threads_agree([partial(work, torch.randn(1, 5)) for _ in range(THREADS)])


@pytest.mark.parametrize(
    "fields", [{}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": list(range(40))}], ids=str
)
def test_encoding(fields):
    """While one thread encodes instructions by the backbone, without adapters, the others keep theirs."""
    model = routed(instruction_dim=32, **fields)
    encoder, inputs, stop = BackboneEncoder(model, tokenizer()), text(), threading.Event()
    expected = outputs(model, inputs)
    with model.disable_adapter():
        embeds = BackboneEncoder(model, tokenizer())([words(i, 3) for i in range(200)])
        assert not torch.equal(outputs(model, inputs), expected)

    def encode() -> int:
        number = 0
        while number < 200 and not stop.is_set():
            torch.testing.assert_close(encoder([words(number, 3)])[0], embeds[number], rtol=0, atol=0)
            number += 1
        return number

    with ThreadPoolExecutor(1) as pool:
        encoded = pool.submit(encode)
        for _ in range(CALLS):
            torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=0)
        stop.set()
        assert encoded.result() > 0


def test_recording():
    """A thread records its own calls alone."""
    model = routed()

    def work(length: int) -> set:
        with record_routing(model) as trace:
            for _ in range(CALLS):
                outputs(model, {"input_ids": torch.ones(1, length, dtype=torch.long)})
        assert len(trace.calls) == CALLS
        return {call.weights[0].shape[1] for call in trace.calls}

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(2, 2 + THREADS))) == [{length} for length in range(2, 2 + THREADS)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiles", ["model", "layers"])
def test_compiled(compiles):
    """Compiled as a whole or layer by layer, threads agree as well."""
    torch._dynamo.reset()
    model = routed()
    inputs = [{"input_ids": token_ids(2, 5)} for _ in range(THREADS)]
    if compiles == "layers":
        for layer in model.base_model.model.model.layers:
            layer.compile(backend="aot_eager")
        runs = model
    else:
        runs = torch.compile(model, backend="aot_eager")
    for i in inputs:  # compiled by one thread
        outputs(runs, i)
    assert_threads_agree([lambda i=i: outputs(runs, i) for i in inputs], calls=10)


def test_refused_call_leaves_other_threads_alone():
    model = routed()
    ids = token_ids(2, 5)
    expected, stop = outputs(model, {"input_ids": ids}), threading.Event()

    def be_refused() -> int:
        refused = 0
        while not stop.is_set():
            with pytest.raises(ValueError, match="attention mask of shape"):
                model(input_ids=ids, attention_mask=torch.ones(1, 1, 1, 1, 1))
            refused += 1
        return refused

    with ThreadPoolExecutor(1) as pool:
        refusals = pool.submit(be_refused)
        for _ in range(CALLS):
            torch.testing.assert_close(outputs(model, {"input_ids": ids}), expected, rtol=0, atol=0)
        stop.set()
        assert refusals.result() > 0


class GenerateInside(LogitsProcessor):
    """Generates with the same model, for another prompt and under another instruction, at each step."""

    def __init__(self, model: nn.Module, embeds: Tensor | None) -> None:
        self.model, self.embeds = model, embeds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        extra = {} if self.embeds is None else {"instruction_embeds": self.embeds}
        self.model.generate(input_ids=input_ids[:1, :2], max_new_tokens=2, do_sample=False, pad_token_id=0, **extra)
        return scores


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
def test_generate_inside_generate(scope):
    """The inner `generate` restores the prompt and the instruction of the outer one."""
    model = routed(scope, instruction_dim=5)
    outer, inner = torch.randn(1, 5), torch.randn(1, 5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "instruction_embeds": outer}
    ids = token_ids(2, 5)
    expected = model.generate(input_ids=ids, **settings)
    processors = LogitsProcessorList([GenerateInside(model, inner)])
    nested = model.generate(input_ids=ids, logits_processor=processors, **settings)
    torch.testing.assert_close(torch.stack(nested.logits), torch.stack(expected.logits), rtol=0, atol=0)


def test_call_inside_a_call():
    """A forward hook that calls the model leaves the outer call as it was."""
    model = routed()
    ids = token_ids(2, 5)
    expected = outputs(model, {"input_ids": ids})
    called = []

    def call_again(module: nn.Module, args: tuple, output: Tensor) -> None:
        if not called:
            called.append(1)
            outputs(model, {"input_ids": token_ids(3, 4)})

    hook = model.base_model.model.model.layers[1].register_forward_hook(call_again)
    torch.testing.assert_close(outputs(model, {"input_ids": ids}), expected, rtol=0, atol=0)
    hook.remove()
    assert called


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, torch.OutOfMemoryError, ValueError])
def test_after_an_exception(error):
    """The next call starts clean, and nothing of the broken one is kept."""
    model = routed("prompt")
    ids = token_ids(2, 5)
    expected = outputs(model, {"input_ids": ids})
    layer = model.base_model.model.model.layers[2]

    def fail(module: nn.Module, args: tuple) -> None:
        raise error("stop")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(input_ids=ids, labels=ids.clone())
    hook.remove()
    inner = model.base_model.model.model  # without the outermost call, whose labels must be forgotten
    states = inner(input_ids=ids).last_hidden_state
    torch.testing.assert_close(outputs(model, {"input_ids": ids}), expected, rtol=0, atol=0)
    torch.testing.assert_close(states, adapted_states(model, ids), rtol=0, atol=0)
    torch.testing.assert_close(inner(input_ids=ids).last_hidden_state, adapted_states(model, ids), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="ran outside a call"):
        layer.mlp.gate_proj(torch.randn(2, 5, 32))


def adapted_states(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def test_copies():
    """Deep copies and pickles, also of a model that has just been interrupted, are models of their own."""
    model = routed()
    ids = token_ids(2, 5)
    expected = outputs(model, {"input_ids": ids})

    def fail(module: nn.Module, args: tuple) -> None:
        raise KeyboardInterrupt

    hook = model.base_model.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids)
    hook.remove()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(copied, {"input_ids": ids}), expected, rtol=0, atol=0)
        randomise(copied)
        torch.testing.assert_close(outputs(model, {"input_ids": ids}), expected, rtol=0, atol=0)
        assert not torch.equal(outputs(copied, {"input_ids": ids}), expected)
