"""What a call's arguments tell of its tokens: padding, packed sequences and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..method.scope import segment_cumsum

IGNORE_INDEX = -100  # label of unsupervised tokens, as in transformers


def read_mask(
    attention_mask: Any, batch: int, length: int | None, past: int | Tensor = 0
) -> tuple[Tensor | None, Tensor | None]:
    """What the attention mask of a call tells: which of its tokens are real, and which pairs of them see each other.

    Args:
        attention_mask: as [`real_tokens`] takes it.
        batch: number B of rows.
        length: number T of tokens per row of the call; None if they are not known for tokens.
        past: number of tokens of each row that the call's cache holds; a tensor without dimensions, which is not read,
            for a filled static cache in a graph.

    Returns:
        real: [B, T] bool, or [B, S] of all keys where `length` is None; None if the mask hides no token.
        visible: [B, T, T] bool, of a mask about pairs of tokens in a call that starts anew; else None.

    Raises:
        ValueError: if the mask does not tell which tokens are padding.
    """
    mask = widest_mask(attention_mask)
    real = real_tokens(mask, batch)
    if real is None or length is None:
        return real, None
    if isinstance(past, Tensor):  # an index outside the mask is an error
        return real.index_select(1, past.to(real.device) + torch.arange(length, device=real.device)), None
    if mask.ndim == 2 and real.shape[1] != past + length:
        raise ValueError(
            f"The call has {length} tokens per row and {past} in its cache, but its attention mask is about "
            f"{real.shape[1]}: no route sees a token that is neither in the call nor in a `transformers` cache. "
            "Pass a mask of the call's tokens, and `use_cache=False` if the model keeps earlier ones elsewhere."
        )
    if real.shape[1] < past + length:
        raise ValueError(_SLIDING)
    real = real[:, past : past + length]  # of the call's own tokens
    if mask.ndim == 2 or past > 0 or not mask.shape[-2] == length > 1:
        return real, None
    return real, is_visible(mask)[:, 0, :, :length].expand(batch, -1, -1)


def has_tokens(inputs: Tensor) -> bool:
    """Whether a call's leading tensor has a token axis: token ids [B, T] or hidden states [B, T, d]."""
    return inputs.ndim == (3 if inputs.is_floating_point() else 2)


def widest_mask(attention_mask: Any) -> Any:
    """Of masks by layer type that of full attention, or the first; with a head axis if it is about token pairs."""
    if isinstance(attention_mask, Mapping):  # sliding windows hide tokens, full attention does not
        masks = [m for name, m in attention_mask.items() if name == "full_attention"] or list(attention_mask.values())
        attention_mask = masks[0]
    is_pairs = isinstance(attention_mask, Tensor) and attention_mask.ndim == 3
    return attention_mask.unsqueeze(1) if is_pairs else attention_mask


def is_visible(mask: Tensor) -> Tensor:
    """The mask [B, 1, T, S], bool or additive, as bool: True where a query may attend to a key."""
    return mask if mask.dtype == torch.bool else mask.bool() if not mask.is_floating_point() else mask >= 0


def hides(mask: Tensor) -> bool:
    """Whether a mask, [B, S] of 0 and 1 or additive of more dimensions, hides anything; waits for its device."""
    return not (mask.bool() if mask.ndim < 3 else is_visible(mask)).all()


def real_tokens(mask: Any, batch: int) -> Tensor | None:
    """Real tokens [B, S], cached ones included, told from the mask that attention gets; None if it masks none.

    Args:
        mask: what transformers passes to a stack of layers, or a dict of such masks by layer type: None; [B, S], over
            cached tokens too; or [B, 1, T, S], bool or additive, in which a token is real if some query of the call
            may attend to it.
        batch: number B of rows.

    Raises:
        ValueError: for a mask of another shape, or one [B, S] of floats that may be additive.
    """
    mask = widest_mask(mask)
    if mask is None:
        return None
    is_tensor = isinstance(mask, Tensor)
    if is_tensor and mask.ndim == 2:
        if mask.is_floating_point() and not torch.compiler.is_compiling():
            check_row_mask(mask)
        return mask.bool().expand(batch, -1)
    if is_tensor and mask.ndim == 4:
        return is_visible(mask)[:, 0].any(-2).expand(batch, -1)  # [B, S]
    kind = f"shape {tuple(mask.shape)}" if is_tensor else f"type {type(mask).__name__}"
    raise ValueError(
        f"An attention mask of {kind} does not tell which tokens are padding: pass one of shape [batch, tokens] or "
        "[batch, 1, queries, keys], and use `attn_implementation='sdpa'` if the model makes another from it."
    )


