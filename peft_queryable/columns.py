"""Instructions from a column of training data, in the trainers of transformers and TRL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .calls.tokens import packed_segments, sequence_index
from .encoders import InstructionEncoder, embed_texts
from .instruction import only_active, tuner_of, use_instructions

_COLLATING = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")  # TRL's that pass a batch on to the model
_ONLINE = ("GRPOTrainer", "RLOOTrainer")  # TRL's that make their batches of completions that they generate
_PAIRING = ("DataCollatorForPreference", "DataCollatorForVisionPreference")  # TRL's, all chosen before all rejected


class InstructionCollator:
    """A data collator that turns a column of texts into `instruction_embeds` [n, d_c].

    A text of None is no instruction. There is one for each row of the batch, or for each sequence of a padding-free
    row; TRL's collators of preferences make two rows of each example, which share its instruction.
    [`use_instruction_column`] puts it into a trainer.

    Args:
        collator: makes the rest of the batch.
        encoder: encodes the texts.
        column: name of the column. In examples that are packed rows, with a column `seq_lengths`, it has a list of one
            text for each sequence.

    Raises:
        ValueError: if an example has no such column, several instructions for one sequence, or log-probabilities of a
            reference that were computed without instruction; or if the rows that `collator` makes are not known to be
            those of the examples.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        encoder: InstructionEncoder,
        column: str = "instruction",
    ) -> None:
        self.collator, self.encoder, self.column = collator, encoder, column

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [text for example in features for text in texts_of(example, self.column)]
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in features])
        embeds = embed_texts(self.encoder, texts)
        return {**batch, "instruction_embeds": self._in_order(embeds, batch, features)}

    def _in_order(self, embeds: Tensor, batch: Mapping[str, Any], features: list[dict[str, Any]]) -> Tensor:
        """`embeds` [n, d_c] of the examples as the rows or packed sequences of `batch` follow them."""
        leading = next(value for value in batch.values() if isinstance(value, Tensor))
        segments = packed_segments(batch, len(leading), leading.shape[-1]) if leading.ndim == 2 else None
        repeats = 2 if _is_of(self.collator, _PAIRING) else 1
        fill = 0  # tokens that fill up a padding-free row, each of which counts as a sequence
        found = len(leading)
        if segments is not None:
            fill = leading.numel() - sum(len(example.get("input_ids", ())) for example in features)
            found = int(sequence_index(segments)[-1, -1]) + 1 - fill
        if found != repeats * len(embeds):
            raise ValueError(
                f"The collator made {found} sequences in {len(leading)} rows for {len(embeds)} instructions, so which "
                "of them each follows is not known. Use TRL's own collator, and `packing=False`."
            )
        return torch.cat([*[embeds] * repeats, embeds.new_zeros(fill, embeds.shape[1])])


def use_instruction_column(
    trainer: Any, column: str = "instruction", encoder: InstructionEncoder | None = None, pack_to: int | None = None
) -> None:
    """Let every example of a trainer follow the instruction in a column of its data sets.

    Works for `transformers.Trainer` and for TRL's SFT, DPO, KTO, Reward, GRPO and RLOO trainers. Call it after making
    the trainer and before `train()`. A reference that is the model without its adapter sees no instruction; the
    adapter `ref` follows the same ones as the adapter that trains.

    Args:
        trainer: made with `remove_unused_columns=False`.
        column: texts, None for no instruction.
        encoder: default: the one that the configuration of the active adapter names.
        pack_to: of `SFTTrainer` with `padding_free=True`: pack its training data into rows of up to so many tokens, by
            TRL's strategy `bfd`, which cuts no sequence that fits.

    Raises:
        TypeError: if the trainer's model is no `PeftModel` with Queryable LoRA, or for another trainer of TRL.
        ValueError: if its data have no such column or it would drop it, if it generates by other means than the
            model's `generate`, or if a sequence is longer than `pack_to`.
    """
    tuner = tuner_of(trainer.model)
    encoder = encoder or tuner.instruction_encoder(only_active(tuner))
    is_online = _check_trainer(trainer, column)
    if pack_to is not None:
        _check_packing(trainer, pack_to)
        trainer.train_dataset = _packed(trainer.train_dataset, column, pack_to)
    if is_online:
        _Online(trainer, encoder, column).install()
    else:
        trainer.data_collator = InstructionCollator(trainer.data_collator, encoder, column)


