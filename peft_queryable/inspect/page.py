"""What the report says: findings in words, tables, and pictures inside one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import torch

from ..findings import findings
from ..metrics import atom_reuse, entropy, load_balance, symmetric_kl
from ..plots import INK, figure_style, plot_gradient_norms, plot_matrix, plot_tokens, plot_usage, svg
from ..statistics import Readings
from .measuring import POSITIONS, Measured

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#1a1a1a, #e6e6e6); background: light-dark(#fff, #121212); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child, .facts td { text-align: left; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { max-width: 45rem; }
svg { max-width: none; } .bad { border-left: 4px solid #D55E00; padding-left: 1rem; }
"""


def page(measured: Measured, title: str, facts: dict[str, Any]) -> str:
    """The report as HTML that needs no other file.

    Args:
        measured: what it is made of.
        title: of the page.
        facts: what is shown of the adapter and the data, by name.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table([], facts.items(), "facts"),
        "<h2>Findings</h2>",
        *(f'<p class="{kind}">{escape(text)}</p>' for kind, text in _findings(measured)),
        "<h2>Blocks</h2>",
        _blocks(measured),
        "<h2>Atoms</h2>",
        _atoms(measured),
        *_pictures(measured),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _findings(measured: Measured) -> list[tuple[str, str]]:
    """What is wrong, and then what decides the routes, each with its class."""
    readings = Readings(measured.statistics.table())
    bad = [("bad", text) for text in findings(readings).values()]
    told = readings.summary()
    total = told["entropy"] + told["by_input"] + told["by_block"]
    sentences = [
        f"The use of the atoms has an entropy of {total:.3f} nats: {told['by_block']:.2g} are decided by the block, "
        f"{told['by_input']:.2g} by the input, and {told['entropy']:.2g} are left open by a route, which mixes atoms."
    ]
    if len(measured.groups) > 1:
        decided = sum(measured.by_group()) / len(measured.weights)
        sentences.append(
            f"The group decides {decided:.2g} nats, mean over the blocks; groups without meaning would seem to decide "
            f"about {measured.chance():.2g}."
        )
    if not bad:
        sentences.append("Routes are not constant, no atom takes nearly all weight, and none is known to be dead.")
    return [*bad, *(("", sentence) for sentence in sentences)]


def _blocks(measured: Measured) -> str:
    readings = Readings(measured.statistics.table())
    header = [
        "block",
        "routes",
        "entropy of a route",
        "by input",
        "by group",
        "by position",
        "load balance",
        "top atom",
    ]
    columns: list[Sequence[float]] = [
        readings.entropy.tolist(),
        readings.by_input.tolist(),
        measured.by_group(),
        measured.by_position(),
        load_balance(readings.usage).tolist(),
        readings.usage.amax(1).tolist(),
    ]
    rows = [
        [block, int(readings.count[i]), *(f"{column[i]:.4f}" for column in columns)]
        for i, block in enumerate(measured.statistics.blocks)
    ]
    note = (
        "<p>Nats, but for load balance (0 to 1) and the top atom's share of the weight. A position is a stretch of "
        f"{POSITIONS} tokens.</p>"
    )
    return _table(header, rows) + note


def _atoms(measured: Measured) -> str:
    readings = Readings(measured.statistics.table())
    usages = torch.stack([usage.mean(0) for usage in measured.usage().values()])  # [groups, M]
    reuse = atom_reuse(usages).tolist()
    rows = [
        [
            atom,
            f"{readings.usage[:, atom].mean():.4f}",
            f"{readings.used[:, atom].max():.0%}",
            *([f"{reuse[atom]:.3f}", measured.groups[int(usages[:, atom].argmax())]] if len(usages) > 1 else []),
        ]
        for atom in range(readings.usage.shape[1])
        if readings.used[:, atom].any()
    ]
    header = ["atom", "share of all weight", "routes that use it, most in a block"]
    unused = f"<p>Atoms that no route uses: {readings.dead}.</p>" if readings.dead else ""
    more = ["reuse, nats", "most used by"] if len(usages) > 1 else []
    note = f"<p>Reuse: {entropy(torch.full((len(usages),), 1 / len(usages))):.3f} if all groups use it alike.</p>"
    return _table([*header, *more], rows) + unused + (note if more else "")


def _pictures(measured: Measured) -> Iterable[str]:
    blocks = measured.statistics.blocks
    with figure_style():
        yield "<h2>Pictures</h2>"
        caption = "Mean weight of each atom in each block, by group."
        yield _figure(plot_usage(measured.usage(), blocks), caption)
        if all(len(routes) == len(measured.tokens) > 1 for routes in measured.first.values()):
            caption = "Routes along the first text, and how far each token moves them from the token before it."
            yield _figure(plot_tokens(measured.first, measured.tokens), caption)
        if len(measured.groups) > 1:
            usages = torch.stack([usage.mean(0) for usage in measured.usage().values()])
            label = "symmetric KL, nats"
            yield _figure(
                plot_matrix(symmetric_kl(usages), measured.groups, label), "How far the groups' uses are apart."
            )
        if any(measured.gradient_norms.values()):
            caption = "Gradient norms by layer, of the language modelling loss on the first rows."
            yield _figure(plot_gradient_norms({"this adapter": measured.gradient_norms}), caption)
        yield "<h2>Gates</h2>"
        yield _table(["layer", "mean gate"], [(name, f"{g:.4f}") for name, g in measured.gates_by_layer().items()])


def _figure(figure: Any, caption: str) -> str:
    picture = svg(figure)
    picture = picture[picture.index("<svg") :].replace(INK, "currentColor")  # the page's, light or dark
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>" if header else ""
    body = ("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}">{head}' + "".join(body) + "</table>"
