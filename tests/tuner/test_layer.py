"""The adapted module: equal to LoRA with gates at zero, to the base at first, for all dtypes it meets."""

import copy

import pytest
import torch
import transformers
from helpers.models import (
    ARCHITECTURES,
    LLAMA_PROJECTIONS,
    adapted,
    close_gates,
    llama,
    mlp,
    outputs,
    randomise,
    text,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.tuner.layer import QueryableLoraLayer

SCOPES = ["causal", "prompt", "sequence"]


def lora_like(model: nn.Module, base: nn.Module) -> nn.Module:
    """PEFT's LoRA of `base` with the A, B and settings of the queryable adapter of `model`."""
    ours = model.peft_config["default"]
    names = ("r", "lora_alpha", "target_modules", "lora_bias", "use_rslora", "alpha_pattern", "lora_dropout")
    fields = {name: copy.copy(getattr(ours, name)) for name in names}
    has_conv = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in base.modules())
    lora = get_peft_model(base, LoraConfig(**fields, fan_in_fan_out=has_conv))
    weights = {name: tensor for name, tensor in model.state_dict().items() if "queryable_lora" not in name}
    lora.load_state_dict(weights)
    return lora.train(model.training)


def single(layer: nn.Module, **kwargs) -> nn.Module:
    """A model of one adapted linear layer."""
    return adapted(nn.Sequential(layer), target_modules=["0"], **kwargs)


# Gates at zero


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_closed_gates_are_lora(name, scope):
    """With g = 0 the model equals PEFT's LoRA with the same A and B, in every scope (Prop. D.7b)."""
    architecture = ARCHITECTURES[name]
    model = architecture.build().double()
    base = copy.deepcopy(model)
    model = adapted(model, target_modules=architecture.targets, lora_alpha=7, routing_scope=scope)
    randomise(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in architecture.inputs().items()}
    open_gates = outputs(model, inputs)
    close_gates(model)
    expected = outputs(lora_like(model, base), inputs)
    torch.testing.assert_close(outputs(model, inputs), expected)
    assert not torch.allclose(open_gates, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    "fields",
    [{"lora_bias": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}],
    ids=["lora_bias", "use_rslora", "alpha_pattern"],
)
def test_closed_gates_are_lora_with_its_settings(fields):
    """Settings that change a plain LoRA change ours alike."""
    base = llama().double()
    model = adapted(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS, lora_alpha=7, **fields)
    randomise(model)
    close_gates(model)
    inputs = text()
    torch.testing.assert_close(outputs(model, inputs), outputs(lora_like(model, base), inputs))


def test_closed_gates_train_as_lora():
    """With g = 0 the gradients of A and B are those of PEFT's LoRA, dropout included."""
    base = llama(attention_dropout=0.0).double()
    model = adapted(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS, lora_dropout=0.4)
    randomise(model)
    close_gates(model)
    lora, inputs = lora_like(model, base).train(), text()
    model.train()
    for each in (model, lora):
        torch.manual_seed(3)
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    ours, theirs = dict(model.named_parameters()), dict(lora.named_parameters())
    trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * len(LLAMA_PROJECTIONS)
    for name in trained:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


# Initialisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *[(name, architecture.targets) for name, architecture in ARCHITECTURES.items()],
        *[(name, "all-linear") for name in ARCHITECTURES],
        *[(name, None) for name in ("llama", "gpt2", "opt", "bert", "t5")],  # those whose defaults PEFT knows
    ],
    ids=lambda value: "named" if isinstance(value, list) else str(value),
)
def test_identity_at_initialisation(name, targets, dtype):
    """A new adapter changes no bit of the base model's output, whatever it targets and the base's dtype."""
    architecture = ARCHITECTURES[name]
    model = architecture.build().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in architecture.inputs().items()}
    expected = outputs(model, inputs)
    result = outputs(adapted(model, target_modules=targets), inputs)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_random_initialisation_changes_the_model():
    """`init_lora_weights=False` leaves B random, and so the adapter at work from the start."""
    model, inputs = llama(), text()
    expected = outputs(model, inputs)
    result = outputs(adapted(model, target_modules=LLAMA_PROJECTIONS, init_lora_weights=False), inputs)
    assert not torch.allclose(result, expected, atol=1e-3)


def test_initial_gate():
    """Every gate starts at `init_gate`."""
    model = adapted(mlp(), target_modules=["first", "third"], init_gate=0.2)
    gates = [p.sigmoid().item() for name, p in model.named_parameters() if "gate" in name]
    assert gates == pytest.approx([0.2, 0.2])


