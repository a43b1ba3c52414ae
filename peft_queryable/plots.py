"""Pictures of routes, as matplotlib figures; needs matplotlib (`pip install "peft_queryable[plots]"`).

Colours are cividis, which reads alike with and without colour blindness and keeps its order in grey, and Okabe and
Ito's palette for lines. `figure_style(dark=True)` is a context for dark pages. `svg` bounds the size of what it
returns: the cells of a heat map are one image inside it, and text stays text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('Pictures need matplotlib: pip install "peft_queryable[plots]"') from error

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")  # Okabe, Ito 2008
MAP = "cividis"
INK, DARK_INK = "#1a1a1a", "#e6e6e6"  # of text and lines
SVG_LIMIT = 500_000  # bytes
TEXT_TOKENS = 120  # per picture of one text, so that its words can be read


@contextmanager
def figure_style(dark: bool = False) -> Iterator[None]:
    """Within it, figures are made for a light or a dark page, with a transparent background."""
    ink = DARK_INK if dark else INK
    with matplotlib.rc_context(
        {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "axes.prop_cycle": cycler(color=COLOURS),
            "font.size": 10,
            "svg.fonttype": "none",  # text as text
            "svg.hashsalt": "peft_queryable",  # the same names inside the file each time
        }
    ):
        yield


def svg(figure: Figure) -> str:
    """`figure` as SVG text.

    Raises:
        ValueError: if it is larger than 500 kB, which pages load slowly.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peft_queryable"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    if (size := len(buffer.getvalue())) > SVG_LIMIT:
        raise ValueError(f"The picture takes {size} bytes as SVG, above {SVG_LIMIT}: save it as PNG, or draw less.")
    return buffer.getvalue()


