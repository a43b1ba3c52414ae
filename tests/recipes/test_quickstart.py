"""recipes/quickstart.py and docs/quickstart.ipynb, cut short."""

import json
import re
from pathlib import Path

import pytest
from helpers.recipes import ROOT

SCRIPT = ROOT / "recipes/quickstart.py"
NOTEBOOK = ROOT / "docs/quickstart.ipynb"


def shortened(code: str) -> str:
    assert code.count("STEPS, FOLDER = 401, ") == 1
    return code.replace("STEPS, FOLDER = 401, ", "STEPS, FOLDER = 51, ")


def test_an_adapter_lives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(shortened(SCRIPT.read_text()), SCRIPT, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed))
    assert last < 0.5 * first
    assert len(re.findall(r"counting (?:up|down), block [0-3]:(?: \d\.\d\d){16}\n", printed)) == 8
    assert "same logits after loading: True" in printed
    _, exported, merged = (float(loss) for loss in re.findall(r"loss counting down, \w+: (\S+)", printed))
    assert exported == pytest.approx(merged, abs=1e-4)  # the last digit that is printed
    config = json.loads(Path("outputs/quickstart/lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def cells(script: str) -> list[tuple[str, str]]:
    """Kinds and texts of the cells of a script in the percent format."""
    _, *parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [
        ("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)) if kind else ("code", text.strip())
        for kind, text in pairs
    ]


def test_the_notebook_is_the_script():
    notebook = json.loads(NOTEBOOK.read_text())
    written = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert written == cells(SCRIPT.read_text()), "Run `make notebook`."


def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[1].source = shortened(notebook.cells[1].source)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "same logits after loading: True" in outputs
