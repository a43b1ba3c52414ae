"""recipes/benchmark, run on a tiny model: its JSON, tables, pictures and page. No time is judged."""

import json

import pytest
import torch
from helpers.recipes import ROOT, cells, run

import recipes.benchmark.__main__ as recipe
from recipes.benchmark.arguments import QUICK, Arguments
from recipes.benchmark.cells import time_cell
from recipes.benchmark.conditions import read_results
from recipes.benchmark.launches import Kernels, launches
from recipes.benchmark.methods import COUNTED, adapted
from recipes.benchmark.methods import METHODS as ALL_METHODS
from recipes.benchmark.plan import sections
from recipes.benchmark.shapes import Setup, base_model
from recipes.benchmark.timing import paired
from recipes.benchmark.work import WARM_UP
from recipes.common import report

METHODS = ["lora", "causal", "causal+instruction"]
WORKS = ["prefill", "decode_8", "train_checkpointed"]
FIGURES = ["times-cpu-tiny", "growth-cpu"]
CHOICE = ["--methods", *METHODS, "--works", *WORKS, "--sweeps", "length"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark")
    stdout = run("recipes.benchmark", "--quick", "--threads", 1, "--output_dir", output, *CHOICE)
    return output, stdout, json.loads((output / "benchmark.json").read_text())["sections"]


def test_every_section_is_measured(benchmark):
    _, _, sections = benchmark
    measured = [f"eager/{work}" for work in WORKS] + [f"memory/{work}" for work in WORKS] + ["sizes"]
    swept = [f"growth/length/{length}/{kind}" for length in (64, 128) for kind in ("prefill", "train", "memory")]
    assert list(sections) == [f"tiny/{name}" for name in measured] + swept
    for work in WORKS:
        times, memory = sections[f"tiny/eager/{work}"], sections[f"tiny/memory/{work}"]
        assert times["failed"] == memory["failed"] == {}
        assert {method: len(seconds) for method, seconds in times["seconds"].items()} == dict.fromkeys(METHODS, 2)
        assert min(second for seconds in times["seconds"].values() for second in seconds) > 0
        assert list(memory["bytes"]) == METHODS


def test_the_tables_hold_the_figures(benchmark):
    output, stdout, sections = benchmark
    text = (output / "benchmark.md").read_text()
    assert text in stdout
    text = cells(text)
    assert f"```bash\npython -m recipes.benchmark --models tiny --methods {' '.join(METHODS)} " in text
    for work in WORKS:
        seconds = sections[f"tiny/eager/{work}"]["seconds"]
        for method, baseline in (("causal", "lora"), ("causal+instruction", "causal")):
            ratios = sorted(a / b for a, b in zip(seconds[method], seconds[baseline], strict=True))
            median = sum(ratios) / 2  # of two rounds
            assert f"| {median:.3f} ({(ratios[0] + median) / 2:.3f} to {(ratios[1] + median) / 2:.3f}), " in text
    peaks = sections["tiny/memory/train_checkpointed"]["bytes"]
    assert f"| {peaks['causal'] / peaks['lora']:.3f}" in text
    sizes = sections["tiny/sizes"]
    for method in METHODS:
        assert f"| {sizes['trainable'][method]:,} | {sizes['bytes'][method] / 1000:,.0f} |" in text
    assert f"{sizes['flops']['prefill']['causal'] / sizes['flops']['prefill']['lora']:.3f}" in text
    for counted in zip(*(sizes["launches"][method].values() for method in ("causal", "lora")), strict=True):
        (calls, moved), (of_lora, _) = counted
        assert calls > of_lora > 0
        assert f"| {calls:,} ({calls / of_lora:.3f}) | {moved / 1e6:,.0f} MB (" in text
    first, last = (sections[f"growth/length/{length}/memory"]["bytes"] for length in (64, 128))
    ratios = " → ".join(f"{peaks['prompt'] / peaks['lora']:.3f}" for peaks in (first, last))
    assert f"| {ratios} |" in next(
        line for line in text.splitlines() if "| length 64 → 128 | ours, `prompt` |" in line
    )
    for name in FIGURES:
        assert (output / f"{name}.svg").read_text().endswith("</svg>\n")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ([0.9, 1, 1.1], "meets 1.000"),
        ([0.99, 1.01, 1.02], "within noise of 1.000"),
        ([1.1, 1.2, 1.3], "**misses** 1.000"),
    ],
)
def test_a_miss_is_told_from_noise(seconds, words):
    """A target that the lower quartile meets is missed within noise."""
    times = {"seconds": {"prompt": seconds, "lora": [1, 1, 1]}, "failed": {}}
    assert time_cell(times, "prompt", "lora", 1.0).endswith(f"), {words}")


def test_kernels_count_operators_and_bytes():
    """A product and a sum in place are two launches; a view is none. Bytes are those of inputs and outputs."""
    x = torch.ones(4, 4)
    with Kernels() as kernels:
        (x @ x.T).add_(x)
    assert kernels.calls == {"aten::mm": 1, "aten::add_": 1}
    assert kernels.bytes == 6 * 16 * 4
    rows = torch.ones(2, 2, 4)
    with Kernels() as kernels:
        rows @ x  # reshaped by an operator that torch does not call a view
    assert kernels.calls == {"aten::mm": 1}


