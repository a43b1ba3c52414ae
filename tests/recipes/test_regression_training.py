"""The training of recipes/regression: samples, stacked runs, optimizers, phases and what they record."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.regression import ADAPTERS, VARIANTS, deep, trainable
from pytorch_optimizer import SOAP
from torch import nn

from peft_queryable import record_routing
from recipes.regression.backbones import BACKBONES
from recipes.regression.baselines import INSTRUCTION_DIM, attach
from recipes.regression.phases import adapt, pretrain, summary
from recipes.regression.settings import SETTINGS, Run
from recipes.regression.stacked import Data, Stacked
from recipes.regression.train import optimizer, sample

SHORT = {"pretrain_epochs": 2, "epochs": 3, "source_train": 40, "source_test": 8, "target_train": 20, "target_test": 8}


@pytest.fixture
def short(monkeypatch):
    """The deep setting, cut short, on six layers."""
    monkeypatch.setitem(BACKBONES, "deep", deep)
    return replace(SETTINGS["deep"], batch_size=8, **SHORT)


def test_source_target_and_halves_are_different_points():
    runs = [Run("Ackley", 0), Run("Levy", 0), Run("Ackley", 1)]
    parts = [part for target in (False, True) for part in sample(runs, 20, 10, target, "cpu")]
    assert [part.x.shape for part in parts] == [(3, 20, 2), (3, 10, 2)] * 2
    points = [tuple(point) for part in parts for run in part.x[[0, 2]].tolist() for point in run]
    assert len(set(points)) == len(points) == 120


@pytest.mark.parametrize("method", ["soap", *ADAPTERS, *VARIANTS])
@pytest.mark.filterwarnings("ignore:With `(num_atoms|top_k)=1`")
def test_stacked_runs_are_runs_one_by_one(short, method):
    """Trained together as apart, and as by an ordinary loop over an ordinary module."""
    runs = [Run("Matyas", 0), Run("Sin-Cos", 1)]
    embedding = torch.ones(1, INSTRUCTION_DIM)

    def records(runs):
        backbones = [torch.manual_seed(run.seed) and deep() for run in runs]
        return adapt(short, method, runs, backbones, [embedding] * len(runs), "cpu", False, lambda: None)

    together = records(runs)
    for run, record in zip(runs, together, strict=True):
        (apart,) = records([run])
        assert (record["function"], record["seed"], record["method"]) == (*run, method)
        torch.testing.assert_close(torch.tensor(record["curve"]), torch.tensor(apart["curve"]), rtol=1e-4, atol=1e-6)

        torch.manual_seed(run.seed)
        model = deep()
        torch.manual_seed(run.seed)
        model = attach(method, model, embedding)
        data, test = sample([run], short.target_train, short.target_test, True, "cpu")
        optimizer = (SOAP if method == "soap" else torch.optim.AdamW)([*trainable(model).values()], lr=short.lr)
        shuffle = torch.Generator().manual_seed(run.seed)
        for _ in range(short.epochs):
            for rows in torch.randperm(short.target_train, generator=shuffle).split(short.batch_size):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(data.x[0, rows]), data.y[0, rows]).backward()
                optimizer.step()
        expected = nn.functional.mse_loss(model(test.x[0]), test.y[0]).item()
        assert record["last_test"] == pytest.approx(expected, rel=1e-4)


def test_stacking_leaves_the_models_alone():
    models = [attach("replora", deep(), None) for _ in range(2)]
    x = torch.randn(2, 9, 2)
    expected = torch.stack([model(points) for model, points in zip(models, x, strict=True)])
    torch.testing.assert_close(Stacked(models)(x), expected)
    torch.testing.assert_close(models[0](x[0]), expected[0])


def test_gradient_norms_are_those_of_the_layers():
    models = [attach("lora", deep(), None) for _ in range(2)]
    data = Data(torch.randn(2, 9, 2), torch.randn(2, 9))
    stacked = Stacked(models)
    stacked.errors(data).sum().backward()
    for i, model in enumerate(models):
        nn.functional.mse_loss(model(data.x[i]), data.y[i]).backward()
        layers = model.base_model.model.layers
        expected = [math.hypot(*(p.grad.norm().item() for p in trainable(layer).values())) for layer in layers]
        assert stacked.gradient_norms()[:, i].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("method", "setting", "parts", "value", "default"),
    [
        ("bank_lr*10.0", "lr", ("atoms", "keys"), 1e-2, 1e-3),
        ("gate_lr*10.0", "lr", ("gate",), 1e-2, 1e-3),
        ("no_decay", "weight_decay", ("gate", "keys"), 0.0, 0.01),
    ],
)
def test_a_variant_trains_its_parts_by_settings_of_their_own(method, setting, parts, value, default):
    learned = trainable(attach(method, deep()))
    groups = optimizer(method, 1e-3, learned).param_groups
    found = {id(p): group[setting] for group in groups for p in group["params"]}
    for name, parameter in learned.items():
        expected = value if any(part in name for part in parts) else default
        assert found[id(parameter)] == pytest.approx(expected), name


def test_routes_of_stacked_models_are_theirs():
    models = [attach("queryable", deep()) for _ in range(2)]
    x = torch.randn(2, 9, 2)
    routes = Stacked(models).routes(x)
    assert routes.shape == (2, 4, 9, 8)
    for model, points, found in zip(models, x, routes, strict=True):
        with record_routing(model) as trace:
            model(points)
        for block, weights in trace.weights().items():
            torch.testing.assert_close(found[block], weights)


def test_summary():
    norms = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    record = summary([[0, 0.1, 0.1], [1, 3.0, math.nan], [2, 2.0, 5.0], [3, 4.0, 6.0]], norms)
    assert record["train"] == 2 and record["test"] == 5  # not the errors before training
    assert record["last_train"] == 4 and record["last_test"] == 6
    assert record["concentration"] == [1.5, 1.0]


def test_pretraining_learns_the_source_function(short):
    runs = [Run("Sin-Cos", 0), Run("Rastrigin", 1)]
    data, _ = sample(runs, short.source_train, short.source_test, False, "cpu")
    before = [torch.manual_seed(run.seed) and deep() for run in runs]
    calls = []
    after = pretrain(replace(short, pretrain_epochs=20), runs, "cpu", False, lambda: calls.append(1))
    assert len(calls) == 20
    for i in range(2):
        old, new = (nn.functional.mse_loss(models[i](data.x[i]), data.y[i]) for models in (before, after))
        assert new < old


def test_products_have_the_precision_of_the_setting(short, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", used.append)
    for setting in (short, replace(short, matmul_precision="medium")):
        pretrain(setting, [Run("Matyas", 0)], "cpu", False, lambda: None)
    assert used == ["highest", "medium"]
    precise = {name for name, setting in SETTINGS.items() if setting.matmul_precision == "highest"}
    assert precise == {"wide", "deep"}  # the paper's own
