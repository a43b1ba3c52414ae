"""`python -m peft_queryable PROGRAM`: the program runs as under Python itself, with the method registered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import adapted, llama, outputs, randomise, token_ids

from peft_queryable.__main__ import main

REPORT = """
import json, sys
from neighbour import NAME
print(json.dumps([sys.argv, sys.path[0], __name__, __package__ or "", sys.modules["__main__"].__dict__ is globals()]))
sys.exit(7)
"""
ARGUMENTS = ["a", "--b", "--", "-h", "-c", ""]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a script, a module and a package that all report how they are run; the working directory."""
    for place in (tmp_path / "scripts", tmp_path, tmp_path / "package"):
        place.mkdir(exist_ok=True)
        (place / "neighbour.py").write_text("NAME = __name__\n")
    for name in ("scripts/report.py", "report.py", "report with spaces"):
        (tmp_path / name).write_text(REPORT)
    (tmp_path / "package" / "__main__.py").write_text(REPORT.replace("from neighbour", "from .neighbour"))
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "inner.py").write_text(REPORT.replace("from neighbour", "from .neighbour"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "__init__.py").touch()
    (tmp_path / "link.py").symlink_to(tmp_path / "scripts" / "report.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(monkeypatch, *command: str) -> None:
    """Call `main` as `python -m peft_queryable` does: its own file in sys.argv, the working directory in sys.path."""
    monkeypatch.setattr(sys, "argv", ["peft_queryable/__main__.py", *command])
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] in ("neighbour", "package", "scripts", "empty")]:
        del sys.modules[name]  # of the last test's project
    main()


@pytest.mark.parametrize(
    "plain",
    [
        ["report.py"],
        ["scripts/report.py"],
        ["./scripts/../scripts/report.py"],
        ["link.py"],
        ["report with spaces"],
        ["-m", "report"],
        ["-m", "package"],
        ["-m", "package.inner"],
        ["-m", "scripts.report"],
    ],
    ids=" ".join,
)
def test_programs_run_as_under_python(project, monkeypatch, capsys, plain):
    """A script or module sees the arguments, the path, the names and the modules beside it that Python gives it."""
    done = subprocess.run([sys.executable, *plain, *ARGUMENTS], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, plain[-1], *ARGUMENTS)
    assert ended.value.code == 7
    assert json.loads(capsys.readouterr().out) == json.loads(done.stdout)


def test_a_safe_path_stays_safe(project, monkeypatch, capsys):
    """Where Python puts no folder in front of sys.path (-P), neither do we."""
    (project / "report.py").write_text("import sys; print(sys.path[0])")
    monkeypatch.setattr(sys, "argv", ["peft_queryable/__main__.py", "report.py"])
    monkeypatch.setattr(sys, "path", ["/first", *sys.path])
    main()
    assert capsys.readouterr().out == "/first\n"


def test_a_file_goes_before_a_module(project, monkeypatch, capsys):
    """A name that is both is the file: `./` or a full path is not needed."""
    (project / "report").write_text("print('the file')")
    run_here(monkeypatch, "report")
    assert capsys.readouterr().out == "the file\n"


@pytest.mark.parametrize("program", ["nothing", "nothing.py", "nothing/at.py", "../at.py", "", "nothing.inner"])
def test_no_such_program(project, monkeypatch, capsys, program):
    """What is neither a file nor a module ends with status 2 and one line that names it."""
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, program, "--model", "hf")
    assert ended.value.code == 2
    assert f"there is neither a file nor an installed module named {program!r}" in capsys.readouterr().err


def test_a_package_that_does_not_run(project, monkeypatch):
    """A package without `__main__` is Python's error."""
    with pytest.raises(ImportError, match=r"'empty' is a package and cannot be directly executed"):
        run_here(monkeypatch, "empty")


@pytest.mark.parametrize(("command", "status"), [(["--help"], 0), ([], 2), (["-m", "report"], 2)], ids=str)
def test_usage(project, monkeypatch, capsys, command, status):
    """Without a program the usage is printed; `--help` has examples; there are no options but that."""
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *command)
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert "usage: python -m peft_queryable PROGRAM [ARGUMENTS]" in printed.out + printed.err
    assert ("accelerate launch -m peft_queryable train.py" in printed.out) == (status == 0)


UNAWARE = """
import sys
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

base, adapter, ids, logits = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
torch.save(model(torch.load(ids)).logits.detach(), logits)
"""


@pytest.mark.parametrize(
    "launcher",
    [["-m"], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]],
    ids=["python", "accelerate launch"],
)
def test_an_unaware_program_loads_an_adapter(tmp_path, launcher):
    """A script without our import loads an adapter and computes the same logits, bit by bit; alone it fails."""
    llama().save_pretrained(tmp_path / "base")
    model = adapted(type(llama()).from_pretrained(tmp_path / "base"), target_modules=["q_proj", "down_proj"])
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    ids = token_ids()
    torch.save(ids, tmp_path / "ids")
    (tmp_path / "unaware.py").write_text(UNAWARE)
    command = [sys.executable, *launcher, "peft_queryable", "unaware.py", "base", "adapter", "ids", "logits"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits"), outputs(model, {"input_ids": ids}))
