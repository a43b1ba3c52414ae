"""Matplotlib as the recipes use it: without a display, and with the same file for the same figure."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt

plt.rcParams |= {"svg.hashsalt": "peft_queryable", "svg.fonttype": "none"}  # the same file each time, text as text


def save(figure, path: Path, **options) -> Path:
    """Write `figure` to `path` without the date, and forget it."""
    figure.savefig(path, metadata={"Date": None}, **options)
    plt.close(figure)
    if path.suffix == ".svg":
        path.write_text(compact(path.read_text()))
    return path


def shorter(number: re.Match) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def compact(svg: str) -> str:
    """`svg` with tenths of a point for the six decimals of matplotlib, and without needless spaces."""
    svg = re.sub(r"(?<![\d.(-])-?\d+\.\d{3,}", shorter, svg)  # not scale(0.015625)
    svg = re.sub(r' d="[^"]*"', lambda line: re.sub(r"\s*([MLQCz])\s*", r"\1", line[0]), svg)
    return re.sub(r"<!--.*?-->|\n\s+", "\n", svg)
