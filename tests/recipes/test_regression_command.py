"""recipes/regression as its users run it: going on, failing tasks, estimates and instructions."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from helpers.recipes import cells, run
from helpers.regression import reciprocal

import recipes.regression.__main__ as recipe
from recipes.common.workers import Workers
from recipes.regression import estimate, instructions
from recipes.regression.arguments import QUICK, Arguments
from recipes.regression.baselines import INSTRUCTION_DIM
from recipes.regression.functions import FUNCTIONS
from recipes.regression.jobs import finished
from recipes.regression.settings import SETTINGS


def test_the_command_goes_on_where_it_stopped(tmp_path):
    methods, results = ["lora", "queryable", "doran"], tmp_path / "deep-quick.jsonl"
    stdout = run("recipes.regression", "--quick", "--output_dir", tmp_path, "--methods", *methods)
    assert (tmp_path / "deep-quick.md").read_text() in stdout
    for name in ("curves", "gradients", "routes"):
        assert (tmp_path / f"deep-quick-{name}.svg").read_text().endswith("</svg>\n")
    lines = results.read_text().splitlines()
    keys = [(record["method"], record["function"], record["seed"]) for record in map(json.loads, lines)]
    assert keys == [(method, function, 0) for method in methods for function in ("Ackley", "Sin-Cos")]
    assert [point[0] for point in json.loads(lines[0])["curve"]] == [0, 2]
    results.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    recipe.main(Arguments(str(tmp_path), methods=methods, quick=True, **QUICK))
    again = results.read_text().splitlines()
    assert again[:-1] == lines[:2] + lines[3:]
    missing, redone = json.loads(lines[2]), json.loads(again[-1])
    assert (redone["method"], redone["function"]) == keys[2][:2]
    assert redone["last_test"] == pytest.approx(missing["last_test"], rel=1e-4)


def test_a_task_that_fails_does_not_take_the_others_with_it():
    results = []
    with Workers(1) as workers, pytest.raises(ZeroDivisionError):
        for result in workers.results([partial(reciprocal, number) for number in (2, 0, 4)], 1, "dividing"):
            results.append(result)
    assert results == [0.5, 0.25]


def test_runs_of_another_setting_are_not_taken_for_these(tmp_path):
    setting = SETTINGS["deep"]
    line = {"setting": asdict(setting), "method": "lora", "function": "Ackley", "seed": 0}
    (tmp_path / "deep.jsonl").write_text(json.dumps(line) + "\n")
    assert finished(tmp_path / "deep.jsonl", setting) == {("lora", "Ackley", 0)}
    with pytest.raises(SystemExit, match="another setting: remove it"):
        finished(tmp_path / "deep.jsonl", replace(setting, epochs=4))


def test_the_estimate_counts_all_runs(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "step_seconds", lambda method, setting, runs, device, compiled: 1.0)
    setting = replace(SETTINGS["deep"], batch_size=8, epochs=1200, target_train=21)
    monkeypatch.setitem(SETTINGS, "deep", setting)
    recipe.main(Arguments(estimate=True, methods=["lora"], at_once=15))
    assert "| lora | 1 | 1000.0 | 45.0 |\n| lora | 15 | 1000.0 | 3.0 |" in cells(capsys.readouterr().out)


def test_an_instruction_is_its_description_projected(monkeypatch):
    embeds = {"Ackley": torch.ones(1, 384), "Levy": -torch.ones(1, 384)}
    texts = {FUNCTIONS[name].description: embed for name, embed in embeds.items()}
    monkeypatch.setattr(instructions, "sentence_encoder", lambda name: lambda asked: texts[asked[0]])
    ackley, levy = (instructions.instruction(name, None) for name in embeds)
    assert ackley.shape == (1, INSTRUCTION_DIM)
    assert torch.equal(ackley, -levy) and ackley.norm() > 1
