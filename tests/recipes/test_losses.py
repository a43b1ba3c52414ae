"""recipes.serve.losses on a tiny random model: what it measures, how it goes on, and its table."""

import importlib.util
import json
import math

import pytest
import torch
from helpers.recipes import save_model

from recipes.common import report
from recipes.common.arguments import adapter_configs
from recipes.serve import losses, results, trainings

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)

pytestmark = [
    needs_reasoning_gym,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Atoms|Atom) .* dead:UserWarning"),
]


def command(folder, data: str, *more) -> None:
    names = ["--model_name_or_path", folder / "model", "--output_dir", folder, "--report_to", "none", "--use_cpu"]
    sizes = [
        "--train_size",
        20,
        "--test_size",
        20,
        "--calibrate",
        4,
        "--max_steps",
        2,
        "--learning_rate",
        3e-2,
        "--queryable_num_atoms",
        4,
    ]
    losses.main(*losses.parse([data, *map(str, [*names, *sizes, *more])]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe"])
    monkeypatch.setattr(report, "DOCS", tmp_path)
    save_model(tmp_path / "model")
    return tmp_path


def records(folder, data: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{data}.jsonl").read_text().splitlines()]


def test_goes_on_after_the_last_training(folder, monkeypatch):
    """Each training is a line; a second command adds what is missing, and fills the place in the docs."""
    start, end = (f"<!-- {edge} of recipes.serve.losses instructions -->" for edge in ("start", "end"))
    (folder / "serving.md").write_text(f"{start}\n\n{end}\n")
    command(folder, "instructions", "--seeds", 1, "--methods", "lora")
    both = ["--seeds", 2, "--methods", "queryable", "lora"]
    command(folder, "instructions", *both, "--write_docs")
    found = records(folder, "instructions")
    order = [(0, "lora"), (0, "queryable"), (1, "queryable"), (1, "lora")]
    assert [(record["seed"], record["method"]) for record in found] == order
    for record in found:
        for by_task in record["losses"].values():
            assert list(by_task) == ["sum", "difference", "divisor", "order"]
            assert all(math.isfinite(loss) for loss in by_task.values())
    measured = found[1]["losses"]
    assert list(measured) == ["routed", "means", "mean", "closed"]
    assert len({tuple(by_task.values()) for by_task in measured.values()}) == 4  # routes differ, and so do losses
    assert found[1]["losses"] != found[2]["losses"]
    text = (folder / "serving.md").read_text()
    assert len([line for line in text.splitlines() if line.endswith("| 2       |")]) == 5
    monkeypatch.setattr(trainings.Work, "trained", lambda *_: pytest.fail("all trainings are there"))
    command(folder, "instructions", *both)
    with pytest.raises(SystemExit, match="other settings"):
        command(folder, "instructions", *both, "--calibrate", 5)


def test_shares_of_steps(folder, monkeypatch):
    """LoRAs of single tasks take a share of the steps, or all of them."""
    steps = []
    monkeypatch.setattr(
        trainings, "finetune", lambda trainer: steps.append((trainer.train(), len(trainer.train_dataset)))
    )
    more = ["--max_steps", "-1", "--num_train_epochs", 1, "--seeds", 1]
    command(folder, "sft", *more, "--methods", "lora", "each", "each-long")
    assert [(result.global_step, size) for result, size in steps] == [(5, 20), *5 * [(1, 4)], *5 * [(5, 4)]]


def test_without_routes_of_its_own(folder, monkeypatch):
    """An adapter whose router reads nothing loses nothing by a mean; closed gates are another model."""

    def static(*arguments) -> dict:
        configs = adapter_configs(*arguments)
        configs["queryable"].query_terms = ()
        return configs

    monkeypatch.setattr(losses, "adapter_configs", static)
    command(folder, "sft", "--seeds", 1, "--methods", "queryable")
    (record,) = records(folder, "sft")
    found = {name: torch.tensor(list(by_task.values())) for name, by_task in record["losses"].items()}
    torch.testing.assert_close(found["means"], found["routed"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["mean"], found["routed"], atol=1e-5, rtol=0)
    assert (found["closed"] - found["routed"]).abs().max() > 1e-3


def test_table():
    def record(seed: int, method: str, **arms: list[float]) -> dict:
        by_task = {name: dict(zip("ab", values, strict=True)) for name, values in arms.items()}
        return {"seed": seed, "method": method, "losses": by_task}

    text = results.table(
        [
            record(0, "queryable", routed=[1.0, 2.0], mean=[2.0, 2.0]),
            record(1, "queryable", routed=[2.0, 2.0], mean=[2.5, 2.0]),
            record(1, "lora", lora=[1.0, 2.0]),
        ]
    )
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        "one LoRA for all tasks",
        "1.500",
        "-0.500",
        "1",
    ]
    assert "| 1.750 (1.500 to 2.000)" in text and "| +0.375 (+0.250 to +0.500)" in text


def test_which_data_is_needed(capsys):
    with pytest.raises(SystemExit, match=r"sft\|instructions"):
        losses.parse(["--seeds", "1"])