def check_row_mask(mask: Tensor) -> None:
    """Raise a ValueError unless a mask [B, S] of floats is surely one of 0 and 1; waits for its device.

    An additive mask has other values where it hides tokens, and nothing but zeros in a row where it hides none.
    """
    if not (((mask == 0) | (mask == 1)).all() & mask.any(-1).all()):
        raise ValueError(
            "An attention mask [batch, tokens] of floats must have 1 for real tokens and 0 for padding, with a real "
            "token in each row: other values are those of an additive mask, in which 0 stands for real tokens. Pass "
            "`attention_mask >= 0` in place of an additive one."
        )


_APART = (
    "The attention mask [batch, 1, tokens, tokens] hides tokens from each other, as in packed sequences or a tree, so "
    "that no route can serve a whole row. Use `routing_scope='causal'`, whose routes see what their token sees, or "
    "tell packed sequences by `position_ids` that restart."
)
_SLIDING = (
    "The attention mask hides earlier tokens of the sequence, as that of a sliding window in a static cache, so that "
    "it does not tell which tokens are padding. Generate with a dynamic cache, which is the default."
)


def check_rows(visible: Tensor, real: Tensor, is_generating: bool) -> None:
    """Raise a ValueError unless each real token sees all real tokens before it; later ones it may see or not.

    Args:
        visible: mask of one call, [B, T, T] bool.
        real: real tokens, [B, T] bool.
        is_generating: whether `generate` made the mask.
    """
    if torch.compiler.is_compiling():
        return  # values are not known while a graph is made
    earlier = real.unsqueeze(1).expand_as(visible).tril()
    if not (visible | ~earlier | ~real.unsqueeze(-1)).all():
        raise ValueError(_SLIDING if is_generating else _APART)


def labels_of_tokens(labels: Tensor | None, length: int | None) -> Tensor | None:
    """`labels` if they are of `length` tokens per row, [B, T] of integers; None if they are of whole sequences."""
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return None
    return labels if length in (None, labels.shape[1]) else None


def packed_segments(kwargs: Mapping[str, Any], batch: int, length: int | None = None) -> Tensor | None:
    """Sequence index [B, T] of each token of packed rows, or None where every row is one sequence.

    Takes what collators of packed batches send: `seq_idx`, `cu_seq_lens_q` or `position_ids` that restart. As in
    transformers' own attention, position_ids mean packing only without a mask [B, T] and without a filled cache.
    `length` is the number T of tokens per row, where the call tells it; else position_ids do.
    """
    if isinstance(seq_idx := kwargs.get("seq_idx"), Tensor):
        return seq_idx.long().expand(batch, -1)
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3:  # Qwen-VL's: of text, then time, height and width
        positions = positions[0] if positions.shape[0] == 4 else None
    if length is None and isinstance(positions, Tensor):
        length = positions.shape[-1]
    if isinstance(bounds := kwargs.get("cu_seq_lens_q"), Tensor) and length is not None:
        index = torch.arange(length, device=bounds.device)
        return torch.bucketize(index, bounds[1:], right=True).expand(batch, -1)
    mask = kwargs.get("attention_mask")
    is_row_mask = isinstance(mask, Tensor) and mask.ndim == 2
    if is_row_mask or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    restarts = torch.diff(positions, dim=-1) != 1
    if not torch.compiler.is_compiling() and not restarts.any():  # as transformers' own attention looks for packing
        return None
    return torch.nn.functional.pad(restarts, (1, 0)).cumsum(-1).expand(batch, -1)


def sequence_index(segments: Tensor) -> Tensor:
    """The index [B, T] of each token's sequence among those of all rows, row by row, from its `segments` [B, T]."""
    is_first = torch.nn.functional.pad(torch.diff(segments, dim=-1) != 0, (1, 0), value=True)
    return is_first.flatten().cumsum(0).view(segments.shape) - 1


def prompt_tokens(
    labels: Tensor | None, prompt_mask: Tensor | None, real: Tensor | None = None, segments: Tensor | None = None
) -> Tensor | None:
    """Tokens [B, T] before the first supervised one of their sequence; None where nothing marks a prompt.

    Args:
        labels: [B, T], -100 where unsupervised.
        prompt_mask: [B, T] bool or 0/1, True for prompt tokens; wins over `labels`.
        real: as in [`Tokens`]; padding is not supervised, whatever the other two say of it.
        segments: as in [`Tokens`].
    """
    if prompt_mask is not None:
        supervised = ~prompt_mask.bool()
    elif labels is not None:
        supervised = labels != IGNORE_INDEX
    else:
        return None
    if real is not None:
        supervised = supervised & real
    return segment_cumsum(supervised.long().unsqueeze(-1), segments).squeeze(-1) == 0
