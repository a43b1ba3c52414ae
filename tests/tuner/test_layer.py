"""The adapted module: equal to LoRA with gates at zero, to the base at first, for all shapes and dtypes it meets."""

import copy

import pytest
import torch
import transformers
from helpers.models import (
    ARCHITECTURES,
    LLAMA_PROJECTIONS,
    adapted,
    close_gates,
    gpt2,
    llama,
    mlp,
    opt,
    outputs,
    randomise,
    text,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.layer import QueryableLoraLayer

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


# Shapes


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 2, 5, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_activation_shapes(shape, scope):
    """[B, d], [B, T, d] and [B, ..., d] activations keep their shape, and rows do not see each other."""
    model = adapted(mlp().double(), target_modules=["first", "second"], routing_scope=scope)
    randomise(model)
    x = torch.randn(*shape, dtype=torch.float64)
    result = outputs(model, {"x": x})
    assert result.shape == (*shape[:-1], 3)
    for row in range(shape[0]):
        torch.testing.assert_close(outputs(model, {"x": x[row : row + 1]}), result[row : row + 1])


@pytest.mark.parametrize("scope", SCOPES)
def test_middle_dimensions_are_tokens(scope):
    """[B, H, W, d] activations are [B, H W, d] ones."""
    model = adapted(mlp().double(), target_modules=["first", "second"], routing_scope=scope)
    randomise(model)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    flat = outputs(model, {"x": x.flatten(1, 2)})
    torch.testing.assert_close(outputs(model, {"x": x}), flat.view(2, 3, 4, 3))


@pytest.mark.parametrize("targets", [["fc1", "fc2"], ["fc1"], ["q_proj", "fc2"]], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_flattened_activations(targets, scope):
    """OPT's fc1 and fc2 get [B T, d]: rows are told apart all the same, padding included, also without others."""
    model = adapted(opt().double(), target_modules=targets, routing_scope=scope, num_blocks=2)
    randomise(model)
    inputs = text()
    result = outputs(model, inputs)
    torch.testing.assert_close(outputs(model, {"input_ids": inputs["input_ids"][:1]}), result[:1])
    torch.testing.assert_close(outputs(model, {"input_ids": inputs["input_ids"][1:, :4]}), result[1:, :4])


def test_rows_that_are_not_rows_are_refused():
    """Activations whose leading dimension is no multiple of the batch raise a ValueError with both and a remedy."""

    class Regroup(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.view(-1, 4))

    model = adapted(Regroup(), target_modules=["inner"])
    with pytest.raises(ValueError, match=r"leading dimension is 5 .* batch size 2.*`exclude_modules`"):
        model(torch.randn(2, 10))


def test_other_tokens_than_the_stacks_are_refused():
    """A module that sees other tokens than its block raises a ValueError with both numbers and a remedy."""

    class Shorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x)[:, :3])

    model = adapted(Shorter(), target_modules=["first", "second"], num_blocks=1, routing_scope="causal")
    with pytest.raises(ValueError, match=r"3 tokens a row.* routes 5.*`exclude_modules`"):
        model(torch.randn(2, 5, 4))


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
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    expected = model(dropped) - base(dropped)
    model.train()
    torch.manual_seed(5)
    torch.testing.assert_close(model(x) - base(x), expected)


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


# Refusals


class Experts(nn.Module):
    """Two experts behind a list, as older mixture models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


class Attention(nn.Module):
    """Self-attention of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


class Several(nn.Module):
    """One module of each kind that some adapter might be asked to take."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.rnn = nn.Embedding(4, 4), nn.Conv2d(1, 1, 1), nn.GRU(4, 4)
        self.bilinear, self.norm = nn.Bilinear(4, 4, 4), nn.LayerNorm(4)


REFUSALS = {
    "embedding": (llama, "embed_tokens", "model.embed_tokens", "Embedding"),
    "embedding of GPT-2": (gpt2, "wte", "transformer.wte", "Embedding"),
    "embedding of torch": (Several, "embed", "embed", "Embedding"),
    "convolution": (Several, "conv", "conv", "Conv2d"),
    "recurrence": (Several, "rnn", "rnn", "GRU"),
    "bilinear": (Several, "bilinear", "bilinear", "Bilinear"),
    "norm": (Several, "norm", "norm", "LayerNorm"),
    "head": (llama, "lm_head", "lm_head", "head"),
    "head of GPT-2": (gpt2, "lm_head", "lm_head", "head"),
    "expert": (Experts, "experts.0", "experts.0", "expert"),
    "attention of torch": (Attention, "attn", "attn", "MultiheadAttention"),
    "its output projection": (Attention, "out_proj", "attn.out_proj", "MultiheadAttention"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("case", REFUSALS)
def test_refused_targets(case):
    """A module that cannot be adapted raises a ValueError that names it, its kind and a remedy."""
    build, target, name, kind = REFUSALS[case]
    with pytest.raises(ValueError, match=rf"'{name}' .*{kind}.*(`target_modules`|`exclude_modules`)"):
        adapted(build(), target_modules=[target])


def test_head_is_trained_in_full_as_the_refusal_says():
    """The remedy that the head's refusal names works: `modules_to_save` trains it, beside the adapter."""
    model = adapted(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]).train()
    inputs = text()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    assert len(gradients) == 1 and gradients[0].any()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_foreign_adapter_is_refused():
    """A module with another method's adapter raises a ValueError that names the module, that adapter and a remedy."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' .*Linear.*`exclude_modules`"):
        adapted(model, target_modules=["q_proj"])


def test_no_matched_target():
    """Targets that match nothing raise PEFT's ValueError, which names them."""
    with pytest.raises(ValueError, match="nowhere"):
        adapted(llama(), target_modules=["nowhere"])


def test_a_refusal_leaves_the_model_usable():
    """After a refused attempt, a second one on the same model is as a first one, instructions included."""
    results = []
    inputs = text() | {"instruction_embeds": torch.randn(2, 4)}
    for first_attempt in (["q_proj", "embed_tokens"], None):
        torch.manual_seed(0)
        model = llama()
        if first_attempt is not None:
            with pytest.raises(ValueError, match="embed_tokens"):
                adapted(model, target_modules=first_attempt, instruction_dim=4)
        model = adapted(model, target_modules=["q_proj"], instruction_dim=4)
        torch.manual_seed(1)
        randomise(model)
        results.append(outputs(model, inputs))
    torch.testing.assert_close(*results)


def test_a_layer_alone_is_refused():
    """An adapted module called outside its model raises an error that says what to call."""
    model = adapted(llama(), target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match="Call the model, not a layer of it"):
        model.base_model.model.model.layers[0].self_attn.q_proj(torch.randn(1, 2, 32))


def test_the_layer_says_what_it_is():
    """PEFT's bookkeeping sees one adapter, its rank and scaling."""
    layer = adapted(llama(), target_modules=["q_proj"], lora_alpha=6).base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QueryableLoraLayer)
    assert (layer.r, layer.scaling) == ({"default": 4}, {"default": 1.5})
    assert layer.weight is layer.base_layer.weight
