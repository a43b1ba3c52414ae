"""What continuous batching runs under, in a thread of its own, and what it refuses before it takes a request."""

from __future__ import annotations

import pytest
import torch
from helpers.fixed import random_routes
from helpers.models import VOCAB, llama, randomise
from helpers.paged import METHODS, alone, batching, prompts, run, settings, trained, watch
from peft import LoraConfig, get_peft_model
from transformers import TrainerState
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper

from peft_queryable import (
    QueryableLoraConfig,
    RoutingCallback,
    fix_routes,
    record_routing,
    set_fixed_routes,
    use_instructions,
)
from peft_queryable.calls.paged import Filling, Tallies, tally_dtype, widths, with_tallies

DIM = 5  # of instructions


def instructed(**kwargs):
    return trained("queryable", instruction_dim=DIM, **kwargs)


# Under what it runs


def test_instructions():
    """A block of instructions around the call, or its own argument, holds for all requests."""
    model, given, text = instructed(), prompts(3, 20), torch.randn(1, DIM) * 5
    with use_instructions(model, text):
        run(model, given, settings(), batching())
        followed = alone(model, given[0], [3, 4])
    config, held = settings(max_new_tokens=2), {"instruction_embeds": text.double()}
    with watch(model) as seen:
        (result,) = model.generate_batch(given[:1], config, batching(), **held).values()
    expected = model.generate(torch.tensor(given[:1]), generation_config=config, **held)
    assert result.generated_tokens == expected[0, 3:].tolist()
    torch.testing.assert_close(seen.logits["req_0"][0], followed[0], rtol=0, atol=1e-10)
    assert (alone(model, given[0], [3, 4]) - followed).abs().max() > 0.1


def test_instructions_without_tokens():
    """Routes that nothing but the instruction chooses follow it, too."""
    model, given = instructed(query_terms=["instruction"]), prompts(3, 20)
    with use_instructions(model, torch.randn(1, DIM) * 5):
        run(model, given, settings(), batching())


def test_fixed_routes():
    """Fixed routes hold for all requests, those of a block and those that are set."""
    model, given = trained("queryable"), prompts(3, 20)
    with fix_routes(model, random_routes(model)):
        run(model, given, settings(), batching())
    set_fixed_routes(model, random_routes(model))
    run(model, given, settings(), batching())


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters(method):
    """Each active adapter has tallies of its own."""
    model = trained(method)
    further = {"lora": LoraConfig(r=8, target_modules=["q_proj", "down_proj"])}
    further["queryable"] = QueryableLoraConfig(
        r=8, num_blocks=2, target_modules=["q_proj", "down_proj"], num_atoms=5, routing_scope="causal"
    )
    model.add_adapter("second", further[method])
    model.double()
    randomise(model, "second")
    model.base_model.set_adapter(["default", "second"])
    run(model, prompts(15, 17, shared=14), settings(), batching(max_requests_per_batch=1))


@pytest.mark.parametrize("terms", [["state"], ["depth"], []])
def test_query_terms(terms):
    run(trained("queryable", query_terms=terms), prompts(3, 20, 7), settings(), batching())


# The tallies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tallies_lie_in_the_blocks(dtype):
    """Tallies keep every bit in a cache of any dtype, follow copies of blocks, and touch no key or value."""
    model = trained("queryable").to(dtype)
    plans = model.base_model.model_hooks.active_plans()
    config, further = with_tallies(model.config, dtype, plans)
    cache = PagedAttentionCache(
        config, batching(max_memory_percent=0.5), "cpu", DistributedHelper(None, None, {}), dtype
    )
    tallies = Tallies(cache, Filling(tuple(plans), None, None), further)
    group, (plan,) = tallies.group, plans
    group.block_table["request"] = [9, 4, 7]
    slots = torch.tensor(group.get_write_indices("request", 0, 10))
    written = torch.randn(10, sum(widths(plan).values()), dtype=tally_dtype(plan))
    for k, v in (group._kv_token_views[layer] for layer in range(model.config.num_hidden_layers)):
        for view in (k, v):
            view.index_fill_(0, slots, 7.0)
    tallies.write(plan, slots, written)
    assert torch.equal(tallies.read(plan, slots), written)
    group.copy_blocks([9, 4, 7], [20, 21, 22])
    group.block_table["fork"] = [20, 21, 22]
    copied = torch.tensor(group.get_write_indices("fork", 0, 10))
    assert torch.equal(tallies.read(plan, copied), written)
    for k, v in (group._kv_token_views[layer] for layer in range(model.config.num_hidden_layers)):
        assert (k[copied] == 7).all() and (v[copied] == 7).all()


# Refused


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
def test_other_scopes_are_refused(scope):
    model = trained("queryable", scope=scope)
    with pytest.raises(ValueError, match=rf"cannot run adapters \['default'\] with routing scope \['{scope}'\]"):
        model.generate_batch(inputs=[[3, 4, 5]], generation_config=settings())
    set_fixed_routes(model, random_routes(model))
    run(model, prompts(3, 20), settings(), batching())


