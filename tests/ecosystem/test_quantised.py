"""Quantised base models, each beside plain LoRA on the same one: bitsandbytes, torchao, and others that PEFT knows."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.models import CACHE, LLAMA_PROJECTIONS, llama, outputs, randomise, token_ids
from helpers.trainers import settings
from helpers.words import tokenizer, words
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import quantization_utils, resolve_quantization_backend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, TorchAoConfig
from trl import SFTConfig, SFTTrainer

from peft_queryable import QueryableLoraConfig, Routes, export_lora, set_fixed_routes
from peft_queryable.method.router import Router

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|trl|peft)"),  # of torchao's tensors, of configurations
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|transformers|trl)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WIDTH = 64  # bitsandbytes takes no narrower layers in 4 bits on a CPU


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def torchao(name: str, **kwargs) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(**kwargs))


CONFIGS: dict[str, Callable[[], BitsAndBytesConfig | TorchAoConfig]] = {
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: nf4(torch.float32),
    "bitsandbytes nf4, bf16 compute": lambda: nf4(torch.bfloat16),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8, dynamic activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny Llama."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    llama(hidden_size=WIDTH, intermediate_size=WIDTH, initializer_range=0.2).save_pretrained(path)
    return path


def load(folder, backend: str) -> nn.Module:
    if backend.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[backend](), dtype=torch.float32)


def dequantised(quantised: nn.Module) -> nn.Module:
    """A float model with the weights that the projections of `quantised` stand for."""
    config = LlamaConfig(**quantised.config.to_diff_dict() | {"quantization_config": None})
    model = type(quantised)(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or name.endswith("norm"):
            source = quantised.get_submodule(name)
            backend = resolve_quantization_backend(source, get_apply_tensor_subclass=lambda: None)
            weight = source.weight if backend is None else backend.get_base_weight(source)
            module.weight.data = weight.data.float().clone()
    return model


def with_adapter(base: nn.Module, config_class: type[LoraConfig] = QueryableLoraConfig, **kwargs) -> PeftModel:
    """`base` with an adapter of random values, in training mode, for bitsandbytes rounds more in evaluation mode."""
    torch.manual_seed(1)
    config = config_class(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of torchao models that it cannot merge into
        model = get_peft_model(base, config)
    randomise(model, scale=0.1)
    return model.train()


def logits_and_gradient(model: PeftModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the loss by all trainable tensors, flat."""
    result = model(input_ids=ids, labels=ids, use_cache=False)
    result.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return result.logits.detach(), gradient


@pytest.mark.parametrize("backend", CONFIGS)
def test_as_near_to_the_dequantised_base_as_lora(folder, backend):
    """Logits and gradients are those on the dequantised base, as nearly as plain LoRA's are, in every scope."""
    ids = token_ids(2, 8)

    def errors(config_class, **kwargs) -> list[float]:
        quantised = load(folder, backend)
        reference = with_adapter(dequantised(quantised), config_class, **kwargs)
        model = with_adapter(quantised, config_class, **kwargs)
        set_peft_model_state_dict(reference, get_peft_model_state_dict(model))
        pairs = zip(logits_and_gradient(model, ids), logits_and_gradient(reference, ids), strict=True)
        return [((value - expected).norm() / expected.norm()).item() for value, expected in pairs]

    lora = errors(LoraConfig)
    for scope in ("causal", "prompt", "sequence"):
        ours = errors(QueryableLoraConfig, routing_scope=scope)
        assert all(error < 3 * bound + 1e-6 for error, bound in zip(ours, lora, strict=True)), scope


@pytest.mark.parametrize("backend", CONFIGS)
def test_prepared_base_trains(folder, backend):
    """After `prepare_model_for_kbit_training`, whose checkpointing changes no gradient, all that is trained moves."""
    base = load(folder, backend)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain = with_adapter(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))
    ids = token_ids(2, 8)
    expected = logits_and_gradient(plain, ids)[1]
    model = with_adapter(prepare_model_for_kbit_training(plain.unload()))
    assert model.base_model.model.is_gradient_checkpointing
    torch.testing.assert_close(logits_and_gradient(model, ids)[1], expected)

    trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".default." in name for name in trainable)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if name in trainable and not torch.equal(p, trainable[name])}
    assert moved == set(trainable)
    after = dict(model.unload().named_parameters())
    assert all(_same(after[name], p) for name, p in frozen.items())


