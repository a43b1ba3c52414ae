"""Matplotlib as the recipes use it: without a display, and with the same file for the same figure."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt

plt.rcParams |= {"svg.hashsalt": "peft_queryable", "svg.fonttype": "none"}  # the same file each time, text as text


def save(figure, path: Path, **options) -> Path:
    """Write `figure` to `path` without the date, and forget it."""
    figure.savefig(path, metadata={"Date": None}, **options)
    plt.close(figure)
    return path
