"""Fixed routes in every kind of call: rows, generation, caches, checkpoints, mixed batches, threads, graphs."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.fixed import close, random_routes, trained
from helpers.models import (
    CACHE,
    LLAMA_PROJECTIONS,
    llama,
    outputs,
    randomise,
    text,
    two_adapters,
)
from peft import PeftModel, get_peft_model
from transformers import DynamicCache

from peft_queryable import (
    QueryableLoraConfig,
    export_lora,
    fix_routes,
    record_routing,
    set_fixed_routes,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_rows_have_routes_of_their_own():
    """A list fixes one set for each row; beams of `generate` follow their row."""
    model, inputs = trained(llama(), target_modules=LLAMA_PROJECTIONS), text()
    sets = [random_routes(model) for _ in range(2)]
    alone = []
    for row, routes in enumerate(sets):
        with fix_routes(model, routes):
            alone.append(outputs(model, {k: v[row : row + 1] for k, v in inputs.items()}))
    with fix_routes(model, sets):
        close(outputs(model, inputs), torch.cat(alone))
        with pytest.raises(ValueError, match="2 sets of routes were given for a call of batch size 1"):
            outputs(model, {k: v[:1] for k, v in inputs.items()})
        with pytest.raises(ValueError, match="fixed at 2 sets"):
            model.merge_adapter()
        beams = model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
        uncached = model.generate(
            **inputs, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False
        )
    assert torch.equal(beams, uncached)


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
def test_generation_is_the_exports(scope, tmp_path):
    base = llama(initializer_range=0.5)
    model = trained(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
    routes, ids = random_routes(model), text()["input_ids"]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    set_fixed_routes(model, routes)
    export_lora(model, tmp_path / "lora")
    fixed = model.generate(input_ids=ids, **arguments)
    chunked = model.generate(input_ids=ids, prefill_chunk_size=2, **arguments)
    set_fixed_routes(model, None)
    exported = PeftModel.from_pretrained(base, tmp_path / "lora").eval().generate(input_ids=ids, **arguments)
    assert torch.equal(fixed, exported)
    assert torch.equal(chunked, exported)
    assert not torch.equal(model.generate(input_ids=ids, **arguments), fixed)


def test_a_training_step_with_checkpointing():
    """Loss and gradients with checkpointing equal those without; whatever the router learns from gets a zero."""
    model, inputs = trained(llama(), target_modules=LLAMA_PROJECTIONS).train(), text()
    set_fixed_routes(model, random_routes(model))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        close(gradient, plain[name])
        assert (gradient.abs().max() > 0) == ("router" not in name or "atoms" in name), name


def test_mixed_batch_and_several_adapters():
    """Rows of a fixed adapter use its routes, those of another its router; two fixed adapters merge together."""
    model = two_adapters()
    inputs = {"x": torch.randn(4, 8)}
    routes = random_routes(model, "one")
    names = ["two", "one", "__base__", "one"]
    with fix_routes(model, routes):
        mixed = model(**inputs, adapter_names=names)
        model.set_adapter("one", inference_mode=True)
        close(mixed[[1, 3]], outputs(model, inputs)[[1, 3]])
    model.set_adapter("two", inference_mode=True)
    close(mixed[0], outputs(model, inputs)[0])
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(NotImplementedError, match="cannot be merged"), fix_routes(model, routes):
        model.merge_adapter()
    with fix_routes(model, routes), fix_routes(model, random_routes(model, "two")):
        both = outputs(model, inputs)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"while .* are merged"):
            model(**inputs, adapter_names=names)
    close(outputs(model, inputs), both)
    with model.disable_adapter():
        base = outputs(model, inputs)
    model.unload()
    close(base, outputs(model.base_model.model, inputs))


def test_caches_between_routed_and_fixed():
    """A cache that was filled routed goes on fixed; one that was filled fixed cannot go on routed, and says so."""
    model, ids = trained(llama(), target_modules=LLAMA_PROJECTIONS), text()["input_ids"]
    cache = DynamicCache(config=model.config)
    with fix_routes(model, random_routes(model)), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :4], **{CACHE: cache}).logits
        close(torch.cat([first, model(input_ids=ids[:, 4:], **{CACHE: cache}).logits], 1), whole)
    with pytest.raises(ValueError, match="The cache holds 6 tokens, but adapter 'default' routed 0"):
        model(input_ids=ids[:, :1], **{CACHE: cache})
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        with fix_routes(model, random_routes(model)):
            assert model(input_ids=ids[:, :1], **{CACHE: cache}).logits.isfinite().all()


def test_threads():
    """A block holds in its own thread, routes that are set hold in all."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    routed, routes = outputs(model, inputs), random_routes(model)
    with ThreadPoolExecutor(1) as pool:
        with fix_routes(model, routes):
            fixed = outputs(model, inputs)
            close(pool.submit(outputs, model, inputs).result(), routed)
        set_fixed_routes(model, routes)
        close(pool.submit(outputs, model, inputs).result(), fixed)


def test_compiled():
    """Under fixed routes the model makes one graph, and gives the same."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    set_fixed_routes(model, random_routes(model))
    expected = outputs(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        close(compiled(**inputs).logits, expected)


def test_a_copy_keeps_its_routes():
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    set_fixed_routes(model, random_routes(model))
    expected = outputs(model, inputs)
    copied = copy.deepcopy(model)
    set_fixed_routes(model, None)
    close(outputs(copied, inputs), expected)


def test_routes_leave_with_their_adapter():
    """A further adapter of the same name is routed."""
    config = QueryableLoraConfig(r=4, num_atoms=6, top_k=3, router_dim=8, target_modules=["q_proj"])
    model, inputs = get_peft_model(llama(), config), text()
    model.add_adapter("second", copy.deepcopy(config))
    set_fixed_routes(model, random_routes(model, "second"))
    model.delete_adapter("second")
    model.add_adapter("second", copy.deepcopy(config))
    model.set_adapter("second")
    randomise(model, "second")
    with record_routing(model.eval()) as trace:
        outputs(model, inputs)
    assert (trace.weights("second")[0] == 0).any()  # top-k, as only a router chooses
