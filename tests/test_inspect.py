"""`python -m peft_queryable.inspect`: one HTML file, whose numbers are those of the routes."""

import json
import re
from xml.etree import ElementTree

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, randomise
from helpers.words import tokenizer, words

from peft_queryable import metrics, record_routing
from peft_queryable.inspect.__main__ import main

GROUPS = {"a": 3, "b": 30}


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A folder with a base model, an adapter and texts of two groups that have no word in common."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    llama(pad_token_id=0).save_pretrained("base")
    tokenizer().save_pretrained("base")
    model = adapted(
        type(llama()).from_pretrained("base"), target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM", num_atoms=6
    )
    randomise(model)
    model.save_pretrained("adapter")
    lines = [
        {"text": " ".join(f"w{first + (i + j * j) % 20}" for j in range(6 + i % 3)), "task": name}
        for i in range(11)
        for name, first in GROUPS.items()
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return model, lines


def report(*arguments: str) -> str:
    assert main(["adapter", "--data", "texts.jsonl", "--output", "report.html", *arguments]) == 0
    with open("report.html", encoding="utf-8") as file:
        return file.read()


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, without its header."""
    part = page.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)][1:]


def test_the_tables_hold_the_routes(adapter):
    """What the report says of each block, from a recording of every text alone."""
    model, lines = adapter
    page, parts, labels = report("--group", "task"), {}, []
    for line in lines:
        ids = torch.tensor([tokenizer()(line["text"])["input_ids"]])
        with torch.no_grad(), record_routing(model) as trace:
            model(input_ids=ids)
        for block, weights in trace.weights().items():
            parts.setdefault(block, []).append(weights.double())
        labels += [list(GROUPS).index(line["task"])] * ids.shape[1]
    labels = torch.tensor(labels)
    rows = table(page, "Blocks")
    assert [row[0] for row in rows] == list("0123")
    for row, weights in zip(rows, map(torch.cat, parts.values()), strict=True):
        usage = metrics.usage(weights)
        expected = [
            metrics.entropy(weights).mean(),
            metrics.jensen_shannon(weights),
            metrics.information(weights, labels),
            0.0,  # no text is longer than a stretch of positions
            metrics.load_balance(usage),
            usage.max(),
        ]
        assert int(row[1]) == len(labels)
        assert [float(cell) for cell in row[2:]] == pytest.approx([float(e) for e in expected], abs=1.01e-4)
    assert max(float(row[4]) for row in rows) > 0.002  # the groups are told apart


def test_the_file_needs_no_other(adapter):
    page = report("--group", "task")
    assert re.findall(r"<svg", page) and not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "<script" not in page and "<?xml" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)  # well-formed
    assert "#1a1a1a" not in "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))  # the page's own colour
    for said in ("symmetric KL, nats", "gradient norm of the adapter", "route\n", "The group decides"):
        assert said.strip() in page
    assert all(f">{word}</text>" in page for word in adapter[1][0]["text"].split())


def test_constant_routes_are_said(adapter):
    model, _ = adapter
    model.base_model.queryable_lora_router["default"].block_prior.weight.data.mul_(1e4)
    model.save_pretrained("adapter")
    assert re.search(r'<p class="bad">Routes are constant: over \d+ routes', report())


def test_without_groups_there_is_none(adapter):
    page = report()
    assert "symmetric KL" not in page and "The group decides" not in page
    assert "Routes are constant" not in page


def test_a_scope_of_sequences(adapter):
    """One route per text, and no picture along its tokens."""
    model, _ = adapter
    model.peft_config["default"].routing_scope = "sequence"
    model.save_pretrained("adapter")
    page = report("--group", "task", "--rows", "7")
    assert {row[1] for row in table(page, "Blocks")} == {"7"}
    assert "Routes along the first text" not in page


def test_what_routes_of_instructions_are_shown(adapter):
    """An adapter that takes instructions: the report says that no column of them is read."""
    assert "column of instructions" not in report()
    model = adapted(
        type(llama()).from_pretrained("base"),
        target_modules=LLAMA_PROJECTIONS,
        task_type="CAUSAL_LM",
        instruction_dim=4,
    )
    model.save_pretrained("adapter")
    assert "the adapter&#x27;s default, or none; no column of instructions is read" in report()


def test_text_is_escaped(adapter, tmp_path):
    rows = [{"text": words(i, 5), "task": "<b>&" if i else "x"} for i in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "<b>" not in report("--group", "task")


def test_a_missing_column(adapter):
    with pytest.raises(ValueError, match=r"Line 1 of the data has no column 'family', only \['task', 'text'\]"):
        report("--group", "family")


def test_an_empty_file(adapter, tmp_path):
    (tmp_path / "texts.jsonl").write_text("")
    with pytest.raises(ValueError, match="The data file has no lines"):
        report()