# Entry states


@pytest.mark.parametrize(
    "targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj", "o_proj"], ["v_proj"]], ids=str
)
def test_entry_state_is_the_mean_of_the_attention_projections(targets):
    """A block's entry state is the mean of A x over its first query, key and value projections (Eqs. 15, 16)."""
    model = adapted(llama().double(), target_modules=targets, num_blocks=2, routing_scope="sequence")
    randomise(model)
    layers, router = model.base_model.model.model.layers, model.base_model.queryable_lora_router["default"]
    first_layers = [layers[0].self_attn, layers[2].self_attn]
    inputs, entries = [], []
    for attention in first_layers:
        attention.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    router.register_forward_pre_hook(lambda module, args: entries.append(args[1]))
    outputs(model, {"input_ids": text()["input_ids"]})
    assert len(entries) == len(first_layers)
    for attention, x, entry in zip(first_layers, inputs, entries, strict=True):
        group = [getattr(attention, name) for name in targets if name != "o_proj"]
        states = [projection.lora_A["default"](x).mean(1, keepdim=True) for projection in group]
        torch.testing.assert_close(entry, torch.stack(states).mean(0))


# Dropout, dtypes, autocast


def test_dropout_is_for_training():
    """`lora_dropout` drops in training, replays with the seed, and is off in evaluation."""
    model = adapted(llama(), target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    randomise(model)
    inputs = text()
    still = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), still)
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(outputs(model, inputs))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    assert not torch.allclose(results[0], still)


@pytest.mark.parametrize("scope", SCOPES)
def test_dropout_acts_on_the_state(scope):
    """The update, route included, is that of the dropped input (METHOD, step 10), and the base sees all of it."""
    base = nn.Linear(8, 5).double()
    model = single(base, lora_dropout=0.5, init_lora_weights=False, routing_scope=scope)
    x, prompt = torch.randn(2, 3, 8, dtype=torch.float64), torch.ones(2, 3)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    expected = model(dropped, prompt_mask=prompt) - base(dropped)
    model.train()
    torch.manual_seed(5)
    torch.testing.assert_close(model(x, prompt_mask=prompt) - base(x), expected)


@pytest.mark.parametrize("layer", [nn.Linear(8, 5), transformers.pytorch_utils.Conv1D(5, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_dtype_is_the_bases(layer, dtype):
    """The output has the dtype of the base layer's, adapters in 16 bits are float32, and gradients reach the input."""
    model = single(copy.deepcopy(layer).to(dtype))
    randomise(model)
    adapter = {p.dtype for name, p in model.named_parameters() if ".default." in name}
    assert adapter == {torch.promote_types(dtype, torch.float32)}
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    result = model(x)
    result.sum().backward()
    assert result.dtype == x.grad.dtype == dtype
    assert x.grad.isfinite().all()


def test_adapters_may_stay_narrow():
    """With `autocast_adapter_dtype=False` A, B, gates and the bank keep the base's 16 bits, and the model runs."""
    config = QueryableLoraConfig(r=4, target_modules=LLAMA_PROJECTIONS)
    model = get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=False)
    randomise(model, scale=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = text()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_narrow_adapter_narrows_no_base():
    """A new adapter of narrower weights leaves every bit of a wider base layer's output."""
    layer = nn.Linear(8, 8).double()
    model = single(copy.deepcopy(layer))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_autocast(scope, base):
    """Under autocast the model computes the same up to bfloat16's rounding, and at first exactly the base's output."""
    plain, inputs = llama().to(base), text()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(plain, inputs)
        model = adapted(plain, target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
        assert torch.equal(outputs(model, inputs), expected)
    randomise(model)
    exact = outputs(model.float(), inputs) if base == torch.float32 else None
    with torch.autocast("cpu", torch.bfloat16):
        result = outputs(model, inputs)
    assert result.isfinite().all()
    if exact is not None:
        torch.testing.assert_close(result.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_autocast_trains():
    """Under autocast every trainable tensor gets a finite gradient of its own dtype."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS).train()
    randomise(model)
    inputs = text()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_the_layer_says_what_it_is():
    """PEFT's bookkeeping sees one adapter, its rank and scaling."""
    layer = adapted(llama(), target_modules=["q_proj"], lora_alpha=6).base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QueryableLoraLayer)
    assert (layer.r, layer.scaling) == ({"default": 4}, {"default": 1.5})
    assert layer.weight is layer.base_layer.weight
