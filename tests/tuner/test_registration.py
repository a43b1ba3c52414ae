"""Registration with PEFT: once, with a complete enum member, and found by a process that loads an adapter."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.models import adapted, llama, outputs, randomise, token_ids
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from transformers import LlamaForCausalLM

import peft_queryable
from peft_queryable import QueryableLoraConfig, QueryableLoraModel
from peft_queryable.tuner import registration

MEMBER = PeftType.QUERYABLE_LORA


def test_mappings():
    """PEFT finds the configuration and the tuner by the member."""
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is QueryableLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] is QueryableLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MEMBER] == QueryableLoraModel.prefix


@pytest.mark.parametrize("module", [peft_queryable, registration], ids=lambda module: module.__name__)
def test_reload_registers_nothing_twice(module):
    """Importing again changes neither PEFT's enum nor its mappings, and is no error."""
    members, configs = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.reload(module)
    assert list(PeftType) == members
    assert configs == PEFT_TYPE_TO_CONFIG_MAPPING
    assert PeftType.QUERYABLE_LORA is MEMBER


def test_register_twice():
    """Registering again is no error and changes nothing."""
    registration.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is QueryableLoraConfig


@pytest.mark.parametrize(
    "same",
    [
        lambda: PeftType("QUERYABLE_LORA"),
        lambda: PeftType["QUERYABLE_LORA"],
        lambda: PeftType.__members__["QUERYABLE_LORA"],
        lambda: pickle.loads(pickle.dumps(MEMBER)),
        lambda: copy.copy(MEMBER),
        lambda: copy.deepcopy(MEMBER),
        lambda: PeftType(json.loads(json.dumps(MEMBER))),
        lambda: next(member for member in PeftType if member.name == "QUERYABLE_LORA"),
    ],
    ids=["call", "item", "members", "pickle", "copy", "deepcopy", "json", "iteration"],
)
def test_member_is_complete(same):
    """Every way to reach or copy a member of an enum gives the member itself."""
    assert same() is MEMBER


def test_member_is_like_its_neighbours():
    """The member is a string and a PeftType as LORA is, counted once, equal to nothing else."""
    assert isinstance(MEMBER, str) and isinstance(MEMBER, PeftType)
    assert MEMBER == "QUERYABLE_LORA" and MEMBER.name == MEMBER.value == "QUERYABLE_LORA"
    assert str(MEMBER) == str(PeftType.LORA).replace("LORA", "QUERYABLE_LORA")
    assert repr(MEMBER) == repr(PeftType.LORA).replace("LORA", "QUERYABLE_LORA")
    assert f"{MEMBER}" == f"{PeftType.LORA}".replace("LORA", "QUERYABLE_LORA")
    assert [member.value for member in PeftType].count("QUERYABLE_LORA") == 1
    assert len({*PeftType}) == len(PeftType) == len(PeftType.__members__)
    assert {MEMBER: 1}["QUERYABLE_LORA"] == 1


# One process for both tests below: importing takes most of its time.
FRESH_PROCESS = """
import sys
import torch
import transformers
import peft_queryable
from peft import PeftModel, get_peft_model
from peft.utils import PeftType

base_path, adapter_path, ids_path, logits_path = sys.argv[1:]
base = transformers.LlamaForCausalLM.from_pretrained(base_path)
model = PeftModel.from_pretrained(base, adapter_path).eval()
torch.save(model(torch.load(ids_path)).logits.detach(), logits_path)

for name in [name for name in sys.modules if name.partition(".")[0] == "peft_queryable"]:
    del sys.modules[name]
import peft_queryable as again

assert again is not peft_queryable
for package in (peft_queryable, again):
    config = package.QueryableLoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    model(torch.ones(2, 4)).sum().backward()
print([member.name for member in PeftType].count("QUERYABLE_LORA"))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """Logits of an adapted model, those of the same model loaded in a fresh process, and what that one printed."""
    folder = tmp_path_factory.mktemp("fresh_process")
    base, adapter, ids, logits = (folder / name for name in ("base", "adapter", "ids", "logits"))
    llama().save_pretrained(base)
    model = adapted(LlamaForCausalLM.from_pretrained(base), target_modules=["q_proj", "down_proj"])
    randomise(model)
    model.save_pretrained(adapter)
    inputs = token_ids()
    torch.save(inputs, ids)
    command = [sys.executable, "-c", FRESH_PROCESS, base, adapter, ids, logits]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return outputs(model, {"input_ids": inputs}), torch.load(logits), process.stdout


def test_fresh_process_loads_an_adapter(fresh_process):
    """A process that did not make the adapter loads it from its folder and computes the same logits, bit by bit."""
    here, there, _ = fresh_process
    assert torch.equal(here, there)


def test_import_after_removal_from_sys_modules(fresh_process):
    """A second import of the package (a notebook's, say) adds no second member; both packages' configs train."""
    assert fresh_process[2].splitlines()[-1] == "1"
