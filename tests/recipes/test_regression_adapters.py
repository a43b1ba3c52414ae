"""The adapters of recipes/regression: their sizes, how they start, reconstructions and variants against formulas."""

import pytest
import torch
from helpers.regression import ADAPTERS, VARIANTS, deep, trainable, wide
from torch import nn

from recipes.regression.backbones import BACKBONES
from recipes.regression.baselines import INSTRUCTION_DIM, attach
from recipes.regression.reconstructed import GENERATED, Trunk
from recipes.regression.variants import VARIANTS as ALL_VARIANTS


@pytest.mark.parametrize("setting", ["wide", "deep"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_parameters_are_within_10_percent_of_lora(method, setting):
    model = attach(method, BACKBONES[setting](), torch.zeros(1, INSTRUCTION_DIM))
    lora = {"wide": 294_912, "deep": 15_872}[setting]
    count = sum(p.numel() for p in trainable(model).values())
    assert count == lora if method == "lora" else abs(count / lora - 1) < 0.1


@pytest.mark.parametrize("backbone", [lambda: wide(256), deep], ids=["wide", "deep"])
@pytest.mark.parametrize("method", ADAPTERS + VARIANTS)
@pytest.mark.filterwarnings("ignore:With `num_atoms=1`")
def test_an_adapter_starts_as_its_base_and_learns_alone(method, backbone):
    model = backbone()
    x = torch.randn(5, 2)
    expected = model(x)
    model = attach(method, model, torch.ones(1, INSTRUCTION_DIM))
    # VB-LoRA starts with a small random update: the vectors of its bank make A and B.
    tolerance = 0.02 if method == "vblora" else 1e-6
    torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
    model(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    learned = set(trainable(model))
    assert learned and not any("base_layer" in name or "head" in name or "first." in name for name in learned)


@pytest.mark.parametrize("method", ["replora", "hyra", "doran"])
def test_a_generated_update_is_one_weight(method):
    """The three reconstructions, from their formulas, on one layer with random tensors."""
    kind, hidden, heads = GENERATED[method]
    base, trunk = nn.Linear(12, 8), Trunk(hidden, heads)
    layer = kind(base, trunk)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    A = (layer.second_A @ torch.relu(trunk.first_A @ torch.diag(trunk.seed_A))).T
    rows = [layer.second_B @ torch.relu(trunk.first_B @ torch.diag(seed)) for seed in trunk.seed_B]
    weight = base.weight + 2 * torch.cat(rows) @ A
    if method == "doran":
        offset = torch.log1p(torch.exp(layer.offset))
        norm = weight.square().sum(1).sqrt()
        weight = torch.diag(layer.magnitude / (norm + offset)) @ weight
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias, atol=1e-4, rtol=1e-4)


def test_targets_share_a_trunk():
    trunks = [
        [module for module in attach("replora", m, None).modules() if isinstance(module, Trunk)]
        for m in (wide(), deep())
    ]
    assert [len(found) for found in trunks] == [
        2,
        1,
    ]  # per layer, and in all where layers have a single target


def test_a_variant_differs_in_what_it_says():
    ours, static = attach("queryable", deep()), attach("prior_only", deep())
    assert {name.split(".")[-2] for name in trainable(static)} == {"default", "atoms", "keys", "block_prior"}
    assert len(trainable(static)) < len(trainable(ours))
    assert attach("router_dim=4", deep()).peft_config["default"].router_dim == 4

    torch.manual_seed(0)
    keys = trainable(attach("queryable", deep()))["base_model.queryable_lora_router.default.keys.weight"]
    torch.manual_seed(0)
    larger = trainable(attach("keys*10.0", deep()))["base_model.queryable_lora_router.default.keys.weight"]
    torch.testing.assert_close(larger, 10 * keys)

    parts = {part for v in ALL_VARIANTS.values() for part in (*v.lr_factors, *v.weight_decays)}
    assert all(any(part in name for name in trainable(ours)) for part in parts)


def test_shut_gates_leave_lora():
    model = attach("shut_gates", deep())
    for name, parameter in trainable(model).items():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    assert not any("gate" in name for name in trainable(model))
    lora = attach("lora", deep())
    lora.load_state_dict({name: model.state_dict()[name] for name in lora.state_dict()})
    x = torch.randn(7, 2)
    torch.testing.assert_close(model(x), lora(x))
