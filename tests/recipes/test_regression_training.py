"""recipes/regression: its functions, adapters and training, and the command on tiny runs."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import SOAP
from torch import nn

RECIPE = Path(__file__).parents[1] / "recipes" / "regression"
ADAPTERS = ["lora", "dora", "lily", "vblora", "replora", "hyra", "doran", "queryable", "instruction"]
VARIANTS = ["state_only", "one_atom", "shut_gates", "prior*10.0", "num_blocks=16"]
# Where each function is lowest, Langermann highest, and the value there.
OPTIMA = {
    "Ackley": ([0.0, 0.0], 0.0),
    "Dropwave": ([0.0, 0.0], -1.0),
    "Langermann": ([2.0029, 1.0060], 5.1621),
    "Levy": ([1.0, 1.0], 0.0),
    "Matyas": ([0.0, 0.0], 0.0),
    "Michalewicz": ([2.20291, 1.57080], -1.80130),
    "Rastrigin": ([0.0, 0.0], 0.0),
    "Sin-Cos": ([-math.pi / 2, math.pi], -2.0),
    "Styblinski-Tang": ([-2.903534, -2.903534], -78.33233),
}


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(RECIPE)


def wide(width=8):
    from backbones import Transformer

    return Transformer(depth=2, width=width, heads=2)


def deep(depth=6):
    from backbones import MLP

    return MLP(depth=depth)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OPTIMA)
def test_optimum(name):
    from functions import FUNCTIONS

    function, (point, value) = FUNCTIONS[name], OPTIMA[name]
    best = torch.tensor([point])
    torch.testing.assert_close(function.value(best, 1.0), torch.tensor([value]), atol=2e-4, rtol=1e-4)
    grid = torch.linspace(function.low, function.high, 200)
    values = function.value(torch.cartesian_prod(grid, grid), 1.0)
    worst = values.max() - value if name == "Langermann" else value - values.min()
    assert worst < 2e-4
    assert values.std() > 0.1


REFERENCES = {  # written out for a point (a, b), after Surjanovic and Bingham
    "Ackley": lambda a, b: (
        -20 * math.exp(-0.2 * math.sqrt((a * a + b * b) / 2))
        - math.exp((math.cos(2 * math.pi * a) + math.cos(2 * math.pi * b)) / 2)
        + 20
        + math.e
    ),
    "Dropwave": lambda a, b: -(1 + math.cos(12 * math.hypot(a, b))) / (0.5 * (a * a + b * b) + 2),
    "Langermann": lambda a, b: sum(
        c * math.exp(-((a - p) ** 2 + (b - q) ** 2) / math.pi) * math.cos(math.pi * ((a - p) ** 2 + (b - q) ** 2))
        for c, p, q in ((1, 3, 5), (2, 5, 2), (5, 2, 1), (2, 1, 4), (3, 7, 9))
    ),
    "Levy": lambda a, b: (
        math.sin(math.pi * (a + 3) / 4) ** 2
        + ((a - 1) / 4) ** 2 * (1 + 10 * math.sin(math.pi * (a + 3) / 4 + 1) ** 2)
        + ((b - 1) / 4) ** 2 * (1 + math.sin(math.pi * (b + 3) / 2) ** 2)
    ),
    "Matyas": lambda a, b: 0.26 * (a * a + b * b) - 0.48 * a * b,
    "Michalewicz": lambda a, b: (
        -math.sin(a) * math.sin(a * a / math.pi) ** 20 - math.sin(b) * math.sin(2 * b * b / math.pi) ** 20
    ),
    "Rastrigin": lambda a, b: 20 + sum(t * t - 10 * math.cos(2 * math.pi * t) for t in (a, b)),
    "Sin-Cos": lambda a, b: math.sin(a) + math.cos(b),
    "Styblinski-Tang": lambda a, b: sum(t**4 - 16 * t**2 + 5 * t for t in (a, b)) / 2,
}


@pytest.mark.parametrize("name", OPTIMA)
def test_values_elsewhere(name):
    from functions import FUNCTIONS

    points = torch.tensor([[1.7, 1.4], [2.1, 1.2], [0.3, 2.6]])
    expected = torch.tensor([REFERENCES[name](*point) for point in points.tolist()])
    torch.testing.assert_close(FUNCTIONS[name].value(points, 1.0), expected, atol=1e-4, rtol=1e-4)


def test_every_function_is_tested():
    from functions import FUNCTIONS

    assert FUNCTIONS.keys() == OPTIMA.keys()
    assert len({function.description for function in FUNCTIONS.values()}) == 9


@pytest.mark.parametrize("name", OPTIMA)
def test_the_target_has_other_coefficients_and_is_turned(name):
    from functions import ANGLE, COEFFICIENT, FUNCTIONS

    function = FUNCTIONS[name]
    x = function.low + (function.high - function.low) * torch.rand(50, 2)
    turn = torch.polar(torch.tensor(1.0), torch.tensor(-ANGLE))
    centre = (function.low + function.high) / 2
    turned = torch.view_as_real(torch.view_as_complex(x - centre) * turn) + centre
    torch.testing.assert_close(function.target(x), function.value(turned, COEFFICIENT), atol=1e-3, rtol=1e-3)
    if name != "Dropwave":  # which looks the same from every side
        assert (function.target(x) - function.value(x, COEFFICIENT)).abs().max() > 0.01
    assert (function.target(x) - function.value(turned, 1.0)).abs().max() > 0.01


def test_samples_are_noisy_in_the_box_and_repeatable():
    from functions import FUNCTIONS, NOISE

    function = FUNCTIONS["Michalewicz"]
    x, y = function.sample(4000, torch.Generator().manual_seed(3), target=False)
    again = function.sample(4000, torch.Generator().manual_seed(3), target=False)
    other, _ = function.sample(4000, torch.Generator().manual_seed(4), target=False)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other)
    assert x.min() >= function.low and x.max() <= function.high
    assert x.std(0).tolist() == pytest.approx([math.pi / math.sqrt(12)] * 2, rel=0.05)
    assert (y - function.value(x, 1.0)).std().item() == pytest.approx(NOISE, rel=0.05)


def test_source_target_and_halves_are_different_points():
    from settings import Run
    from train import sample

    runs = [Run("Ackley", 0), Run("Levy", 0), Run("Ackley", 1)]
    parts = [part for target in (False, True) for part in sample(runs, 20, 10, target, "cpu")]
    assert [part.x.shape for part in parts] == [(3, 20, 2), (3, 10, 2)] * 2
    points = [tuple(point) for part in parts for run in part.x[[0, 2]].tolist() for point in run]
    assert len(set(points)) == len(points) == 120


@pytest.mark.parametrize("setting", ["wide", "deep"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_parameters_are_within_10_percent_of_lora(method, setting):
    from backbones import BACKBONES
    from baselines import INSTRUCTION_DIM, attach

    model = attach(method, BACKBONES[setting](), torch.zeros(1, INSTRUCTION_DIM))
    lora = {"wide": 294_912, "deep": 15_872}[setting]
    count = sum(p.numel() for p in trainable(model).values())
    assert count == lora if method == "lora" else abs(count / lora - 1) < 0.1


@pytest.mark.parametrize("backbone", [lambda: wide(256), deep], ids=["wide", "deep"])
@pytest.mark.parametrize("method", ADAPTERS + VARIANTS)
def test_an_adapter_starts_as_its_base_and_learns_alone(method, backbone):
    from baselines import INSTRUCTION_DIM, attach

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
    from baselines import GENERATED, Trunk

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
    from baselines import Trunk, attach

    trunks = [
        [module for module in attach("replora", m, None).modules() if isinstance(module, Trunk)]
        for m in (wide(), deep())
    ]
    assert [len(found) for found in trunks] == [2, 1]  # one a layer, and one where layers have a single target


SHORT = {"pretrain_epochs": 2, "epochs": 3, "source_train": 40, "source_test": 8, "target_train": 20, "target_test": 8}


@pytest.fixture
def short(monkeypatch):
    """The deep setting, cut short, on six layers."""
    import settings
    import train

    monkeypatch.setitem(train.BACKBONES, "deep", deep)
    return replace(settings.SETTINGS["deep"], batch_size=8, **SHORT)


@pytest.mark.parametrize("method", ["soap", *ADAPTERS, *VARIANTS])
def test_stacked_runs_are_runs_one_by_one(short, method):
    """Trained together as apart, and as by an ordinary loop over an ordinary module."""
    from baselines import INSTRUCTION_DIM, attach
    from settings import Run
    from train import adapt, sample

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
    from baselines import attach
    from stacked import Stacked

    models = [attach("replora", deep(), None) for _ in range(2)]
    x = torch.randn(2, 9, 2)
    expected = torch.stack([model(points) for model, points in zip(models, x, strict=True)])
    torch.testing.assert_close(Stacked(models)(x), expected)
    torch.testing.assert_close(models[0](x[0]), expected[0])


def test_gradient_norms_are_those_of_the_layers():
    from baselines import attach
    from stacked import Data, Stacked

    models = [attach("lora", deep(), None) for _ in range(2)]
    data = Data(torch.randn(2, 9, 2), torch.randn(2, 9))
    stacked = Stacked(models)
    stacked.errors(data).sum().backward()
    for i, model in enumerate(models):
        nn.functional.mse_loss(model(data.x[i]), data.y[i]).backward()
        layers = model.base_model.model.layers
        expected = [math.hypot(*(p.grad.norm().item() for p in trainable(layer).values())) for layer in layers]
        assert stacked.gradient_norms()[:, i].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_a_variant_differs_in_what_it_says():
    from baselines import attach
    from variants import VARIANTS

    ours, static = attach("queryable", deep()), attach("prior_only", deep())
    assert {name.split(".")[-2] for name in trainable(static)} == {"default", "atoms", "keys", "prior"}
    assert len(trainable(static)) < len(trainable(ours))
    assert attach("router_dim=4", deep()).peft_config["default"].router_dim == 4

    torch.manual_seed(0)
    keys = trainable(attach("queryable", deep()))["base_model.queryable_lora_router.default.keys.weight"]
    torch.manual_seed(0)
    larger = trainable(attach("keys*10.0", deep()))["base_model.queryable_lora_router.default.keys.weight"]
    torch.testing.assert_close(larger, 10 * keys)

    parts = {part for v in VARIANTS.values() for part in (*v.lr_factors, *v.weight_decays)}
    assert all(any(part in name for name in trainable(ours)) for part in parts)


@pytest.mark.parametrize(
    ("method", "setting", "parts", "value", "default"),
    [
        ("bank_lr*10.0", "lr", ("atoms", "keys"), 1e-2, 1e-3),
        ("gate_lr*10.0", "lr", ("gate",), 1e-2, 1e-3),
        ("no_decay", "weight_decay", ("gate", "keys"), 0.0, 0.01),
    ],
)
def test_a_variant_trains_its_parts_by_settings_of_their_own(method, setting, parts, value, default):
    from baselines import attach
    from train import optimizer

    learned = trainable(attach(method, deep()))
    groups = optimizer(method, 1e-3, learned).param_groups
    found = {id(p): group[setting] for group in groups for p in group["params"]}
    for name, parameter in learned.items():
        expected = value if any(part in name for part in parts) else default
        assert found[id(parameter)] == pytest.approx(expected), name


def test_shut_gates_leave_lora():
    from baselines import attach

    model = attach("shut_gates", deep())
    for name, parameter in trainable(model).items():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    assert not any("gate" in name for name in trainable(model))
    lora = attach("lora", deep())
    lora.load_state_dict({name: model.state_dict()[name] for name in lora.state_dict()})
    x = torch.randn(7, 2)
    torch.testing.assert_close(model(x), lora(x))


def test_routes_of_stacked_models_are_theirs():
    from baselines import attach
    from stacked import Stacked

    from peft_queryable import record_routing

    models = [attach("queryable", deep()) for _ in range(2)]
    x = torch.randn(2, 9, 2)
    routes = Stacked(models).routes(x)
    assert routes.shape == (2, 4, 9, 8)
    for model, points, found in zip(models, x, routes, strict=True):
        with record_routing(model) as trace:
            model(points)
        for block, weights in trace.weights().items():
            torch.testing.assert_close(found[block], weights)


def test_route_statistics():
    """A router that decides by block alone, one that decides by example alone, and one that leaves all open."""
    from routing import route_statistics

    eye, n = torch.eye(4), 8
    by_block = eye[:2, None].expand(2, n, 4)
    by_example = eye[torch.arange(n) % 4].expand(2, n, 4)
    open_ = torch.full((2, n, 4), 0.25)
    expected = [(0, 0, math.log(2), 2), (0, math.log(4), 0, 0), (math.log(4), 0, 0, 0)]
    for found, values in zip(route_statistics(torch.stack([by_block, by_example, open_])), expected, strict=True):
        assert list(found) == ["entropy", "by_example", "by_block", "dead"]
        assert list(found.values()) == pytest.approx(values, abs=1e-6)


def test_summary():
    from train import summary

    norms = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    record = summary([[0, 0.1, 0.1], [1, 3.0, math.nan], [2, 2.0, 5.0], [3, 4.0, 6.0]], norms)
    assert record["train"] == 2 and record["test"] == 5  # not the errors before training
    assert record["last_train"] == 4 and record["last_test"] == 6
    assert record["concentration"] == [1.5, 1.0]


def test_pretraining_learns_the_source_function(short):
    from settings import Run
    from train import pretrain, sample

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
    from settings import SETTINGS, Run
    from train import pretrain

    used = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", used.append)
    for setting in (short, replace(short, matmul_precision="medium")):
        pretrain(setting, [Run("Matyas", 0)], "cpu", False, lambda: None)
    assert used == ["highest", "medium"]
    precise = {name for name, setting in SETTINGS.items() if setting.matmul_precision == "highest"}
    assert precise == {"wide", "deep"}  # the paper's own


def test_the_command_goes_on_where_it_stopped(tmp_path):
    import run

    methods, results = ["lora", "queryable", "doran"], tmp_path / "deep-quick.jsonl"
    command = [sys.executable, RECIPE / "run.py", "--quick", "--output_dir", tmp_path, "--methods", *methods]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "deep-quick.md").read_text() in done.stdout
    for name in ("curves", "gradients", "routes"):
        assert (tmp_path / f"deep-quick-{name}.svg").read_text().endswith("</svg>\n")
    lines = results.read_text().splitlines()
    keys = [(record["method"], record["function"], record["seed"]) for record in map(json.loads, lines)]
    assert keys == [(method, function, 0) for method in methods for function in ("Ackley", "Sin-Cos")]
    assert [point[0] for point in json.loads(lines[0])["curve"]] == [0, 2]
    results.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    run.main(run.Arguments(str(tmp_path), methods=methods, quick=True, **run.QUICK))
    again = results.read_text().splitlines()
    assert again[:-1] == lines[:2] + lines[3:]
    missing, redone = json.loads(lines[2]), json.loads(again[-1])
    assert (redone["method"], redone["function"]) == keys[2][:2]
    assert redone["last_test"] == pytest.approx(missing["last_test"], rel=1e-4)


def reciprocal(number: int, epochs) -> float:
    epochs.put(1)
    return 1 / number


def test_a_task_that_fails_does_not_take_the_others_with_it():
    from workers import Workers

    results = []
    with Workers(1) as workers, pytest.raises(ZeroDivisionError):
        for result in workers.results([partial(reciprocal, number) for number in (2, 0, 4)], 1, "dividing"):
            results.append(result)
    assert results == [0.5, 0.25]


def test_runs_of_another_setting_are_not_taken_for_these(tmp_path, short):
    import run

    line = {"setting": run.asdict(short), "method": "lora", "function": "Ackley", "seed": 0}
    (tmp_path / "deep.jsonl").write_text(json.dumps(line) + "\n")
    assert run.finished(tmp_path / "deep.jsonl", short) == {("lora", "Ackley", 0)}
    with pytest.raises(SystemExit, match="another setting: remove it"):
        run.finished(tmp_path / "deep.jsonl", replace(short, epochs=4))


def test_the_estimate_counts_all_runs(short, capsys, monkeypatch):
    import estimate
    import run

    monkeypatch.setattr(estimate, "step_seconds", lambda method, setting, runs, device, compiled: 1.0)
    monkeypatch.setitem(run.SETTINGS, "deep", replace(short, epochs=1200, target_train=21))
    run.main(run.Arguments(estimate=True, methods=["lora"], at_once=15))
    assert "| lora | 1 | 1000.0 | 45.0 |\n| lora | 15 | 1000.0 | 3.0 |" in capsys.readouterr().out


def test_an_instruction_is_its_description_projected(monkeypatch):
    import instructions
    from baselines import INSTRUCTION_DIM

    embeds = {"Ackley": torch.ones(1, 384), "Levy": -torch.ones(1, 384)}
    texts = {instructions.FUNCTIONS[name].description: embed for name, embed in embeds.items()}
    monkeypatch.setattr(instructions, "sentence_encoder", lambda name: lambda asked: texts[asked[0]])
    ackley, levy = (instructions.instruction(name, None) for name in embeds)
    assert ackley.shape == (1, INSTRUCTION_DIM)
    assert torch.equal(ackley, -levy) and ackley.norm() > 1


# Report


def finished(path, errors: dict[str, dict[str, list[float]]]) -> None:
    """Records of runs by method and function, whose training error and test error are one number a seed."""
    curve = {"curve": [[0, 1.0, 1.0], [1, 0.5, 0.5]], "gradient_norms": [[1.0, 2.0]], "concentration": [4 / 3]}
    told = [{"entropy": 0.5, "by_example": 0.25, "by_block": 0.125, "dead": 1}]
    routes = {method: {"routes": [None] if method == "lora" else told} for method in errors}
    records = [
        {"method": method, "function": function, "seed": seed, "train": error, "test": error + 1, **curve}
        | routes[method]
        for method, by_function in errors.items()
        for function, values in by_function.items()
        for seed, error in enumerate(values)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_tables_stand_beside_the_papers(tmp_path):
    from tables import report

    path = tmp_path / "deep.jsonl"
    finished(path, {"lora": {"Ackley": [1.0, 3.0]}, "queryable": {"Ackley": [0.5, 1.2]}})
    text = report(path)
    assert "| train error | LoRA | ours |" in text
    assert "| Ackley | 2 ± 1.4 [13.124] | **0.85 ± 0.49** [0.113] |" in text
    assert f"| LoRA | {5**0.5:.3g} |" in text and "| 2 of 2 | 1.0e+00 |" in text and "| 1 of 2 | 1.0e+00 |" in text
    assert "| Ackley | 3 ± 1.4 [13.227] | **1.85 ± 0.49** [0.673] |" in text


def test_the_comparison_is_paired_by_seed(tmp_path):
    """Ratios, differences and tests against scipy's and by hand; the order of the lines does not matter."""
    from scipy.stats import ttest_rel
    from tables import comparison, read

    path = tmp_path / "deep.jsonl"
    lora, ours = [1.0, 2.0, 4.0], [0.5, 2.5, 1.0]
    finished(path, {"lora": {"Levy": lora, "Ackley": ours}, "queryable": {"Levy": ours, "Ackley": lora}})
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    text = comparison(read(path), "queryable")
    ratio = (0.5 * 1.25 * 0.25) ** (1 / 3)
    p = ttest_rel([math.log(e) for e in ours], [math.log(e) for e in lora]).pvalue
    margin = statistics.stdev([-0.5, 0.5, -3.0]) / 3**0.5
    assert f"| Levy | {ratio:.3g} | {p:.2g} | yes | -1 ± {margin:.2g} | better |" in text
    assert f"| Ackley | {1 / ratio:.3g} | {p:.2g} | no | +1 ± {margin:.2g} | within one standard error |" in text
    assert "best on 1 of 2" in text and "on 2, and better on 1." in text
    assert "Over all 6 pairs the ratio of training errors is 1 " in text


