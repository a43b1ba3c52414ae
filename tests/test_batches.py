"""Batches: padding, masks, batch mates, row order and packing change nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.models import adapted, bert, gpt2, llama, opt, outputs, randomise, token_ids
from torch import Tensor

LENGTHS = (7, 4, 6)
SCOPES = ("causal", "prompt", "sequence")
MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def build(make, scope: str):
    model = adapted(make().double(), target_modules="all-linear", routing_scope=scope)
    randomise(model)
    return model


@pytest.fixture
def sequences() -> list[dict[str, Tensor]]:
    """Three sequences of different lengths, each [1, T], with the first three tokens as prompt."""
    return [
        {"input_ids": token_ids(1, length), "prompt_mask": (torch.arange(length) < 3).unsqueeze(0)}
        for length in LENGTHS
    ]


def padded(sequences: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """The sequences as one batch [3, 9], with at least two columns of padding."""
    length = max(LENGTHS) + 2
    batch = {"input_ids": [], "prompt_mask": [], "attention_mask": []}
    for sequence in sequences:
        missing = length - sequence["input_ids"].shape[1]
        pad = (missing, 0) if side == "left" else (0, missing)
        for name, tensor in (sequence | {"attention_mask": torch.ones_like(sequence["input_ids"])}).items():
            batch[name].append(torch.nn.functional.pad(tensor, pad))
    return {name: torch.cat(tensors) for name, tensors in batch.items()}


def alone(model, sequences) -> list[Tensor]:
    return [outputs(model, sequence)[0] for sequence in sequences]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_batch_equals_sequences_alone(name, side, scope, sequences):
    """Real tokens of a padded batch get the logits that their sequence gets alone."""
    model, batch = build(MODELS[name], scope), padded(sequences, side)
    positions = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}  # as generate passes them
    logits = outputs(model, batch | positions)
    for row, mask, expected in zip(logits, batch["attention_mask"], alone(model, sequences), strict=True):
        torch.testing.assert_close(row[mask.bool()], expected, **TOLERANCE)


@pytest.mark.parametrize("scope", SCOPES)
def test_row_order_and_batch_mates(scope, sequences):
    """Rows may be shuffled, and a mate replaced, without a change to the others."""
    model, batch = build(llama, scope), padded(sequences, "right")
    logits, order = outputs(model, batch), torch.tensor([2, 0, 1])
    shuffled = outputs(model, {name: tensor[order] for name, tensor in batch.items()})
    torch.testing.assert_close(shuffled, logits[order], **TOLERANCE)
    batch["input_ids"][0] = token_ids(1, batch["input_ids"].shape[1])
    torch.testing.assert_close(outputs(model, batch)[1:], logits[1:], **TOLERANCE)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", SCOPES)
def test_four_dimensional_masks(scope, side, kind, sequences):
    """A mask [B, 1, T, T] that hides the same tokens gives the same logits as [B, T]."""
    model, batch = build(llama, scope), padded(sequences, side)
    real = batch["attention_mask"].bool()
    length = real.shape[1]
    visible = torch.ones(length, length).tril().bool() & real[:, None, None, :]
    mask = visible if kind == "bool" else torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e300)
    positions = torch.arange(length).expand_as(batch["input_ids"])
    expected = outputs(model, batch | {"position_ids": positions})
    logits = outputs(model, batch | {"attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


def packed(sequences, marks: tuple[str, ...]) -> dict[str, Tensor]:
    """The sequences in one row, as collators of packed and padding-free batches send them: no attention mask."""
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    row = {
        "input_ids": torch.cat([s["input_ids"] for s in sequences], dim=1),
        "prompt_mask": torch.cat([s["prompt_mask"] for s in sequences], dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0),
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS)).unsqueeze(0).int(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
    }
    # With a cache, transformers' attention does not look for packed rows.
    return {name: row[name] for name in ("input_ids", "prompt_mask", "position_ids", *marks)} | {"use_cache": False}


@pytest.mark.parametrize(
    "marks", [(), ("seq_idx",), ("cu_seq_lens_q", "cu_seq_lens_k")], ids=["positions", "seq", "cu"]
)
@pytest.mark.parametrize("scope", SCOPES)
def test_packed_row_equals_sequences_apart(scope, marks, sequences):
    """Sequences packed into one row are routed as if alone."""
    model = build(llama, scope)
    logits = outputs(model, packed(sequences, marks))[0].split(LENGTHS)
    for row, expected in zip(logits, alone(model, sequences), strict=True):
        torch.testing.assert_close(row, expected, **TOLERANCE)


def test_packed_labels_mark_each_prompt(sequences):
    """In scope `prompt`, labels mark the prompt of every packed sequence, as prompt masks do."""
    model = build(llama, "prompt")
    row = packed(sequences, ())
    by_mask = outputs(model, row)
    labels = row["input_ids"].masked_fill(row.pop("prompt_mask"), -100)
    torch.testing.assert_close(outputs(model, row | {"labels": labels}), by_mask, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_future_tokens_change_nothing_in_causal(name):
    """A perturbed token moves no earlier logit in scope `causal`."""
    model, ids = build(MODELS[name], "causal"), token_ids(2, 8)
    logits = outputs(model, {"input_ids": ids})
    ids[:, 5] = (ids[:, 5] - 2) % 61 + 3
    changed = outputs(model, {"input_ids": ids})
    assert torch.equal(changed[:, :5], logits[:, :5])
    assert not torch.equal(changed[:, 5:], logits[:, 5:])


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
def test_one_route_a_sequence(scope, sequences):
    """Supervised tokens do not move a prompt's route, but a sequence's."""
    model, ids = build(llama, scope), token_ids(1, 8)
    mask = (torch.arange(8) < 3).unsqueeze(0)
    logits = outputs(model, {"input_ids": ids, "prompt_mask": mask})
    ids[:, 7] = (ids[:, 7] - 2) % 61 + 3
    changed = outputs(model, {"input_ids": ids, "prompt_mask": mask})
    assert torch.equal(changed[:, :7], logits[:, :7]) == (scope == "prompt")


def test_encoder_padding():
    """A padded batch of BERT gets the logits that its rows get alone."""
    model = build(bert, "auto")
    ids, mask = token_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    logits = outputs(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(logits[1:], outputs(model, {"input_ids": ids[1:, :4]}), **TOLERANCE)
