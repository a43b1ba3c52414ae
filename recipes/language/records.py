"""Files of finished runs: a line of JSON per run, with the setting in which it was made."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Run(NamedTuple):
    """What tells the runs of one setting apart."""

    condition: str
    rank: int
    arm: str
    lr: float
    seed: int


def finished(path: Path, setting: Mapping[str, Any]) -> set[Run]:
    """The runs that are in `path`, if it exists."""
    records = load(path) if path.exists() else []
    if any(record["setting"] != named(setting) for record in records):
        raise SystemExit(f"{path} has runs of another setting: remove it, or name another --output_dir.")
    return {Run(*(record[name] for name in Run._fields)) for record in records}


def add(path: Path, setting: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"setting": named(setting), **record}) + "\n" for record in records)


def load(*paths: Path) -> list[dict[str, Any]]:
    """The records of all files, whose settings must be equal."""
    records = [(path, json.loads(line)) for path in paths for line in path.read_text().splitlines()]
    for path, record in records:
        found, expected = record["setting"], records[0][1]["setting"]
        if found != expected:
            other = {name: value for name, value in found.items() if expected.get(name) != value}
            raise SystemExit(f"{path} has runs of another setting than {paths[0]}, {other}: make tables of it alone.")
    return [record for _, record in records]


def named(setting: Mapping[str, Any]) -> dict[str, Any]:
    """`setting` with names of models in place of their folders, which differ between machines."""
    return {name: Path(value).name if isinstance(value, str) else value for name, value in setting.items()}
