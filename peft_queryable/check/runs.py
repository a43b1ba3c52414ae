"""The ways to run a model that must give one answer, each with the largest difference that it finds.

Every function takes a [`Runner`] and returns that difference, or in words why there is nothing to compare. It is
called twice, with the model and with plain LoRA in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..calls.cache import cache_argument, find_cache
from .copies import moves_base, reloaded
from .sequences import SUPERVISION, Batch, Sequences, num_rows, select

STEPS = 8  # tokens decoded one by one, at most
NO_TOKENS, NO_GENERATION = "the batch has no tokens", "the model does not generate"
_OURS = ("prompt_mask", "instruction_embeds")  # arguments that the base model does not take


@dataclass
class Runner:
    """A model, or plain LoRA in its place, with what is known of its base and the batch to run.

    Args:
        model: a copy of the user's model.
        batch: B rows.
        is_plain: whether it is plain LoRA.
    """

    model: PeftModel
    batch: Batch
    is_plain: bool = False
    base: Any = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.model.get_base_model()
        self.config: Any = getattr(self.base, "config", None)
        self.is_encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.arguments = set(inspect.signature(self.base.forward).parameters)
        self.pad_token_id = getattr(self.config, "pad_token_id", None) or 0
        self.leading = "decoder_input_ids" if self.is_encoder_decoder else "input_ids"

    def call(self, batch: Batch) -> Any:
        """What the model returns."""
        with torch.no_grad():
            return self.model(**{n: v for n, v in batch.items() if not (self.is_plain and n in _OURS)})

    def output(self, batch: Batch) -> Tensor:
        """Logits, or the first tensor that the model returns: [B, ...]."""
        return output_of(self.call(batch))

    def by_row(self, batch: Batch) -> list[Tensor]:
        """Outputs of each row, without those of padding."""
        output, mask = self.output(batch), batch.get("attention_mask")
        if isinstance(mask, Tensor) and not self.is_encoder_decoder and self._is_per_token(output, mask):
            return [row[real.bool()] for row, real in zip(output, mask, strict=True)]
        return list(output)

    def _is_per_token(self, output: Tensor, tokens: Tensor) -> bool:
        return output.ndim > 2 and output.shape[:2] == tokens.shape

    @cached_property
    def sequences(self) -> Sequences:
        return Sequences(self.batch, self.is_encoder_decoder, "position_ids" in self.arguments)

    @cached_property
    def apart(self) -> list[Tensor]:
        """Outputs of each sequence without padding or company."""
        return [self.output(row)[0] for row in self.sequences.rows]

    @cached_property
    def has_tokens(self) -> bool:
        """Whether the batch has `input_ids`."""
        return isinstance(self.batch.get("input_ids"), Tensor)

    @cached_property
    def token_names(self) -> list[str]:
        """Names of the tensors that hold one value for each of `input_ids`."""
        return self.sequences.names if self.has_tokens else []

    @cached_property
    def prompt(self) -> int:
        """Number of tokens of each row of `even` before those that are changed or decoded."""
        length = self.even[self.leading].shape[1]
        return length - max(1, min(STEPS, length // 3))

    @cached_property
    def even(self) -> Batch:
        """The batch without padding: the first tokens of each sequence, as many as the shortest has."""
        if not self.has_tokens:  # but speech, say, beside a decoder's tokens
            return {name: value for name, value in self.batch.items() if name not in SUPERVISION}
        return self.sequences.cut(min(self.sequences.lengths))

    @cached_property
    def prompt_mask(self) -> Tensor:
        """[B, T], true for the first `prompt` tokens of `even`."""
        ids = self.even[self.leading]
        return (torch.arange(ids.shape[1], device=ids.device) < self.prompt).expand(ids.shape)

    @cached_property
    def even_output(self) -> Tensor:
        """Outputs of `even`, of one forward with `prompt_mask`."""
        return self.output({**self.even, "prompt_mask": self.prompt_mask})

    def scopes(self) -> set[str]:
        """Scopes of the stacks that do not read another's output."""
        plans = [(stack, plan) for stack in self.model.base_model.stacks for plan in stack.plans.values()]
        return {plan.scope.name for stack, plan in plans if not plan.traits.reads_memory}

    def is_sequence(self) -> bool:
        """Whether an active adapter was told the scope `sequence`, in a decoder too."""
        names = self.model.base_model.active_adapters
        return any(self.model.peft_config[name].routing_scope == "sequence" for name in names)


Run = Callable[[Runner], "float | str"]


def output_of(result: Any) -> Tensor:
    """Logits if there are any, else the first tensor of what a model returned."""
    if isinstance(result, Tensor):
        return result
    if isinstance(getattr(result, "logits", None), Tensor):
        return result.logits
    values = result.values() if hasattr(result, "values") else result
    return next(value for value in values if isinstance(value, Tensor))


def largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between tensors of the same shapes; infinite where one is not a number."""
    differences = [(a.double() - b.double()).abs() for a, b in zip(found, expected, strict=True)]
    return max(d.nan_to_num(nan=float("inf")).max().item() for d in differences if d.numel())


def rows_alone(run: Runner) -> float | str:
    """Each row in the batch, against the row alone."""
    alone = [run.by_row(select(run.batch, [row]))[0] for row in range(num_rows(run.batch))]
    return largest(run.by_row(run.batch), alone)


def another_order(run: Runner) -> float | str:
    """The rows in another order."""
    order = [*range(1, num_rows(run.batch)), 0]
    expected = run.by_row(run.batch)
    return largest(run.by_row(select(run.batch, order)), [expected[row] for row in order])


def padded_left(run: Runner) -> float | str:
    """All sequences padded on the left, against each alone without padding."""
    return _padded(run, "left")


def padded_right(run: Runner) -> float | str:
    """All sequences padded on the right, against each alone without padding."""
    return _padded(run, "right")


def _padded(run: Runner, side: str) -> float | str:
    if not run.has_tokens or "attention_mask" not in run.arguments:
        return "the batch has no input_ids, or the model takes no attention_mask"
    return largest(run.by_row(run.sequences.padded(side, run.pad_token_id)), run.apart)


def later_tokens(run: Runner) -> float | str:
    """Outputs of the tokens before one that is changed."""
    if run.leading not in run.batch:
        return NO_TOKENS
    if run.scopes() <= {"sequence"}:
        return "in scope sequence every token is routed by the whole sequence"
    if run.even[run.leading].shape[1] < 2 or not run._is_per_token(run.even_output, run.even[run.leading]):
        return "there is no output for each of at least two tokens"
    ids = run.even[run.leading].clone()
    ids[:, run.prompt :] = ids[:, run.prompt - 1 : run.prompt]
    changed = run.output({**run.even, run.leading: ids, "prompt_mask": run.prompt_mask})
    return largest([changed[:, : run.prompt]], [run.even_output[:, : run.prompt]])


def cached_steps(run: Runner) -> float | str:
    """One forward over the whole, against a prefill and then token by token with a cache."""
    if not can_generate(run.base):
        return NO_GENERATION
    if run.leading not in run.batch:
        return NO_TOKENS
    if run.is_sequence():
        return "in scope sequence, generation is routed by the prompt alone"
    ids, start = run.even[run.leading], run.prompt
    if ids.shape[1] < 2:
        return "there are not two tokens in each sequence"
    name = cache_argument(run.base)
    if name is None:
        return "the model takes no key/value cache"
    pieces, cache = [], None
    for first, last in [(0, start), *((i, i + 1) for i in range(start, ids.shape[1]))]:
        step = _piece(run, first, last)
        result = run.call(step if cache is None else {**step, name: cache})
        cache = find_cache(result)
        if cache is None:
            return "the model returns no cache"
        pieces.append(output_of(result))
    return largest([torch.cat(pieces, dim=1)], [run.even_output])


def _piece(run: Runner, first: int, last: int) -> Batch:
    """The arguments of a call for the tokens from `first` to `last` of `even`."""
    kept = run.even
    if not run.is_encoder_decoder:
        kept = {n: v[:, first:last] if n in run.token_names else v for n, v in run.even.items()}
        if first > 0:  # images and the like went in with the prompt
            kept = {n: v for n, v in kept.items() if n in run.token_names or n == "instruction_embeds"}
    return {**kept, run.leading: run.even[run.leading][:, first:last], "use_cache": True}


def generate(run: Runner) -> float | str:
    """Logits of greedy decoding with a cache and without, as long as both chose the same tokens."""
    if not can_generate(run.base):
        return NO_GENERATION
    if not run.has_tokens:
        return NO_TOKENS
    dropped = ("labels", "prompt_mask", "position_ids", "decoder_input_ids", "decoder_attention_mask")
    padded = run.sequences.padded("left", run.pad_token_id) if "attention_mask" in run.arguments else run.even
    batch = {name: value for name, value in padded.items() if name not in dropped}
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "num_beams": 1}
    settings |= {"pad_token_id": run.pad_token_id, "output_logits": True, "return_dict_in_generate": True}
    if run.is_plain:
        batch = {name: value for name, value in batch.items() if name not in _OURS}
    cached, uncached = (run.model.generate(**batch, **settings, use_cache=use_cache) for use_cache in (True, False))
    chosen = (cached.sequences[:, -STEPS:] == uncached.sequences[:, -STEPS:]).long().cumprod(1).bool()
    agree = torch.cat([torch.ones_like(chosen[:, :1]), chosen[:, :-1]], dim=1)  # before each step
    steps = [(a[rows], b[rows]) for a, b, rows in zip(cached.logits, uncached.logits, agree.T, strict=True)]
    return largest(*zip(*steps, strict=True))


def can_generate(base: nn.Module) -> bool:
    """Whether `base` is a model of transformers that generates text."""
    return bool(getattr(base, "can_generate", bool)())


def packed(run: Runner) -> float | str:
    """All sequences in one row, told apart by `position_ids`, against each alone."""
    if not run.has_tokens:
        return NO_TOKENS
    if "position_ids" not in run.arguments:
        return "the model takes no position_ids"
    if not run.sequences.has_tokens_alone:
        return "the batch has more in it than tokens, which a packed row cannot share out"
    settings = {"use_cache": False} if "use_cache" in run.arguments else {}
    row = run.sequences.packed()
    output = run.output({**row, **settings})
    if not run._is_per_token(output, row["input_ids"]):
        return "there is no output for each token"
    return largest(output[0].split(run.sequences.lengths), run.apart)


def reload(run: Runner) -> float | str:
    """The adapter saved and loaded onto a copy of the base; of plain LoRA, the same call again."""
    if moves_base(run.model):
        return "the adapter changed the base weights when it was made, and those it is loaded onto are not here"
    again = run if run.is_plain else Runner(reloaded(run.model), run.batch)
    return largest(again.by_row(run.batch), run.by_row(run.batch))


RUNS: dict[str, Run] = {
    "rows alone": rows_alone,
    "rows in another order": another_order,
    "padded on the left": padded_left,
    "padded on the right": padded_right,
    "later tokens changed": later_tokens,
    "cached steps": cached_steps,
    "generate, cached or not": generate,
    "packed in one row": packed,
    "saved and loaded": reload,
}