def test_single_runs_have_no_spread(tmp_path):
    from tables import report

    path = tmp_path / "wide-short.jsonl"
    finished(path, {"lora": {"Ackley": [2.0], "Levy": [1.0]}, "queryable": {"Ackley": [1.0], "Levy": [3.0]}})
    text = report(path)
    assert "| Ackley | 2 | **1** |" in text  # and no figures of the paper, whose runs are longer
    assert "| Ackley | 0.5 |  | yes | -1 | better |" in text
    assert "| Levy | 3 |  | no | +2 | worse |" in text


def test_diverged_and_missing_runs_have_their_place(tmp_path):
    """A run that diverged counts as infinite, one that is not there is left out; neither stops the report."""
    from tables import report

    path = tmp_path / "deep.jsonl"
    ours = {"Ackley": [0.5, 1.2], "Levy": [1.0, 2.0]}
    finished(
        path,
        {"lora": {"Ackley": [1.0, math.inf], "Levy": [3.0, 5.0]}, "dora": {"Levy": [0.1, 0.2]}, "queryable": ours},
    )
    text = report(path)
    assert "| Ackley | inf [13.124] |  | **0.85 ± 0.49** [0.113] |" in text
    assert "| Ackley | 0 |  | yes | -inf | better |" in text and "best on 1 of 2" in text


