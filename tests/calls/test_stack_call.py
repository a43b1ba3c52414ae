"""What one call of one stack says: its rows, its tokens, and which labels are about them."""

import warnings

import pytest
import torch
from helpers.models import CACHE, adapted, llama, mlp, outputs, randomise, t5, text, token_ids
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_queryable import record_routing


def test_labels_are_about_the_decoders_tokens():
    """In scope `prompt`, labels of an encoder-decoder mark a prompt in its decoder, and none in its encoder."""
    model = adapted(t5(), target_modules=["q", "v"], routing_scope="prompt")
    randomise(model)
    inputs = text() | {"decoder_input_ids": token_ids(length=6)}
    labels = inputs["input_ids"].clone()  # as many of them as tokens of the encoder
    labels[:, :2] = -100
    routes = []
    for kwargs in (inputs, inputs | {"labels": labels}):
        with record_routing(model) as trace:
            outputs(model, kwargs)
        routes.append({call.stack: call.weights for call in trace.calls})
    plain, labelled = routes
    assert plain.keys() == {"encoder", "decoder", "decoder (cross-attention)"}
    for stack, blocks in plain.items():
        same = [torch.equal(labelled[stack][block], weights) for block, weights in blocks.items()]
        assert any(same) == all(same) == (stack != "decoder")


class Weighted(nn.Module):
    """Linear layers after a weighting of the tokens, whose weights [T] come first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, weights, hidden_states):
        return self.body(weights[:, None] * hidden_states)


def test_hidden_states_tell_the_rows():
    """Whatever tensors stand before them, hidden states say how many rows and tokens a call has."""
    model = adapted(Weighted().eval(), target_modules=["first", "second"], routing_scope="causal")
    randomise(model)
    weights, states = torch.rand(4), torch.randn(2, 4, 8)
    together = model(weights, states)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], model(weights, states[row : row + 1]))
    torch.testing.assert_close(model(weights[:3], states[:, :3]), together[:, :3])


class Constant(nn.Module):
    """A model of a number, which no tensor comes into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, number):
        return self.inner(torch.full((1, 4), number))


def test_a_call_without_a_tensor_is_refused():
    """Without a tensor among the arguments there are no rows to tell apart: a ValueError says so."""
    model = adapted(Constant(), target_modules=["inner"])
    with pytest.raises(ValueError, match="A call without any tensor among its arguments cannot be routed"):
        model(3.0)


# A prompt that nothing tells


def in_scope_prompt() -> nn.Module:
    model = adapted(llama(), target_modules="all-linear", routing_scope="prompt")
    randomise(model)
    return model


def test_training_without_a_prompt_is_refused():
    """In training nothing may be taken for the prompt: the answer would route itself."""
    model, ids = in_scope_prompt().train(), token_ids()
    with pytest.raises(
        ValueError,
        match=r"scope 'prompt', .* neither integer `labels` \[batch, tokens\] nor `prompt_mask`, so the answer",
    ):
        model(input_ids=ids)
    model(input_ids=ids, prompt_mask=torch.ones_like(ids))
    model(input_ids=ids, labels=ids)  # after the first call nothing waits for the device


@pytest.mark.parametrize("taken", ["label_smoothing_factor", "compute_loss_func"])
def test_trainers_that_take_the_labels_are_refused(taken, tmp_path):
    """A Trainer that keeps the labels for itself stops in its first step; a prompt mask in the batch helps it."""
    ids = token_ids(1, 6)[0].tolist()
    value = 0.1 if taken == "label_smoothing_factor" else None
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        label_smoothing_factor=value or 0,
    )
    loss = None if value else lambda outputs, labels, **kwargs: outputs.logits.square().mean()

    def trainer(example: dict) -> Trainer:
        return Trainer(in_scope_prompt(), arguments, train_dataset=[example] * 2, compute_loss_func=loss)

    with pytest.raises(ValueError, match="so the answer would route itself"):
        trainer({"input_ids": ids, "labels": ids}).train()
    trainer({"input_ids": ids, "labels": ids, "prompt_mask": [1, 1, 0, 0, 0, 0]}).train()


