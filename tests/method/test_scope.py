"""Which tokens a route sees in each scope: the sums over them, with masks and in packed rows."""

import pytest
import torch
from helpers.tokens import PADDED, packed_rows, segments_of
from hypothesis import given
from hypothesis import strategies as st

from peft_queryable.method import scope as scopes
from peft_queryable.method.scope import Pool, Tokens, segment_cumsum, segment_sum

RANK = 3
SCOPES = ["causal", "prompt", "sequence"]


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


# Pooling


def pooled(scope: str, states: torch.Tensor, **tokens) -> torch.Tensor:
    """Means [B, T, r] of `states` over what each token sees."""
    pool = Pool(scopes.SCOPES[scope], Tokens(**tokens))
    return (pool.sum(states) / pool.count(states).clamp(min=1)).expand_as(states)


def looped(
    scope: str, states: torch.Tensor, real=None, prompt=None, generation_prompt=None, segments=None
) -> torch.Tensor:
    """The same, token by token."""
    masks = {
        "causal": [real],
        "prompt": [real, prompt, generation_prompt],
        "sequence": [real, generation_prompt],
    }[scope]
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
    tokens = {name: data.draw(masks(rows, length)) for name in ("real", "prompt", "generation_prompt")}
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
    pool = Pool(scopes.SCOPES[scope], Tokens(segments=torch.zeros(1, 1000, dtype=torch.long)))
    with torch.autocast("cpu", torch.bfloat16):
        total, count = pool.sum(states)[0, -1], pool.count(states)[0, -1]
    assert total.dtype == count.dtype == torch.float32
    assert total.tolist() == [1000.0] * RANK
    assert count.item() == 1000


@pytest.mark.parametrize("scope", SCOPES)
def test_shapes(scope):
    """Scope `causal` gives one sum per token; the others give one per row, or one per token of packed rows."""
    states = torch.randn(2, 5, RANK)
    rows = 5 if scope == "causal" else 1
    assert Pool(scopes.SCOPES[scope], Tokens()).sum(states).shape == (2, rows, RANK)
    assert Pool(scopes.SCOPES[scope], Tokens()).count(states).shape == (2, rows, 1)
    packed = Pool(scopes.SCOPES[scope], Tokens(segments=segments_of([[2, 3]] * 2)))
    assert packed.sum(states).shape == (2, 5, RANK)


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
def test_one_vector_a_sequence(scope):
    """States [B, 1, r] of a module with one vector per sequence are their own mean, whatever the tokens' masks."""
    states = torch.randn(3, 1, RANK)
    assert torch.equal(pooled(scope, states, real=PADDED.bool()), states)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["real", "segments"])
def test_other_tokens_than_the_calls_are_refused(scope, name):
    """States of another number of tokens than the masks' raise a ValueError with both numbers and a remedy."""
    mask = torch.ones(2, 4, dtype=torch.bool if name == "real" else torch.long)
    with pytest.raises(ValueError, match=r"3 tokens .* have 4\. .*`exclude_modules`"):
        Pool(scopes.SCOPES[scope], Tokens(**{name: mask})).sum(torch.randn(2, 3, RANK))