def test_variants_stand_beside_ours(tmp_path):
    from scipy.stats import wilcoxon
    from tables import report

    path = tmp_path / "deep-500.jsonl"
    dense = {"Levy": [0.5, 3.0], "Ackley": [4.0]}
    unfinished = {"depth_only": {"Levy": [3.0]}, "state_only": {"Ackley": [4.0]}}
    finished(path, {"lora": {"Levy": [4.0, 4.0]}, "queryable": {"Levy": [1.0, 2.0]}, "all_atoms": dense} | unfinished)
    text = report(path)
    ratio, test = (0.5 * 1.5) ** 0.5, (1.5 / 2 * 4 / 3) ** 0.5  # the run without a partner is left out
    p = wilcoxon([math.log(0.5), math.log(1.5)]).pvalue
    routes = "0.50 | 0.25 | 0.12 | 1.00"
    assert f"| `all_atoms` | {ratio:.3g} | {test:.3g} | {p:.2g} | 1 of 2 | 1.0e+00 | {routes} |" in text
    assert f"| ours | 1 | 1 |  | 2 of 2 | 1.0e+00 | {routes} |" in text
    assert "| `depth_only` | 3 | 2 | 1 |" in text and "state_only" not in text
    assert f"| LoRA | {8**0.5:.3g} |" in text and "[13.124]" not in text


