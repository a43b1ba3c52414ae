"""Pictures of routes: the values that are drawn, axes and labels, in light and dark, and the size of the files."""

import re

import numpy as np
import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, randomise, text
from matplotlib.colors import to_hex

from peft_queryable import plots, record_routing
from peft_queryable.metrics import gradient_norms, symmetric_kl

GROUPS, BLOCKS, ATOMS = 3, 4, 16


def usages(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, ATOMS).softmax(-1)


def pictures(figure) -> list[np.ndarray]:
    """The values of each heat map, in the order of the panels."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_usage_by_block_and_group():
    groups = {name: usages(BLOCKS) for name in ("sums", "sorting", "verse")}
    figure = plots.plot_usage(groups, [0, 1, 2, 5])
    *panels, colours = figure.axes
    assert [axes.get_title() for axes in panels] == ["block 0", "block 1", "block 2", "block 5"]
    assert labels(panels[0].yaxis) == list(groups)
    assert {axes.get_xlabel() for axes in panels} == {"atom"} and colours.get_ylabel() == "mean weight"
    for block, drawn in enumerate(pictures(figure)):
        np.testing.assert_allclose(drawn, torch.stack([usage[block] for usage in groups.values()]))
    limits = {image.get_clim() for axes in panels for image in axes.images}
    assert limits == {(0, float(torch.stack(list(groups.values())).max()))}  # one scale for all


def test_usage_of_one_group():
    usage = usages(BLOCKS)
    figure = plots.plot_usage({"all": usage})
    (drawn,) = pictures(figure)
    np.testing.assert_allclose(drawn, usage)
    assert labels(figure.axes[0].yaxis) == [f"block {block}" for block in range(BLOCKS)]


def test_routes_along_a_text():
    weights = {block: usages(5) for block in (0, 3)}
    figure = plots.plot_tokens(weights, [" The", " $5", "\n", " ", " end"])
    for drawn, routes in zip(pictures(figure), weights.values(), strict=True):
        np.testing.assert_allclose(drawn, routes.T)
    assert [axes.get_ylabel() for axes in figure.axes[:3]] == ["block 0\natom", "block 3\natom", "route\nmoved"]
    moved = figure.axes[2]
    assert labels(moved.xaxis) == ["The", r"\$5", "⏎", "␣", "end"]
    expected = [
        sum(float((routes[t] - routes[t - 1]).abs().sum()) / 2 for routes in weights.values()) / 2 for t in range(1, 5)
    ]
    assert [bar.get_height() for bar in moved.patches] == pytest.approx(expected)
    assert [bar.get_x() + bar.get_width() / 2 for bar in moved.patches] == [1, 2, 3, 4]


def test_routes_along_another_text_are_refused():
    with pytest.raises(ValueError, match="Block 0 has 1 routes for 3 tokens"):
        plots.plot_tokens({0: usages(1)}, ["a", "b", "c"])


def test_a_trace_plots_itself():
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS)
    randomise(model)
    inputs = text()
    with record_routing(model) as trace:
        model(**inputs)
    (drawn,) = pictures(trace.plot())
    np.testing.assert_allclose(drawn, torch.stack([w.mean(0) for w in trace.weights().values()]))
    first = pictures(trace.plot(list("abcdef")))  # of the first row, which has no padding
    np.testing.assert_allclose(first[2], trace.calls[0].weights[2][0].T)


def test_usage_over_training():
    values = usages(4)
    figure = plots.plot_training([10, 20, 30, 40], values)
    (drawn,) = pictures(figure)
    np.testing.assert_allclose(drawn, values.T)
    assert figure.axes[0].images[0].get_extent()[:2] == [5, 45]  # a step's column is centred on it
    assert [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()] == ["step", "atom"]


def test_history():
    history = [
        {"loss": 2.0, "routing/entropy": 1.0, "routing/drift": 0.1, "step": 5},
        {"loss": 1.0, "step": 10},
        {"loss": 1.0, "routing/entropy": 0.5, "routing/drift": 0.2, "step": 15},
    ]
    figure = plots.plot_history(history)
    assert [axes.get_title() for axes in figure.axes if axes.lines] == ["entropy", "drift"]
    for axes, expected in zip(figure.axes, ([1.0, 0.5], [0.1, 0.2]), strict=False):
        assert axes.lines[0].get_xydata().tolist() == [[5, expected[0]], [15, expected[1]]]
        assert axes.get_xlabel() == "step"
    assert len([axes for axes in plots.plot_history(history, ["drift"]).axes if axes.lines]) == 1
    with pytest.raises(ValueError, match="Train with a `RoutingCallback`"):
        plots.plot_history([{"loss": 2.0, "step": 5}])


def test_parts():
    parts = {"entropy": [1.0, 0.5], "by_input": [0.1, 0.2], "by_block": [0.3, 0.3]}
    figure = plots.plot_parts({"ours": parts}, [50, 100], "epoch")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_legend().get_texts()] == [
        "left open by a route",
        "by input",
        "by block",
    ]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert tops == pytest.approx([1.0, 1.1, 1.4])  # one on the other
    assert [axes.get_title(), axes.get_xlabel()] == ["ours", "epoch"]


def test_matrix():
    values = symmetric_kl(torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.4, 0.4, 0.2]]))
    figure = plots.plot_matrix(values, ["a", "b", "c"], "symmetric KL, nats")
    axes, colours = figure.axes
    assert [t.get_text() for t in axes.texts] == [
        "∞" if value == float("inf") else f"{value:.2g}" for value in values.flatten().tolist()
    ]
    assert "∞" in {t.get_text() for t in axes.texts}
    assert labels(axes.xaxis) == labels(axes.yaxis) == ["a", "b", "c"]
    assert colours.get_ylabel() == "symmetric KL, nats"


def test_gradient_norms():
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS)
    randomise(model)
    model(**(inputs := text()), labels=inputs["input_ids"]).loss.backward()
    norms = {name: float(norm) for name, norm in gradient_norms(model).items()}
    figure = plots.plot_gradient_norms({"ours": norms, "half": {name: norm / 2 for name, norm in norms.items()}})
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata() == pytest.approx(list(norms.values()))
    assert axes.lines[1].get_ydata() == pytest.approx([norm / 2 for norm in norms.values()])
    index = max(norms.values()) * 4 / sum(norms.values())
    assert axes.get_legend().get_texts()[0].get_text() == f"ours: concentration {index:.2f}"
    assert [axes.get_xlabel(), axes.get_yscale()] == ["layer", "log"]


@pytest.mark.parametrize(("dark", "ink"), [(False, "#1a1a1a"), (True, "#e6e6e6")], ids=["light", "dark"])
def test_pages_light_and_dark(dark, ink):
    with plots.figure_style(dark):
        figure = plots.plot_usage({"all": usages(BLOCKS)})
        written = plots.svg(figure)
    assert to_hex(figure.axes[0].xaxis.label.get_color()) == ink
    assert f"fill: {ink}" in written
    assert figure.get_facecolor()[3] == 0  # the page shows through


def test_text_stays_text_and_files_are_the_same():
    figures = [plots.plot_matrix(torch.eye(2), ["first group", "second"], "nats") for _ in range(2)]
    first, second = map(plots.svg, figures)
    assert ">first group</text>" in first
    assert first == second
    assert not re.search(r"<dc:date>", first)


def test_size_is_bounded():
    """Thousands of cells are one image; what is too large all the same is refused."""
    assert len(plots.svg(plots.plot_usage({"all": usages(300)}))) < plots.SVG_LIMIT
    figure = plots.plot_usage({"all": usages(1)})
    figure.axes[0].plot(*torch.rand(2, 60_000), marker=".")
    with pytest.raises(ValueError, match="bytes as SVG, above 500000"):
        plots.svg(figure)


def brightness(colour: tuple) -> float:
    return sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), colour, strict=False))


def test_the_map_keeps_its_order_in_grey():
    """More weight is brighter at every step, so neither colour blindness nor a printer changes the order."""
    from matplotlib import colormaps

    steps = [brightness(colormaps[plots.MAP](i / 20)) for i in range(21)]
    assert steps == sorted(steps)
