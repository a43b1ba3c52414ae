"""The outermost call of a model: its labels, prompt, instruction and adapter names, which no inner module sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import bind, parameter_names
from .cache import cached_length, find_cache
from .current import Current
from .instruction import check_embeds, check_names, idle_instruction
from .paged import Filling, PagedCall, check_requests, init_manager
from .plan import Plan
from .record import Recorder
from .rows import name_rows
from .tokens import IGNORE_INDEX


@dataclass(frozen=True)
class ModelCall:
    """What the outermost call, and the `with` blocks around it, say about routing.

    Args:
        labels: [B, T], -100 where unsupervised, aligned with the tokens they are the targets of.
        prompt_mask: [B, T] bool or 0/1, True for prompt tokens.
        prompt_length: in `generate`, the number of leading tokens that are the prompt; None outside.
        instruction_embeds: embeddings e(c) passed to the call, [n, d_c]: one, one for each row, or one for each
            sequence of packed rows.
        instructions: by adapter, the embeddings of the innermost `use_instructions` block; None outside of one.
        routes: by adapter whose routes are fixed, their weights over the atoms, [1, blocks, M] or a set for each row.
        adapter_names: [B], the adapter of each row in a batch of several, "__base__" for rows without one; None for a
            batch of the active adapters.
        arguments: the outermost call's, by name; empty outside of a call.
        ended: calls of stacks that have ended within this call, in order; None outside of a call.
        recorders: called with a [`RoutedCall`] for each adapter when a stack's call ends.
        records_all: whether one of them is to miss no call, as in a `record_routing` block.
        paged: of a step of continuous batching, its requests; None in all other calls.
    """

    labels: Tensor | None = None
    prompt_mask: Tensor | None = None
    prompt_length: int | None = None
    instruction_embeds: Tensor | None = None
    instructions: Mapping[str, Tensor] | None = None
    routes: Mapping[str, Tensor] = field(default_factory=dict)
    adapter_names: tuple[str, ...] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    ended: list[Any] | None = None
    recorders: tuple[Recorder, ...] = ()
    records_all: bool = False
    paged: PagedCall | None = None

    @property
    def is_generating(self) -> bool:
        """Whether this is a step of `generate`, which may repeat rows, for example for beams."""
        return self.prompt_length is not None

    def row_adapters(self, batch: int) -> list[str] | None:
        """The adapter of each of `batch` rows, or None for a batch of the active adapters."""
        return name_rows(self.adapter_names, batch, may_repeat=self.is_generating)

    def instruction(self, plan: Plan) -> Tensor | None:
        """The embeddings that an adapter follows, [n, d_c] as they were given; None for its default.

        Raises:
            ValueError: if a block of instructions is open that was not entered for this adapter.
        """
        if self.instruction_embeds is not None or self.instructions is None:
            return self.instruction_embeds
        if plan.adapter_name not in self.instructions and plan.router.settings.instruction_dim is not None:
            raise ValueError(
                f"The block of instructions was entered for adapters {sorted(self.instructions)}, and "
                f"{plan.adapter_name!r} has been set since. Enter it after `set_adapter`, or name the adapters in its "
                "`adapter_names`."
            )
        return self.instructions.get(plan.adapter_name)

    def reads_tokens(self, plan: Plan) -> bool:
        """Whether an adapter's routes depend on the tokens of the call."""
        return plan.router.reads_states and plan.adapter_name not in self.routes

    def fixed_routes(self, plan: Plan, batch: int) -> Tensor | None:
        """The weights of an adapter's fixed routes in a call of `batch` rows, [B or 1, blocks of the stack, M].

        None if they are not fixed.

        Raises:
            ValueError: for another number of sets than rows, or if the call has an instruction for the adapter.
        """
        weights = self.routes.get(plan.adapter_name)
        if weights is None:
            return None
        if self.instruction_embeds is not None or plan.adapter_name in (self.instructions or {}):
            raise idle_instruction(plan.adapter_name)
        weights = weights[:, plan.first_block : plan.first_block + plan.num_blocks]
        return self.by_row(weights, batch, "sets of routes")

    def by_row(self, x: Tensor, batch: int, what: str) -> Tensor:
        """`x` [n, ...] for a call of `batch` rows: as it is, or repeated as `generate` repeats rows.

        Raises:
            ValueError: for another number n than 1 and that of the rows.
        """
        rows = x.shape[0]
        if self.is_generating and batch % rows == 0:
            return x.repeat_interleave(batch // rows, dim=0)
        if rows not in (1, batch):
            raise ValueError(
                f"{rows} {what} were given for a call of batch size {batch}: give one, or one for each row of the "
                "batch."
            )
        return x


class ModelHooks:
    """Opens a [`ModelCall`] when the base model is called or generates.

    The base model sees only the labels; `prompt_mask` and `instruction_embeds` are taken from the call. Whatever class
    of PEFT or TRL calls the model or its `generate`, it passes through here.

    Args:
        model: the base model.
        active_plans: how the adapters that are active now route the stacks they adapt.
    """

    def __init__(self, model: nn.Module, active_plans: Callable[[], list[Plan]]) -> None:
        self.current = Current()
        self.outside = ModelCall()  # what holds outside of every call and block: routes that are fixed for good
        self.merged: set[str] = set()  # adapters that are in the base weights for now
        self.active_plans = active_plans
        self.is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.parameters = parameter_names(model)
        self.hooks = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]
        self.base_methods: dict[str, Any] = {}
        self.own_methods: dict[str, Any] = {}  # patches that were there before, for example TRL's
        for name in ("generate", "generate_batch", "init_continuous_batching"):
            if hasattr(model, name):
                self.base_methods[name] = getattr(model, name)
                if name in vars(model):
                    self.own_methods[name] = vars(model)[name]
                setattr(model, name, getattr(self, name))

    def remove(self, model: nn.Module) -> None:
        """Leave `model` as it was."""
        for hook in self.hooks:
            hook.remove()
        for name in self.base_methods:
            if vars(model).pop(name, None) is not None and name in self.own_methods:
                setattr(model, name, self.own_methods[name])

    @property
    def call(self) -> ModelCall:
        """What this thread's call, or the `with` blocks it is in, say."""
        return self.current.call or self.outside

    def fix(self, adapter_name: str, weights: Tensor | None) -> None:
        """Fix an adapter's routes at `weights` [1 or rows, blocks, M] outside of every block; None: no more."""
        others = {name: fixed for name, fixed in self.outside.routes.items() if name != adapter_name}
        self.outside = ModelCall(routes=others if weights is None else {**others, adapter_name: weights})

    @contextmanager
    def entered(self, **changes: Any) -> Iterator[None]:
        """While the block lasts, this thread's calls have these fields of [`ModelCall`]."""
        self.current.drop_ended()
        with self.current.entered(replace(self.call, **changes)):
            yield

    def _open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        self.current.drop_ended()
        arguments = bind(self.parameters, args, kwargs)
        labels = arguments.get("labels")
        if self.is_encoder_decoder and labels is not None:
            labels = F.pad(labels, (1, -1), value=IGNORE_INDEX)  # there, a label is the next input token
        check_names(kwargs, self.parameters)
        prompt_mask = kwargs.pop("prompt_mask", None)
        instruction = kwargs.pop("instruction_embeds", None)
        paged = PagedCall.of(kwargs)
        outer = self.call if paged is None else paged.filling.current(self.active_plans(), self.outside)
        if outer.is_generating or paged is not None:  # a step of what was given the instruction
            instruction = outer.instruction_embeds
        else:
            self._check_instruction(instruction)
        self.current.open(
            ModelCall(
                labels=labels,
                prompt_mask=prompt_mask,
                prompt_length=outer.prompt_length,
                instruction_embeds=instruction,
                instructions=outer.instructions,
                routes=outer.routes,
                adapter_names=outer.adapter_names,
                recorders=outer.recorders,
                paged=paged,
                ended=[],
                arguments=arguments,
            )
        )
        return args, kwargs

    def _close(self, model: nn.Module, args: tuple, output: Any) -> None:
        call = self.current.close()
        if call is not None and call.ended is not None:
            call.ended.clear()  # each of them holds this call

    def generate(self, *args: Any, instruction_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prompt it is called with as the prompt of all its steps.

        Args:
            instruction_embeds: [B, d_c] or [1, d_c], for all steps.

        Raises:
            ValueError: unless every scope has a route per token, for chunked prefill, classifier-free guidance and a
                cache that is already filled.
        """
        check_names(kwargs, self.parameters)
        self._check_generation(kwargs)
        self._check_instruction(instruction_embeds)
        prompt_length = self._prompt_length(args, kwargs)
        with self.entered(prompt_length=prompt_length, instruction_embeds=instruction_embeds):
            return self.base_methods["generate"](*args, **kwargs)

    def generate_batch(self, *args: Any, instruction_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's `generate_batch`, under the instruction and the fixed routes that hold where it is called.

        Args:
            instruction_embeds: [1, d_c], for all requests.

        Raises:
            ValueError: as `init_continuous_batching` does; also for `adapter_names`, which transformers ignores.
        """
        check_requests(kwargs)
        self._check_instruction(instruction_embeds)
        with self.entered(instruction_embeds=instruction_embeds):
            return self.base_methods["generate_batch"](*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `init_continuous_batching`, with a cache that carries what routes need.

        Raises:
            ValueError: for adapters, instructions, routes and settings that it cannot run exactly.
        """
        if self.call.records_all:
            raise ValueError(
                "`record_routing` cannot record continuous batching, whose manager calls the model in a thread of its "
                "own. Call `generate_batch` or `init_continuous_batching` outside of the block, or record `generate`."
            )
        filling = Filling(tuple(self.active_plans()), replace(self.call, recorders=()), self.outside)
        return init_manager(self.base_methods["init_continuous_batching"], args, kwargs, filling)

    def _prompt_length(self, args: tuple, kwargs: dict[str, Any]) -> int:
        names = ("decoder_input_ids",) if self.is_encoder_decoder else ("input_ids", "inputs", "inputs_embeds")
        leading = () if self.is_encoder_decoder else args[:1]
        prompts = [value for value in (*leading, *map(kwargs.get, names)) if isinstance(value, Tensor)]
        return max((prompt.shape[1] for prompt in prompts), default=1)  # generate starts from one start token

    def _check_generation(self, kwargs: dict[str, Any]) -> None:
        """Where one route serves a generated sequence, refuse what would show it another prompt than its own."""
        plans = [plan for plan in self.active_plans() if plan.traits.predicts and self.call.reads_tokens(plan)]
        scopes = sorted({plan.scope.name for plan in plans if not plan.scope.is_per_token})
        config = kwargs.get("generation_config") or getattr(
            getattr(self.base_methods["generate"], "__self__", None), "generation_config", None
        )

        def setting(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        if scopes and setting("prefill_chunk_size") is not None:
            raise ValueError(
                f"`prefill_chunk_size` cannot be used with routing scope {scopes}: the route of the first chunk "
                "depends on the last. Use `routing_scope='causal'`, or prefill in one chunk."
            )
        if scopes and setting("guidance_scale") not in (None, 1):
            raise ValueError(
                f"`guidance_scale` cannot be used with routing scope {scopes}: classifier-free guidance runs a second "
                "prompt beside the one that `generate` was called with. Use `routing_scope='causal'`."
            )
        if scopes and cached_length(find_cache(kwargs)) > 0:
            raise ValueError(
                f"`generate` cannot go on from a filled cache with routing scope {scopes}: routes stay as the cached "
                "tokens made them, while the prompt is now longer. Start from an empty cache, or use "
                "`routing_scope='causal'`."
            )

    def _check_instruction(self, embeds: Tensor | None) -> None:
        if told := self.merged if embeds is not None else self.merged & set(self.call.instructions or ()):
            raise idle_instruction(min(told))
        for plan in self.active_plans() if embeds is not None else ():
            check_embeds(embeds, plan.adapter_name, plan.router.settings.instruction_dim, "`instruction_embeds`")
