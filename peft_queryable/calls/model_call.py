"""The outermost call of a model: its labels, its prompt and its instruction, which no inner module sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .pooling import IGNORE_INDEX
from .routing import Plan


class OuterCall:
    """Inputs of the outermost call that concern routing, kept while the call lasts.

    The base model sees only the labels; `prompt_mask` and `instruction_embeds` are taken from the call. Whatever class
    of PEFT or TRL calls the model or its `generate`, it passes through here.

    Args:
        model: the base model.
        active_plans: how the adapters that are active now route the stacks they adapt.

    Attributes:
        labels: [B, T], -100 where unsupervised, aligned with the tokens they are the targets of.
        prompt_mask: [B, T] bool or 0/1, True for prompt tokens.
        prompt_length: in `generate`, the number of leading tokens that are the prompt; None outside.
        instruction: embeddings e(c) given to the call, [B, d_c] or [1, d_c].
        block: embeddings of the open block of [`instructions`], by adapter.
        adapter_names: [B], the adapter of each row of a batch that has several, "__base__" for none; None for a batch
            of the active ones.
    """

    def __init__(self, model: nn.Module, active_plans: Callable[[], list[Plan]]) -> None:
        self.active_plans = active_plans
        self.labels: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.prompt_length: int | None = None
        self.instruction: Tensor | None = None
        self.block: dict[str, Tensor] | None = None
        self.adapter_names: list[str] | None = None
        self.is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.hooks = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]
        self.own_generate = vars(model).get("generate")  # a patch that was there before, by TRL say
        self.base_generate: Any = getattr(model, "generate", None)
        if self.base_generate is not None:
            setattr(model, "generate", self.generate)  # noqa: B010  (a method, to the type checker)

    def remove(self, model: nn.Module) -> None:
        """Leave `model` as it was."""
        for hook in self.hooks:
            hook.remove()
        if vars(model).pop("generate", None) is not None and self.own_generate is not None:
            setattr(model, "generate", self.own_generate)  # noqa: B010

    @property
    def is_generating(self) -> bool:
        """Whether a step of `generate` runs, which repeats rows, for beams say."""
        return self.prompt_length is not None

    def row_adapters(self, batch: int) -> list[str] | None:
        """The adapter of each of `batch` rows, or None for a batch of the active adapters.

        Raises:
            ValueError: if `adapter_names` has another number of names.
        """
        names = self.adapter_names
        if names is None:
            return None
        if len(names) == 0 or batch % len(names) or (batch != len(names) and not self.is_generating):
            raise ValueError(
                f"`adapter_names` has {len(names)} names for a batch of {batch}: give one name for each row, "
                "'__base__' for rows without an adapter."
            )
        return [name for name in names for _ in range(batch // len(names))]

    def _open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        self.labels = kwargs.get("labels")
        if self.is_encoder_decoder and self.labels is not None:
            self.labels = F.pad(self.labels, (1, -1), value=IGNORE_INDEX)  # there, a label is the next input token
        self.prompt_mask = kwargs.pop("prompt_mask", None)
        instruction = kwargs.pop("instruction_embeds", None)
        if not self.is_generating:  # else this is one of its steps, and it was given the instruction
            self.instruction = self._checked(instruction)
        return args, kwargs

    def _close(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.labels = self.prompt_mask = None
        if not self.is_generating:
            self.instruction = None

    def generate(self, *args: Any, instruction_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, for every step of which the prompt stays what it is called with.

        Args:
            instruction_embeds: [B, d_c] or [1, d_c], for all steps.

        Raises:
            ValueError: for chunked prefill, unless every route is `causal`.
        """
        self._check_prefill(kwargs)
        self.prompt_length = self._prompt_length(args, kwargs)
        try:
            self.instruction = self._checked(instruction_embeds)
            return self.base_generate(*args, **kwargs)
        finally:
            self.prompt_length = self.instruction = None

    def _prompt_length(self, args: tuple, kwargs: dict[str, Any]) -> int:
        names = ("decoder_input_ids",) if self.is_encoder_decoder else ("input_ids", "inputs", "inputs_embeds")
        leading = () if self.is_encoder_decoder else args[:1]
        prompts = [value for value in (*leading, *map(kwargs.get, names)) if isinstance(value, Tensor)]
        return max((prompt.shape[1] for prompt in prompts), default=1)  # generate starts from one start token

    def _check_prefill(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or getattr(
            getattr(self.base_generate, "__self__", None), "generation_config", None
        )
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        scopes = {plan.scope for plan in self.active_plans()} - {"causal"}
        if chunk is not None and scopes:
            raise ValueError(
                f"`prefill_chunk_size` cannot be used with routing scope {sorted(scopes)}: the route of the first "
                "chunk depends on the last. Use `routing_scope='causal'`, or prefill in one chunk."
            )

    def _checked(self, embeds: Tensor | None) -> Tensor | None:
        for plan in self.active_plans() if embeds is not None else ():
            check_embeds(embeds, plan.adapter, plan.router.instruction_dim, "`instruction_embeds`")
        return embeds

    def instruction_for(self, plan: Plan) -> Tensor | None:
        """The embeddings that an adapter follows in this call, [n, d_c]; None for its own default.

        Raises:
            ValueError: if a block of instructions is open that was not entered for this adapter.
        """
        if self.instruction is not None or self.block is None:
            return self.instruction
        if plan.adapter not in self.block and plan.router.instruction_dim is not None:
            raise ValueError(
                f"The block of instructions was entered for adapters {sorted(self.block)}, and {plan.adapter!r} has "
                "been set since. Enter it after `set_adapter`, or name the adapters in its `adapter_names`."
            )
        return self.block.get(plan.adapter)


def check_embeds(embeds: Any, adapter: str, dim: int | None, source: str) -> None:
    """Raise a ValueError unless `embeds`, which came from `source`, are instruction embeddings [n, `dim`]."""
    if dim is None:
        raise ValueError(
            f"{source} was given, but adapter {adapter!r} takes no instruction: it was made with "
            "`instruction_dim=None`. Leave the instruction out, or train an adapter with `instruction_encoder` or "
            "`instruction_dim`."
        )
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != dim:
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(
            f"{source} must be a tensor of shape [batch, {dim}] or [1, {dim}] for adapter {adapter!r}, got {shape}."
        )