def test_the_papers_figures():
    """Spot checks against the printed tables, by their corners."""
    from paper import FIGURES

    assert FIGURES["wide", "train"]["lora"]["Ackley"] == 0.0754
    assert FIGURES["wide", "train"]["queryable"]["Styblinski-Tang"] == 0.3862
    assert FIGURES["wide", "test"]["dora"]["Dropwave"] == 374.8006
    assert FIGURES["deep", "train"]["hyra"]["Styblinski-Tang"] == math.inf
    assert FIGURES["deep", "test"]["soap"]["Rastrigin"] == 156.795


def test_the_page_takes_the_tables_of_a_setting(tmp_path, monkeypatch):
    import tables

    page = tmp_path / "regression.md"
    page.write_text((RECIPE.parents[1] / "docs/regression.md").read_text())
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    for name in ("curves", "gradients"):
        (tmp_path / f"deep-{name}.svg").write_text("<svg/>")
    for table in ("| a table |", "| another |"):
        tables.write_docs(table, tmp_path / "deep.jsonl")
    before, _, after = page.read_text().partition("| another |\n\n![deep-curves](regression-deep-curves.svg)\n")
    assert "## The deep setting" in before and "## Not done yet" in after
    assert "| a table |" not in before + after
    assert (tmp_path / "regression-deep-gradients.svg").read_text() == "<svg/>"
