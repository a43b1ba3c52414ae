"""Five task families of reasoning-gym as TRL conversational prompt/completion data, made from fixed seeds.

pip install --no-deps reasoning-gym==0.1.25
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from itertools import islice
from types import ModuleType

from datasets import Dataset

SYSTEM = "Give only the final answer."
SEED = 2606  # the learning rate and the families were chosen on 2605, so this held-out data is untouched
TRAIN_SIZE, TEST_SIZE = 400, 100  # two adapters train in under 9 minutes on two cores
# Small settings: questions and answers stay short enough for two cores.
FAMILIES = {
    "arithmetic.chain_sum": {"max_terms": 2, "min_digits": 1, "max_digits": 2},
    "arithmetic.calendar_arithmetic": {"tasks": ["is_leap_year"]},
    "algorithmic.word_sequence_reversal": {"min_words": 3, "max_words": 4},
    "algorithmic.number_filtering": {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0},
    "graphs.family_relationships": {"max_family_size": 4},
}


def load_families(families: Iterable[str]):
    """The dataset factory, with these families registered.

    `import reasoning_gym` imports a hundred families and a dozen packages, one of which compiles C.
    Empty packages in its place let each family be imported alone.
    """
    subpackages = sorted({f"reasoning_gym.{family.split('.')[0]}" for family in families})
    for package in ("reasoning_gym", *subpackages):
        if package in sys.modules:
            continue
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise SystemExit(
                "The default data is made by reasoning-gym: pip install --no-deps reasoning-gym==0.1.25, "
                "or name other data with --dataset_name, or --train_file and --test_file."
            )
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    for family in families:
        importlib.import_module(f"reasoning_gym.{family}")
    return importlib.import_module("reasoning_gym.factory").create_dataset


def reasoning_data(train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE) -> tuple[Dataset, Dataset]:
    """Train and held-out examples, as many of each family, no question twice: held-out ones come first."""
    create_dataset = load_families(FAMILIES)
    train, test = [], []
    for family, settings in FAMILIES.items():
        stream = create_dataset(family.split(".")[1], seed=SEED, size=sys.maxsize, **settings)
        examples = distinct_examples(stream, family)
        test += islice(examples, test_size // len(FAMILIES))
        train += islice(examples, train_size // len(FAMILIES))
    return Dataset.from_list(train), Dataset.from_list(test)


def distinct_examples(stream, family: str):
    seen = set()
    for entry in map(stream.__getitem__, range(len(stream))):
        question = entry["question"].strip()
        if question not in seen:
            seen.add(question)
            yield {
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": entry["answer"]}],
                "family": family,
            }
