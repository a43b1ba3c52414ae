"""The tables and the marked places of pages that all recipes share."""

import pytest

from recipes.common import report


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with two places, whose names begin alike, in a folder that stands for docs/."""
    monkeypatch.setattr(report, "DOCS", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(
        "# Page\n\n<!-- start of a -->\n\n<!-- end of a -->\n\n<!-- start of a b -->\n\n<!-- end of a b -->\n\nEnd.\n"
    )
    return path


def test_a_table_keeps_its_cells_and_lines_them_up():
    table = report.markdown_table(["method", "error"], [["LoRA", "1.50"], ["ours, `causal`", "**1e-3** [0.10]"]])
    assert table.splitlines() == [
        "| method         | error           |",
        "|----------------|-----------------|",
        "| LoRA           | 1.50            |",
        "| ours, `causal` | **1e-3** [0.10] |",
    ]


def test_a_place_is_filled_again(page, tmp_path):
    (tmp_path / "run").mkdir()
    figure = tmp_path / "run" / "curves.svg"
    figure.write_text("<svg/>")
    for text in ("| a table |", "| another |\n"):
        report.fill_place("page.md", "a", text, {"a-curves.svg": figure})
    assert page.read_text() == (
        "# Page\n\n<!-- start of a -->\n\n| another |\n\n![curves](a-curves.svg)\n\n<!-- end of a -->\n\n"
        "<!-- start of a b -->\n\n<!-- end of a b -->\n\nEnd.\n"
    )
    assert (tmp_path / "a-curves.svg").read_text() == "<svg/>"


def test_a_page_without_the_place_stays_as_it_is(page, tmp_path):
    before = page.read_text()
    with pytest.raises(ValueError, match="has no place for c"):
        report.fill_place("page.md", "c", "text", {})
    assert page.read_text() == before
