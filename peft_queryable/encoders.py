"""Frozen text encoders e(c) of instructions: the backbone itself, sentence-transformers models, or a user's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from threading import RLock, get_ident
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .reference_texts import PROMPT, REFERENCE

BACKBONE, CENTRED = "backbone", "backbone-centred"
_LOCK = RLock()  # of all encoders: one for each could not be pickled for the workers of a data loader


class InstructionEncoder(ABC):
    """A frozen text encoder e(c): texts in, embeddings [n, d_c] out, in float32 on the CPU.

    It remembers the texts that were used last, and may be called from several threads. To bring your own, write a
    subclass with `encode`.

    Attributes:
        name: what a configuration calls it in `instruction_encoder`; None if no name can load it.
        revision: of the Hub's model of that name.
        remembered: largest number of texts that it remembers.
    """

    name: str | None = None
    revision: str | None = None
    remembered: int = 16384

    @abstractmethod
    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings [n, d_c] of `texts`, each independent of the other texts."""

    @cached_property
    def width(self) -> int:
        """d_c."""
        return self(["instruction"]).shape[1]

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        return {}  # in the order of their last use

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [n, d_c] of `texts`.

        Raises:
            TypeError: if `texts` is anything but a list of strings, at least one.
            ValueError: if `encode` does not return one finite vector per text.
        """
        if isinstance(texts, str) or len(texts) == 0 or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"An instruction encoder takes a list of texts, at least one, got {texts!r}.")
        with _LOCK:
            known = {text: self._known.pop(text) for text in dict.fromkeys(texts) if text in self._known}
            self._known.update(known)
            if new := [text for text in dict.fromkeys(texts) if text not in known]:
                known.update(zip(new, self._encode(new), strict=True))
                self._known.update({text: known[text] for text in new})
                for text in list(self._known)[: max(len(self._known) - self.remembered, 0)]:
                    del self._known[text]
        return torch.stack([known[text] for text in texts])

    def _encode(self, texts: list[str]) -> list[Tensor]:
        embeds = self.encode(texts)
        if embeds.ndim != 2 or len(embeds) != len(texts) or not embeds.isfinite().all():
            raise ValueError(
                f"{self} must encode {len(texts)} texts as one finite vector each, [{len(texts)}, width], but "
                f"returned {tuple(embeds.shape)} with {(~embeds.isfinite()).sum()} numbers that are not finite."
            )
        # Clones, because encoders return tensors made in inference mode, which no graph can hold.
        return [embedding.clone() for embedding in embeds.detach().float().cpu()]

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.name!r}" if self.name else type(self).__name__


class BackboneEncoder(InstructionEncoder):
    """The model itself, frozen and without adapters: the mean of its last hidden states over the tokens of a text.

    With `centred`, a decoder is asked what the text means in one word (`PROMPT`), and its state where that word would
    come takes the place of the mean; encoders keep the mean. Then the mean embedding of `REFERENCE`, a built-in list
    of instructions that say little, is subtracted. Configurations call the two "backbone" and "backbone-centred".

    An encoder-decoder model encodes with its encoder. While it encodes, the adapters are off in this thread.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        tokenizer: its tokenizer.
        centred: see above; False by default.

    Raises:
        TypeError: for a model of another kind.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, centred: bool = False) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise TypeError(
                f"BackboneEncoder needs a transformers model, which has hidden states of text, got "
                f"{type(base).__name__}. Take another encoder, or pass embeddings."
            )
        self.name, self.tokenizer, self.centred = CENTRED if centred else BACKBONE, tokenizer, centred
        self.model: Any = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
        self.prompted = centred and _decodes(base)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        with _frozen(self.model), torch.autocast(self.model.device.type, enabled=False):
            states = torch.stack([self._state(text) for text in texts])  # one by one: no padding, no batch mates
            return states - self._common.to(states) if self.centred else states

    @cached_property
    def _common(self) -> Tensor:
        """Mean [d_c] of the reference's states."""
        return torch.stack([self._state(text) for text in REFERENCE]).mean(0)

    def _state(self, text: str) -> Tensor:
        if len(self.tokenizer(text)["input_ids"]) == 0:
            raise ValueError(f"The tokenizer makes no token of instruction {text!r}: give one with words, or None.")
        prompt = PROMPT.format(text) if self.prompted else text
        inputs = self.tokenizer(prompt, return_tensors="pt", return_special_tokens_mask=True).to(self.model.device)
        special = inputs.pop("special_tokens_mask")[0]  # some tokenizers end every text with such a token
        states = self.model(**inputs).last_hidden_state[0].float()  # [T, d_c]
        return states[special == 0][-1] if self.prompted else states.mean(0)


