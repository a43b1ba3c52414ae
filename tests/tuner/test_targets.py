"""Modules that cannot be adapted are refused by name, with a remedy that works."""

import copy
import re

import pytest
import torch
import torch.nn.utils.prune
import transformers as tf
from helpers.models import VOCAB, adapted, gpt2, llama, outputs, randomise, text
from helpers.tiny import tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_queryable import QueryableLoraConfig


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


DEBERTA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def deberta_v2(**kwargs) -> nn.Module:
    return tf.DebertaV2Model(tf.DebertaV2Config(**DEBERTA, **kwargs)).eval()


def shared_positions(name: str = "DebertaV2Model", **kwargs) -> nn.Module:
    """Attention whose query and key projections also project relative positions, of DeBERTa v2 or of SEW-D."""
    config = getattr(tf, name).config_class(
        **DEBERTA, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, **kwargs
    )
    return getattr(tf, name)(config).eval()


def sew_d() -> nn.Module:
    return shared_positions("SEWDModel", conv_dim=(8,), conv_kernel=(4,), conv_stride=(2,), num_conv_pos_embeddings=4)


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
    "query of DeBERTa v2": (shared_positions, "query_proj", "encoder.layer.0.attention.self.query_proj", "position"),
    "key of SEW-D": (sew_d, "key_proj", "encoder.encoder.layer.0.attention.self.key_proj", "position embeddings"),
    "its output projection": (Attention, "out_proj", "attn.out_proj", "MultiheadAttention"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("case", REFUSALS)
def test_refused_targets(case):
    """A module that cannot be adapted raises a ValueError that names it, its kind and a remedy."""
    build, target, name, kind = REFUSALS[case]
    with pytest.raises(ValueError, match=rf"'{name}' .*{kind}.*`target_modules`, or pass `exclude_modules=r'"):
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
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' .*Linear.*`exclude_modules="):
        adapted(model, target_modules=["q_proj"])


@pytest.mark.parametrize("fields", [{}, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}], ids=str)
def test_deberta_without_shared_positions(fields):
    """DeBERTa v2 whose configuration says nothing of `share_att_key` is adapted whole, and its gradients flow."""
    model = adapted(deberta_v2(**fields), target_modules=["query_proj", "key_proj", "value_proj"])
    randomise(model)
    model(**text()).last_hidden_state.square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


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


# What "all-linear" leaves out


class Tower(nn.Module):
    """Patches of several images, packed in one dimension as Qwen-VL's are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x, grid_thw=None):
        return self.blocks[0](x)


class Mixed(nn.Module):
    """Two layers that can be adapted, and modules of four kinds that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.moe, self.pool, self.visual = Experts(), Attention(), Tower()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 4)  # [tokens, batch, features]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


LEFT_OUT = {
    "moe.experts.0",
    "moe.experts.1",
    "pool.attn.out_proj",
    "visual.blocks.0",
    "encoder.self_attn.out_proj",
    "encoder.linear1",
    "encoder.linear2",
}


