"""The glue of `make peft-tests`, whose run is not a part of these tests: what it replaces, and what it expects."""

import re
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig
from peft_suite.expected import EXPECTED, REFUSALS
from peft_suite.models import MODELS, build
from peft_suite.plugin import Suite, configs, is_named

import peft_queryable
from peft_queryable import QueryableLoraConfig

SOURCE = "\n".join(path.read_text() for path in Path(peft_queryable.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (("LoRA", "MLP", LoraConfig, {"r": 4}), ("LoRA", "MLP", QueryableLoraConfig, {"r": 4})),
        ((LoraConfig(r=4),), (QueryableLoraConfig(r=4),)),
        (("IA3", "MLP", IA3Config, {}), None),
        (("DoRA", "MLP", LoraConfig, {"use_dora": True}), None),
        (("float16",), ("float16",)),
    ],
    ids=["class", "instance", "another method", "refused", "no method"],
)
def test_rows_of_parametrize(row, expected):
    """Rows of LoRA become ours, unless our configuration refuses their fields; those of other methods go."""
    assert Suite().our_row(row) == expected


def test_the_control_keeps_lora():
    row = ("DoRA", "MLP", LoraConfig, {"use_dora": True})
    assert Suite(LoraConfig).our_row(row) == row
    assert set(configs(row)) == {LoraConfig}


@pytest.mark.parametrize("reason", REFUSALS)
def test_every_refusal_is_one_of_the_library(reason):
    """The message of each expected refusal begins as one of the library's does."""
    message = REFUSALS[reason][0].partition("|")[0].replace("\\", "")
    beginning = re.split(r"[(`:]", message.lstrip("`"))[0].strip()
    assert beginning in SOURCE


def test_entries_are_names_or_patterns():
    entries = [entry for lists in EXPECTED.values() for _, entries in lists.values() for entry in entries]
    assert all(entry.startswith("test_") or "*" in entry for entry in entries)
    assert is_named("tests/test_a.py::TestB::test_merge[case]", "test_merge")
    assert not is_named("tests/test_a.py::TestB::test_merge_layers", "test_merge")
    assert is_named("tests/test_a.py::TestB::test_merge[MHA 1]", "*[[]MHA*")


@pytest.mark.parametrize("name", MODELS)
def test_models_can_be_built(name):
    """Every model that stands in for one of the Hub is small."""
    assert build(name).num_parameters() < 30_000_000
