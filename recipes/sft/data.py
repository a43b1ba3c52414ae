"""The data: a data set, files, or by default five task families of reasoning-gym, made from fixed seeds.

pip install --no-deps reasoning-gym==0.1.25
"""

import sys
from functools import partial
from itertools import islice

from datasets import Dataset, load_dataset
from jinja2 import Environment, StrictUndefined, TemplateError, TemplateSyntaxError

from recipes.common.files import columns_of, form_of, hold_out, read_lines
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
        test = load_dataset(**source, split=script_args.dataset_test_split)
    elif script_args.train_file is None:
        return reasoning_data()
    else:
        read = partial(read_lines, kind_of=form_of if script_args.doc_to_text is None else columns_of)
        train = read(script_args.train_file)
        train, test = hold_out(train) if test_args.test_file is None else (train, read(test_args.test_file))
    if script_args.doc_to_text is None:
        return train, test
    form = Form(script_args.doc_to_text, script_args.doc_to_target)
    return tuple(data.map(form, remove_columns=data.column_names or list(next(iter(data)))) for data in (train, test))


class Form:
    """Makes a prompt and its completion, as a user's and an assistant's turn, from a row's columns.

    Args:
        doc_to_text: Jinja template of the prompt; it has the columns, and all of them in `row`.
        doc_to_target: of the completion.
    """

    def __init__(self, doc_to_text: str, doc_to_target: str) -> None:
        environment = Environment(undefined=StrictUndefined, finalize=known)
        try:
            self.templates = [environment.from_string(text) for text in (doc_to_text, doc_to_target)]
        except TemplateSyntaxError as error:
            raise SystemExit(f"A template is no Jinja ({error}): {error.source}") from None
        self.sources = doc_to_text, doc_to_target

    def __call__(self, row: dict) -> dict:
        turns = []
        for template, source in zip(self.templates, self.sources, strict=True):
            try:
                turns.append(template.render({**row, "row": row}).strip())
            except TemplateError as error:
                raise SystemExit(f"{error.message}. A row has {', '.join(row)}; the template is {source}") from None
        prompt, completion = turns
        if not completion:
            raise SystemExit(f"The completion of a row is empty: {self.sources[1]} of {row}")
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }


def known(value: object) -> object:
    """A template's value; Jinja would write "None" for a column that the row lacks."""
    if value is None:
        raise TemplateError("A value is null")
    return value


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
