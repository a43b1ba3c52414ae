"""The documentation: its code runs, every error has an entry, every public name and field is in the reference."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.models import adapted, llama, text
from helpers.words import tokenizer
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import TrainingArguments
from trl import TrlParser

import peft_queryable
from peft_queryable import QueryableLoraConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_queryable"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
WRITERS = {
    "card.py",
    "version.py",
    "__main__.py",
    "checking.py",
    "runs.py",
    "report.py",
    "page.py",
    "plots.py",
    "reference_texts.py",
}  # what they write is no error, but for what they raise

# Code

CHAT_TEMPLATE = (
    "{% for message in messages %}w4 {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }} </s>{% endgeneration %}{% else %}{{ message.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)


def turns(*contents: str) -> list[dict]:
    return [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant", "user", "assistant"), contents, strict=False)
    ]


DATA = {
    "trl-lib/tldr": {"prompt": "w5 w6 w7", "completion": " w8 w9"},
    "trl-lib/Capybara": {"messages": turns("w5 w6", "w7 w8", "w9", "w10")},
    "trl-lib/ultrafeedback_binarized": {"chosen": turns("w5 w6", "w7 w8"), "rejected": turns("w5 w6", "w9")},
    "trl-lib/DeepMath-103K": {"prompt": turns("w5 w6 w7"), "solution": "w8"},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working directory in which the models and data sets that the pages name are small local folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    reader = tokenizer()
    reader.chat_template = CHAT_TEMPLATE
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        llama(pad_token_id=0).save_pretrained(name)
        reader.save_pretrained(name)
    for name, row in DATA.items():
        Path(name).mkdir(parents=True)
        Path(name, "train.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    check = TrainingArguments.__post_init__

    def on_cpu(arguments):
        arguments.use_cpu = True
        check(arguments)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_cpu)


def blocks(page: str, language: str) -> list[re.Match]:
    """Code blocks of `page` in `language`: groups `title` and `code`."""
    pattern = rf'^```{language}(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```$'
    return list(re.finditer(pattern, page, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/scopes.md",
        "docs/trl.md",
        "docs/instructions.md",
        "docs/adapters.md",
        "docs/routes.md",
        "docs/serving.md",
        "docs/index.md",
        "docs/tuning.md",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:trl")
@pytest.mark.filterwarnings("ignore::FutureWarning:trl")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Adapter french was active which is now deleted:UserWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_code_runs(name, hub, monkeypatch):
    """The Python code of a page runs from top to bottom, on tiny models and data."""
    page = (ROOT / name).read_text()
    for block in blocks(page, "yaml"):
        Path(block["title"]).write_text(block["code"])
    namespace = {"base_model": llama(pad_token_id=0), "inputs": text()}
    for block in blocks(page, "python"):
        monkeypatch.setattr(sys, "argv", (block["title"] or name).split())
        above = "\n" * page.count("\n", 0, block.start("code"))  # so that tracebacks show the page's lines
        exec(compile(above + block["code"], ROOT / name, "exec"), namespace)


def test_the_settings_of_a_page_are_the_recipes(hub, monkeypatch):
    """The recipe takes every line of the file that docs/trl.md shows for it."""
    (block,) = [b for b in blocks((ROOT / "docs/trl.md").read_text(), "yaml") if b["title"] == "recipe.yaml"]
    Path("recipe.yaml").write_text(block["code"])
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", "recipe.yaml", "--bf16", "false"])
    parsed = {}
    for group in importlib.import_module("recipes.sft.__main__").parse():
        parsed |= vars(group)
    settings = yaml.safe_load(block["code"])
    assert {name: parsed[name] for name in settings} == settings


# Troubleshooting


class Sentences(ast.NodeVisitor):
    """Patterns of what modules can say: all strings of `raise` statements, and any of four words or more elsewhere.

    Docstrings and the help texts of fields are not among them.
    """

    def __init__(self, is_writer: bool) -> None:
        self.is_writer = is_writer
        self.patterns: set[str] = set()
        self.error = ""

    def add(self, pieces: list[ast.expr]) -> None:
        words = [re.sub(r"\s", " ", piece.value) if isinstance(piece, ast.Constant) else None for piece in pieces]
        is_sentence = len(" ".join(word for word in words if word).split()) > 3
        if self.error or (is_sentence and not self.is_writer):
            self.patterns.add(self.error + "".join(".+?" if word is None else re.escape(word) for word in words))

    def visit_Raise(self, node: ast.Raise) -> None:
        if isinstance(node.exc, ast.Call):
            self.error = ast.unparse(node.exc.func) + ": "
        self.generic_visit(node)
        self.error = ""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.add(node.values)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.add([node])

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "metadata":
            self.generic_visit(node)


def sentences() -> set[str]:
    patterns = set()
    paths = list(PACKAGE.rglob("*.py"))
    assert len(paths) > 20  # every folder of the package
    for path in paths:
        visitor = Sentences(is_writer=path.name in WRITERS)
        visitor.visit(ast.parse(path.read_text()))
        patterns |= visitor.patterns
    return patterns


def entries(language: str) -> list[str]:
    """Messages on the troubleshooting page, each in one line."""
    return [" ".join(block["code"].split()) for block in blocks(TROUBLESHOOTING.read_text(), language)]


def test_every_error_has_an_entry():
    """Each message of the package, and each reason that goes into one, is on the page as it would be printed."""
    reasons = re.findall(r"^\|.*\|$", TROUBLESHOOTING.read_text(), flags=re.MULTILINE)
    printed = "\n".join(entries("text") + reasons)
    assert [pattern for pattern in sentences() if not re.search(pattern, printed)] == []


def test_every_entry_is_an_error():
    """No message on the page is one that the package does not have."""
    messages = re.compile(rf"(\w+: )?({'|'.join(sentences())})")
    assert [entry for entry in entries("text") if not messages.fullmatch(entry)] == []


class Unknown(nn.Module):
    """A model of which PEFT knows no default targets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


