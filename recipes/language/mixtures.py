"""What a real model is fine-tuned on: mixtures of eight languages, one input and another output in each, and texts.

pip install num2words==0.5.14 babel==2.18.0
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from recipes.language.texts import TEXTS, text_data

LANGUAGES = {  # by code
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "nl": "Dutch",
    "sv": "Swedish",
    "fi": "Finnish",
    "hu": "Hungarian",
}
TELLINGS = ("prompt", "examples", "instruction")  # how the language is told
MIXTURES = ("numbers", "territories")
SHOWN = 2  # examples of a prompt, where examples tell the language
SEED = 0  # of the split into training, validation and test items


def items(mixture: str) -> dict[str, dict[str, str]]:
    """What is to be said, and by language how it is said."""
    if mixture == "numbers":
        from num2words import num2words

        return {str(n): {code: num2words(n, lang=code) for code in LANGUAGES} for n in range(1000)}
    from babel import Locale

    english = Locale("en").territories
    said = {code: Locale(code).territories for code in LANGUAGES}
    countries = [code for code in english if code.isalpha() and all(code in names for names in said.values())]
    return {english[code]: {language: said[language][code] for language in LANGUAGES} for code in sorted(countries)}


def split(mixture: str, validation: int, test: int) -> tuple[list[str], ...]:
    """The items of training, validation and test: no item is in two of them."""
    names = list(items(mixture))
    if len(names) <= validation + test:
        raise SystemExit(f"{mixture} has {len(names)} items: lower --validation {validation} or --test {test}.")
    random.Random(SEED).shuffle(names)
    return names[validation + test :], names[:validation], names[validation : validation + test]


def condition_data(condition: str, validation: int, test: int, gsm8k: str) -> tuple[Dataset, Dataset, Dataset]:
    """Examples for training, validation and test.

    Args:
        condition: a mixture of languages and its telling, or texts and "prompt": "numbers-examples", "gsm8k-prompt".
        validation: number of items that are held out to choose by, in eight languages, or of as many texts.
        test: of those that are held out to show.
        gsm8k: Hub id of GSM8K, or its folder.
    """
    name, telling = condition.split("-")
    if name in TEXTS:
        return text_data(name, len(LANGUAGES) * validation, len(LANGUAGES) * test, gsm8k)
    return mixture_data(name, telling, validation, test)


def mixture_data(mixture: str, telling: str, validation: int, test: int) -> tuple[Dataset, Dataset, Dataset]:
    """Examples for training, validation and test in TRL's prompt/completion form, with `instruction` and `task`.

    Args:
        mixture: one of `MIXTURES`.
        telling: one of `TELLINGS`.
        validation: number of items that are held out to choose by; each gives an example in every language.
        test: number of items that are held out to show.
    """
    said = items(mixture)
    train, *held_out = split(mixture, validation, test)
    return tuple(Dataset.from_list(list(examples(said, names, train, telling))) for names in (train, *held_out))


def examples(said: dict[str, dict[str, str]], names: Sequence[str], shown: Sequence[str], telling: str) -> Iterator:
    """One example per item and language; the examples in prompts are of the items `shown`."""
    for name in names:
        for task, (code, language) in enumerate(LANGUAGES.items()):
            draw = random.Random(f"{name} {code}")
            lines = [f"{other} = {said[other][code]}" for other in draw.sample(shown, SHOWN + 1) if other != name]
            before = {"prompt": [language], "examples": lines[:SHOWN], "instruction": []}[telling]
            yield {
                "prompt": "\n".join([*before, f"{name} ="]),
                "completion": f" {said[name][code]}",
                "instruction": f"Say it in {language}.",
                "task": task,
            }


class WithTasks:
    """A collator that keeps the column `task`, as the `task_ids` [B] that PEFT's Poly takes."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.collator(examples) | {"task_ids": torch.tensor([example["task"] for example in examples])}
