"""`python -m peft_queryable.export`: what it writes, prints and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, outputs, randomise, text
from helpers.words import tokenizer, words
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_queryable import fix_routes, mean_routes, record_routing, set_default_instruction
from peft_queryable.command import encode
from peft_queryable.export.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:Passing a.*:UserWarning:transformers")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A working directory with `base`, an adapter of it and data of two tasks."""
    monkeypatch.chdir(tmp_path)
    llama(initializer_range=0.2).save_pretrained("base")
    tokenizer().save_pretrained("base")
    save("adapter")
    save("static", query_terms=())
    save("instructed", query_terms=("instruction",), instruction_dim=32, instruction_encoder="backbone")
    lines = [{"text": words(seed, 12), "task": "ab"[seed % 2]} for seed in range(16)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def save(name: str, **fields) -> None:
    base = AutoModelForCausalLM.from_pretrained("base")
    model = adapted(base, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM", **fields)
    randomise(model)
    model.save_pretrained(name)


def loaded(adapter: str) -> PeftModel:
    """In float64, so that two models differ by the rounding of what is saved, not of a CPU's matrix products."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter).eval().double()


def fixed_outputs(lines, inputs) -> torch.Tensor:
    """Outputs of the adapter under the mean of its routes on `lines`."""
    model, reader = loaded("adapter"), tokenizer()
    with torch.no_grad(), record_routing(model) as trace:
        for line in lines:
            model(**encode(reader, [line], 512))
    with fix_routes(model, mean_routes(trace)):
        return outputs(model, inputs)


def data() -> list[dict]:
    return [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]


def test_calibrated(project, capsys):
    """The export is the adapter under the mean of all lines but every fourth, whose losses are printed and kept."""
    main(["adapter", "out", "--calibrate", "data.jsonl"])
    inputs = text()
    expected = fixed_outputs([line for i, line in enumerate(data()) if i % 4 != 3], inputs)
    torch.testing.assert_close(outputs(loaded("out"), inputs), expected, atol=1e-5, rtol=1e-5)
    measured = json.loads(Path("out/routes.json").read_text())["losses"]
    assert list(measured) == ["routed", "fixed", "S = 0"]
    assert len(set(measured.values())) == 3
    printed = capsys.readouterr()
    assert ", ".join(f"{name} {loss:.4f}" for name, loss in measured.items()) in printed.out
    assert ("Warning: fixing the routes costs" in printed.err) == (measured["fixed"] - measured["routed"] > 0.05)
    assert "data.jsonl" in Path("out/README.md").read_text()


def test_losses_are_the_models(project):
    """What is printed as routed and fixed is the models' own loss on the lines that are held out."""
    main(["adapter", "out", "--calibrate", "data.jsonl"])
    measured = json.loads(Path("out/routes.json").read_text())["losses"]
    batches = [encode(tokenizer(), [line], 512) for line in data()[3::4]]
    for name, adapter in (("routed", "adapter"), ("fixed", "out")):
        model = loaded(adapter)
        with torch.no_grad():
            own = [model(**batch, labels=batch["input_ids"]).loss.item() for batch in batches]
        assert measured[name] == pytest.approx(sum(own) / len(own), abs=1e-5)


def test_the_gap_is_warned_of(project, monkeypatch, capsys):
    monkeypatch.setattr("peft_queryable.export.__main__.GAP", -100.0)
    main(["adapter", "out", "--calibrate", "data.jsonl"])
    assert "more than -100.0" in capsys.readouterr().err


def test_groups(project):
    """One LoRA for each value of the column, of that value's lines."""
    main(["adapter", "out", "--calibrate", "data.jsonl", "--group", "task"])
    inputs = text()
    for value in "ab":
        lines = [line for line in data() if line["task"] == value]
        expected = fixed_outputs([line for i, line in enumerate(lines) if i % 4 != 3], inputs)
        torch.testing.assert_close(outputs(loaded(f"out/{value}"), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [[], ["--group", "task"]])
def test_merged(project, arguments):
    """`--merge` writes whole models, which answer as the LoRAs do."""
    main(["adapter", "lora", "--calibrate", "data.jsonl", *arguments])
    main(["adapter", "out", "--calibrate", "data.jsonl", "--merge", *arguments])
    inputs = text()
    for part in "ab" if arguments else [""]:
        model = AutoModelForCausalLM.from_pretrained(Path("out") / part).double()
        expected = outputs(loaded(str(Path("lora") / part)), inputs)
        torch.testing.assert_close(outputs(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_without_data(project):
    """A static adapter needs nothing, one that follows instructions alone needs its instruction."""
    main(["static", "out"])
    inputs = text()
    torch.testing.assert_close(outputs(loaded("out"), inputs), outputs(loaded("static"), inputs), atol=1e-5, rtol=1e-5)
    main(["instructed", "french", "--instruction", "w5 w6"])
    main(["instructed", "german", "--instruction", "w7"])
    assert not torch.allclose(outputs(loaded("french"), inputs), outputs(loaded("german"), inputs), atol=1e-3)
    assert "w5 w6" in Path("french/README.md").read_text()


def test_default_instruction(project):
    """What it is without an instruction is known, once a default is saved with it: as a LoRA and merged."""
    with pytest.raises(ValueError, match="depend on the input"):
        main(["instructed", "none", "--merge"])
    model, inputs = loaded("instructed"), text()
    set_default_instruction(model, torch.randn(1, 32))
    model.save_pretrained("ready")
    main(["ready", "lora"])
    main(["ready", "merged", "--merge"])
    expected = outputs(model, inputs)
    assert not torch.allclose(expected, outputs(loaded("instructed"), inputs), atol=1e-3)
    torch.testing.assert_close(outputs(loaded("lora"), inputs), expected, atol=1e-5, rtol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained("merged").double()
    torch.testing.assert_close(outputs(merged, inputs), expected, atol=1e-4, rtol=1e-4)


REFUSED = {
    "merge without routes": (["adapter", "out", "--merge"], "depend on the input"),
    "no routes": (["adapter", "out"], "depend on the input"),
    "own folder": (["adapter", "adapter", "--calibrate", "data.jsonl"], "adapter holds an adapter"),
    "no column": (["adapter", "out", "--calibrate", "data.jsonl", "--group", "tenant"], "no column 'tenant'"),
    "unsafe": (["adapter", "out", "--calibrate", "data.jsonl", "--group", "text"], "takes at least 4"),
    "no adapter": (["lora", "out"], "has the type LORA"),
    "instruction": (["adapter", "out", "--instruction", "w5"], "takes no instruction"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(project, case):
    """What is wrong is named, and nothing is written."""
    main(["static", "lora"])
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        main(arguments)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    assert not Path("out").exists()


@pytest.mark.parametrize("value", ["../a", "..", ".", "", "a/b"])
def test_values_that_name_no_folder(value, project):
    Path("data.jsonl").write_text("\n".join([json.dumps({"text": "w5 w6", "task": value})] * 4))
    with pytest.raises(ValueError, match=rf"Line 1 .*'{re.escape(value)}' cannot be the name of a folder"):
        main(["adapter", "out", "--calibrate", "data.jsonl", "--group", "task"])
