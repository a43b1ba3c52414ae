"""Finished trainings in their file, and the table of their losses."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.common.report import markdown_table, spread

LABELS = {
    "routed": "routed",
    "means": "fixed at one mean of the routes per task",
    "mean": "fixed at one mean of the routes",
    "closed": "its own A and B alone (S = 0)",
    "lora": "one LoRA for all tasks",
    "each": "one LoRA per task, together as many steps",
    "each-long": "one LoRA per task, each as many steps",
}


def read(path: Path, settings: Mapping[str, Any]) -> list[dict]:
    """The records of finished trainings."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(record["settings"] != settings for record in records):
        raise SystemExit(f"{path} has trainings with other settings: remove it, or name another --output_dir.")
    return records


def table(records: list[dict]) -> str:
    """By row, the mean loss over tasks and seeds, and the paired difference from the routed adapter's."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, losses in record["losses"].items():
            found.setdefault(name, {})[record["seed"]] = statistics.mean(losses.values())
    routed, rows = found.get("routed", {}), []
    for name, label in LABELS.items():
        if by_seed := found.get(name):
            more = [loss - routed[seed] for seed, loss in by_seed.items() if seed in routed]
            rows.append([label, spread(list(by_seed.values()), ".3f"), spread(more, "+.3f"), str(len(by_seed))])
    return markdown_table(["", "held-out loss", "more than routed", "seeds"], rows)
