"""An instruction for each sequence of packed and padding-free rows, and for each request of a service."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.encoders import Fixed
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, outputs, randomise, token_ids
from peft import PeftModel
from torch import Tensor

from peft_queryable import QueryableLoraConfig, use_instructions

LENGTHS = (5, 3, 4)
ROWS = ((5, 3), (2, 6), (8,))  # the lengths of what is packed in three rows
EXACT = {"rtol": 0, "atol": 1e-10}
SCOPES = ("causal", "prompt", "sequence")
MARKS = {
    "positions": ("position_ids",),
    "seq_idx": ("seq_idx", "position_ids"),
    "cu": ("cu_seq_lens_q", "cu_seq_lens_k"),
}


def build(scope: str = "causal", **kwargs) -> PeftModel:
    model = adapted(
        llama().double(), target_modules=LLAMA_PROJECTIONS, routing_scope=scope, instruction_dim=5, **kwargs
    )
    randomise(model)
    return model


def embeddings(number: int) -> Tensor:
    return 3 * torch.randn(number, 5, dtype=torch.float64)


def sequence(length: int) -> dict[str, Tensor]:
    """One sequence [1, T], its first two tokens its prompt."""
    ids = token_ids(1, length)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 2, -100)}


def packed(sequences: list[dict[str, Tensor]], marks: tuple[str, ...] = ("position_ids",)) -> dict[str, Tensor]:
    """The sequences one after another in one row, as collators send them: without an attention mask."""
    lengths = torch.tensor([s["input_ids"].shape[1] for s in sequences])
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    row = {
        "input_ids": torch.cat([s["input_ids"] for s in sequences], 1),
        "labels": torch.cat([s["labels"] for s in sequences], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), lengths).unsqueeze(0).int(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
    }
    return {name: row[name] for name in ("input_ids", "labels", "position_ids", *marks)} | {"use_cache": False}


def apart(model: PeftModel, sequences: list[dict[str, Tensor]], embeds: Tensor) -> list[Tensor]:
    return [outputs(model, s | {"instruction_embeds": e}) for s, e in zip(sequences, embeds.split(1), strict=True)]


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS)
@pytest.mark.parametrize("scope", SCOPES)
def test_packed_sequences_follow_their_own(scope, marks):
    """Each sequence of a packed row is routed as if it ran alone under its instruction; the order matters."""
    model, sequences, embeds = build(scope), [sequence(n) for n in LENGTHS], embeddings(3)
    row = packed(sequences, marks)
    logits = outputs(model, row | {"instruction_embeds": embeds})
    torch.testing.assert_close(logits, torch.cat(apart(model, sequences, embeds), 1), **EXACT)
    with use_instructions(model, embeds):
        assert torch.equal(outputs(model, row), logits)
    turned = outputs(model, row | {"instruction_embeds": embeds.roll(1, 0)})
    assert (turned - logits).abs().max() > 1e-3


@pytest.mark.parametrize("scope", SCOPES)
def test_several_packed_rows(scope):
    """Instructions are given row by row, however many sequences a row has; one alone is for all."""
    model, embeds = build(scope), embeddings(5)
    rows = [[sequence(n) for n in lengths] for lengths in ROWS]
    batch = [packed(row) for row in rows]
    joined = {name: torch.cat([row[name] for row in batch]) for name in ("input_ids", "labels", "position_ids")}
    joined["use_cache"] = False
    flat = [s for row in rows for s in row]
    expected = torch.cat(apart(model, flat, embeds), 1).view(3, 8, -1)
    torch.testing.assert_close(outputs(model, joined | {"instruction_embeds": embeds}), expected, **EXACT)
    one = outputs(model, joined | {"instruction_embeds": embeds[:1]})
    expected = torch.cat(apart(model, flat, embeds[:1].expand(5, -1)), 1).view(3, 8, -1)
    torch.testing.assert_close(one, expected, **EXACT)


@pytest.mark.parametrize("terms", [("instruction",), ()], ids=["instruction", "prior"])
def test_routes_that_read_no_token(terms):
    """Adapters whose routes depend on instructions alone follow each sequence's, too."""
    model, sequences, embeds = build(query_terms=terms), [sequence(n) for n in LENGTHS], embeddings(3)
    logits = outputs(model, packed(sequences) | {"instruction_embeds": embeds})
    torch.testing.assert_close(logits, torch.cat(apart(model, sequences, embeds), 1), **EXACT)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_of_a_packed_row(scope, checkpointing):
    """Loss and every gradient of a packed row are those of its sequences, with and without checkpointing."""
    model, sequences, embeds = build(scope), [sequence(4) for _ in range(3)], embeddings(3)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    one = copy.deepcopy(model)
    row = packed(sequences)
    row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, -100)
    model(**row, instruction_embeds=embeds).loss.backward()
    for s, e in zip(sequences, embeds.split(1), strict=True):
        (one(**s, instruction_embeds=e).loss / 3).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("instruction" in name and g.abs().max() > 1e-5 for name, g in gradients.items())
    for name, p in one.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-10)


