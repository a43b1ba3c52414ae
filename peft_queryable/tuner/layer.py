"""The adapted module: a rank-space update of one linear layer, routed by its block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calls.adapter_call import AdapterCall, check_layout
from ..calls.replay import AdapterReplay
from ..config import MOVING_INITIALISATIONS, QueryableLoraConfig
from ..method.atoms import Weight
from .layout import Place
from .merging import MergingLayer


class QueryableLoraLayer(MergingLayer):
    """LoRA factors of one module, with a gate logit beside them; one of each for every adapter."""

    if TYPE_CHECKING:  # what PEFT's untyped classes set
        merged_adapters: list[str]
        base_layer: Any
        lora_A: Any
        lora_B: Any
        lora_dropout: Any
        scaling: dict[str, float]
        disable_adapters: bool
        active_adapters: list[str]
        _cast_input_dtype: Any

    adapter_layer_names: tuple[str, ...] = (*LoraLayer.adapter_layer_names, "queryable_lora_gate")
    other_param_names: tuple[str, ...] = (*LoraLayer.other_param_names, "places")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.queryable_lora_gate: Any = nn.ModuleDict()  # eta
        self.places: dict[str, Place] = {}
        self.merged_operators = {}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: QueryableLoraConfig, **kwargs: Any
    ) -> None:
        if r != config.r:  # PEFT's EVA, given other components than its configuration says
            raise ValueError(f"Adapter {adapter_name!r} has rank r={config.r} in all its modules, got {r} for one.")
        gate = Weight(1)
        if gate.weight.is_meta and config.init_lora_weights in MOVING_INITIALISATIONS:
            raise ValueError(
                f"Adapter {adapter_name!r} was made with `init_lora_weights={config.init_lora_weights!r}`, which "
                "decomposes the base weights again. Load it with `low_cpu_mem_usage=False`."
            )
        nn.init.constant_(gate.weight, math.log(config.init_gate / (1 - config.init_gate)))
        self.queryable_lora_gate[adapter_name] = gate
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)


class Linear(nn.Module, QueryableLoraLayer):
    """A linear layer with routed low-rank updates.

        output = W h + bias + (alpha / r) B (I + g S) A dropout(h)        (Eqs. 1, 92 to 95)

    S [r, r] is the operator that the module's block routes its sequence to, or, in scope `causal`, its token. Where it
    depends on the input, the update can neither be merged nor written as one weight.

    Args:
        base_layer: an `nn.Linear` (quantised ones included) or a transformers `Conv1D`; never read, only called.
        adapter_name: name of the first adapter.
        config: its configuration.

    Shape:
        - input: [B, in], [B, T, in], [B, ..., in] or, flattened, [B T, in], where B is the batch of the call.
        - output: the same with `out` in place of `in`, in the dtype of the base layer's output.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: QueryableLoraConfig, **kwargs: Any) -> None:
        super().__init__()
        QueryableLoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # what PEFT's initialisations ask for
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for adapter_name in self._adapters_at_work():
            if adapter_name not in self.places or adapter_name in self.merged_adapters:
                continue
            stack = self.places[adapter_name].stack
            if adapter_name in stack.model_hooks.merged:
                raise RuntimeError(
                    f"Adapter {adapter_name!r} is merged in a part of its modules only. Take it out of the weights: "
                    "`model.unmerge_adapter()`."
                )
            call = stack.adapter_call(adapter_name)
            if call.rows is None:
                result = self._add_update(result, x, adapter_name, call)
            else:  # the adapter serves a part of the batch
                check_layout(x, call.rows.batch, call.tokens_per_row)
                updated = self._add_update(call.rows.take(result), call.rows.take(x), adapter_name, call)
                result = call.rows.put(result, updated)
        return result.to(dtype)

    def __repr__(self) -> str:
        return f"queryable_lora.{super().__repr__()}"

    def _adapters_at_work(self) -> list[str]:
        """The active adapters, or those that a batch of several names."""
        place = next(iter(self.places.values()), None)
        named = None if place is None else place.stack.model_hooks.call.adapter_names
        return self.active_adapters if named is None else sorted(set(named))

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str, call: AdapterCall | AdapterReplay) -> Tensor:
        lora_B, scaling, block = self.lora_B[adapter_name], self.scaling[adapter_name], self.places[adapter_name].block
        lora_A = self.lora_A[adapter_name]
        x = self.lora_dropout[adapter_name](self._cast_input_dtype(x, lora_A.weight.dtype))
        states = call.by_row(lora_A(x))  # s, [B, T, r]
        route = call.route_for(block, self)
        if route is None:
            route = call.choose(block, self, self._entry_states(adapter_name, x, states))
        call.keep(block, states)
        gate = self._gate(adapter_name, states, call.gate_values)
        if lora_B.bias is None:
            update = lora_B(route.apply(states, gate, scaling))  # B (alpha / r) t
        else:
            update = scaling * lora_B(route.apply(states, gate, 1.0))
        if update.shape != result.shape:
            update = update.view(result.shape)
        return update + result  # not in place: a hook on B may have kept its output

    def _gate(self, adapter_name: str, states: Tensor, gate_values: dict[int, float] | None) -> Tensor | float:
        """g = sigmoid(eta), [1] like `states`; in the steps of a cache a number, read once."""
        if gate_values is None:
            return self.queryable_lora_gate[adapter_name].weight.sigmoid().to(states)
        if id(self) not in gate_values:
            gate_values[id(self)] = self.queryable_lora_gate[adapter_name].weight.sigmoid().item()
        return gate_values[id(self)]

    def _entry_states(self, adapter_name: str, x: Tensor, states: Tensor) -> Tensor:
        """Token states that the block's entry state averages, [B, T, r]: Eq. 16 in an attention block."""
        group = self.places[adapter_name].entry_group
        if len(group) == 1:
            return states
        # A is called, not read: hooks make its weight (pruning) or read its input (gradients per example).
        of_group = [states if layer is self else layer.lora_A[adapter_name](x).view_as(states) for layer in group]
        return torch.stack(of_group).mean(0)
