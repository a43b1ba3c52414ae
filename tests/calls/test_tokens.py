"""Which tokens a route sees: masks, packed rows and prompts as collators send them, and the sums over them."""

from itertools import pairwise

import pytest
import torch
from helpers.models import llama, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers import BatchEncoding
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_queryable.pooling import (
    Pool,
    Tokens,
    packed_segments,
    prompt_tokens,
    read_tokens,
    real_tokens,
    segment_cumsum,
    segment_sum,
)

RANK = 3
SCOPES = ["causal", "prompt", "sequence"]


@st.composite
def packed_rows(draw):
    """Lengths of the sequences of each row: every row has the same number of tokens, and at least one sequence."""
    total, rows = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    lengths = []
    for _ in range(rows):
        cuts = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=4))})
        lengths.append([b - a for a, b in pairwise(cuts)])
    return lengths


def segments_of(lengths: list[list[int]]) -> torch.Tensor:
    """Index of each token's sequence [B, T]."""
    return torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])


def masks(rows: int, length: int):
    """A strategy for bool masks [B, T] or None."""
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return st.none() | st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)


# Sums over segments


@given(packed_rows(), st.sampled_from([torch.float32, torch.float64, torch.int64]))
def test_segment_sums_against_loops(lengths, dtype):
    """Running sums restart with each sequence; sums are those of the sequence, at every one of its tokens."""
    segments = segments_of(lengths)
    x = (10 * torch.randn(*segments.shape, RANK, dtype=torch.float64)).to(dtype)
    running, whole = torch.zeros_like(x), torch.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            mine = [i for i in range(x.shape[1]) if segments[row, i] == segments[row, t]]
            running[row, t] = sum(x[row, i] for i in mine if i <= t)
            whole[row, t] = sum(x[row, i] for i in mine)
    torch.testing.assert_close(segment_cumsum(x, segments), running)
    torch.testing.assert_close(segment_sum(x, segments), whole)


@given(st.integers(1, 9))
def test_one_segment_is_no_segments(length):
    """Rows of one sequence give the same numbers with or without segments."""
    x, segments = torch.randn(2, length, RANK), torch.zeros(2, length, dtype=torch.long)
    torch.testing.assert_close(segment_cumsum(x, segments), segment_cumsum(x, None))
    torch.testing.assert_close(segment_sum(x, segments), segment_sum(x, None).expand_as(x))


@pytest.mark.parametrize("function", [segment_cumsum, segment_sum])
@pytest.mark.parametrize("segments", [None, segments_of([[2, 3], [1, 4]])], ids=["rows", "packed"])
def test_gradients_of_segment_sums(function, segments):
    """Gradients are those of finite differences."""
    x = torch.randn(2, 5, RANK, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, segments), x)


def test_earlier_sequences_leave_no_rounding_behind():
    """A packed sequence has its own running sums to float32 precision, after two million in its neighbour's."""
    large, small = 1e3 + torch.rand(1, 2000, RANK), torch.rand(1, 5, RANK)
    segments = segments_of([[2000, 5]])
    packed = segment_cumsum(torch.cat([large, small], dim=1), segments)[:, 2000:]
    torch.testing.assert_close(packed, small.cumsum(1), rtol=1e-6, atol=0)


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
    """Positions that only start elsewhere than at 0 are one sequence a row, which needs no segments."""
    assert packed_segments({"position_ids": torch.arange(7, 12)[None]}, 1) is None


# Real tokens

PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [create_causal_mask, create_bidirectional_mask], ids=lambda make: make.__name__)
@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
def test_masks_of_transformers(attention, make, as_dict):
    """The masks that transformers makes of a padding mask tell its real tokens, alone or one a layer type."""
    config = llama(attn_implementation=attention).config
    arguments = {"config": config, "inputs_embeds": torch.zeros(3, 4, 32), "attention_mask": PADDED}
    mask = make(**arguments, past_key_values=None)
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
        torch.ones(2, 4, 4),
        torch.ones(4),
        create_block_mask(lambda b, h, q, k: k < 2, B=1, H=None, Q_LEN=4, KV_LEN=4, device="cpu"),
    ],
    ids=["three axes", "one axis", "flex attention"],
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
    assert read_tokens(token_ids(), {}, labels=labels).prompt is None


