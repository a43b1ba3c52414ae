"""Settings of all tests: few threads, reproducible property tests, and one warning that PEFT itself sets off."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("quick")


def pytest_configure(config):
    # peft 0.21 reads this property of transformers 5.23 models whenever it wraps one.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