def _same(value: Tensor, expected: Tensor) -> bool:
    """Whether two quantised or plain weights are equal: torchao's have no `equal`."""
    value, expected = (t.dequantize() if hasattr(t, "qdata") else t for t in (value, expected))
    return torch.equal(value, expected)


@pytest.mark.parametrize("backend", CONFIGS)
def test_life_of_an_adapter(folder, backend, tmp_path):
    """Without its adapter the base answers, to the bit; saved and loaded onto a new base, it answers as it did."""
    base = load(folder, backend)
    inputs = {"input_ids": token_ids(2, 8)}
    plain = outputs(base, inputs)
    model = with_adapter(base).eval()
    expected = outputs(model, inputs)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), plain)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            merge()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, backend), tmp_path)
    assert torch.equal(outputs(loaded, inputs), expected)
    assert torch.equal(outputs(loaded.unload(), inputs), plain)


@pytest.mark.parametrize("backend", CONFIGS)
def test_merging_is_as_near_as_loras(folder, backend, tmp_path):
    """Merging under fixed routes misses the exact weights by what PEFT's LoRA with the same update misses them by."""
    model = with_adapter(load(folder, backend)).eval()
    settings = model.base_model.queryable_lora_router["default"].settings
    weights = torch.rand(settings.num_blocks, settings.num_atoms).softmax(-1)
    set_fixed_routes(model, Routes(dict(enumerate(weights))))
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(folder, backend), tmp_path / "lora").eval()

    def error(model: PeftModel) -> Tensor:
        exact = projections(model) + torch.cat(
            [m.get_delta_weight("default").flatten() for m in adapted_layers(model)]
        )
        model.merge_adapter()
        return (projections(model) - exact).norm() / exact.norm()

    plain = projections(model)
    ours, theirs = error(model), error(lora)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
    model.unmerge_adapter()
    lora.unmerge_adapter()
    torch.testing.assert_close(
        (projections(model) - plain).norm(), (projections(lora) - plain).norm(), rtol=0.02, atol=0
    )


def adapted_layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def projections(model: PeftModel) -> Tensor:
    """The base weights of all projections, dequantised and flat."""
    weights = []
    for layer in adapted_layers(model):
        backend = resolve_quantization_backend(layer.base_layer, get_apply_tensor_subclass=lambda: None)
        weights.append(backend.get_base_weight(layer.base_layer).float().flatten())
    return torch.cat(weights)


def cached_difference(model: PeftModel) -> float:
    """Largest difference that a cache, filled with a prompt and then token by token, makes to a call's logits."""
    model.eval()
    ids = token_ids(4, 13)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        step = model(input_ids=ids[:, :5], use_cache=True)
        parts = [step.logits]
        for token in ids[:, 5:].split(1, dim=1):
            step = model(input_ids=token, use_cache=True, **{CACHE: step.past_key_values})
            parts.append(step.logits)
    return (torch.cat(parts, dim=1) - whole).abs().max().item()


def amplified_rounding(model: PeftModel) -> float:
    """Largest difference in logits after a change of the embeddings as small as float32's rounding."""
    model.eval()
    embeddings = model.get_input_embeddings()(token_ids(4, 13))
    with torch.no_grad():
        one, other = (
            model(inputs_embeds=e).logits for e in (embeddings, embeddings + 1e-7 * torch.randn_like(embeddings))
        )
    return (one - other).abs().max().item()


@pytest.mark.parametrize("backend", CONFIGS)
def test_cached_steps(folder, backend):
    """A cache changes logits as little as rounding changes LoRA's: layers that round their inputs, to bfloat16 or to
    8 bits, make steps of it.
    """
    lora = with_adapter(load(folder, backend), LoraConfig)
    rounding = max(cached_difference(lora), amplified_rounding(lora))
    assert cached_difference(with_adapter(load(folder, backend))) <= 3 * rounding