class _Online:
    """What gives the rows of an online trainer their instructions: while it generates, scores, and trains on them.

    The embeddings become a part of the batch that TRL shuffles, splits and keeps for several steps.
    """

    def __init__(self, trainer: Any, encoder: InstructionEncoder, column: str) -> None:
        self.trainer, self.encoder, self.column = trainer, encoder, column
        self.score = trainer._generate_and_score_completions
        self.log_probs = trainer._get_per_token_logps_and_entropies
        self.loss = trainer.compute_loss
        self.embeds = torch.zeros(0, 0)  # of the rows at hand

    def install(self) -> None:
        self.trainer._generate_and_score_completions = self._score
        self.trainer._get_per_token_logps_and_entropies = self._log_probs
        self.trainer.compute_loss = self._loss

    @contextmanager
    def _rows(self, embeds: Tensor) -> Iterator[None]:
        outer, self.embeds = self.embeds, embeds
        try:
            yield
        finally:
            self.embeds = outer

    def _score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        embeds = embed_texts(self.encoder, [text for example in inputs for text in texts_of(example, self.column)])
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self._rows(embeds), use_instructions(model, embeds):
            return {**self.score(inputs), "instruction_embeds": embeds}

    def _log_probs(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        left = self.embeds

        def with_instructions(**inputs: Any) -> Any:  # TRL calls the model on a few rows after the other
            nonlocal left
            rows = len(inputs["input_ids"])
            embeds, left = left[:rows], left[rows:]
            self._check(len(embeds), rows)
            return model(**inputs, instruction_embeds=embeds)

        result = self.log_probs(with_instructions, *args, **kwargs)
        self._check(len(left), 0)
        return result

    def _check(self, instructions: int, rows: int) -> None:
        if instructions != rows:
            raise RuntimeError(
                f"{type(self.trainer).__name__} ran the model on {rows} rows where {instructions} have an "
                "instruction, so this version of TRL orders them in another way. Use TRL 1.16, or one instruction for "
                "all."
            )

    def _loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._rows(inputs["instruction_embeds"]):
            return self.loss(model, inputs, *args, **kwargs)


def texts_of(example: Mapping[str, Any], column: str) -> list[str | None]:
    """The instructions of an example: one, or one for each sequence of a packed row."""
    if column not in example:
        raise ValueError(
            f"An example has no column {column!r}; it has {sorted(example)}. Give the trainer "
            "`remove_unused_columns=False`, and `packing=False`: `use_instruction_column(trainer, pack_to=...)` packs."
        )
    if references := sorted({"ref_chosen_logps", "ref_logps"} & set(example)):
        raise ValueError(
            f"An example has {references} that were computed before, and under which instruction is not known. Use "
            "`precompute_ref_log_probs=False`."
        )
    texts, lengths = example[column], example.get("seq_lengths", [0])
    texts = texts if isinstance(texts, (list, tuple)) else [texts]
    if len(texts) != len(lengths):
        raise ValueError(
            f"An example has {len(texts)} instructions for {len(lengths)} sequences: a sequence follows one from its "
            "first token to its last. Make an example of each turn that has an instruction of its own, with the turns "
            "before it as its prompt."
        )
    return list(texts)


def _is_of(x: Any, names: tuple[str, ...]) -> bool:
    """Whether `x` is of one of TRL's classes called `names`, or of a class made from one."""
    return next((kind.__name__ for kind in type(x).__mro__ if kind.__module__.startswith("trl.")), "") in names


def _check_trainer(trainer: Any, column: str) -> bool:
    """Whether a trainer is an online one."""
    name, args = type(trainer).__name__, trainer.args
    is_online, is_of_trl = (
        _is_of(trainer, _ONLINE),
        any(k.__module__.startswith("trl.") for k in type(trainer).__mro__),
    )
    if is_of_trl and not is_online and not _is_of(trainer, _COLLATING):
        raise TypeError(
            f"Whether a {name} gives the model a column of instructions is not known. {_COLLATING + _ONLINE} do. "
            "Give all examples one instruction, with `set_default_instruction(model, text)` or a block "
            "`with use_instructions(model, text): trainer.train()`."
        )
    if args.remove_unused_columns:
        raise ValueError(
            f"{name} would drop the column {column!r}. Make it with `{type(args).__name__}(..., "
            "remove_unused_columns=False)`."
        )
    if getattr(args, "packing", False):
        raise ValueError(
            f"{name} packs and so drops the column {column!r}. Make it with `SFTConfig(..., packing=False, "
            "padding_free=True, max_length=None, remove_unused_columns=False)`, and pack with "
            f"`use_instruction_column(trainer, pack_to={args.max_length})`."
        )
    others = ("use_vllm", "use_transformers_continuous_batching", "tools", "rollout_func", "environment_factories")
    if is_online and (used := [x for x in others if getattr(args, x, None) or getattr(trainer, x, None)]):
        raise ValueError(
            f"{name} generates with {used}, where it is not known which instruction a row follows. Make it without, "
            "so that it generates by the model's `generate`."
        )
    evaluation = trainer.eval_dataset
    for dataset in (trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])):
        columns = getattr(dataset, "column_names", None)
        if columns is not None and column not in columns:
            raise ValueError(f"A data set of {name} has no column {column!r}; it has {sorted(columns)}.")
    return is_online


def _check_packing(trainer: Any, pack_to: int) -> None:
    if not getattr(trainer, "padding_free", False) or not hasattr(trainer.train_dataset, "select_columns"):
        raise ValueError(
            f"`pack_to={pack_to}` is for an `SFTTrainer` with a tokenised data set whose rows are not padded. Make it "
            "with `SFTConfig(..., padding_free=True, max_length=None, remove_unused_columns=False)`."
        )
    if (longest := max(map(len, trainer.train_dataset["input_ids"]))) > pack_to:
        raise ValueError(f"A sequence of {longest} tokens does not fit into a row: use `pack_to={longest}`.")


def _packed(dataset: Any, column: str, length: int) -> Any:
    """A tokenised data set, packed by TRL into rows of up to `length` tokens; `column` becomes lists of texts.

    TRL packs columns that have a value for each token, so the index of its sequence travels with each.
    """
    from trl import pack_dataset

    texts = dataset[column]
    numbered = dataset.map(lambda row, i: {"sequence": [i] * len(row["input_ids"])}, with_indices=True)
    rows = pack_dataset(numbered.select_columns(["input_ids", "labels", "sequence"]), length, "bfd")

    def name(row: dict[str, Any]) -> dict[str, Any]:
        starts = list(accumulate(row["seq_lengths"], initial=0))[:-1]
        return {column: [texts[row["sequence"][start]] for start in starts]}

    return rows.map(name, remove_columns="sequence")
