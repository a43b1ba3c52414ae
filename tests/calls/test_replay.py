"""Gradient checkpointing: loss and every gradient equal those without it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from helpers.models import adapted, bert, gpt2, llama, randomise, t5, token_ids
from packaging.version import Version
from torch import Tensor, nn

from peft_queryable.calls.adapter_call import AdapterCall

SCOPES = ("causal", "prompt", "sequence")
MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def build(make=llama, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = adapted(make().double(), target_modules="all-linear", **kwargs)
    randomise(model)
    return model.train()


def batch(seed: int) -> dict[str, Tensor]:
    """Two rows, the second padded, the first three tokens unsupervised."""
    torch.manual_seed(seed)
    ids, mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses, and gradients of their sum after all forwards, with the dropout masks of one seed."""
    torch.manual_seed(7)
    losses = [model(**inputs).loss for inputs in batches]
    sum(losses).backward()
    result = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return result | {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}


def router(model: nn.Module) -> nn.Module:
    return model.base_model.queryable_lora_router["default"]


def checkpointing(model: nn.Module, **kwargs) -> nn.Module:
    model.get_base_model().gradient_checkpointing_enable(**kwargs)
    return model


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("scope", SCOPES)
def test_equal_to_none(scope, blocks):
    """Blocks that span several checkpointed layers, dropout on, two forwards before one backward."""
    kwargs = {"routing_scope": scope, "num_blocks": blocks, "lora_dropout": 0.2}
    batches = [batch(1), batch(2)]
    expected = gradients(build(**kwargs), batches)
    assert_same(gradients(checkpointing(build(**kwargs)), batches), expected)


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    """Decoder, Conv1D decoder, encoder with a pooler of its own, encoder-decoder with cross-attention."""
    inputs = batch(1)
    if name == "bert":
        inputs |= {"labels": torch.tensor([0, 1])}
        del inputs["use_cache"]
    expected = gradients(build(MODELS[name]), [inputs])
    assert_same(gradients(checkpointing(build(MODELS[name])), [inputs]), expected)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.21"), reason="every_n_layers is newer")
def test_every_second_layer():
    """Layers that run again and layers that do not, in one block."""
    expected = gradients(build(), [batch(1)])
    assert_same(gradients(checkpointing(build(), every_n_layers=2), [batch(1)]), expected)


def test_accumulation():
    """Gradients of two steps add up."""
    expected = gradients(build(), [batch(1), batch(2)])
    model = checkpointing(build())
    torch.manual_seed(7)
    for inputs in (batch(1), batch(2)):
        model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


def test_graph_gone_through_twice():
    """A graph that is kept gives the same gradients again."""
    model = checkpointing(build())
    loss = model(**batch(1)).loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for again, gradient in zip(torch.autograd.grad(loss, parameters), first, strict=True):
        torch.testing.assert_close(again, gradient, rtol=0, atol=0)


def test_under_autocast():
    """bfloat16 autocast: equal to the same run without checkpointing."""
    models = [build().float(), checkpointing(build().float())]
    results = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(model, [batch(1)]))
    assert_same(results[1], results[0], atol=1e-6)


def test_adapter_disabled_between_forward_and_backward():
    """A reference pass without the adapter (as in DPO) disturbs no replay."""
    expected = gradients(build(), [batch(1)])
    model = checkpointing(build())
    torch.manual_seed(7)
    loss = model(**batch(1)).loss
    with model.disable_adapter():
        model(**batch(2))
    model.eval()(**batch(2))
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


def test_dropped_graph_takes_its_replay_with_it():
    """A forward without a backward leaves no cycle through the graph, which Python could not collect."""
    model = checkpointing(build())
    loss = model(**batch(1)).loss
    contexts = [weakref.ref(o) for o in gc.get_objects() if type(o) is AdapterCall and o.plan.router is router(model)]
    assert len(contexts) == 1
    del loss
    gc.collect()
    assert contexts[0]() is None


def test_reentrant_is_refused():
    """Reentrant checkpointing would lose the route's gradient: an error before anything is computed."""
    model = checkpointing(build(), gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        model(**batch(1))


def test_nothing_said_is_not_reentrant():
    """Empty keywords, as from PEFT's `prepare_model_for_kbit_training`, do not mean torch's reentrant default."""
    model = checkpointing(build(), gradient_checkpointing_kwargs={})
    assert_same(gradients(model, [batch(1)]), gradients(build(), [batch(1)]))


def test_other_checkpointing_is_refused_clearly():
    """A layer checkpointed by hand has no call to find when it runs again."""
    model = build()
    layer = model.get_base_model().model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    loss = model(**batch(1)).loss
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_functions_without_the_argument(is_reentrant):
    """Checkpoint functions that take no `use_reentrant`, as diffusers' do, work; reentrant ones are found out."""
    expected = gradients(build(), [batch(1)])
    model = checkpointing(build())

    def checkpoint(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=is_reentrant)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint
    if is_reentrant:
        model.enable_input_require_grads()
        with pytest.raises(ValueError, match="reentrant gradient checkpointing"):
            gradients(model, [batch(1)])
    else:
        assert_same(gradients(model, [batch(1)]), expected)


def test_replays_keep_nothing():
    """Layers that run again leave no tensor of the graph in the call that they read."""
    model = checkpointing(build(routing_scope="causal"))
    loss = model(**batch(1)).loss
    calls = [o for o in gc.get_objects() if type(o) is AdapterCall and o.plan.router is router(model)]
    loss.backward()
    assert [call.sums for call in calls] == [None]
