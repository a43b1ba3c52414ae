"""Four tasks of reasoning-gym on two numbers: only the instruction says what to do with them.

The families' own questions name the task. Here a question is its two numbers, "47, 12", whatever the family, so an
answer that is better than a guess among the tasks must come from the instruction.

pip install --no-deps reasoning-gym==0.1.25
"""

import re
import sys
from dataclasses import dataclass
from itertools import islice

import torch
from datasets import Dataset
from torch import Tensor

from recipes.common.reasoning import SEED, SYSTEM, load_families


@dataclass(frozen=True)
class Task:
    """A family with settings, which of its questions are kept, and three texts; training sees only the first."""

    family: str
    settings: dict
    kept: str  # what a question of the family must contain
    instruction: str
    paraphrase: str
    adversarial: str  # nearly the words of the instruction, for another task


TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
TASKS = {
    "sum": Task(
        "arithmetic.chain_sum",
        TWO_DIGITS,
        " + ",
        "Add up the two numbers.",
        "What do they make together?",
        "Do not add up the two numbers, repeat them.",
    ),
    "difference": Task(
        "arithmetic.chain_sum",
        TWO_DIGITS,
        " - ",
        "Subtract the second number from the first.",
        "By how much does the first exceed the second?",
        "Subtract the first number from the second.",
    ),
    "divisor": Task(
        "arithmetic.gcd",
        {"min_value": 10, "max_value": 99},
        "",
        "Find the greatest common divisor.",
        "Which is the largest integer that divides both evenly?",
        "Find the least common multiple.",
    ),
    "order": Task(
        "algorithmic.number_sorting",
        {"min_numbers": 2, "max_numbers": 2, "max_decimals": 0, "min_value": 10, "max_value": 99},
        "descending",
        "Sort the numbers from the largest to the smallest.",
        "Put them in descending order.",
        "Sort the numbers from the smallest to the largest.",
    ),
}
GENERIC = "Solve the task."
RANDOM_EMBEDDINGS = 5  # per task


def instruction_data(train_size: int, test_size: int, in_prompt: bool = False) -> tuple[Dataset, Dataset]:
    """Training and held-out examples, the same number from each task; a task has each question once.

    The held-out ones are generated first. With `in_prompt`, each question begins with its instruction.
    """
    create_dataset = load_families({task.family for task in TASKS.values()})
    train, test = [], []
    for name, task in TASKS.items():
        stream = create_dataset(task.family.split(".")[1], seed=SEED, size=sys.maxsize, **task.settings)
        examples = distinct_examples(stream, name, task, in_prompt)
        test += islice(examples, test_size // len(TASKS))
        train += islice(examples, train_size // len(TASKS))
    return Dataset.from_list(train), Dataset.from_list(test)


def distinct_examples(stream, name: str, task: Task, in_prompt: bool):
    seen = set()
    for entry in map(stream.__getitem__, range(len(stream))):
        first_line = entry["question"].splitlines()[0]
        question = numbers(first_line)
        if task.kept in first_line and question not in seen:
            seen.add(question)
            content = f"{task.instruction} {question}" if in_prompt else question
            yield {
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": numbers(entry["answer"])}],
                "instruction": task.instruction,
                "task": name,
            }


def instructions_by_kind(encoder) -> dict[str, dict[str, list[str | Tensor | None]]]:
    """What each task is given when it is tested, by kind: those of the paper's Table 8, and a paraphrase.

    A list of one text, or of several random embeddings, each for a part of the task's examples: a single one could be
    right by luck.
    """
    right = {name: task.instruction for name, task in TASKS.items()}
    others = [*list(right.values())[1:], *list(right.values())[:1]]  # each task gets the next one's
    generator = torch.Generator().manual_seed(SEED)
    return {
        "right": {name: [text] for name, text in right.items()},
        "none": {name: [None] for name in TASKS},
        "generic": {name: [GENERIC] for name in TASKS},
        "paraphrase": {name: [task.paraphrase] for name, task in TASKS.items()},
        "shuffled": {name: [text] for name, text in zip(TASKS, others, strict=True)},
        "adversarial": {name: [task.adversarial] for name, task in TASKS.items()},
        "random": {name: random_like(encoder([text]), generator) for name, text in right.items()},
    }


def random_like(embedding: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Random embeddings [1, d_c] of the norm of `embedding` [1, d_c]."""
    directions = torch.randn(RANDOM_EMBEDDINGS, *embedding.shape, generator=generator)
    return [direction * embedding.norm() / direction.norm() for direction in directions]


def numbers(text: str) -> str:
    """The whole numbers in `text`, always written in the same way."""
    return ", ".join(str(int(float(number))) for number in re.findall(r"-?\d[\d.]*", text))
