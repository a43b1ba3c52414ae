"""Pushing to a Hub and loading from it, over a stand-in on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import Hub, running_hub
from helpers.models import llama
from helpers.recipes import ROOT, save_data, save_model, sft_arguments
from huggingface_hub import ModelCard


def run(hub: Hub, home: Path, *command) -> None:
    """Run Python in a process of its own, whose Hub is `hub`."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What helpers/hub_session.py saved, and the files of the two branches it pushed to."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    with running_hub() as hub:
        hub.upload("user/base", folder / "base")
        run(hub, folder / "home", "-m", "helpers.hub_session", folder / "results")
        files = {branch: hub.find("user/adapter", branch) for branch in ("v1", "main")}
    return torch.load(folder / "results") | {"files": files}


def test_what_is_pushed(session):
    """A push leaves a configuration, safetensors and a card, and no other file, on the branch it names."""
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {branch: {*files} for branch, files in session["files"].items()} == {"v1": names, "main": names}
    assert session["files"]["v1"] != session["files"]["main"]


@pytest.mark.parametrize("revision", ["v1", "main"])
@pytest.mark.parametrize("loader", ["PeftModel", "AutoPeftModel"])
def test_what_is_pushed_loads(session, loader, revision):
    """Either loader gives the adapter of the revision that is asked for, bit by bit."""
    logits = session["logits"]
    assert not torch.allclose(logits["pushed as v1"], logits["pushed as main"], atol=1e-3)
    assert torch.equal(logits[f"{loader} {revision}"], logits[f"pushed as {revision}"])


def test_the_code_on_the_pushed_card_works(session):
    """The snippet of the card on the Hub, as it stands there, loads the adapter."""
    assert torch.equal(session["logits"]["card"], session["logits"]["pushed as main"])


def test_the_pushed_card_is_true(session):
    """`model_card(...).push_to_hub` replaces the card of transformers' push, and later pushes keep ours."""
    card = ModelCard(session["cards"]["ours"])
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "user/base",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:user/base", "peft", "queryable-lora", "transformers"],
    }
    assert 'PeftModel.from_pretrained(base_model, "user/adapter")' in card.text
    assert "[More Information Needed]" not in card.text
    assert session["cards"]["pushed again"] == session["cards"]["ours"]


@pytest.mark.slow
def test_the_recipe_pushes_our_card(tmp_path):
    """recipes.sft with `--push_to_hub` ends with our card on the Hub, after TRL's of each checkpoint."""
    files = save_model(tmp_path / "model"), save_data(tmp_path / "data"), tmp_path / "out"
    command_line = [*sft_arguments(*files), "--methods", "queryable", "--max_steps", 2]
    settings = ["--save_strategy", "steps", "--save_steps", 1, "--push_to_hub", "--hub_model_id", "user/tuned"]
    with running_hub() as hub:
        run(hub, tmp_path / "home", "-m", "recipes.sft", *command_line, *settings)
        card = hub.find("user/tuned", "main")["README.md"].decode()
    assert "# Queryable LoRA adapter" in card
    assert "library_name: peft" in card
