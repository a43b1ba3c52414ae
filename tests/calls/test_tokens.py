"""The tokens of a call: masks, packed rows and prompts as collators send them."""

import pytest
import torch
from helpers.models import CACHE, llama
from helpers.tokens import PADDED, packed_rows, segments_of
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_queryable.calls.tokens import (
    has_tokens,
    labels_of_tokens,
    packed_segments,
    prompt_tokens,
    read_mask,
    real_tokens,
)

# Packed rows, as collators describe them


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_descriptions_of_packing_agree(lengths):
    """Restarting position_ids, seq_idx and cu_seq_lens_q find the same sequences."""
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    expected = segments_of([lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = packed_segments({"position_ids": positions}, 1)
    assert torch.equal(found, expected) if len(lengths) > 1 else found is None
    for kwargs in (
        {"seq_idx": expected.to(torch.int32)},
        {"position_ids": positions, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        {"position_ids": positions, "cu_seq_lens_q": bounds, "seq_idx": expected.to(torch.int32)},
    ):
        assert torch.equal(packed_segments(kwargs, 1), expected)


@given(packed_rows())
def test_rows_may_be_packed_differently(lengths):
    """Each row of a batch has its own sequences."""
    positions = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    found = packed_segments({"position_ids": positions}, len(lengths))
    assert torch.equal(found, segments_of(lengths)) if max(map(len, lengths)) > 1 else found is None


def test_collator_of_trl():
    """The sequences of TRL's padding-free batch are the examples it was made of."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": list(range(3, 3 + n))} for n in (4, 2, 3)])
    assert torch.equal(packed_segments(batch, 1), segments_of([[4, 2, 3]]))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"position_ids": torch.tensor([[0, 1, 0]]), "attention_mask": torch.ones(1, 3)},
        {"position_ids": torch.zeros(3, 1, 3)},
        {"position_ids": None, "seq_idx": None, "cu_seq_lens_q": None},
    ],
    ids=["nothing", "attention mask", "positions of three axes", "all None"],
)
def test_rows_that_are_not_packed(kwargs):
    """Without a description of packing, or beside an attention mask, a row is one sequence."""
    assert packed_segments(kwargs, 1) is None


def test_positions_for_all_rows():
    """position_ids [1, T] hold for every row."""
    segments = packed_segments({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, 3)
    assert torch.equal(segments, segments_of([[2, 3]] * 3))


def test_positions_that_start_late_are_not_packed():
    """Positions that only start elsewhere than at 0 are one sequence per row, which needs no segments."""
    assert packed_segments({"position_ids": torch.arange(7, 12)[None]}, 1) is None


# Real tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [create_causal_mask, create_bidirectional_mask], ids=lambda make: make.__name__)
@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
def test_masks_of_transformers(attention, make, as_dict):
    """The masks that transformers makes of a padding mask tell its real tokens, alone or one per layer type."""
    config = llama(attn_implementation=attention).config
    arguments = {"config": config, "inputs_embeds": torch.zeros(3, 4, 32), "attention_mask": PADDED}
    mask = make(**arguments, **{CACHE: None})
    assert mask.ndim == 4
    if as_dict:
        mask = {"sliding_attention": mask[..., :0], "full_attention": mask}
    assert torch.equal(real_tokens(mask, 3), PADDED.bool())


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32], ids=str)
def test_padding_masks(dtype):
    """A mask [B, S] is taken as it is, and one [1, S] for every row."""
    assert torch.equal(real_tokens(PADDED.to(dtype), 3), PADDED.bool())
    assert torch.equal(real_tokens(PADDED[1:2].to(dtype), 3), PADDED[1:2].bool().expand(3, -1))


def test_no_mask_masks_nothing():
    """None leaves all tokens real."""
    assert real_tokens(None, 2) is None


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 1, 4, 4),
        torch.ones(4),
        create_block_mask(lambda b, h, q, k: k < 2, B=1, H=None, Q_LEN=4, KV_LEN=4, device="cpu"),
    ],
    ids=["five axes", "one axis", "flex attention"],
)
def test_unknown_masks_are_refused(mask):
    """A mask that does not tell which tokens are padding raises a ValueError: counting padding would be silent."""
    with pytest.raises(ValueError, match="attention mask"):
        real_tokens(mask, 2)


# Prompts


def test_prompt_from_labels():
    """The prompt is what stands before the first supervised token; a row without one is all prompt."""
    labels = torch.tensor([[-100, -100, 5, -100], [7, -100, -100, 8], [-100, -100, -100, -100]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(prompt_tokens(labels, None), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long], ids=str)
def test_prompt_mask_wins_over_labels(dtype):
    """An explicit mask decides, and labels are not asked."""
    mask = torch.tensor([[1, 1, 1, 0]])
    assert torch.equal(prompt_tokens(torch.full((1, 4), 5), mask.to(dtype)), mask.bool())


def test_prompts_of_packed_sequences():
    """Every sequence of a packed row has its own prompt."""
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, -100]])
    expected = torch.tensor([[1, 0, 0, 1, 1, 0, 1]]).bool()
    assert torch.equal(prompt_tokens(labels, None, segments=segments_of([[3, 3, 1]])), expected)


def test_nothing_marks_a_prompt():
    """With neither labels nor a mask no prompt is marked."""
    assert prompt_tokens(None, None) is None


def test_padding_is_not_supervised():
    """Padding before the prompt ends no prompt, whatever the labels or the mask say of it."""
    real = torch.tensor([[0, 0, 1, 1, 1]]).bool()
    labels = torch.tensor([[0, 0, -100, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 0, 0]])
    for prompt in (prompt_tokens(labels, None, real), prompt_tokens(None, mask, real)):
        assert prompt[real].tolist() == [True, False, False]


# Tokens of a call


@pytest.mark.parametrize(
    "labels", [torch.tensor([1, 0]), torch.rand(2, 6), torch.rand(2)], ids=["classes", "multi-label", "regression"]
)
def test_labels_of_sequences_mark_no_prompt(labels):
    """Labels of whole sequences are not labels of tokens."""
    assert labels_of_tokens(labels, 6) is None


def test_labels_of_tokens():
    """Labels of tokens are of as many as the call has, if it is known how many."""
    labels = torch.zeros(2, 6, dtype=torch.long)
    assert labels_of_tokens(labels, 6) is labels_of_tokens(labels, None) is labels
    assert labels_of_tokens(labels, 5) is None


def test_mask_of_a_cached_step():
    """With cached tokens, the mask of a call is that of its own tokens, and nothing is packed."""
    real, visible = read_mask(PADDED, 3, 2, past=2)
    assert torch.equal(real, PADDED[:, 2:].bool()) and visible is None


def test_sequence_bounds_alone_mark_packing():
    """`cu_seq_lens_q` tells packed sequences apart without position_ids beside it."""
    bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    assert torch.equal(packed_segments({"cu_seq_lens_q": bounds}, 1, 9), segments_of([[4, 2, 3]]))


def test_inputs_without_a_token_axis():
    """A call on indices [B], as a plain module with an embedding gets, has rows and no tokens to tell apart."""
    assert not has_tokens(torch.zeros(3, dtype=torch.long))
    assert read_mask(None, 3, None) == (None, None) and packed_segments({}, 3) is None