def test_tokens_of_a_cached_step():
    """With cached tokens, masks are those of the call's own tokens, and nothing is packed or given any more."""
    cache = DynamicCache()
    cache.update(torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), 0)
    kwargs = BatchEncoding({"attention_mask": PADDED, "position_ids": torch.tensor([[5, 3]] * 3)})
    tokens = read_tokens(token_ids(3, 2), kwargs, past=cache.get_seq_length(), prompt_length=2)
    assert torch.equal(tokens.real, PADDED[:, 2:].bool())
    assert tokens.segments is tokens.given is tokens.prompt is None


def test_given_tokens():
    """In a prefill by `generate` the first tokens are given, and later ones are not."""
    tokens = read_tokens(token_ids(2, 5), {}, prompt_length=3)
    assert torch.equal(tokens.given, (torch.arange(5) < 3).expand(2, -1))


# Pooling


def pooled(scope: str, states: torch.Tensor, **tokens) -> torch.Tensor:
    """Means [B, T, r] of `states` over what each token sees."""
    pool = Pool(Tokens(**tokens), scope)
    return (pool.sum(states) / pool.count(states).clamp(min=1)).expand_as(states)


def looped(scope: str, states: torch.Tensor, real=None, prompt=None, given=None, segments=None) -> torch.Tensor:
    """The same, token by token."""
    masks = {"causal": [real], "prompt": [real, prompt, given], "sequence": [real, given]}[scope]
    out = torch.zeros_like(states)
    for row in range(states.shape[0]):
        for t in range(states.shape[1]):
            seen = [
                states[row, i]
                for i in range(states.shape[1])
                if all(mask is None or mask[row, i] for mask in masks)
                and (segments is None or segments[row, i] == segments[row, t])
                and (scope != "causal" or i <= t)
            ]
            if seen:
                out[row, t] = torch.stack(seen).mean(0)
    return out


@pytest.mark.parametrize("scope", SCOPES)
@given(data=st.data())
def test_pool_against_loops(scope, data):
    """Whatever the masks, the packing and the scope, a token sees the mean of what METHOD says it sees."""
    lengths = data.draw(packed_rows().filter(lambda rows: sum(rows[0]) > 1))
    rows, length = len(lengths), sum(lengths[0])
    tokens = {name: data.draw(masks(rows, length)) for name in ("real", "prompt", "given")}
    tokens["segments"] = data.draw(st.sampled_from([None, segments_of(lengths)]))
    states = torch.randn(rows, length, RANK, dtype=torch.float64)
    torch.testing.assert_close(pooled(scope, states, **tokens), looped(scope, states, **tokens))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(scope, side):
    """Real tokens see the same with padding before or after them, whatever the padding's states are."""
    states, prompt = torch.randn(2, 4, RANK), torch.tensor([[True, True, False, False]] * 2)
    expected = pooled(scope, states, prompt=prompt)
    amount = (2, 0) if side == "left" else (0, 2)
    wide = torch.nn.functional.pad(states, (0, 0, *amount), value=1e3)
    real = torch.nn.functional.pad(torch.ones(2, 4), amount).bool()
    wide_prompt = torch.nn.functional.pad(prompt, amount, value=True)
    means = pooled(scope, wide, real=real, prompt=wide_prompt)[real].view(2, 4, RANK)
    torch.testing.assert_close(means, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_packing_changes_nothing(scope):
    """A packed sequence sees the same as one in a row of its own."""
    lengths = [3, 1, 4]
    states, prompt = torch.randn(1, 8, RANK), torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0]]).bool()
    packed = pooled(scope, states, prompt=prompt, segments=segments_of([lengths]))
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        alone = looped(scope, states[:, rows], prompt=prompt[:, rows])
        torch.testing.assert_close(packed[:, rows], alone)
        start += n