class HQQLinear(nn.Module):
    """A layer as HQQ's, under its name: no `nn.Linear`, like AQLM's, EETQ's and GPTQ's, and without a `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("W_q", linear.weight.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W_q.T.to(x)


def with_foreign_layers() -> nn.Module:
    model = llama()
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, HQQLinear(module))
    return model


def test_layers_that_peft_knows_are_adapted(monkeypatch):
    """Every class of PEFT's quantisation layer is taken, whatever it derives from."""
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", SimpleNamespace(HQQLinear=HQQLinear))
    monkeypatch.setattr(quantization_utils, "is_hqq_available", lambda: True)
    base = with_foreign_layers()
    plain = outputs(base, {"input_ids": (ids := token_ids(2, 8))})
    model = get_peft_model(base, QueryableLoraConfig(r=4, target_modules=LLAMA_PROJECTIONS))
    assert torch.equal(outputs(model, {"input_ids": ids}), plain)
    model.train()
    randomise(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert torch.equal(outputs(model.unload(), {"input_ids": ids}), plain)


def test_layers_that_peft_does_not_know_are_refused():
    """Of another class that is no `nn.Linear`, the error says what is supported."""
    with pytest.raises(ValueError, match=r"HQQLinear.*torch\.nn\.Linear, Conv1D and the quantised"):
        get_peft_model(with_foreign_layers(), QueryableLoraConfig(target_modules=LLAMA_PROJECTIONS))


def test_quantised_embedding_is_refused():
    """torchao quantises embeddings too, whose class stays torch's own; they are refused as embeddings are."""
    quantization = pytest.importorskip("torchao.quantization")
    model = llama()
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    with pytest.raises(ValueError, match="of type Embedding"):
        get_peft_model(model, QueryableLoraConfig(target_modules=["embed_tokens"]))


def qlora_trainer(folder, tmp_path, max_steps: int, texts: list[str], **kwargs) -> SFTTrainer:
    """TRL's trainer of a 4-bit model, as its users make it, before its first step."""
    pytest.importorskip("bitsandbytes")
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(torch.bfloat16), dtype=torch.bfloat16),
        SFTConfig(**settings(tmp_path, bf16=True, max_steps=max_steps, lr_scheduler_type="constant", **kwargs)),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=AutoTokenizer.from_pretrained(folder)
        if (folder / "tokenizer.json").exists()
        else tokenizer(),
        peft_config=QueryableLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("remedy", [False, True])
def test_qlora(folder, tmp_path, remedy, monkeypatch):
    """TRL's steps train every tensor; the bank fully only in float32, for bfloat16, TRL's choice, rounds them away."""
    seen = set()
    forward = Router.forward

    def watch(self, block, state, means, instruction=None):
        weights = forward(self, block, state, means, instruction)
        seen.update((state.dtype, weights.dtype))
        return weights

    monkeypatch.setattr(Router, "forward", watch)
    trainer = qlora_trainer(folder, tmp_path, 8, [words(i, 5 + i % 4) for i in range(8)], learning_rate=2e-4)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    if remedy:
        trainer.model.base_model.queryable_lora_router.float()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert seen == {torch.float32}
    moved = {name: (p != before[name]).float().mean() for name, p in trainer.model.named_parameters()}
    assert {name for name, share in moved.items() if share > 0} == {
        name for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    bank = [moved[name] for name in moved if name.endswith(("atoms.weight", "keys.weight", "block_prior.weight"))]
    assert len(bank) == 3 and all(share > 0.8 if remedy else share < 0.1 for share in bank)


@pytest.mark.slow
def test_qlora_of_smollm2(tmp_path):
    """SmolLM2-135M-Instruct in 4 bits learns in a few steps, and its adapter loads onto a new 4-bit base."""
    folder = importlib.import_module("recipes.common.smollm2").smollm2_folder()
    texts = ["The capital of Queryland is Routington, and its river is the Keys."] * 2
    trainer = qlora_trainer(folder, tmp_path, 4, texts, learning_rate=2e-3)
    trainer.model.base_model.queryable_lora_router.float()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(torch.bfloat16), dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, trainer.args.output_dir)
    trained = get_peft_model_state_dict(trainer.model)
    assert all(torch.equal(t, trained[name].float()) for name, t in get_peft_model_state_dict(loaded).items())
    ids = trainer.processing_class(texts[0], return_tensors="pt").input_ids
    assert loaded(input_ids=ids, labels=ids).loss < 0.7 * losses[0]
