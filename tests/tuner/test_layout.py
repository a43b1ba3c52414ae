"""Stacks: which modules run in order, how they are cut into blocks, and which projections share an entry state."""

import re

import numpy as np
import pytest
import torch
import transformers
from helpers.models import (
    ARCHITECTURES,
    LAYERS,
    VOCAB,
    adapted,
    bart,
    bert,
    gpt2,
    llama,
    mlp,
    opt,
    sequential,
    t5,
    token_ids,
    vit,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_queryable.tuner.layout import StackKey, entry_groups, find_stacks, sees_all, split_into_blocks


def linear_names(model: nn.Module) -> list[str]:
    """Names of the modules that can be adapted."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name != "lm_head"]


def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    )


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2)
    )


def bert_decoder() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
    )
    return transformers.BertLMHeadModel(config)


def clip() -> nn.Module:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=small | {"vocab_size": VOCAB},
            vision_config=small | {"image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    )


# Stacks

OWNERS = {
    llama: {"model"},
    gpt2: {"transformer"},
    opt: {"model.decoder"},
    bert: {"bert.encoder", "bert.pooler", "classifier"},
    vit: {"vit", "classifier"},
    t5: {"encoder", "decoder", "decoder (cross-attention)"},
    bart: {"model.encoder", "model.decoder", "model.decoder (cross-attention)"},
    clip: {"text_model.encoder", "vision_model.encoder", "text_projection", "visual_projection"},
    mlp: {"the model"},
    sequential: {"the model"},
}


@pytest.mark.parametrize("build", OWNERS, ids=lambda build: build.__name__)
def test_owners(build):
    """The module that holds repeated layers owns a stack; poolers, heads and cross-attention have their own."""
    model = build()
    assert {str(key) for key in find_stacks(model, linear_names(model))} == OWNERS[build]


@pytest.mark.parametrize("build", [llama, gpt2, opt, bert, vit, t5], ids=lambda build: build.__name__)
def test_layers_in_order(build):
    """Each of a stack's layers holds the modules of one repeated layer, in the order they are defined in."""
    model = build()
    names = linear_names(model)
    for key, layers in find_stacks(model, names).items():
        if len(layers) > 1:  # poolers and heads have one
            indices = [{int(re.search(r"\d+", name).group()) for name in layer} for layer in layers]
            assert indices == [{index} for index in range(LAYERS)], key
    placed = [name for layers in find_stacks(model, names).values() for layer in layers for name in layer]
    assert sorted(placed) == sorted(names)


@pytest.mark.parametrize(("build", "names"), [(mlp, ["first", "second", "third", "head"]), (sequential, ["0", "2"])])
def test_modules_are_layers_without_a_list(build, names):
    """In a model without a repeated-layer list each adapted module is a layer of the one stack."""
    assert find_stacks(build(), names) == {StackKey(""): [[name] for name in names]}


class Loose(nn.Module):
    """A stack with linear modules in it, beside it and below it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.project_in = nn.Linear(4, 4)
        self.body.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
        self.pooler = nn.Sequential(nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)
        self.body.taps = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4))})


def test_loose_modules():
    """A loose module is a layer of the stack that holds it, else of its parent's or its own; entries of dicts are."""
    names = ["body.project_in", "body.layers.0", "body.layers.1.0", "body.layers.1.1", "pooler.0", "head"]
    names += ["body.taps.a", "body.taps.b.0"]
    assert find_stacks(Loose(), names) == {
        StackKey("body"): [["body.project_in"], ["body.layers.0"], ["body.layers.1.0", "body.layers.1.1"]],
        StackKey("pooler", is_loose=True): [["pooler.0"]],
        StackKey("head", is_loose=True): [["head"]],
        StackKey("body.taps.a", is_loose=True, holder="body"): [["body.taps.a"]],
        StackKey("body.taps.b", is_loose=True, holder="body"): [["body.taps.b.0"]],
    }


def test_only_adapted_modules_make_layers():
    """A layer without an adapted module does not count, so blocks are of adapted layers."""
    names = ["model.layers.1.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    assert find_stacks(llama(), names) == {StackKey("model"): [[names[0]], [names[1]]]}


def test_outermost_list_counts():
    """Lists inside a repeated layer (T5's sublayers) make no stacks."""
    assert set(find_stacks(t5(), ["encoder.block.0.layer.0.SelfAttention.q"])) == {StackKey("encoder")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacks_are_watched(name):
    """Adapted, each stack has as many blocks as it has layers, up to `num_blocks`, and one router serves them all."""
    architecture = ARCHITECTURES[name]
    model = adapted(architecture.build(), target_modules=architecture.targets, num_blocks=3).base_model
    plans = [stack.plans["default"] for stack in model.stacks]
    assert [plan.first_block for plan in plans] == np.cumsum([0, *[plan.num_blocks for plan in plans[:-1]]]).tolist()
    assert len(model.queryable_lora_router["default"].block_prior.weight) == sum(plan.num_blocks for plan in plans)
    for plan in plans:
        assert plan.router is model.queryable_lora_router["default"]


def test_encoder_and_decoder_are_separate_stacks():
    """T5's encoder and decoder have blocks, priors and scopes of their own."""
    model = adapted(t5(), target_modules=["q", "v"], num_blocks=2).base_model
    plans = {str(key): stack.plans["default"] for key, stack in model.stacks.by_key.items()}
    assert {name: (plan.first_block, plan.num_blocks, plan.scope.name) for name, plan in plans.items()} == {
        "encoder": (0, 2, "sequence"),
        "decoder": (2, 2, "causal"),
        "decoder (cross-attention)": (4, 2, "sequence"),
    }


# Blocks


@given(st.integers(1, 40), st.integers(1, 40))
def test_blocks_are_those_of_array_split(num_layers, num_blocks):
    """Layers are split as numpy.array_split splits them; fewer layers than blocks are one layer per block."""
    blocks = split_into_blocks(num_layers, num_blocks)
    split = np.array_split(np.arange(num_layers), min(num_layers, num_blocks))
    assert blocks == [index for index, block in enumerate(split) for _ in block]


@pytest.mark.parametrize(
    ("num_blocks", "expected"), [(1, [0] * 4), (3, [0, 0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_blocks_of_a_model(num_blocks, expected):
    """All modules of a layer have its block."""
    model = adapted(llama(), target_modules=["q_proj", "up_proj"], num_blocks=num_blocks)
    for index, layer in enumerate(model.base_model.model.model.layers):
        for module in (layer.self_attn.q_proj, layer.mlp.up_proj):
            assert module.places["default"].block == expected[index]


# Entry groups


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj"], [["a.q_proj", "a.k_proj", "a.v_proj"], ["a.o_proj"]]),
        (["a.query", "a.key", "a.value", "b.query"], [["a.query", "a.key", "a.value"], ["b.query"]]),
        (["a.q_lin", "a.v_lin", "a.out_lin"], [["a.q_lin", "a.v_lin"], ["a.out_lin"]]),
        (["a.to_q", "a.to_k", "a.to_out"], [["a.to_q", "a.to_k"], ["a.to_out"]]),
        (["a.wq", "a.wk", "a.wv", "a.wo"], [["a.wq", "a.wk", "a.wv"], ["a.wo"]]),
        (["a.q", "a.k", "a.v", "a.o"], [["a.q", "a.k", "a.v"], ["a.o"]]),
        (["q", "v"], [["q", "v"]]),
        (["a.c_attn", "a.c_proj"], [["a.c_attn"], ["a.c_proj"]]),
        (["a.query_key_value", "a.dense"], [["a.query_key_value"], ["a.dense"]]),
        (["a.up_proj", "a.gate_proj", "a.vision_proj"], [["a.up_proj"], ["a.gate_proj"], ["a.vision_proj"]]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_entry_groups(names, groups):
    """Query, key and value projections of one attention are a group; every other module is its own."""
    assert entry_groups(names) == {name: group for group in groups for name in group}


def test_entry_groups_of_a_model():
    """In an adapted model the adapted ones among query, key and value are each other's group, as modules."""
    model = adapted(llama(), target_modules=["q_proj", "v_proj", "o_proj"]).base_model.model.model
    for layer in model.layers:
        attention = layer.self_attn
        expected = [attention.q_proj, attention.v_proj]
        for module in expected:
            group = module.places["default"].entry_group
            assert len(group) == 2 and all(a is b for a, b in zip(group, expected, strict=True))
        assert attention.o_proj.places["default"].entry_group == [attention.o_proj]


def test_entry_group_reads_one_input():
    """Key and value projections of a cross-attention read the encoder's states, so they are no group of its query."""
    model = adapted(bart(), target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=r".*encoder\.layers.*")
    attention = model.base_model.model.model.decoder.layers[0].encoder_attn
    assert attention.q_proj.places["default"].entry_group == [attention.q_proj]


# What `auto` means


@pytest.mark.parametrize(
    ("build", "owner", "expected"),
    [
        (llama, "model", False),
        (gpt2, "transformer", False),
        (opt, "model.decoder", False),
        (bloom, "transformer", False),
        (mamba, "backbone", False),
        (bert_decoder, "bert.encoder", False),
        (t5, "decoder", False),
        (bart, "model.decoder", False),
        (t5, "encoder", True),
        (bart, "model.encoder", True),
        (bert, "bert.encoder", True),
        (vit, "vit", True),
        (clip, "vision_model.encoder", True),
        (mlp, "", False),
        (sequential, "", False),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_sees_all(build, owner, expected):
    """Encoders of encoder-decoders, towers and encoders that cannot generate see all tokens; nothing else does."""
    assert sees_all(build(), owner) is expected


@pytest.mark.parametrize("build", [llama, gpt2, opt, bloom, mamba], ids=lambda build: build.__name__)
def test_auto_does_not_look_ahead(build):
    """In scope `auto` the logits of a causal language model do not change with later tokens."""
    model = adapted(build().eval(), target_modules="all-linear")
    nn.init.normal_(model.base_model.queryable_lora_router["default"].atoms.weight)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = token_ids(1, 6)
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 1) % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[:, :4], model(input_ids=other).logits[:, :4])