def test_a_decoding_step_launches_no_more_than_loras():
    """Where the prefill has fixed the routes."""
    setup = Setup("tiny", length=8, prompt=8)
    counted = {method: launches(adapted(method, base_model(setup), setup), method, setup) for method in COUNTED}
    decoding = {method: calls for method, works in counted.items() for calls, _ in [works["decoding step"]]}
    assert decoding["sequence"] == decoding["prompt"] == decoding["lora"] < decoding["causal"]


def test_sweeps_alone():
    assert {name.split("/")[0] for name in sections(Arguments(works=["none"]))} == {"growth"}


def test_a_run_goes_on_where_it_stopped_and_fills_the_page(benchmark, tmp_path, monkeypatch, capsys):
    output, stdout, measured = benchmark
    results = json.loads((output / "benchmark.json").read_text())
    del results["sections"]["growth/length/128/prefill"]
    (output / "benchmark.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    places = [f"recipes.benchmark --device cpu {measured}" for measured in ("--models tiny", "--sweeps")]
    page = "\n\n".join(f"<!-- {edge} of {place} -->" for place in places for edge in ("start", "end"))
    (tmp_path / "speed.md").write_text(page)
    chosen = {"methods": METHODS, "works": WORKS, "sweeps": ["length"], "threads": 1, "quick": True}
    recipe.main(Arguments(output_dir=str(output), write_docs=True, **chosen | QUICK))
    again, before = (
        [line for line in text.splitlines() if not line.startswith("| length ")]  # made of what was missing
        for text in (capsys.readouterr().out, stdout)
    )
    assert again == before  # with the numbers that were there
    assert json.loads((output / "benchmark.json").read_text())["sections"].keys() == measured.keys()
    page = (tmp_path / "speed.md").read_text()
    for text, figure in zip((output / "benchmark.md").read_text().split("\n\n```bash"), FIGURES, strict=True):
        assert f"{text.strip()}\n\n![{figure}]({figure}.svg)" in page
        assert (tmp_path / f"{figure}.svg").read_text() == (output / f"{figure}.svg").read_text()


def test_a_profile_counts_operators(tmp_path, capsys):
    """A run of ours beside LoRA's: one product more per module, and no scaling of its output."""
    chosen = {"methods": ["lora", "prompt"], "works": ["prefill"], "threads": 1, "profile": True}
    recipe.main(Arguments(output_dir=str(tmp_path), **chosen | QUICK))
    text = (tmp_path / "profile-tiny-eager-prefill-prompt.md").read_text()
    assert text in capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:4] for line in text.splitlines() if len(cells := line.split("|")) > 4}
    ours, lora = (int(count) for count in rows["aten::baddbmm"])
    assert (ours, lora) == (7 * 4, 0)  # modules of four layers


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    (tmp_path / "benchmark.json").write_text(json.dumps({"settings": {"batch": 2}, "sections": {}}))
    with pytest.raises(SystemExit, match="was measured with other settings: remove it, or name another --output_dir"):
        read_results(tmp_path / "benchmark.json", {"batch": 1})


def test_methods_share_the_base_models_tensors():
    setup = Setup("tiny")
    base = base_model(setup)
    owned = {parameter.data_ptr() for parameter in base.parameters()}
    for method in ALL_METHODS:
        model = adapted(method, base, setup)
        assert owned <= {parameter.data_ptr() for parameter in model.parameters()}
        assert all(parameter.any() for parameter in model.parameters() if parameter.requires_grad)


def test_each_round_runs_all_and_errors_are_kept():
    calls = []

    def make(name):
        def run():
            calls.append(name)
            if name == "c":
                raise ValueError("not c")
            return len(calls)

        return run

    result = paired({name: lambda name=name: make(name) for name in "abc"}, rounds=8)
    rounds = [calls[i : i + 2] for i in range(2 * WARM_UP + 1, len(calls), 2)]
    assert {tuple(order) for order in rounds} == {("a", "b"), ("b", "a")}
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"a": 8, "b": 8}
    assert result["failed"] == {"c": "ValueError: not c"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "measured", ["--models SmolLM2-135M", "--models SmolLM2-135M --modes compile", "--models Qwen2.5-0.5B", "--sweeps"]
)
def test_the_page_has_a_place(device, measured):
    page = (ROOT / "docs/speed.md").read_text()
    for edge in ("start", "end"):
        assert page.count(f"<!-- {edge} of recipes.benchmark --device {device} {measured} -->") == 1


def test_the_callback_is_timed(tmp_path, capsys):
    """Steps whose routes are counted beside steps without, and one line of the report about them."""
    chosen = {"methods": ["lora", "causal"], "works": ["train"], "sweeps": ["none"], "threads": 1, "quick": True}
    recipe.main(Arguments(output_dir=str(tmp_path), **chosen | QUICK))
    times = json.loads((tmp_path / "benchmark.json").read_text())["sections"]["tiny/callback"]
    assert {method: len(seconds) for method, seconds in times["seconds"].items()} == {"plain": 2, "counted": 2}
    ratio = sum(a / b for a, b in zip(times["seconds"]["counted"], times["seconds"]["plain"], strict=True)) / 2
    assert f"whose routes `RoutingCallback` counts takes {ratio:.3f} (" in capsys.readouterr().out