def test_evaluation_without_a_prompt_warns():
    """In evaluation mode a call that tells no prompt is taken for a prefill, with a warning; `generate` tells it."""
    model, ids = in_scope_prompt(), token_ids()
    with pytest.warns(UserWarning, match="All its tokens count as the prompt"):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids)
        model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0)


def test_training_where_all_is_supervised_warns_once():
    """Labels that leave no prompt make routes that are the same for all inputs; one prompt in the batch is enough."""
    ids = token_ids()
    labels = ids.clone()
    labels[0, :2] = -100
    told, model = in_scope_prompt().train(), in_scope_prompt().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told(input_ids=ids, labels=labels)
    with pytest.warns(UserWarning, match=r"every token of its first training call is supervised, .*'causal'"):
        model(input_ids=ids, labels=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids)
    padded = torch.ones_like(ids)
    padded[:, :2] = 0  # padding before the first supervised token is no prompt
    with pytest.warns(UserWarning, match="is supervised"):
        in_scope_prompt().train()(input_ids=ids, attention_mask=padded, prompt_mask=1 - padded)


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
def test_the_prompt_of_generate_is_the_decoders(scope):
    """In `generate` an encoder's routes see all of its tokens, though the decoder's prompt is one token."""
    model = adapted(t5(), target_modules=["q", "v"], routing_scope=scope)
    randomise(model)
    inputs, routes = text(), []
    for run in (lambda: model.generate(**inputs, max_new_tokens=2), lambda: model.get_encoder()(**inputs)):
        with record_routing(model) as trace:
            run()
        routes.append([call.weights for call in trace.calls if call.stack == "encoder"])
    (generated,), (alone,) = routes
    for block, weights in alone.items():
        torch.testing.assert_close(generated[block], weights)


def test_labels_of_other_tokens_tell_no_prompt():
    """Labels of another length than the call are about other tokens: nothing tells the prompt."""
    with pytest.raises(ValueError, match="so the answer would route itself"):
        in_scope_prompt().train()(input_ids=token_ids(2, 6), labels=token_ids(2, 5))


# A prompt that goes on in a second call


def test_a_step_with_more_of_the_prompt_is_refused():
    """Routes that a cached prompt has fixed do not see more of it; a supervised answer may follow."""
    model, ids = in_scope_prompt(), token_ids(2, 6)
    answer = ids[:, 4:]
    half = torch.tensor([[-100, 1], [2, 3]])
    for marks in ({"prompt_mask": torch.tensor([[1, 0], [0, 0]])}, {"labels": half}):
        cache = model(input_ids=ids[:, :4], prompt_mask=torch.ones(2, 4))[CACHE]
        with pytest.raises(ValueError, match="goes on from a filled cache marks tokens as prompt"):
            model(input_ids=answer, **{CACHE: cache}, **marks)
    padded = {"labels": torch.tensor([[-100, 1], [2, 3]]), "attention_mask": torch.ones(2, 6)}
    padded["attention_mask"][0, 4] = 0
    for marks in ({"prompt_mask": torch.zeros(2, 2)}, {"labels": answer}, {}, padded):
        cache = model(input_ids=ids[:, :4], prompt_mask=torch.ones(2, 4))[CACHE]
        model(input_ids=answer, **{CACHE: cache}, **marks)


def test_positions_of_a_step_mark_no_packing():
    """With a filled cache, positions that do not go on are those of candidates, not of packed sequences."""
    model, ids = adapted(llama(), target_modules="all-linear"), token_ids(1, 6)
    randomise(model)
    routes = []
    for positions in ([4, 5], [4, 3]):
        cache = model(input_ids=ids[:, :4])[CACHE]
        with record_routing(model) as trace:
            model(input_ids=ids[:, 4:], position_ids=torch.tensor([positions]), **{CACHE: cache})
        routes.append(trace.calls[-1].weights[0])  # of the first block, before any attention
    torch.testing.assert_close(*routes)