def test_packed_rows_of_several_adapters():
    """With an adapter for each packed row, the sequences of a row follow their instructions in its adapter."""
    model, embeds = build("causal"), embeddings(5)
    model.add_adapter("other", QueryableLoraConfig(r=3, target_modules=["q_proj", "down_proj"], instruction_dim=5))
    randomise(model, "other")
    model.double().eval()
    names = ["other", "default", "__base__"]
    rows = [[sequence(n) for n in lengths] for lengths in ROWS]
    batch = [packed(row) for row in rows]
    joined = {name: torch.cat([row[name] for row in batch]) for name in ("input_ids", "position_ids")}
    logits = outputs(model, joined | {"instruction_embeds": embeds, "adapter_names": names, "use_cache": False})
    flat = iter(embeds.split(1))
    for row, name, found in zip(rows, names, logits, strict=True):
        for s, part in zip(row, found.split([s["input_ids"].shape[1] for s in row]), strict=True):
            one = {"input_ids": s["input_ids"], "instruction_embeds": next(flat), "adapter_names": [name]}
            torch.testing.assert_close(part, outputs(model, one)[0], **EXACT)


@pytest.mark.parametrize("terms", [("state", "depth", "instruction"), ("instruction",)], ids=["routed", "static"])
def test_a_wrong_number_of_instructions(terms):
    model = build(query_terms=terms)
    row = packed([sequence(n) for n in LENGTHS])
    with pytest.raises(ValueError, match="2 instructions were given for 3 sequences packed in 1 rows: give one"):
        outputs(model, row | {"instruction_embeds": embeddings(2)})
    with pytest.raises(ValueError, match="3 instructions were given for a call of batch size 2"):
        outputs(model, {"input_ids": token_ids(2, 5), "instruction_embeds": embeddings(3)})


def test_compiled():
    """The layout of a packed row is read in the graph: one graph serves other lengths."""
    model = build("causal")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, (4, 4, 4)):
        row = packed([sequence(n) for n in lengths]) | {"instruction_embeds": embeddings(3)}
        torch.testing.assert_close(outputs(compiled, row), outputs(model, row), **EXACT)
    with pytest.raises(RuntimeError, match="2 instructions were given for another number of packed sequences"):
        outputs(compiled, row | {"instruction_embeds": embeddings(2)})


# A misspelt keyword


@pytest.mark.parametrize("name", ["instruction_embed", "instruction_embeddings", "instruction", "instructions"])
def test_a_misspelt_keyword(name):
    """Models take any keyword in their `**kwargs`; this one is told from theirs."""
    model, ids = build(), token_ids()
    with pytest.raises(TypeError, match=rf"called with `{name}`.*`instruction_embeds="):
        outputs(model, {"input_ids": ids, name: embeddings(1)})
    with pytest.raises(TypeError, match=rf"called with `{name}`.*`instruction_embeds="):
        model.generate(input_ids=ids, max_new_tokens=2, **{name: embeddings(1)})


# Requests of a service


def test_requests_in_threads():
    """Requests in batches and threads each generate as they do alone: their texts stay theirs."""
    model, encoder = build(), Fixed()
    ids, names = token_ids(6, 4), ["one", "two", None, "three", "two", "four"]
    settings = {"max_new_tokens": 5, "do_sample": False}

    def request(rows: list[int]) -> list[list[int]]:
        with use_instructions(model, [names[row] for row in rows], encoder):
            return model.generate(input_ids=ids[rows], **settings).tolist()

    alone = [request([row])[0] for row in range(6)]
    assert len({tuple(answer[4:]) for answer in alone}) > 2
    batches = [[0, 1, 2], [3, 4, 5], [5, 2, 0], [1, 3], [4], [2, 1, 4, 3]]
    with ThreadPoolExecutor(4) as pool:
        for rows, answers in zip(batches * 2, pool.map(request, batches * 2), strict=True):
            assert answers == [alone[row] for row in rows]
