"""The data: a data set, files, or by default five task families of reasoning-gym, made from fixed seeds.

pip install --no-deps reasoning-gym==0.1.25
"""

import sys
from itertools import islice

from datasets import Dataset, load_dataset

from recipes.common.files import hold_out, read_lines
from recipes.common.reasoning import SEED, SYSTEM, load_families

TRAIN_SIZE, TEST_SIZE = 400, 100  # two adapters train in under 9 minutes on two cores
# Small settings keep questions and answers short enough for two cores.
FAMILIES = {
    "arithmetic.chain_sum": {"max_terms": 2, "min_digits": 1, "max_digits": 2},
    "arithmetic.calendar_arithmetic": {"tasks": ["is_leap_year"]},
    "algorithmic.word_sequence_reversal": {"min_words": 3, "max_words": 4},
    "algorithmic.number_filtering": {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0},
    "graphs.family_relationships": {"max_family_size": 4},
}


def load_data(script_args, test_args):
    """Training and held-out examples in TRL's prompt/completion or messages form."""
    if script_args.dataset_name is not None:
        source = {"path": script_args.dataset_name, "name": script_args.dataset_config}
        train = load_dataset(**source, split=script_args.dataset_train_split, streaming=script_args.dataset_streaming)
        return train, load_dataset(**source, split=script_args.dataset_test_split)
    if script_args.train_file is None:
        return reasoning_data()
    train = read_lines(script_args.train_file)
    return hold_out(train) if test_args.test_file is None else (train, read_lines(test_args.test_file))


def reasoning_data(train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE) -> tuple[Dataset, Dataset]:
    """Training and held-out examples, the same number from each family; every question occurs once.

    The held-out ones are generated first, so that they do not depend on the size of the training data.
    """
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