def test_requests_of_their_own_are_refused():
    """One instruction, one set of routes and one set of adapters serve all requests."""
    model = instructed()
    with use_instructions(model, torch.randn(2, DIM)), pytest.raises(ValueError, match="but 2 were given"):
        model.generate_batch(inputs=[[3], [4]], generation_config=settings())
    with pytest.raises(ValueError, match="but 2 were given"):
        model.generate_batch(inputs=[[3], [4]], instruction_embeds=torch.randn(2, DIM).double())
    with pytest.raises(ValueError, match=r"must be a tensor of shape \[batch, 5\]"):
        model.generate_batch(inputs=[[3]], instruction_embeds=torch.randn(1, 3))
    with fix_routes(model, [random_routes(model)] * 2), pytest.raises(ValueError, match="but 2 were given"):
        model.generate_batch(inputs=[[3], [4]], generation_config=settings())
    with pytest.raises(ValueError, match="takes no `adapter_names`"):
        model.generate_batch(inputs=[[3], [4]], adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    "setting",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"use_async_batching": True},
        {"varlen_compile_config": CompileConfig()},
        {"decode_compile_config": CompileConfig()},
        {"default_compile_level": 1},
        {"max_blocks_per_request": 8},
    ],
)
def test_untested_settings_are_refused(setting):
    model, (name,) = trained("queryable"), setting
    with pytest.raises(ValueError, match=f"`{name}` of the ContinuousBatchingConfig was not tested"):
        model.generate_batch(inputs=[[3]], continuous_batching_config=batching(**setting))
    assert model.config._attn_implementation == "sdpa"


def test_the_fast_path_may_be_turned_off():
    run(trained("queryable"), prompts(3, 20), settings(), batching(max_blocks_per_request=0))


def test_recording_is_refused():
    """A block that would record nothing says so before any request; a trainer's recorder is of its own steps."""
    model, given = trained("queryable"), prompts(3)
    with record_routing(model):
        with pytest.raises(ValueError, match="`record_routing` cannot record continuous batching"):
            model.generate_batch(inputs=given, generation_config=settings())
        with pytest.raises(ValueError, match="`record_routing` cannot record continuous batching"):
            model.init_continuous_batching(settings(), batching())
    run(model, given, settings(), batching())
    callback = RoutingCallback(every=1)
    callback.on_train_begin(None, None, None, model)
    callback.on_step_begin(None, TrainerState(), None)
    with torch.no_grad():
        run(model, given, settings(), batching())
    callback.on_step_end(None, None, None)


def test_recording_another_thread():
    """A manager from outside of the block runs in its own thread: whoever reads the routes is told of threads."""
    model = trained("queryable")
    outside = model.continuous_batching_context_manager(settings(), continuous_batching_config=batching())
    with outside as manager, record_routing(model) as trace:
        manager.add_request(prompts(3)[0])
        assert manager.get_result(timeout=60).is_finished()
    with pytest.raises(ValueError, match="in the block's own thread"):
        trace.weights()


def test_a_window_of_one_token_is_refused():
    model = trained("queryable")
    model.config.sliding_window = 1
    with pytest.raises(ValueError, match="A window of one token keeps no earlier token"):
        model.generate_batch(inputs=[[3]], generation_config=settings(), continuous_batching_config=batching())


def test_a_persistent_manager_keeps_to_what_it_was_made_under():
    """Blocks of earlier sessions were routed under their adapters, instruction and fixed routes."""
    model, given = instructed(), prompts(9)
    run(model, given, settings(), batching(), persistent_manager=True)
    changed = pytest.raises(ValueError, match=r"have changed since .*destroy_cached_continuous_batching_manager")
    with use_instructions(model, torch.randn(1, DIM)), changed:
        model.generate_batch(inputs=given, generation_config=settings(), persistent_manager=True)
    with fix_routes(model, random_routes(model)), changed:
        model.generate_batch(inputs=given, generation_config=settings(), persistent_manager=True)
    with model.disable_adapter(), changed:
        model.generate_batch(inputs=given, generation_config=settings(), persistent_manager=True)
    run(model, given, settings(), batching(), persistent_manager=True)
    model.destroy_cached_continuous_batching_manager()
    with use_instructions(model, torch.randn(1, DIM)):
        run(model, given, settings(), batching())


def test_a_running_manager_notices_a_change():
    """A request that comes after the adapter was changed fails, and says why."""
    model = trained("queryable")
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=batching()) as manager:
        manager.add_requests(prompts(5))
        assert manager.get_result(timeout=60).error is None
        model.base_model.disable_adapter_layers()
        manager.add_requests(prompts(5))
        assert "have changed since" in manager.get_result(timeout=60).error


def test_a_manager_from_before_the_adapter():
    """A cache that was made without tallies is refused by the first call that meets it."""
    base = llama(max_position_embeddings=256, eos_token_id=VOCAB + 1).double()
    manager = base.init_continuous_batching(settings(), batching())
    config = QueryableLoraConfig(r=4, target_modules=["q_proj"], routing_scope="causal")
    randomise(get_peft_model(base, config).eval())
    manager.start()
    manager.add_requests(prompts(5))
    assert "is a cache of type PagedAttentionCache" in manager.get_result(timeout=60).error
    manager.stop()
