"""The tuner: injects adapted modules, owns the shared router of each adapter, and manages adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.lora import LoraModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights, skip_init_on_device
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calls.model_call import ModelHooks
from ..calls.plan import Plan
from ..config import MOVING_INITIALISATIONS, QueryableLoraConfig
from ..encoders import BACKBONE, CENTRED, InstructionEncoder, load_encoder
from ..method.router import Router
from .layer import Linear, QueryableLoraLayer
from .layout import Layout, Stacks, remove_hooks
from .merging import MergingTuner
from .offload import onload
from .saving import ROUTER, check_tensors
from .targets import check_target, report_left_out, warn_choice, warn_experts, warn_unknown_names

BASE = "__base__"  # PEFT's name, in `adapter_names`, of no adapter


class QueryableLoraModel(MergingTuner):
    """Queryable LoRA (https://arxiv.org/abs/2605.08423) around a model: use it through `peft.get_peft_model`.

    One bank of atoms and one router serve all adapted modules of an adapter. They live here, in
    `queryable_lora_router[adapter_name]`, once; adapted modules find them through the stack they belong to.

    Args:
        model: the base model, any `nn.Module`.
        config: the adapter's configuration.
        adapter_name: its name.
        low_cpu_mem_usage: create weights on the meta device, to be loaded.
        state_dict: not supported: adapters are injected by their configuration.
    """

    prefix: str = "lora_"
    tuner_layer_cls = QueryableLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # for `ensure_weight_tying`
    _replace_module = LoraModel._replace_module  # BaseTuner's asks for a `weight`, which GPTQ's and HQQ's layers lack
    uses_shared_state = True  # PEFT then refuses to inject layers without the tuner that owns the bank

    queryable_lora_router: Any

    def _pre_injection_hook(self, model: nn.Module, config: QueryableLoraConfig, adapter_name: str) -> None:
        self.queryable_lora_router = nn.ModuleDict()
        self.encoders: dict[tuple[str, str | None], InstructionEncoder] = {}
        remove_hooks(model)
        self.model_hooks = ModelHooks(model, self._active_plans)
        self.stacks = Stacks(model, self.model_hooks)

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._infer_instruction_dim(self.peft_config[adapter_name])
        config = self.peft_config[adapter_name]
        self.left_out: dict[str, str] | None = {} if config.target_modules == "all-linear" else None
        asked = config.target_modules  # before PEFT fills in its defaults
        trainable = {name: router.keys.weight.requires_grad for name, router in self.queryable_lora_router.items()}
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except Exception:
            for layer in self._layers(adapter_name).values():  # else they would join the next adapter of this name
                layer.delete_adapter(adapter_name)
            raise
        layers = self._layers(adapter_name)
        warn_unknown_names(model, asked)
        report_left_out(config, self.left_out or {}, is_any_adapted=bool(layers))
        layout = Layout.of(model, list(layers), config.num_blocks)
        # PEFT gives the empty layers of a new EVA adapter their weights when it has seen data, but knows of no bank.
        create = skip_init_on_device(Router) if config.init_lora_weights == "eva" else Router
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            router = create(config.router_settings(layout.num_blocks, layout.longest_stack))
        self.queryable_lora_router[adapter_name] = router
        self._match_router(adapter_name)
        self.stacks.place(adapter_name, layers, layout, router, config.routing_scope)
        # As PEFT does for the adapters that were there before: theirs stay as they were.
        trainable[adapter_name] = adapter_name in self.active_adapters and not config.inference_mode
        for name, requires_grad in trainable.items():
            self.queryable_lora_router[name].requires_grad_(requires_grad)
        if trainable[adapter_name]:
            warn_experts(model)
            warn_choice(config, adapter_name)

    def _infer_instruction_dim(self, config: QueryableLoraConfig) -> None:
        name = config.instruction_encoder
        if name is None or config.instruction_dim is not None:
            return
        if name in (BACKBONE, CENTRED) and isinstance(self.model, PreTrainedModel):
            config.instruction_dim = self.model.config.get_text_config().hidden_size
        else:
            config.instruction_dim = self._encoder(name, config.instruction_encoder_revision).width

    def instruction_encoder(self, adapter_name: str) -> InstructionEncoder:
        """The encoder that the configuration of `adapter_name` names, loaded once.

        Raises:
            ValueError: if it names none, or one that cannot be loaded.
        """
        config = self.peft_config[adapter_name]
        if config.instruction_encoder is None:
            raise ValueError(
                f"Adapter {adapter_name!r} names no `instruction_encoder`, so a text means nothing to it. Pass "
                "`encoder=`, or embeddings."
            )
        return self._encoder(config.instruction_encoder, config.instruction_encoder_revision)

    def _encoder(self, name: str, revision: str | None) -> InstructionEncoder:
        if (name, revision) not in self.encoders:
            self.encoders[name, revision] = load_encoder(name, revision, self.model)
        return self.encoders[name, revision]

    def _create_and_replace(
        self,
        config: QueryableLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not check_target(self.model, config, current_key, target, self.left_out):
            return
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), current_key), config.lora_alpha)
        if isinstance(target, QueryableLoraLayer):
            target.update_layer(adapter_name, config.r, lora_alpha=alpha, config=config, target_name=current_key)
            return
        layer = Linear(target, adapter_name, config=config, r=config.r, lora_alpha=alpha, target_name=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _active_plans(self) -> list[Plan]:
        layer = next(module for module in self.model.modules() if isinstance(module, QueryableLoraLayer))
        if layer.disable_adapters:
            return []
        names = self.model_hooks.call.adapter_names or self.active_adapters
        return self.stacks.plans(names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """During the call, let each row of the batch be served by its own adapter (PEFT's `adapter_names`).

        Raises:
            ValueError: in training mode, or for an adapter that does not exist.
        """
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        if merged := sorted(self.model_hooks.merged):
            raise ValueError(f"`adapter_names` cannot name rows while {merged} are merged: `model.unmerge_adapter()`.")
        for module in self.model.modules():
            if (
                isinstance(module, AuxiliaryTrainingWrapper)
                and self._name_rows not in module._forward_pre_hooks.values()
            ):
                module.register_forward_pre_hook(self._name_rows, with_kwargs=True)
        with self.model_hooks.entered(adapter_names=tuple(adapter_names)):
            yield

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("`adapter_names` is for inference: call `model.eval()`, or `set_adapter` to train one.")
        if unknown := sorted(set(adapter_names) - {BASE, *self.peft_config}):
            raise ValueError(
                f"`adapter_names` names adapters that do not exist: {unknown}. There are {sorted(self.peft_config)}, "
                f"and {BASE!r} for the base model."
            )

    def _name_rows(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Tell a module that PEFT trains in full, or its tokens, which adapter serves each row."""
        row_adapters = self.model_hooks.call.row_adapters(args[0].shape[0])
        return None if row_adapters is None else (args, {**kwargs, "adapter_names": row_adapters})

    # Adapter management: the bank is a part of its adapter

    def _check_new_adapter_config(self, config: QueryableLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        moving = {name for name, c in self.peft_config.items() if c.init_lora_weights in MOVING_INITIALISATIONS}
        if moving and len(self.peft_config) > 1:
            raise ValueError(
                f"Of several adapters, none may be made with `init_lora_weights` in {MOVING_INITIALISATIONS}, as "
                f"{sorted(moving)} is: they change the base weights under all the others. Use one model for each."
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "Queryable LoRA adapters cannot be combined into one: their banks and routes do not add up. Make them "
            "active together, with `model.base_model.set_adapter([...])`: their updates add up."
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_requires_grad()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.queryable_lora_router:
                self.queryable_lora_router[name].requires_grad_(requires_grad)

    def _sync_requires_grad(self) -> None:
        for name, router in self.queryable_lora_router.items():
            router.requires_grad_(self._weight(name).requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._sync_requires_grad()

    def delete_adapter(self, adapter_name: str) -> None:
        was_active, others = adapter_name in self.active_adapters, set(self.active_adapters) - {adapter_name}
        super().delete_adapter(adapter_name)
        del self.queryable_lora_router[adapter_name]
        self.stacks.forget(adapter_name)
        self.model_hooks.fix(adapter_name, None)
        if was_active and self.peft_config:
            # PEFT lets each layer choose an adapter in its place, and layers may have different ones.
            self.set_adapter(sorted(others or self.peft_config)[: len(others) or 1])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT comes here once more after a load, by when accelerate may have offloaded parts of the adapter.
        if any("_hf_hook" in vars(module) for module in self.modules()):
            onload(self.queryable_lora_router[adapter_name])
            for layer in self._layers(adapter_name).values():
                for parts in (layer.lora_A, layer.lora_B, layer.queryable_lora_gate):
                    onload(parts[adapter_name])
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        self._match_router(adapter_name)

    def _layers(self, adapter_name: str) -> dict[str, QueryableLoraLayer]:
        """The modules that the adapter adapts, by name."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, QueryableLoraLayer) and adapter_name in module.lora_A
        }

    def _weight(self, adapter_name: str) -> Tensor:
        """Some A of the adapter: the router is where A is, has its dtype, and trains when it does."""
        layers = (m for m in self.model.modules() if isinstance(m, QueryableLoraLayer) and adapter_name in m.lora_A)
        return next(layers).lora_A[adapter_name].weight

    def _match_router(self, adapter_name: str) -> None:
        weight = self._weight(adapter_name)
        self.queryable_lora_router[adapter_name].to(None if weight.is_meta else weight.device, weight.dtype)

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, separator, tail = key.partition(f"{ROUTER}.{adapter_name}.")
        return f"{head}{ROUTER}.{tail}" if separator else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping, and checks it leaves to us: PEFT loads non-strictly, and random weights would pass."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(remapped, model.base_model._tensors(adapter_name), adapter_name)
        return remapped

    def _tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of an adapter, by their names in the PeftModel; without what PEFT trains in full beside it."""
        tensors = self.queryable_lora_router[adapter_name].state_dict(prefix=f"base_model.{ROUTER}.{adapter_name}.")
        for name, layer in self._layers(adapter_name).items():
            for part in ("lora_A", "lora_B", "queryable_lora_gate"):
                factor = getattr(layer, part)[adapter_name]
                tensors |= factor.state_dict(prefix=f"base_model.model.{name}.{part}.{adapter_name}.")
        return tensors
