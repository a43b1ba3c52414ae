"""Pushing to a Hub and loading from it, over a stand-in on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import running_hub
from huggingface_hub import ModelCard
from models import llama
from safetensors.torch import load

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What tests/hub_session.py saved, and the files of its two branches."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    with running_hub() as hub:
        hub.upload("user/base", folder / "base")
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": "hf_stand_in",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, str(TESTS / "hub_session.py"), str(folder / "results")]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        branches = {branch: hub.find("user/adapter", branch) for branch in ("v1", "main")}
    return torch.load(folder / "results") | {"branches": branches}


def test_x(session):
    print(session["cards"]["PEFT's push"][:400])
    print(session["cards"]["ours"])
    print({k: v.sum() for k, v in session["logits"].items()})
    print(session["branches"]["main"].keys())
