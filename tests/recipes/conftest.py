"""The tiny model and data that the recipes are tested with."""

import sys

import pytest
from helpers.recipes import save_data, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def command_line(monkeypatch):
    """Sets the arguments that a recipe will parse."""
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