@pytest.mark.parametrize("exclude", [None, ["layers.1"], r"layers\.1"], ids=str)
def test_all_linear_leaves_out_what_cannot_be_adapted(exclude, tmp_path):
    """It adapts what it can, says once what it left out and why, and is saved so that it loads without a word."""
    base = Mixed()
    with pytest.warns(UserWarning, match=r"leaves out 7 modules .*expert.*MultiheadAttention.*patches.*batch_first"):
        model = adapted(copy.deepcopy(base), target_modules="all-linear", exclude_modules=exclude)
    randomise(model)
    names = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in names} == {"layers.0", "layers.1"} - set(
        ["layers.1"] if exclude else []
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    x = torch.randn(2, 3, 4)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_named_modules_are_refused(name):
    """What "all-linear" leaves out is refused where it is named."""
    with pytest.raises(ValueError, match=f"Module '{name}' cannot be adapted: .*`exclude_modules="):
        adapted(Mixed(), target_modules=[name])


def test_a_refusal_excludes_the_kind():
    """The line that a refusal names excludes the module in all layers, and no other module."""
    with pytest.raises(ValueError, match="exclude_modules=") as refused:
        adapted(Mixed(), target_modules=["experts.0", "experts.1", "layers.0", "layers.1"])
    pattern = re.search(r"`exclude_modules=r'(.*)'`", str(refused.value))[1]
    assert pattern == r"moe\.experts\.\d+"
    model = adapted(
        Mixed(), target_modules=["experts.0", "experts.1", "layers.0", "layers.1"], exclude_modules=pattern
    )
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 2


def test_all_linear_with_nothing_to_adapt():
    with pytest.raises(ValueError, match=r"finds nothing that can be adapted\. 'experts\.0': it belongs to an expert"):
        adapted(Experts(), target_modules="all-linear")


LAYOUTS = {
    "LongformerModel": ("encoder.layer.0.attention.self.query", "whole windows"),
    "LEDModel": ("encoder.layers.0.self_attn.longformer_self_attn.query", "whole windows"),
    "ProphetNetModel": ("decoder.layers.0.self_attn.query_proj", "per n-gram"),
    "T5Gemma2ForConditionalGeneration": ("model.decoder.layers.0.self_attn.k_proj", "the encoder's output as well"),
    "Llama4ForCausalLM": ("model.layers.0.feed_forward.router", "Llama4Router"),
    "MllamaForConditionalGeneration": ("model.vision_model.transformer.layers.0.mlp.fc1", "padding alone"),
    "MllamaForCausalLM": ("model.layers.1.cross_attn.k_proj", "memory"),
    "IdeficsForVisionText2Text": ("model.gated_cross_attn_layers.0.cross_attn.k_proj", "memory"),
    "Blip2ForConditionalGeneration": ("language_projection", "queries of an image"),
    "DeepseekV3ForCausalLM": ("model.layers.0.self_attn.kv_b_proj", "latents of cached tokens"),
    "Wav2Vec2ConformerModel": ("encoder.layers.0.self_attn.linear_pos", "positions"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", LAYOUTS)
def test_layouts_that_are_not_known(build):
    """Modules of transformers' models whose rows or tokens no call tells are refused by name; LoRA adapts them."""
    name, reason = LAYOUTS[build]
    config = tiny_config(getattr(tf, build))
    if build == "Wav2Vec2ConformerModel":
        config.position_embeddings_type = "relative"
    with torch.device("meta"):
        model = getattr(tf, build)(config)
    model.get_submodule(name)
    with pytest.raises(ValueError, match=rf"'{name}' cannot be adapted: .*{reason}"):
        adapted(model, target_modules=[name])


@pytest.mark.parametrize("build", ["FSMTModel", "XLNetModel"])
def test_sequence_first_models_are_refused(build):
    """Models whose layers get [tokens, batch, features] would mix the rows of a batch."""
    with torch.device("meta"):
        model = getattr(tf, build)(getattr(tf, build).config_class())
    with pytest.raises(ValueError, match=r"\[tokens, batch, features\]"):
        adapted(model, target_modules="all-linear")


def test_experts_in_bare_parameters_are_announced():
    """Fused experts are not adapted, and a new adapter says so."""
    config = tf.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.warns(UserWarning, match=r"experts of this model .* are not adapted"):
        adapted(tf.MixtralForCausalLM(config), target_modules=["q_proj"])


# Modules are called, not read


@pytest.mark.parametrize("method", ["lora", "queryable"])
def test_factors_are_called(method):
    """Hooks on A and B and pruned factors act as in plain LoRA."""
    base, inputs = llama(), text()
    if method == "lora":
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj"])).eval()
    else:
        model = adapted(base, target_modules=["o_proj"], num_blocks=1)
    randomise(model)
    plain = outputs(model, inputs)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    called = []
    for layer in layers:
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(outputs(model, inputs), plain)
    assert len(called) == 2 * len(layers)
    for layer in layers:
        torch.nn.utils.prune.l1_unstructured(layer.lora_B["default"], "weight", amount=0.5)
    pruned = outputs(model, inputs)
    for layer in layers:
        torch.nn.utils.prune.remove(layer.lora_B["default"], "weight")
    assert torch.equal(outputs(model, inputs), pruned)
    assert not torch.equal(pruned, plain)


@pytest.mark.parametrize(
    "name, guess", [("v_porj", r" \(v_proj\?\)"), ("w", ""), ("self_attn.v_porj", r" \(v_proj\?\)")]
)
def test_a_name_that_no_module_has(name, guess):
    """PEFT, and plain LoRA with it, adapts the others and says nothing."""
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj", name]))
    with pytest.warns(UserWarning, match=rf"no module called '{name}'{guess}, which `target_modules` names: only"):
        adapted(llama(), target_modules=["q_proj", name])


def test_names_that_fit_are_not_warned_of():
    """A whole name, the end of one, one that is excluded, and those that PEFT fills in for a kind of model."""
    whole = "model.layers.0.self_attn.q_proj"
    adapted(llama(), target_modules=[whole, "mlp.up_proj", "k_proj"], exclude_modules=["k_proj"])
    get_peft_model(llama(), QueryableLoraConfig())
