"""Training and held-out examples in files of JSON lines, in TRL's prompt/completion or messages form."""

import json
from collections.abc import Callable

from datasets import Dataset, load_dataset

FORMS = (("prompt", "completion"), ("messages",))
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_SEED = 0.1, 500, 0


def form_of(example: object) -> tuple[str, ...]:
    """Which of `FORMS` an example has."""
    for form in FORMS:
        if isinstance(example, dict) and all(example.get(name) for name in form):
            return form
    keys = list(example) if isinstance(example, dict) else type(example).__name__
    raise ValueError(f"needs `prompt` and `completion`, or `messages`, got {keys}.")


def columns_of(row: object) -> tuple[str, ...]:
    """The columns of a row for templates."""
    if not isinstance(row, dict):
        raise ValueError(f"needs columns and their values, got {type(row).__name__}.")
    return tuple(sorted(row))


def read_lines(path: str, kind_of: Callable[[object], tuple[str, ...]] = form_of) -> Dataset:
    """The examples in the file, after a look at each line: `load_dataset` does not say which one it cannot read.

    Args:
        path: a file of JSON lines.
        kind_of: what must be the same for all lines.
    """
    first = None
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                kind = read_line(line, f"{path}, line {number}", kind_of)
                first = first or kind
                if kind != first:
                    raise SystemExit(f"{path}, line {number}: has {' and '.join(kind)}, unlike the lines before.")
    if first is None:
        raise SystemExit(f"{path} has no examples.")
    return load_dataset("json", data_files=str(path), split="train")


def read_line(line: str, place: str, kind_of: Callable[[object], tuple[str, ...]]) -> tuple[str, ...]:
    try:
        return kind_of(json.loads(line))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{place}, column {error.colno}: not JSON ({error.msg}): {line.strip()[:80]}") from None
    except ValueError as error:
        raise SystemExit(f"{place}: {error}") from None


def hold_out(examples: Dataset) -> tuple[Dataset, Dataset]:
    """A tenth of `examples`, but no more than 500, are held out, always the same ones."""
    if len(examples) < 2:
        raise SystemExit("One example cannot be split into training and held-out data: pass --test_file.")
    size = min(HELD_OUT_MOST, max(1, int(len(examples) * HELD_OUT_SHARE)))
    parts = examples.train_test_split(test_size=size, seed=HELD_OUT_SEED)
    print(f"No --test_file: {size} of the {len(examples)} examples are held out.")
    return parts["train"], parts["test"]
