"""The hooks of a stack: they open a call when the stack's owner is called, and close it when that call ends."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .adapter_call import AdapterCall, RunningCall
from .arguments import bind, leading_tensor, parameter_names
from .cache import cached_length, find_cache
from .current import Current
from .model_call import ModelHooks
from .plan import Plan, StackTraits
from .replay import AdapterReplay, BoundCheckpoint
from .stack_call import StackCall
from .streams import text_of, without_masks


class Stack:
    """One stack of a model. Adapted modules reach it through their `Place`; it is no module and owns no tensor.

    Args:
        traits: what is known of it from where it stands.
        owner: the module whose call runs the layers.
        holder: of an entry of an `nn.ModuleDict`, the stack whose call it runs in; None if there is none.
        model_hooks: tells what the model call says.
        currents: the running calls of all stacks of the model; this stack adds its own.
    """

    def __init__(
        self,
        traits: StackTraits,
        owner: nn.Module,
        holder: Stack | None,
        model_hooks: ModelHooks,
        currents: list[Current],
    ) -> None:
        self.traits, self.holder = traits, holder
        self.model_hooks, self.currents = model_hooks, currents
        self.current = Current()
        currents.append(self.current)
        self.plans: dict[str, Plan] = {}
        self.parameters = parameter_names(owner)
        self.checkpointing: list[Any] = [m for m in owner.modules() if hasattr(m, "gradient_checkpointing")]
        self.hooks = [
            owner.register_forward_pre_hook(self._open, with_kwargs=True),
            owner.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def adapter_call(self, adapter_name: str) -> AdapterCall | AdapterReplay:
        """The adapter's part in the running call of this thread.

        Raises:
            RuntimeError: if no call is running.
        """
        call = self.current.call
        if call is None:
            raise RuntimeError(
                f"An adapted module ran outside a call of {self.traits.name}, so its tokens are not known. "
                "Call the model, not a layer of it. If this happened in a backward pass, a layer was checkpointed by "
                "other means than transformers' `gradient_checkpointing_enable`, which is the supported one."
            )
        return call.adapter_call(adapter_name)

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        for module in self.checkpointing:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, BoundCheckpoint):
                module._gradient_checkpointing_func = checkpoint.checkpoint

    def _open(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(owner, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs replicas of one model, whose adapters would share one router. Use "
                "DistributedDataParallel (`accelerate launch` or `torchrun`), or make one device visible."
            )
        if any(isinstance(plan.router.keys, FullyShardedDataParallel) for plan in self.plans.values()):
            raise RuntimeError(
                "Under PEFT's `fsdp_auto_wrap_policy` FSDP1 wraps each tensor of the adapter alone, so layers cannot "
                "read them together. Use FSDP2 (`fsdp_version: 2`), or wrap whole decoder layers."
            )
        arguments = bind(self.parameters, args, kwargs)
        plans = [plan for plan in self.model_hooks.active_plans() if self.plans.get(plan.adapter_name) is plan]
        routed = [plan for plan in plans if self.model_hooks.call.reads_tokens(plan)]
        if self.traits.reads_memory:
            if arguments.get("encoder_hidden_states") is None:
                return  # then no cross-attention runs
            arguments = text_of(arguments)  # no cache: the first call reads it all
        elif self.traits.is_denoiser:
            arguments = without_masks(arguments, routed, type(owner).__name__)
        self.model_hooks.current.drop_ended()  # where the stack is called by itself
        stack_call = StackCall(
            stack=self.traits.name,
            traits=self.traits,
            model_call=self.model_hooks.call,
            arguments=arguments,
            inputs=leading_tensor(arguments),
            past=cached_length(find_cache(arguments)),
            is_training=owner.training,
            is_checkpointing=owner.training and self._bind_checkpoints(),
        )
        stack_call.model_call.row_adapters(stack_call.batch)  # too few names are an error even if none is an adapter
        if self.traits.is_loose and (routed or any(stack_call.has_packed_instructions(plan) for plan in plans)):
            running = None if self.holder is None else self.holder.current.call
            held_by = running.stack_call if isinstance(running, RunningCall) else None
            stack_call = stack_call.reading(held_by)
        call = RunningCall(stack_call, self.plans)
        self.current.open(call)
        for plan in plans:
            call.adapter_call(plan.adapter_name)  # here, because checkpointed layers would have to repeat it

    def _close(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call = self.current.close()
        if call is not None and output is not None:  # None: the call raised
            call.close(output)

    def _bind_checkpoints(self) -> bool:
        """Make layers that gradient checkpointing runs again find the call they belong to."""
        active = [module for module in self.checkpointing if module.gradient_checkpointing]
        for module in active:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, BoundCheckpoint):
                module._gradient_checkpointing_func = BoundCheckpoint(self.currents, checkpoint)
        return bool(active)
