"""Settings of all tests: few threads, reproducible property tests, and warnings that PEFT itself sets off."""

import copy
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers.models import TARGETS, adapted, llama, randomise
from peft import PeftModel
from torch import nn

torch.set_num_threads(1)
hypothesis.settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("quick")


def pytest_configure(config):
    # What transformers 5.23 renamed is still the name that PEFT, TRL and older transformers use.
    message = r"`\w*gradient_checkpointing\w*` is deprecated"
    config.addinivalue_line("filterwarnings", f"ignore:{message}:FutureWarning")
    # Most tests in scope `prompt` route a call without labels by all its tokens, and mean it.
    config.addinivalue_line("filterwarnings", "ignore:.*has the routing scope 'prompt', but nothing:UserWarning")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def any_peft(monkeypatch) -> None:
    """transformers takes the installed PEFT: 5.24 asks, for every adapter, for one that is not yet released."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0")


@pytest.fixture
def base() -> nn.Module:
    """A tiny Llama."""
    return llama()


@pytest.fixture
def model(base) -> PeftModel:
    """A copy of `base` with a random adapter that takes instructions."""
    model = adapted(copy.deepcopy(base), target_modules=TARGETS, instruction_dim=5)
    randomise(model)
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The folder that `model` is saved in."""
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help="write docs/architectures.md from what passes")


def pytest_terminal_summary(terminalreporter, config):
    """The table of architectures, from the outcome of test_architectures.py."""
    if config.getoption("--write-table"):
        from helpers.architectures import write_table

        reports = [
            (outcome, report)
            for outcome in ("passed", "failed", "skipped")
            for report in terminalreporter.getreports(outcome)
        ]
        write_table(
            {
                report.nodeid.rpartition("::")[2]: outcome
                for outcome, report in reports
                if report.when == "call" or outcome == "skipped"
            }
        )