def plot_usage(groups: Mapping[str, Tensor], blocks: Sequence[int] | None = None) -> Figure:
    """The mean weight of each atom, by block and group (Figs. 6 and 7 of the paper).

    One panel per block with a row per group; for a single group, one panel with a row per block.

    Args:
        groups: usage [blocks, M] by name of the group.
        blocks: their numbers, by default from 0.
    """
    usages = torch.stack([torch.as_tensor(usage) for usage in groups.values()], 1)  # [blocks, groups, M]
    names = [f"block {block}" for block in (range(len(usages)) if blocks is None else blocks)]
    rows, titles = list(groups), names
    if len(groups) == 1:
        rows, titles, usages = names, list(groups), usages.transpose(0, 1)
    num_panels, num_rows, num_atoms = usages.shape
    figure = Figure(figsize=(2.5 + num_panels * (0.4 + 0.09 * num_atoms), 1.2 + 0.26 * num_rows))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, num_panels, squeeze=False, sharey=True)[0]
    for title, usage, axes in zip(titles, usages, panels, strict=True):
        image = _heat_map(axes, usage, vmax=float(usages.max()))
        axes.set(title=title, xlabel="atom")
        axes.set_xticks(range(0, num_atoms, max(1, num_atoms // 4)))
    panels[0].set_yticks(range(num_rows), rows)
    figure.colorbar(image, ax=panels, label="mean weight")
    return figure


def plot_training(steps: Sequence[int], usages: Tensor) -> Figure:
    """The share of weight of each atom over the steps of training.

    Args:
        steps: S steps, evenly spaced.
        usages: the mean route at each, [S, M].
    """
    figure = Figure(figsize=(7, 1.5 + 0.15 * usages.shape[1]))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    half = (steps[-1] - steps[0]) / max(2 * (len(steps) - 1), 1) or 0.5
    image = _heat_map(axes, usages.T, vmax=float(usages.max()))
    image.set_extent((steps[0] - half, steps[-1] + half, usages.shape[1] - 0.5, -0.5))
    axes.set(xlabel="step", ylabel="atom")
    figure.colorbar(image, ax=axes, label="share of all weight")
    return figure


def plot_parts(panels: Mapping[str, Mapping[str, Sequence[float]]], steps: Sequence[float], unit: str) -> Figure:
    """What decides the atoms' use over training: the three parts of its entropy, one on the other.

    Args:
        panels: by title, `entropy`, `by_input` and `by_block` at each step, as [`RouteStatistics.summary`] has them.
        steps: the steps, or epochs.
        unit: what they are.
    """
    labels = {"entropy": "left open by a route", "by_input": "by input", "by_block": "by block"}
    figure = Figure(figsize=(5.5 * len(panels), 4))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for (title, parts), axes in zip(panels.items(), grid, strict=True):
        values = [list(parts[name]) for name in labels]
        axes.stackplot(list(steps), values, labels=list(labels.values()), colors=COLOURS)
        axes.set(title=title, xlabel=unit, ylabel="entropy of the atoms' use, nats")
    grid[0].legend(fontsize=8)
    return figure


def plot_tokens(weights: Mapping[int, Tensor], tokens: Sequence[str]) -> Figure:
    """The routes along one text: for each block, the weight of each atom at each token.


    Below the blocks, how far each token moves the route: the share of weight that goes to other atoms than at
    the token before it, mean over the blocks.

    Args:
        weights: by block, the routes of the text's tokens, [T, M].
        tokens: T words or pieces of words.

    Raises:
        ValueError: if there is not one route per token.
    """
    for block, routes in weights.items():
        if len(routes) != len(tokens):
            raise ValueError(
                f"Block {block} has {len(routes)} routes for {len(tokens)} tokens. Routes of tokens exist in scope "
                "`causal`; for the others use `plot_usage`."
            )
    weights = {block: routes[:TEXT_TOKENS] for block, routes in weights.items()}
    tokens = list(tokens[:TEXT_TOKENS])
    figure = Figure(figsize=(max(4.0, 1.5 + 0.17 * len(tokens)), 2.2 + 1.3 * len(weights)))
    figure.set_layout_engine("constrained")
    *panels, moved = figure.subplots(len(weights) + 1, 1, sharex=True)
    for (block, routes), axes in zip(weights.items(), panels, strict=True):
        image = _heat_map(axes, routes.T, vmax=max(float(r.max()) for r in weights.values()))
        axes.set(ylabel=f"block {block}\natom", yticks=range(0, routes.shape[1], max(1, routes.shape[1] // 4)))
    stacked = torch.stack(list(weights.values()))  # [blocks, T, M]
    moves = (stacked[:, 1:] - stacked[:, :-1]).abs().sum(-1).mean(0) / 2
    moved.bar(range(1, len(tokens)), moves.tolist(), color=COLOURS[0])
    moved.set(ylabel="route\nmoved", xlim=(-0.5, len(tokens) - 0.5))
    moved.set_xticks(range(len(tokens)), [_shown(token) for token in tokens], rotation=90, fontsize=8)
    figure.colorbar(image, ax=panels, label="weight")
    return figure


def plot_history(history: Sequence[Mapping[str, float]], names: Sequence[str] | None = None) -> Figure:
    """What a [`RoutingCallback`] has logged, over the steps: one panel per quantity.

    Args:
        history: `trainer.state.log_history`.
        names: entries without `routing/`, by default all that are there.

    Raises:
        ValueError: if nothing was logged.
    """
    found = dict.fromkeys(key.removeprefix("routing/") for entry in history for key in entry if "routing/" in key)
    names = list(found) if names is None else list(names)
    if not set(names) & found.keys():
        raise ValueError("There is no entry `routing/...` in this history. Train with a `RoutingCallback`.")
    figure = Figure(figsize=(9, 2.1 * -(-len(names) // 3)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(-(-len(names) // 3), 3, squeeze=False, sharex=True).flat
    for name, axes in zip(names, grid, strict=False):
        points = [(e["step"], e[f"routing/{name}"]) for e in history if f"routing/{name}" in e]
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker=".", linewidth=1)
        axes.set(title=name, xlabel="step")
    for axes in list(grid):
        axes.axis("off")
    return figure


def plot_matrix(values: Tensor, names: Sequence[str], label: str) -> Figure:
    """A matrix of drifts or divergences between groups, with its numbers written into the cells (Fig. 9 of the paper).

    Args:
        values: [C, C].
        names: of the groups.
        label: what the numbers are, with their unit.
    """
    figure = Figure(figsize=(2.6 + 0.8 * len(names), 1.6 + 0.6 * len(names)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    finite = values[values.isfinite()]
    most = max(float(finite.max()) if len(finite) else 0.0, 1e-12)
    image = _heat_map(axes, values.clamp(max=most), vmax=most)
    for row, column in torch.cartesian_prod(torch.arange(len(names)), torch.arange(len(names))).tolist():
        value = float(values[row, column])
        text = "∞" if value == float("inf") else f"{value:.2g}"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=8, color="black" if value > most / 2 else "white"
        )
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def plot_gradient_norms(methods: Mapping[str, Mapping[str, float]]) -> Figure:
    """Gradient norms of the layers, one line per method, with its concentration index (Figs. 3 and 4 of the paper).

    Args:
        methods: by name, what `metrics.gradient_norms` returns.
    """
    figure = Figure(figsize=(7, 3.5))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for number, (name, norms) in enumerate(methods.items()):
        values = [float(norm) for norm in norms.values()]
        index = max(values) * len(values) / sum(values)
        axes.plot(
            range(1, len(values) + 1),
            values,
            marker=".",
            color=COLOURS[number % len(COLOURS)],
            label=f"{name}: concentration {index:.2f}",
        )
    axes.set(xlabel="layer", ylabel="gradient norm of the adapter", yscale="log")
    axes.legend()
    return figure


def _heat_map(axes: Any, values: Tensor, vmax: float) -> Any:
    return axes.imshow(values.float().numpy(), cmap=MAP, vmin=0, vmax=vmax, aspect="auto", interpolation="nearest")


def _shown(token: str) -> str:
    """A token as it can be read below a picture; `$` would begin a formula."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$").strip() or "␣"
