"""Recorded routes: those that the router made, once per call, by block and without padding."""

import pytest
import torch
from helpers.models import (
    ARCHITECTURES,
    LLAMA_PROJECTIONS,
    VOCAB,
    adapted,
    llama,
    outputs,
    randomise,
    router_of,
    sgd,
    text,
    token_ids,
    train_step,
    two_adapters,
)

from peft_queryable import RouteStatistics, record_routing

SCOPES = ["causal", "prompt", "sequence"]


def routed(**kwargs):
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, **kwargs)
    randomise(model)
    return model.eval()


def watched(model):
    """Weights [B, K, M] by block, as they leave the router: a list that fills as the model runs."""
    made = []
    router_of(model).register_forward_hook(lambda _, args, weights: made.append((args[0], weights.detach())))
    return made


@pytest.mark.parametrize("scope", [*SCOPES, "auto"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_routers_weights_are_recorded(name, scope):
    """In every architecture and scope, stack by stack, each block's weights are those that the router gave it."""
    architecture = ARCHITECTURES[name]
    model = adapted(architecture.build(), target_modules=architecture.targets, routing_scope=scope)
    randomise(model)
    made = watched(model)
    with record_routing(model) as trace:
        outputs(model, architecture.inputs())
    recorded = {block: weights for call in trace.calls for block, weights in call.weights.items()}
    assert recorded.keys() == {block for block, _ in made}
    assert len(recorded) == router_of(model).settings.num_blocks
    for block, weights in made:
        assert torch.equal(recorded[block], weights)


def test_nothing_is_recorded_outside_the_block():
    model = routed()
    with record_routing(model) as trace:
        model(**text())
    model(**text())
    assert len(trace.calls) == 1


def test_a_call_that_raises_leaves_no_record():
    model = routed()
    with record_routing(model) as trace, pytest.raises(IndexError):
        model(input_ids=torch.tensor([[VOCAB]]))
    assert trace.calls == []


def test_padding_is_left_out():
    """`weights` holds the routes of real tokens, call after call."""
    model = routed(routing_scope="causal")
    ids, mask = token_ids(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with record_routing(model) as trace:
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids[:1, 2:])
    for block, weights in trace.weights().items():
        first, second = (call.weights[block] for call in trace.calls)
        torch.testing.assert_close(weights, torch.cat([first[0, 2:], first[1], second[0]]))
        torch.testing.assert_close(first[0, 2:], second[0])


@pytest.mark.parametrize("scope", SCOPES)
def test_steps_of_generation_are_recorded(scope):
    """One call for the prompt and one for each further token, whose fixed route is the prompt's."""
    model = routed(routing_scope=scope)
    with record_routing(model) as trace:
        model.generate(input_ids=token_ids(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)
    prefill, *steps = trace.calls
    assert len(steps) == 3
    for block, weights in prefill.weights.items():
        assert weights.shape[:2] == (2, 5 if scope == "causal" else 1)
        for step in steps:
            assert step.weights[block].shape[:2] == (2, 1)
            assert torch.equal(step.weights[block], weights) is (scope != "causal")


def test_checkpointed_layers_are_recorded_once():
    """Layers that run again in the backward pass add nothing, and the weights hold no graph."""
    model = routed()
    model.train()
    model.gradient_checkpointing_enable()
    with record_routing(model) as trace:
        train_step(model, text(), sgd(model))
    assert len(trace.calls) == 1
    assert not any(weights.requires_grad for weights in trace.calls[0].weights.values())


def test_each_adapter_is_recorded_for_its_rows():
    """Of a mixed batch, an adapter's record is that of its rows alone."""
    model, x = two_adapters(), torch.randn(4, 3, 8)
    with record_routing(model) as mixed:
        model(x, adapter_names=["one", "two", "__base__", "two"])
    for adapter, rows in (("one", [0]), ("two", [1, 3])):
        model.set_adapter(adapter)
        with record_routing(model) as trace:
            model(x[rows])
        for block, weights in trace.weights(adapter).items():
            torch.testing.assert_close(mixed.weights(adapter)[block], weights)


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="no Queryable LoRA adapter"), record_routing(llama()):
        pass


def test_an_adapter_that_did_not_run():
    model = routed()
    with record_routing(model) as trace:
        model(**text())
    with pytest.raises(ValueError, match=r"No route of adapter 'other' was recorded, only of \['default'\]"):
        trace.weights("other")


@pytest.mark.parametrize(("every", "limit", "kept"), [(1, 2, [0, 1]), (3, None, [0, 3, 6]), (2, 3, [0, 2, 4])])
def test_recording_is_bounded(every, limit, kept):
    """Every so manieth call, and no more than the limit; statistics go on beyond it."""
    model, batches = routed(), [text() for _ in range(7)]
    with record_routing(model) as all_calls:
        for batch in batches:
            model(**batch)
    with record_routing(model, every=every, limit=limit) as trace:
        for batch in batches:
            model(**batch)
    assert len(trace.calls) == len(kept)
    for call, index in zip(trace.calls, kept, strict=True):
        for block, weights in call.weights.items():
            assert torch.equal(weights, all_calls.calls[index].weights[block])
    assert trace.statistics["default"].count == 10 * len(range(0, 7, every))  # real tokens


def test_statistics_alone():
    """With a limit of 0 no call is kept, and the statistics are those of all."""
    model, batch = routed(), text()
    with record_routing(model, limit=0) as bounded, record_routing(model) as trace:
        model(**batch)
        model(**batch)
    assert bounded.calls == []
    expected = RouteStatistics()
    expected.add(trace.weights())
    assert bounded.statistics["default"].summary() == pytest.approx(expected.summary(), abs=1e-12)


@pytest.mark.parametrize("bad", [{"every": 0}, {"limit": -1}])
def test_bounds_that_are_none(bad):
    model, message = routed(), "takes `every` of 1 or more and `limit` of 0 or more"
    with pytest.raises(ValueError, match=message), record_routing(model, **bad):
        pass


def test_a_row_without_its_padding():
    model = routed(routing_scope="causal")
    with record_routing(model) as trace:
        model(**text())
    (call,) = trace.calls
    assert [len(call.row(0, row)) for row in (0, 1)] == [6, 4]
    assert torch.equal(torch.cat([call.row(2, 0), call.row(2, 1)]), trace.weights()[2])
