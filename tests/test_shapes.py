"""Batches without rows or tokens, and inputs without a batch dimension."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.models import VOCAB, adapted, gpt2, learned, mlp, randomise, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

TARGETS = ["first", "second", "third"]
METHODS = {
    "lora": lambda base, targets, **kwargs: get_peft_model(base, LoraConfig(r=4, target_modules=targets)).eval(),
    "queryable": lambda base, targets, **kwargs: adapted(base, target_modules=targets, **kwargs),
}


@pytest.fixture(params=METHODS)
def method(request) -> Callable[..., nn.Module]:
    """Wraps a model in float64 with a random adapter: plain LoRA is the control."""

    def wrap(base: nn.Module, targets: list[str], **kwargs) -> nn.Module:
        model = METHODS[request.param](base.double(), targets, **kwargs)
        randomise(model)
        return model

    return wrap


@pytest.mark.parametrize("scope", ["causal", "sequence"])
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8), (1, 0, 8), (0, 2, 3, 8)], ids=str)
def test_empty_batches(method, shape, scope):
    """A call without rows or tokens gives an empty output, and in training a gradient of zero for every parameter."""
    model = method(mlp(), TARGETS, routing_scope=scope).train()
    output = model(torch.zeros(shape).double())
    assert output.shape == (*shape[:-1], 3)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in learned(model) if p.requires_grad)


def test_one_vector_without_a_batch(method):
    """A vector [d] alone is its row in LoRA; here the call is refused, with the line that works."""
    model, x = method(mlp(), TARGETS), torch.randn(8).double()
    row = model(x.unsqueeze(0))[0]
    if "queryable" in model.peft_type.lower():
        with pytest.raises(ValueError, match=r"one vector of features without a batch .* `x.unsqueeze\(0\)`"):
            model(x)
    else:
        torch.testing.assert_close(model(x), row, rtol=0, atol=1e-12)


class Tagger(nn.Module):
    """Layers over the embeddings of token ids, of a batch or of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCAB, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_tokens_without_a_batch(method, scope):
    """Tokens [T] of one sequence are not taken for T rows, whose numbers would be others: they are refused."""
    model, ids = method(Tagger(), ["0", "1"], routing_scope=scope), token_ids(1, 6)
    row = model(input_ids=ids)[0]
    embeds = model.get_base_model().embedding(ids[0])
    if "queryable" in model.peft_type.lower():
        with pytest.raises(ValueError, match=r"`input_ids` \[6\] of the model has no batch dimension, .*unsqueeze"):
            model(input_ids=ids[0])
        with pytest.raises(ValueError, match=r"`inputs_embeds` \[6, 8\] of the model has no batch dimension"):
            model(inputs_embeds=embeds)
    else:
        torch.testing.assert_close(model(input_ids=ids[0]), row, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(inputs_embeds=embeds), row, rtol=0, atol=1e-12)


def test_ids_without_a_batch_in_transformers():
    """GPT-2 makes a row of ids [T], where its call says nothing of it."""
    model = adapted(gpt2(), target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"`input_ids` \[6\] of transformer has no batch dimension"):
        model(input_ids=token_ids(1, 6)[0])


def test_routes_that_read_no_token_take_any_shape():
    """Where routes depend on no token, one sequence without a batch is what it is in a batch."""
    model, ids = adapted(Tagger(), target_modules=["0", "1"], query_terms=[]), token_ids(1, 6)
    randomise(model)
    torch.testing.assert_close(model(input_ids=ids[0]), model(input_ids=ids)[0])