class SentenceEncoder(InstructionEncoder):
    """A sentence-transformers model, on the CPU; the package's extra `instructions` installs what it needs.

    Args:
        name: its id on the Hub, or its folder.
        revision: branch, tag or commit on the Hub.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        from sentence_transformers import SentenceTransformer

        self.name, self.revision = str(name), revision
        self.model = SentenceTransformer(self.name, revision=revision, device="cpu")

    def encode(self, texts: list[str]) -> Tensor:
        return self.model.encode(texts, convert_to_tensor=True)


def load_encoder(name: str, revision: str | None, model: nn.Module) -> InstructionEncoder:
    """The encoder that a configuration calls `name`; "backbone" and "backbone-centred" are `model` itself.

    Raises:
        ValueError: if it cannot be loaded by its name.
    """
    try:
        if name not in (BACKBONE, CENTRED):
            return SentenceEncoder(name, revision)
        tokenizer = AutoTokenizer.from_pretrained(getattr(model, "name_or_path", ""))
        return BackboneEncoder(model, tokenizer, centred=name == CENTRED)
    except (ImportError, OSError, TypeError, ValueError) as error:
        own = {
            BACKBONE: "BackboneEncoder(model, tokenizer)",
            CENTRED: "BackboneEncoder(model, tokenizer, centred=True)",
        }.get(name, "SentenceEncoder(folder)")
        raise ValueError(
            f"Instruction encoder {name!r} cannot be loaded by its name. Pass `encoder={own}` or an encoder of your "
            f"own, or pass embeddings. What went wrong: {error}"
        ) from error


def embed_texts(encoder: InstructionEncoder, texts: Sequence[str | None]) -> Tensor:
    """Embeddings [n, d_c] of `texts`; zero, which is no instruction, for None (Prop. D.7a)."""
    embeds = torch.zeros(len(texts), encoder.width)
    given = [row for row, text in enumerate(texts) if text is not None]
    if given:
        embeds[given] = encoder([text for text in texts if text is not None])
    return embeds


def _decodes(base: PreTrainedModel) -> bool:
    """Whether it is known that a token's last state is made to predict the next token."""
    config = base.config
    alone = config.model_type in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    return not config.is_encoder_decoder and (alone or base.can_generate() or getattr(config, "is_decoder", False))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """For a while, no adapter of `model` and no dropout is at work in this thread; what trains stays as it is.

    Queryable LoRA goes on in other threads; the switch of PEFT's other tuners is every thread's.
    """
    modules, thread = list(model.modules()), get_ident()
    hooks = {place.stack.model_hooks for module in modules for place in getattr(module, "places", {}).values()}
    hooks = {each for each in hooks if not each.merged}  # the switch takes what is merged out of the weights

    def original(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return module.original_module(*args, **kwargs) if get_ident() == thread else None

    with ExitStack() as undo:
        for each in hooks:
            undo.enter_context(each.entered(adapter_names=("__base__",)))
        for module in modules:
            undo.callback(setattr, module, "training", module.training)
            if hooks and isinstance(module, AuxiliaryTrainingWrapper):
                undo.callback(module.register_forward_hook(original, with_kwargs=True).remove)
            elif hooks and (hasattr(module, "places") or isinstance(module, TrainableTokensLayer)):
                continue  # told by the names, or a part of a wrapper
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                undo.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                module._disable_adapters = True
        model.eval()
        yield
