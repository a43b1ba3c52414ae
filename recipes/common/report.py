"""Markdown tables, and the marked places of the docs pages that show them."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

DOCS = Path(__file__).parents[2] / "docs"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text, too. Each cell stays as it is written."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def spread(numbers: Sequence[float], form: str) -> str:
    """The mean; of several numbers, with the lowest and the highest; nothing of none."""
    if not numbers:
        return ""
    text = format(statistics.mean(numbers), form)
    return f"{text} ({min(numbers):{form}} to {max(numbers):{form}})" if len(numbers) > 1 else text


def fill_place(page: str, place: str, text: str, figures: Mapping[str, Path]) -> None:
    """Put `text`, and `figures` below it, into the marked place of a docs page, instead of what stands there.

    Args:
        page: name of the page's file in docs/.
        place: what its two comments name, `<!-- start of PLACE -->` and `<!-- end of PLACE -->`.
        text: Markdown.
        figures: pictures to copy into docs/, by the names that they get there.
    """
    path, (start, end) = DOCS / page, (f"<!-- {edge} of {place} -->" for edge in ("start", "end"))
    before, _, rest = path.read_text().partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no place for {place}: it needs the lines {start} and {end}.")
    for name, figure in figures.items():
        (DOCS / name).write_text(figure.read_text())
    pictures = [f"![{figure.stem}]({name})" for name, figure in figures.items()]
    path.write_text("\n\n".join([before + start, text.strip(), *pictures, end + after]))
