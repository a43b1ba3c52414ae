"""recipes/instructions, run as its users run it, on a tiny random model."""

import importlib.util
import json
import math
import re

import pytest
import torch
import yaml
from helpers.recipes import ROOT, run

import recipes.instructions.__main__ as recipe
from peft_queryable.reference_texts import REFERENCE
from recipes.instructions.data import TASKS, instruction_data
from recipes.instructions.separation import cosines_between, load_texts, paraphrases_found, wilson

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


@pytest.fixture(scope="module")
def instructed(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("instructed")
    settings = ["--train_size", 320, "--test_size", 20, "--max_steps", 40, "--learning_rate", 3e-2]
    names = ["--model_name_or_path", model_folder, "--output_dir", output, "--report_to", "none"]
    stdout = run("recipes.instructions", *names, *settings, "--max_new_tokens", 3)
    return output, stdout, json.loads((output / "results.json").read_text())["held_out"]


@needs_reasoning_gym
def test_the_instruction_alone_names_the_task(instructed):
    """A model that was trained with instructions is worse with another task's, with none and with a random one."""
    _, _, held_out = instructed
    losses = {kind: sum(task["held_out_loss"] for task in results.values()) / 4 for kind, results in held_out.items()}
    assert list(losses) == ["right", "none", "generic", "paraphrase", "shuffled", "adversarial", "random"]
    assert losses["right"] + 0.2 < min(losses["none"], losses["shuffled"], losses["random"])


@needs_reasoning_gym
def test_routes_follow_the_instruction(instructed):
    """Mean routes [blocks, atoms] of a task are those of the instruction it is given, whatever the numbers."""
    output, stdout, held_out = instructed
    routes = {kind: torch.tensor([task["routes"] for task in results.values()]) for kind, results in held_out.items()}
    right, shuffled = routes["right"], routes["shuffled"]  # [tasks, blocks, atoms]
    assert right.shape == (4, 4, 16)
    torch.testing.assert_close(right.sum(-1), torch.ones(4, 4))
    assert (right - shuffled).abs().max() > 0.05
    torch.testing.assert_close(right.roll(-1, dims=0), shuffled, atol=0.05, rtol=0)
    assert (output / "routes.svg").stat().st_size > 0
    assert (output / "results.md").read_text() in stdout


def test_a_config_file_sets_all_kinds_of_arguments(command_line):
    file = ROOT / "recipes/instructions/gpu.yaml"
    command_line("--config", file, "--bf16", "false")
    settings = yaml.safe_load(file.read_text()) | {"bf16": False}
    parsed = {}
    for group in recipe.parse():
        parsed |= vars(group)
    assert {name: parsed[name] for name in settings} == settings


@needs_reasoning_gym
def test_no_question_names_its_task():
    """Questions are two numbers each, so that tasks look alike; held-out ones are new."""
    train, test = instruction_data(train_size=80, test_size=40)
    seen = [{(row["task"], row["prompt"][1]["content"]) for row in split} for split in (train, test)]
    assert all(re.fullmatch(r"\d\d, \d\d", question) for _, question in seen[0] | seen[1])
    assert not seen[0] & seen[1]
    assert len(seen[0]) == 80 and len(seen[1]) == 40


@needs_reasoning_gym
def test_answers_are_those_of_the_instruction():
    train, _ = instruction_data(train_size=80, test_size=4)
    answers = {
        "sum": lambda a, b: f"{a + b}",
        "difference": lambda a, b: f"{a - b}",
        "divisor": lambda a, b: f"{math.gcd(a, b)}",
        "order": lambda a, b: f"{max(a, b)}, {min(a, b)}",
    }
    for row in train:
        numbers = map(int, row["prompt"][1]["content"].split(", "))
        assert row["completion"][0]["content"] == answers[row["task"]](*numbers)


@needs_reasoning_gym
@pytest.mark.parametrize(
    ("terms", "encoder", "kinds"), [(["instruction"], "backbone", 7), (["state", "depth"], "none", 1)]
)
def test_rows_of_table_8(model_folder, tmp_path, terms, encoder, kinds):
    """Routes that see the instruction alone, and those of an adapter that is told nothing."""
    names = ["--model_name_or_path", model_folder, "--output_dir", tmp_path, "--report_to", "none"]
    settings = ["--train_size", 40, "--test_size", 20, "--max_steps", 2, "--max_new_tokens", 2]
    choice = ["--queryable_query_terms", *terms, "--instruction_encoder", encoder]
    stdout = run("recipes.instructions", *names, *settings, *choice)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["query_terms"] == terms and config["instruction_encoder"] == (None if encoder == "none" else encoder)
    held_out = json.loads((tmp_path / "results.json").read_text())["held_out"]
    assert len(held_out) == kinds and (tmp_path / "results.md").read_text() in stdout
    assert ("none" in held_out) and ("right" in held_out) == (kinds > 1)


@needs_reasoning_gym
def test_the_table_of_several_runs(instructed, tmp_path):
    """Runs of several seeds make one table, with the lowest and the highest of them."""
    output, _, held_out = instructed
    other = json.loads(json.dumps(held_out))
    for result in other["right"].values():
        result["held_out_loss"] += 1.0
    (tmp_path / "results.json").write_text(json.dumps({"held_out": other}))
    stdout = run("recipes.instructions.results", output, tmp_path)
    loss = sum(result["held_out_loss"] for result in held_out["right"].values()) / 4
    assert f"{loss + 0.5:.3f} ({loss:.3f} to {loss + 1:.3f})" in stdout


def test_halves_of_the_texts_share_nothing():
    """What chooses an encoder never shows it, and no encoder subtracts what it is measured on."""
    texts = list(REFERENCE)
    for choosing in (True, False):
        instructions, paraphrases = load_texts(choosing)
        assert [len(pair) for pair in paraphrases] == [2] * 32
        texts += [*instructions, *(text for pair in paraphrases for text in pair)]
    assert len(texts) == len(set(texts)) == 16 + 2 * 32 * 3
    instructions, paraphrases = load_texts(choosing=True)
    for task in TASKS.values():
        assert task.paraphrase in paraphrases[instructions.index(task.instruction)]


def test_separation_by_hand():
    """Cosines of pairs of instructions, the nearest instruction by cosine, and an interval from the literature."""
    instructions = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    paraphrases = torch.tensor([[[9.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    torch.testing.assert_close(cosines_between(instructions), torch.tensor([0.6, 0.6]))
    assert paraphrases_found(instructions, paraphrases).tolist() == [[True, False], [True, False]]
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