@pytest.mark.parametrize("scope", SCOPES)
def test_batch_permutation(scope):
    """Permuting the rows permutes what they see."""
    order = torch.tensor([2, 0, 1])
    states, real = torch.randn(3, 4, RANK), PADDED.bool()
    assert torch.equal(pooled(scope, states[order], real=real[order]), pooled(scope, states, real=real)[order])


@pytest.mark.parametrize("scope", SCOPES)
def test_masked_states_may_be_anything(scope):
    """A state that is not seen may be infinite or not a number."""
    states, real = torch.randn(3, 4, RANK), PADDED.bool()
    expected = pooled(scope, states, real=real)
    for value in (torch.inf, torch.nan):
        assert torch.equal(pooled(scope, states.masked_fill(~real[..., None], value), real=real), expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_without_a_token_to_see(scope):
    """A row all of padding has a mean of zero, not of nan."""
    mean = pooled(scope, torch.randn(2, 4, RANK), real=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(mean, torch.zeros(2, 4, RANK))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_states_are_summed_in_float32(scope, dtype):
    """Sums of 16-bit states are float32 ones, also under autocast: counts beyond 256 stay exact."""
    states = torch.ones(1, 1000, RANK, dtype=dtype)
    pool = Pool(Tokens(segments=torch.zeros(1, 1000, dtype=torch.long)), scope)
    with torch.autocast("cpu", torch.bfloat16):
        total, count = pool.sum(states)[0, -1], pool.count(states)[0, -1]
    assert total.dtype == count.dtype == torch.float32
    assert total.tolist() == [1000.0] * RANK
    assert count.item() == 1000


@pytest.mark.parametrize("scope", SCOPES)
def test_shapes(scope):
    """Scope `causal` gives one sum a token; the others one a row, or one a token of packed rows."""
    states = torch.randn(2, 5, RANK)
    rows = 5 if scope == "causal" else 1
    assert Pool(Tokens(), scope).sum(states).shape == (2, rows, RANK)
    assert Pool(Tokens(), scope).count(states).shape == (2, rows, 1)
    packed = Pool(Tokens(segments=segments_of([[2, 3]] * 2)), scope)
    assert packed.sum(states).shape == (2, 5, RANK)


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
def test_one_vector_a_sequence(scope):
    """States [B, 1, r] of a module that sees one vector a sequence are their own mean, whatever the tokens' masks."""
    states = torch.randn(3, 1, RANK)
    assert torch.equal(pooled(scope, states, real=PADDED.bool()), states)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["real", "segments"])
def test_other_tokens_than_the_calls_are_refused(scope, name):
    """States of another number of tokens than the masks' raise a ValueError with both numbers and a remedy."""
    mask = torch.ones(2, 4, dtype=torch.bool if name == "real" else torch.long)
    with pytest.raises(ValueError, match=r"3 tokens .* have 4\. .*`exclude_modules`"):
        Pool(Tokens(**{name: mask}), scope).sum(torch.randn(2, 3, RANK))


def test_sequence_bounds_alone_mark_packing():
    """`cu_seq_lens_q` tells packed sequences apart without position_ids beside it."""
    bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    tokens = read_tokens(torch.zeros(1, 9, dtype=torch.long), {"cu_seq_lens_q": bounds})
    assert torch.equal(tokens.segments, segments_of([[4, 2, 3]]))


def test_inputs_without_a_token_axis():
    """A call on indices [B], as a plain module with an embedding gets, has rows and no tokens to tell apart."""
    tokens = read_tokens(torch.zeros(3, dtype=torch.long), {})
    assert tokens.real is None and tokens.segments is None
