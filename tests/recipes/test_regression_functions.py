"""The functions of recipes/regression: optima, values, the shift of the target, and samples."""

import math

import pytest
import torch

from recipes.regression.functions import ANGLE, COEFFICIENT, FUNCTIONS, NOISE

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


@pytest.mark.parametrize("name", OPTIMA)
def test_optimum(name):
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
    points = torch.tensor([[1.7, 1.4], [2.1, 1.2], [0.3, 2.6]])
    expected = torch.tensor([REFERENCES[name](*point) for point in points.tolist()])
    torch.testing.assert_close(FUNCTIONS[name].value(points, 1.0), expected, atol=1e-4, rtol=1e-4)


def test_every_function_is_tested():
    assert FUNCTIONS.keys() == OPTIMA.keys()
    assert len({function.description for function in FUNCTIONS.values()}) == 9


@pytest.mark.parametrize("name", OPTIMA)
def test_the_target_has_other_coefficients_and_is_turned(name):
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
    function = FUNCTIONS["Michalewicz"]
    x, y = function.sample(4000, torch.Generator().manual_seed(3), target=False)
    again = function.sample(4000, torch.Generator().manual_seed(3), target=False)
    other, _ = function.sample(4000, torch.Generator().manual_seed(4), target=False)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other)
    assert x.min() >= function.low and x.max() <= function.high
    assert x.std(0).tolist() == pytest.approx([math.pi / math.sqrt(12)] * 2, rel=0.05)
    assert (y - function.value(x, 1.0)).std().item() == pytest.approx(NOISE, rel=0.05)
