"""Where an adapter gets its instruction from: a block of calls, its own default, or a column of training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls.embeds import check_embeds
from .encoders import InstructionEncoder, embed_texts
from .tuner.model import QueryableLoraModel


@contextmanager
def use_instructions(
    model: nn.Module,
    texts: str | Sequence[str | None] | Tensor | None,
    encoder: InstructionEncoder | None = None,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[None]:
    """While the block lasts, calls of `model` and of its `generate` follow these instructions.

    They win over the adapter's default ([`set_default_instruction`]); `instruction_embeds` of a call wins over them.

    Args:
        model: a `PeftModel` with Queryable LoRA.
        texts: one text for all rows, or a list of one for each row of a call; None, for a row or all of them, is no
            instruction. Or embeddings [1, d_c] or [batch, d_c].
        encoder: default: the one that the adapter's configuration names.
        adapter_names: the adapters that follow; default: those active now.

    Raises:
        ValueError: if an adapter does not exist or takes no instruction, if its encoder cannot be loaded, or if an
            embedding's width is not its `instruction_dim`.
    """
    tuner = tuner_of(model)
    names = tuner.active_adapters if adapter_names is None else adapter_names
    embeds = {name: embed_instruction(tuner, name, texts, encoder) for name in names}
    with tuner.model_hooks.entered(instructions=embeds):
        yield


def set_default_instruction(
    model: nn.Module,
    instruction: str | Tensor | None,
    encoder: InstructionEncoder | None = None,
    adapter_name: str | None = None,
) -> None:
    """Give an adapter the instruction that it follows where a call has no other, and that is saved with it.

    The embedding goes into its weights, the text and the encoder's name and revision into its configuration: a loaded
    adapter needs no encoder.

    Args:
        model: a `PeftModel` with Queryable LoRA.
        instruction: a text, an embedding [1, d_c], or None for no instruction.
        encoder: default: the one that the adapter's configuration names.
        adapter_name: default: the active adapter.

    Raises:
        ValueError: as [`use_instructions`] does; also if no adapter is named and several are active.
    """
    tuner = tuner_of(model)
    name = adapter_name or only_active(tuner)
    embeds = embed_instruction(tuner, name, instruction, encoder)
    if len(embeds) != 1:
        raise ValueError(f"A default instruction is one embedding, [1, d_c], got {len(embeds)} of them.")
    with torch.no_grad():
        tuner.queryable_lora_router[name].default_instruction.weight.copy_(embeds)
    config = tuner.peft_config[name]
    config.default_instruction = instruction if isinstance(instruction, str) else None
    if encoder is not None and isinstance(instruction, str):
        config.instruction_encoder, config.instruction_encoder_revision = encoder.name, encoder.revision


class InstructionCollator:
    """A data collator that turns a column of texts into `instruction_embeds` [batch, d_c].

    A text of None is no instruction. Trainers drop the column unless `remove_unused_columns=False`. For data loaders
    with workers, encode all texts beforehand: `encoder(dataset.unique("instruction"))`.

    Args:
        collator: makes the rest of the batch.
        encoder: encodes the texts.
        column: name of the column.

    Raises:
        ValueError: if an example has no such column, or if `collator` packs several examples into a row.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        encoder: InstructionEncoder,
        column: str = "instruction",
    ) -> None:
        self.collator, self.encoder, self.column = collator, encoder, column

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if missing := [example for example in features if self.column not in example]:
            raise ValueError(
                f"An example has no column {self.column!r}; it has {sorted(missing[0])}. Give the trainer "
                "`remove_unused_columns=False`, and `packing=False`: a packed row has many instructions."
            )
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in features])
        rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        if rows != len(features):
            raise ValueError(
                f"The collator made {rows} rows of {len(features)} examples, but a row takes one instruction. Use "
                "`padding_free=False` and `packing=False`."
            )
        embeds = embed_texts(self.encoder, [example[self.column] for example in features])
        return {**batch, "instruction_embeds": embeds}


def embed_instruction(
    tuner: QueryableLoraModel,
    adapter_name: str,
    instruction: str | Sequence[str | None] | Tensor | None,
    encoder: InstructionEncoder | None,
) -> Any:
    """Embeddings [n, d_c] of `instruction` for an adapter."""
    check_adapter(tuner, adapter_name)
    dim = tuner.queryable_lora_router[adapter_name].settings.instruction_dim
    source = "An instruction"
    if instruction is None:
        instruction = torch.zeros(1, dim or 0)
    elif dim is not None and not isinstance(instruction, Tensor):
        encoder = encoder or tuner.instruction_encoder(adapter_name)
        instruction = embed_texts(encoder, [instruction] if isinstance(instruction, str) else instruction)
        source = f"An instruction encoded by {encoder}"
    check_embeds(instruction, adapter_name, dim, source)
    return instruction


def tuner_of(model: nn.Module) -> QueryableLoraModel:
    """The tuner of a `PeftModel`; raises a TypeError for anything else."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, QueryableLoraModel):
        raise TypeError(
            f"This takes a PeftModel with Queryable LoRA, got {type(model).__name__}. Unwrap it first, from "
            "DistributedDataParallel say."
        )
    return tuner


def check_adapter(tuner: QueryableLoraModel, name: str) -> None:
    """Raise a ValueError unless there is an adapter called `name`."""
    if name not in tuner.peft_config:
        raise ValueError(f"There is no adapter {name!r}, but {sorted(tuner.peft_config)}.")


def only_active(tuner: QueryableLoraModel) -> str:
    """The active adapter, if it is one; a ValueError otherwise."""
    if len(tuner.active_adapters) != 1:
        raise ValueError(f"Name one adapter in `adapter_name`: {tuner.active_adapters} are active.")
    return tuner.active_adapters[0]
