"""Merging: with its routes fixed, or depending on no input at all, an adapter is a LoRA and goes into base weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..calls.model_call import ModelHooks
from ..method.router import Router

MERGE_REFUSAL = (
    "A Queryable LoRA adapter cannot be merged into the base weights while its routes depend on the input: its update "
    "is B (I + g S) A, with S of the input. Fix them first, `with fix_routes(model, mean_routes(trace)):`, or write "
    "the LoRA that fixed routes make of it by `export_lora` (docs/serving.md). To keep it routed in TRL, pass "
    "`use_vllm=False`; to drop it, `unload()`."
)


class MergingLayer(LoraLayer):
    """The part of an adapted module that merges."""

    places: dict[str, Any]
    queryable_lora_gate: Any
    base_layer: Any
    merged_operators: dict[str, Tensor]  # by merged adapter, the I + g S that it was merged with
    fan_in_fan_out: bool

    def rank_operator(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """I + g S [r, r] of the module under the fixed routes of its adapter, or those that it is merged with.

        Raises:
            NotImplementedError: if its routes are not fixed, and depend on the input.
        """
        if adapter_name in self.merged_operators:
            return self.merged_operators[adapter_name].to(dtype)
        place = self.places[adapter_name]
        plan = place.stack.plans[adapter_name]
        weights = fixed_weights(place.stack.model_hooks, adapter_name, plan.router)
        if weights is None:
            raise NotImplementedError(MERGE_REFUSAL)
        atoms = plan.router.atoms.weight.detach().to(dtype)
        alpha = weights[plan.first_block + place.block].to(atoms)
        gate = self.queryable_lora_gate[adapter_name].weight.detach().to(atoms).sigmoid()
        operator = torch.tensordot(alpha, atoms, 1)
        return torch.eye(len(operator)).to(atoms) + gate * operator

    def folded(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """scaling B (I + g S) [out, r]: the factor B of the LoRA of rank r and scale 1 that fixed routes make."""
        weight = self.lora_B[adapter_name].weight.detach().to(dtype)
        return self.scaling[adapter_name] * weight @ self.rank_operator(adapter_name, dtype).to(weight.device)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging adds to the base weight, in its layout ([in, out] of a Conv1D)."""
        dtype = self._delta_dtype(adapter_name)
        delta = self.folded(adapter_name, dtype) @ self.lora_A[adapter_name].weight.detach().to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    def _delta_dtype(self, adapter_name: str) -> torch.dtype:
        return torch.promote_types(self.lora_A[adapter_name].weight.dtype, torch.float32)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        if adapter_name not in self.places:
            return True
        stack = self.places[adapter_name].stack
        return fixed_weights(stack.model_hooks, adapter_name, stack.plans[adapter_name].router) is not None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            self._add(name, 1, safe_merge)
            self.merged_operators[name] = self.rank_operator(name, self._delta_dtype(name))
            self.merged_adapters.append(name)
            self.places[name].stack.model_hooks.merged.add(name)

    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight, under the routes that it was merged with."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add(name, -1, False)
            del self.merged_operators[name]
            self.places[name].stack.model_hooks.merged.discard(name)

    def _add(self, adapter_name: str, sign: int, is_checked: bool) -> None:
        """Add an adapter's update to the base layer, or take it away."""
        base_layer, bias = self.get_base_layer(), self.lora_B[adapter_name].bias
        if bias is not None and base_layer.bias is None:
            raise RuntimeError(
                f"Adapter {adapter_name!r} has `lora_bias=True`, and cannot be merged into a base layer without bias."
            )
        weight = self.get_base_weight()
        weight = (weight + sign * self.get_delta_weight(adapter_name).to(weight.device)).to(weight.dtype)
        new_bias = None if bias is None else base_layer.bias.data + sign * self.scaling[adapter_name] * bias.detach()
        if is_checked and not all(new.isfinite().all() for new in (weight, new_bias) if new is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        self.set_base_weight(weight)
        if new_bias is not None:
            base_layer.bias.data = new_bias.to(base_layer.bias.dtype)


class MergingTuner(BaseTuner):
    """The part of the tuner that merges and unloads."""

    model_hooks: ModelHooks
    stacks: Any
    queryable_lora_router: Any

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        if self.model_hooks.merged:
            super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self, merge: bool = True, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        model = super()._unload_and_optionally_merge(merge=merge, adapter_names=adapter_names, **kwargs)
        self.model_hooks.remove(model)
        self.stacks.remove()
        return model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuse before anything is merged, and tell layers how their base is quantised."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.queryable_lora_router:
                weights = fixed_weights(self.model_hooks, name, self.queryable_lora_router[name])
                if weights is None:
                    raise NotImplementedError(MERGE_REFUSAL)
        for layer in self.model.modules():
            if isinstance(layer, MergingLayer):
                layer.quantization_backend = resolve_quantization_backend(
                    layer.get_base_layer(), **get_quantization_kwargs(self.model)
                )
                if layer.quantization_backend is not None and not layer.quantization_backend.supports_merge:
                    raise NotImplementedError(
                        f"PEFT cannot merge into layers quantised by {layer.quantization_backend.backend_name}. Load "
                        "the base model unquantised to merge, or write a LoRA by `export_lora`."
                    )


def fixed_weights(hooks: ModelHooks, adapter_name: str, router: Router) -> Tensor | None:
    """The weights [blocks, M] of an adapter whose routes are fixed or static; None if they depend on the input.

    Raises:
        ValueError: if each row has routes of its own.
    """
    weights = hooks.call.routes.get(adapter_name)
    if weights is None:
        is_static = not router.reads_states and router.default_instruction is None
        return static_weights(router, None) if is_static else None
    if len(weights) != 1:
        raise ValueError(
            f"The routes of adapter {adapter_name!r} are fixed at {len(weights)} sets, one for each row of a batch: "
            "fix one of them to merge or export it."
        )
    return weights[0]


@torch.no_grad()
def static_weights(router: Router, embeds: Tensor | None) -> Tensor:
    """The weights [blocks, M] of a router that reads no states, under the instruction `embeds` [1, d_c] or none."""
    shared = router.prepare(embeds)
    nothing = shared.keys.new_zeros(1, 1, 1)
    return torch.cat([router(block, nothing, [], shared)[0] for block in range(router.settings.num_blocks)])
