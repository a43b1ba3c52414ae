"""Copies of a model: as independent as two models."""

import copy
import io
import pickle

import pytest
import torch
from helpers.models import assert_one_router, outputs, randomise, sgd, text, token_ids, train_step
from torch import nn

from peft_queryable import use_instructions


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def checkpointed_deepcopy(model: nn.Module) -> nn.Module:
    """A deep copy of `model` after a training step with gradient checkpointing, which is then switched off."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**text()).logits.sum().backward()
    model.gradient_checkpointing_disable()
    return copy.deepcopy(model)


COPIES = [copy.deepcopy, through_pickle, through_torch_save, checkpointed_deepcopy]


@pytest.mark.parametrize("copied", COPIES, ids=lambda function: function.__name__)
def test_copies_are_independent(model, copied):
    """A copy computes the same, has one router of its own, and training it does not move the original."""
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    expected = outputs(model, inputs)
    other = copied(model)
    assert torch.equal(outputs(other, inputs), expected)
    assert_one_router(other)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    with use_instructions(other, None):
        train_step(other.train(), text(), sgd(other))
    assert torch.equal(outputs(model, inputs), expected)
    assert not torch.allclose(outputs(other.eval(), inputs), expected)


@pytest.mark.parametrize("copied", COPIES, ids=lambda function: function.__name__)
def test_copies_generate_alone(model, copied):
    """A copy generates what the original does, instructed too, also when the original is changed and gone."""
    settings = {"input_ids": token_ids(1, 3), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings["instruction_embeds"] = 5 * torch.randn(1, 5)
    other = copied(model)
    expected = model.generate(**settings)
    randomise(model, scale=3.0)
    del model
    assert torch.equal(other.generate(**settings), expected)