def load_without_registration():
    adapted(llama(), target_modules=["q_proj"]).save_pretrained("adapter")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.QUERYABLE_LORA)
        PeftModel.from_pretrained(llama(), "adapter")


OTHERS_ERRORS = {
    "registration": load_without_registration,
    "transformers": lambda: llama().add_adapter(QueryableLoraConfig(target_modules=["q_proj"])),
    "targets": lambda: adapted(Unknown()),
    "two methods": lambda: adapted(llama(), target_modules=["q_proj"]).add_adapter("other", LoraConfig()),
}


def test_errors_of_others_are_quoted_right(hub, any_peft):
    """What the page quotes of PEFT's errors is what PEFT says today."""
    said = []
    for cause in OTHERS_ERRORS.values():
        with pytest.raises(Exception) as caught:
            cause()
        said.append(f"{caught.typename}: {caught.value}")
    assert entries("pytb") == said


@pytest.mark.parametrize("config_class", [LoraConfig, QueryableLoraConfig])
def test_parsers_take_no_configuration_of_peft(config_class):
    """As the page says, in words that depend on what was imported before: Python caches unions in either order."""
    with pytest.raises((ValueError, TypeError), match=r"is allowed for `Union`|parameterized generic") as caught:
        TrlParser(config_class)
    page = (ROOT / "docs/troubleshooting.md").read_text().replace("\n", " ")
    assert (
        re.search(
            r"Only `Union\[X, NoneType\]` \(i.e., `Optional\[X\]`\) is allowed|isinst.*generic", str(caught.value)
        )[0]
        in page
    )


# Reference


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    public = set(peft_queryable.__all__) - {"__version__"}
    assert public <= set(re.findall(r"^::: peft_queryable\.(\w+)$", page, flags=re.MULTILINE))


def test_reference_has_every_field():
    """The page as built has a row for each field that LoraConfig lacks, with its default and its help text."""
    rows = [row.split(" | ") for row in hooks().on_page_markdown((ROOT / "docs/api.md").read_text()).splitlines()]
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    for field in dataclasses.fields(QueryableLoraConfig):
        if field.name not in inherited:
            (row,) = [row for row in rows if row[0] == f"| `{field.name}`"]
            assert row[-2:] == [f"`{field.default!r}`", field.metadata["help"] + " |"]


# Pictures


def test_no_picture_is_large():
    assert [path.name for path in (ROOT / "docs").rglob("*.svg") if path.stat().st_size > 200_000] == []
