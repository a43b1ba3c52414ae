"""recipes/language: its tasks, its stacked training, what it measures, its command and its tables."""

import json
import math
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from helpers.recipes import cells, run
from scipy.stats import ttest_1samp

import recipes.language.__main__ as recipe
from peft_queryable import record_routing
from recipes.common import report
from recipes.language import stages, sweep, tables
from recipes.language.arguments import QUICK, QUICK_SETTING, Arguments, Setting
from recipes.language.arms import SHOWN, find
from recipes.language.base import new_base, pretrain
from recipes.language.comparisons import best, forgetting, ratio, read
from recipes.language.records import Run, add, finished
from recipes.language.routes import shuffled
from recipes.language.runs import TEST, TRAIN, Job, Runs, finetune
from recipes.language.skills import CONDITIONS, PLACES, PROMPT, SEPARATOR, SKILLS, TASKS, lines, task_lines, tasks_of
from recipes.language.stacked import answer_loss
from recipes.language.stages import LEAST, moved, plot_stages, separation, told_by_usage

SETTING = replace(Setting(), **QUICK_SETTING)


def bases(*seeds):
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(new_base())
    return models


def runs(arm, *seeds, condition="first", rank=2, lr=0.02):
    return Runs(SETTING, Job(condition, rank, arm, lr), seeds, bases(*seeds))


def train_some(arm, *seeds, **job):
    trained = runs(arm, *seeds, **job)
    trained.train(lambda: None)
    return trained


def test_a_line_holds_its_answers():
    """Orders, then maps, by hand: backwards and plus one; turned by one place and mirrored."""
    symbols = torch.tensor([[3, 1, 4, 15, 9, 2]] * 2)
    told = lines(torch.tensor([[1, 1], [2, 2]]), torch.tensor([[17, 26], [17, 30]]), symbols)
    assert told[0].tolist() == [17, 26, 3, 1, 4, 15, 9, 2, SEPARATOR, 3, 10, 0, 5, 2, 4]
    assert told[1].tolist() == [17, 30, 3, 1, 4, 15, 9, 2, SEPARATOR, 14, 11, 0, 6, 13, 12]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_tells_the_task(condition):
    """The cue where there is one, else a symbol, else nothing; and every task is new to the base."""
    assert len(set(TASKS)) == 8 and not set(TASKS) & set(SKILLS)
    tasks = tasks_of(condition, 3, 16)
    told = task_lines(condition, tasks, torch.Generator().manual_seed(0))
    assert (len(set(tasks.tolist())) == 1) == (condition in ("single", "sequence"))
    assert (told[:, 1] - 26).tolist() == (tasks.tolist() if condition in ("token", "sequence") else [-9] * 16)
    for name, place in PLACES.items():
        assert torch.equal(told[:, 2 + place] % 8, tasks) == (condition == name)


@pytest.mark.parametrize("arm", SHOWN)
def test_stacked_runs_train_as_they_would_alone(arm):
    together, alone = train_some(arm, 0, 1), train_some(arm, 1)
    stacked, other = together.losses(TEST)[0], alone.losses(TEST)[0]
    torch.testing.assert_close(stacked[1], other[0], rtol=1e-4, atol=0)
    assert stacked[0] != stacked[1]


@pytest.mark.parametrize("arm", ["lora", "scale-1", "prompted", "prompt", "oracle"])
def test_a_stacked_model_is_its_models(arm):
    """Losses of the stack are those of its first model, called by itself."""
    stacked = runs(arm, 0, 1).stacked
    for parameter in stacked.learned.values():
        torch.nn.init.normal_(parameter, std=0.1)
    told, tasks = task_lines("first", tasks_of("first", 0, 16), torch.Generator().manual_seed(0)), torch.arange(16) % 8
    model = stacked.template.eval()
    model.load_state_dict({name: tensor[0] for name, tensor in stacked.parameters.items()}, strict=False)
    with torch.no_grad(), stacked.routing(model, tasks):
        given = stacked.inputs(told.expand(2, -1, -1), tasks)
        given |= {name: given[name][0] for name in given if name == "instruction_embeds"}
        logits = model(input_ids=told[:, :-1], **given).logits
    expected = answer_loss(logits[:, PROMPT:], told[:, PROMPT + 1 :])
    torch.testing.assert_close(stacked.losses(told.expand(2, -1, -1), tasks)[0], expected)


def test_a_router_with_a_rate_of_its_own():
    """A step of Adam is as long as the rate: ten times as long in keys, priors and queries alone."""
    setting = replace(SETTING, steps=2)  # in the first, B is zero and the router has no gradient
    steps = {}
    for arm in ("scale-1", "router-10"):
        trained = Runs(setting, Job("first", 2, arm, 1e-4), [0], bases(0))
        before = {name: p.clone() for name, p in trained.stacked.learned.items()}
        trained.train(lambda: None)
        steps[arm] = {name: (p - before[name]).abs().max() for name, p in trained.stacked.learned.items()}
    for name, step in steps["scale-1"].items():
        factor = 10 if "router" in name and "atoms" not in name else 1
        torch.testing.assert_close(steps["router-10"][name], factor * step, rtol=0.01, atol=0, msg=name)
    assert any(step > 0 for name, step in steps["router-10"].items() if "keys" in name)


def test_each_task_has_its_own_adapter():
    """With a model per task, it gets the lines of its task alone, and they are those of all other arms."""
    each, one = runs("lora-each", 0, 1, condition="token"), runs("lora", 0, 1, condition="token")
    told, whole = each.stream(0, 16, TRAIN)(), one.stream(0, 16, TRAIN)()
    assert told.shape == (16, 2, 15) and each.stacked.parameters["base_model.model.lm_head.weight"].shape[0] == 16
    assert torch.equal(told[:, :, 1] - 26, (torch.arange(16) % 8)[:, None].expand(-1, 2))
    assert torch.equal(told[8:].transpose(0, 1).flatten(0, 1), whole[1])


def test_shuffled_routes_are_those_of_other_lines():
    """A line's loss is the one that it has when the router is shown the other line's states."""
    trained = train_some("scale-1", 0, lr=0.05)
    told, tasks = trained.stream(0, 16, TEST)(), trained.tasks(0, 16)
    plain = trained.stacked.routes(told, tasks)
    with shuffled(trained.stacked.template, 16):
        swapped = trained.stacked.routes(told, tasks)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(swapped[:, 0], plain[:, 0][:, order])  # the first block's states stay as they were
    assert not torch.equal(swapped[:, 0], plain[:, 0])
    torch.testing.assert_close(trained.stacked.routes(told, tasks), plain)


def test_given_routes_are_one_atom_per_task():
    trained = runs("oracle", 0)
    model, tasks = trained.stacked.template, torch.tensor([5, 0])
    with record_routing(model) as trace, trained.stacked.routing(model, tasks):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long))
    assert [weights.argmax(-1).tolist() for weights in trace.weights().values()] == [[5, 0]] * 4


def test_instructions_reach_routed_arms_alone():
    """Where only the adapter is told, LoRA and static routes know nothing, and the routes of ours know all."""
    for arm, is_told in {"lora": False, "static": False, "scale-1": True, "oracle": False}.items():
        told = runs(arm, 0, condition="instruction")
        lines, tasks = told.stream(0, 8, TEST)(), told.tasks(0, 8)
        assert ("instruction_embeds" in told.stacked.inputs(lines, tasks)) == is_told
    (routes,) = runs("scale-1", 0, condition="instruction").routes()
    (untold,) = runs("scale-1", 0, condition="single").routes()
    assert routes["mi_task"] > 0.5 and untold["mi_task"] == pytest.approx(0, abs=1e-9)


def test_an_adapter_that_is_told_the_prompt():
    """Its instruction is the base's mean last state of the prompt alone, centred and scaled by other lines'."""
    told = runs("prompted", 0, 1)
    lines, tasks = told.stream(0, 256, TEST)(), told.tasks(0, 256)
    embeddings = told.stacked.inputs(lines, tasks)["instruction_embeds"]
    assert embeddings.mean(1).abs().max() < 0.5 and embeddings.std(1).sub(1).abs().max() < 0.5
    for line, own, base in zip(lines, embeddings, bases(0, 1), strict=True):
        states = base.model(line[:, : PROMPT + 1]).last_hidden_state.mean(1).detach()
        centred = [(each - each.mean(0)) / each.std(0) for each in (states, own)]
        torch.testing.assert_close(*centred, rtol=0, atol=1e-3)
    (routes,) = runs("prompted", 0).routes()
    assert routes["mi_task"] > 0.1


def test_forgetting_is_measured_after_every_stage():
    (record,) = finetune(SETTING, Job("sequence", 2, "lora", 0.05), [0], bases(0), lambda: None)
    matrix = torch.tensor(record["matrix"])
    assert matrix.shape == (8, 8)
    assert record["test"] == pytest.approx(matrix[-1].mean().item(), rel=1e-5)
    by_hand = statistics.mean(record["matrix"][7][task] - record["matrix"][task][task] for task in range(7))
    assert forgetting(record) == pytest.approx(by_hand)


def test_what_stages_do_to_routes(tmp_path):
    """Usages are those of a call's routes after the last stage; the columns by hand, and a table and a picture."""
    trained = runs("scale-1", 0, condition="sequence", rank=2, lr=0.05)
    trained.train(lambda: None)
    usage = torch.cat(trained.usages)
    assert usage.shape == (8, 8, 4, 16)
    routes = trained.stacked.routes(trained.stream(3, SETTING.test // 8, TEST)(), trained.tasks(3, SETTING.test // 8))
    torch.testing.assert_close(usage[7, 3], routes[0].mean((1, 2)))
    assert not torch.equal(usage[0, 3], usage[7, 3])
    (record,) = finetune(SETTING, Job("sequence", 2, "scale-1", 0.05), [0], bases(0), lambda: None)
    assert (
        torch.tensor(record["usage"]).shape == usage.shape
        and "usage" not in finetune(SETTING, Job("sequence", 2, "static", 0.05), [0], bases(0), lambda: None)[0]
    )
    assert all(
        value == round(value, 4) for value in torch.tensor(record["usage"], dtype=torch.double).flatten().tolist()
    )
    path = write(tmp_path / "runs.jsonl", [{"setting": {}, **record}])
    assert "moved by its own stage" in tables.report(path) and (tmp_path / "runs-r2-scale-1.svg").exists()


def test_the_columns_of_usages_by_hand():
    """Two tasks and one block of two atoms: the second stage moves both tasks, half of each one's weight."""
    first = [[[1.0, 0.0]], [[1.0, 0.0]]]
    second = [[[0.5, 0.5]], [[0.5, 0.5]]]
    assert told_by_usage(torch.tensor([first, second])) == pytest.approx((0.5, 0.5, 0.0, 1.0))
    apart = [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert told_by_usage(torch.tensor([first, apart])) == pytest.approx((1.0, 0.0, 1.0, 0.0))


def test_the_matrices_of_usages_by_hand():
    """Three tasks and two atoms: the second stage moves its own task, the third one half of that; tasks stay apart."""
    first = [[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]
    second = [[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]]
    third = [[[1.0, 0.0]], [[0.5, 0.5]], [[0.0, 1.0]]]
    usage = torch.tensor([first, second, third])
    assert moved(usage).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 0.0]]
    assert told_by_usage(usage)[:2] == pytest.approx((0.5, 0.5 / 3))
    half, whole = (0.5 - LEAST) * math.log(0.5 / LEAST) + 0.5 * math.log(2), 2 * (1 - LEAST) * math.log(1 / LEAST)
    by_hand = [[0, half, whole], [half, 0, half], [whole, half, 0]]
    torch.testing.assert_close(separation(usage), torch.tensor(by_hand, dtype=torch.double))


def test_a_picture_of_stages_mixes_no_atoms_of_two_seeds(tmp_path, monkeypatch):
    """Two seeds whose atoms have changed places: the tasks of both are apart, and so they are in the picture."""
    one = torch.tensor([[[[0.75, 0.25, 0.0]], [[0.25, 0.75, 0.0]]]] * 2)  # [2 stages, 2 tasks, 1 block, 3 atoms]
    found = {seed: {"usage": usage.tolist()} for seed, usage in ((1, one.flip(-1)), (0, one))}
    figures = []
    monkeypatch.setattr(stages, "save", lambda figure, path: figures.append(figure))
    plot_stages(found, tmp_path / "runs.svg")
    axes = {each.get_title(): each for each in figures[0].axes}
    for stage in (0, 1):
        assert axes[f"after stage {stage}"].images[0].get_array().tolist() == one[stage, :, 0].tolist()
    assert axes["moved by the stage"].images[0].get_array().tolist() == [[0.0, 0.0]]
    divergence = axes["symmetric KL at the end, nats"].images[0].get_array()
    assert divergence[0, 1] == pytest.approx(math.log(3), rel=1e-6) == divergence[1, 0]
    entropies = axes["entropy of an atom's use, bits"].collections[0].get_offsets()[:, 1]
    assert entropies[:2].tolist() == pytest.approx([0.811278, 0.811278], rel=1e-5) and entropies.mask.tolist()[2]


def test_records_from_before_usages_make_tables(tmp_path):
    """A table of what is forgotten, without routes and their picture."""
    old = record("scale-1", 0, 0.01, 1.0, 1.0) | {"condition": "sequence", "matrix": [[1.0, 2.0], [1.5, 1.0]]}
    text = tables.report(write(tmp_path / "runs.jsonl", [old]))
    assert "forgotten" in text and "0.50" in text and "moved" not in text
    assert not (tmp_path / "runs-r8-scale-1.svg").exists()


def test_the_base_learns():
    (model,) = pretrain([0], 20, 16, lambda: None)
    (new,) = bases(0)
    assert not torch.equal(model.lm_head.weight, new.lm_head.weight)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.17e6, rel=0.05)


def test_the_command_goes_on_where_it_stopped(tmp_path):
    results = tmp_path / "quick-runs.jsonl"
    stdout = run("recipes.language", "--quick", "--processes", "1", "--output_dir", tmp_path)
    assert results.with_suffix(".md").read_text() in stdout
    assert (tmp_path / "quick-runs-r2.svg").read_text().endswith("</svg>\n")
    written = results.read_text().splitlines()
    keys = [(record["arm"], record["seed"]) for record in map(json.loads, written)]
    assert keys == [(arm, seed) for arm in QUICK["arms"] for seed in (0, 1)]
    results.write_text("\n".join(written[:3] + written[4:]) + "\n")
    recipe.main(Arguments(str(tmp_path), processes=1, quick=True, **QUICK))
    again = results.read_text().splitlines()
    assert again[:-1] == written[:3] + written[4:]
    missing, redone = json.loads(written[3]), json.loads(again[-1])
    assert (redone["arm"], redone["seed"]) == keys[3]
    assert redone["test"] == pytest.approx(missing["test"], rel=1e-4)
    with pytest.raises(SystemExit, match="another setting: remove it"):
        recipe.main(Arguments(str(tmp_path), processes=1, quick=True, steps=5, **QUICK))


def test_the_command_trains_for_as_many_steps_as_it_is_told(tmp_path):
    recipe.main(Arguments(str(tmp_path), processes=1, quick=True, steps=5, **QUICK | {"arms": ["lora"], "seeds": 1}))
    (longer,) = map(json.loads, (tmp_path / "quick-runs.jsonl").read_text().splitlines())
    assert longer["setting"] == asdict(replace(SETTING, steps=5))


def record(arm, seed, lr, validation, test, **setting):
    return {
        "setting": {"steps": 200, **setting},
        "condition": "first",
        "rank": 8,
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "validation": validation,
        "test": test,
        "exact": 0.5,
        "trainable": 1000,
        "seconds": 2.0,
    }


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_the_tables_against_numbers_by_hand(tmp_path):
    """Validation data choose the rate, test data are shown, and ratios are paired by seed."""
    lora, ours = [2.0, 1.0, 4.0], [0.5, 0.9, 1.5]
    records = [record("lora", seed, 0.01, 1.0, loss) for seed, loss in enumerate(lora)]
    records += [record("lora", seed, 0.02, 2.0, 1e-3) for seed in range(3)]
    records += [record("static", seed, lr, loss, loss) for lr in (0.1, 0.2, 0.3) for seed, loss in enumerate(ours)]
    records += [record("scale-1", seed, lr, lr - 0.1, lr) for lr in (0.2, 0.3) for seed in range(3)]
    records += [record("scale-1", seed, 0.1, math.inf, math.inf) for seed in range(3)]
    path = write(tmp_path / "runs.jsonl", records[::-1])
    found = read(path)["first", 8]
    assert best(found["lora"]).lr == 0.01 and best(found["lora"]).is_edge
    assert best(found["scale-1"]).lr == 0.2 and not best(found["scale-1"]).is_edge
    told = ratio(found["static"][0.1], found["lora"][0.01])
    logs = [math.log(a / b) for a, b in zip(ours, lora, strict=True)]
    low, high = ttest_1samp(logs, 0).confidence_interval(0.95)
    assert told == pytest.approx((math.exp(statistics.mean(logs)), math.exp(low), math.exp(high), 3))
    text = cells(tables.report(path))
    assert "### Decided by the first symbol, r = 8" in text
    assert "| 2.000 | 0.50 | 0.01* | 3 | 1,000 | 2.0 |" in text
    assert f"| {told} |" in text.replace("\N{NO-BREAK SPACE}", " ")


def test_files_of_several_machines_make_one_table(tmp_path, monkeypatch, capsys):
    """Their tables are those of one file with all records; pictures are beside the first."""
    records = [
        record(arm, seed, 0.01, seed + 1, loss * (seed + 1), model="model")
        for seed in range(4)
        for arm, loss in (("lora", 1.0), ("scale-1", 0.5))
    ]
    parts = [write(tmp_path / f"{i}" / "runs.jsonl", records[4 * i : 4 * i + 4]) for i in range(2)]
    whole = tables.report(write(tmp_path / "runs.jsonl", records))
    edges = [f"<!-- {edge} of recipes.language runs -->" for edge in ("start", "end")]
    (tmp_path / "language-models.md").write_text("\n\n".join(edges))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    tables.main([*map(str, parts), "--write_docs"])
    assert capsys.readouterr().out == f"{whole}\n" and "| 4 " in cells(whole)
    assert whole in (tmp_path / "language-models.md").read_text()
    assert (tmp_path / "language-runs-r8.svg").read_text() == (parts[0].parent / "runs-r8.svg").read_text()
    assert not (parts[1].parent / "runs-r8.svg").exists()


def test_records_name_no_folder(tmp_path):
    """A model's folder differs between machines: what one has begun, another goes on with."""
    path, run = tmp_path / "smollm2.jsonl", Run("numbers-prompt", 8, "lora", 0.01, 0)
    add(path, {"model": "/home/one/model"}, [run._asdict()])
    assert "/home" not in path.read_text()
    assert finished(path, {"model": "/home/two/model"}) == {run}
    with pytest.raises(SystemExit, match="runs of another setting"):
        finished(path, {"model": "/home/two/another"})


def test_files_that_make_no_table_together(tmp_path, capsys):
    """Another setting, or another name, is named."""
    one, two, named = (
        write(tmp_path / name, [record("lora", 0, 0.01, 1.0, 1.0, model=model)])
        for name, model in (("1/runs.jsonl", "a"), ("2/runs.jsonl", "b"), ("2/choosing.jsonl", "a"))
    )
    with pytest.raises(SystemExit, match=rf"{two} has runs of another setting than {one}, \{{'model': 'b'\}}"):
        tables.main([str(one), str(two)])
    with pytest.raises(SystemExit):
        tables.main([str(one), str(named)])
    assert "files of one name make one table, got choosing.jsonl, runs.jsonl" in capsys.readouterr().err


def test_ratios_need_common_seeds():
    runs = {seed: {"test": 1.0} for seed in range(3)}
    assert ratio(runs, {7: {"test": 1.0}}) is None
    assert str(ratio(runs, {1: {"test": 2.0}})) == "0.50"
    assert ratio({1: {"test": math.inf}, 2: {"test": 1.0}}, runs).mean == math.inf


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Sizes reach the configuration; ratios are to the paper's size, and the docs get table and picture."""
    stdout = run("recipes.language.sweep", "--quick", "--processes", 1, "--output_dir", tmp_path)
    results = tmp_path / "quick-sweep.jsonl"
    written = results.read_text()
    assert stdout == results.with_suffix(".md").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert [(each["arm"], each["seed"]) for each in records] == [(f"M16-k{k}", s) for k in (2, 4) for s in (0, 1)]
    ours = find("M16-k2").fields
    assert ours == {"num_atoms": 16, "top_k": 2}
    found = sweep.read(results, "instruction", 0.005)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sweep.table(found).splitlines()[2:]]
    assert [row[:3] for row in rows] == [["8", "16", "2"], ["8", "16", "4"]]
    by_hand = str(ratio(found[8, 16, 2], found[8, 16, 4]))
    assert [row[5].replace("\N{NO-BREAK SPACE}", " ") for row in rows] == [by_hand, ""]
    (tmp_path / "language-models.md").write_text(
        "".join(f"<!-- {edge} of recipes.language.sweep -->\n" for edge in ("start", "end"))
    )
    monkeypatch.setattr(report, "DOCS", tmp_path)
    arguments = {"output_dir": str(tmp_path), "processes": 1, "quick": True, "write_docs": True}
    sweep.main(sweep.SweepArguments(**arguments, **sweep.QUICK))
    assert results.read_text() == written
    page = (tmp_path / "language-models.md").read_text()
    assert "#### Told to the adapter alone, rate 0.005" in page
    assert "![quick-sweep-instruction](language-quick-sweep-instruction.svg)" in page
    assert (tmp_path / "language-quick-sweep-instruction.svg").exists()


def test_a_sweep_keeps_rates_apart_and_shows_runs_that_diverged(tmp_path):
    """A second rate in the same file is not mixed in, nor another condition; an infinite loss ends nothing."""
    told = {"mi_task": 1.0, "entropy": 0.5, "dead": 2.0}
    records = [
        record(f"M16-k{k}", seed, lr, 1.0, loss) | told | {"condition": condition}
        for condition, k, lr, loss in (
            ("instruction", 4, 0.005, 1.0),
            ("instruction", 2, 0.005, 0.5),
            ("instruction", 1, 0.005, math.inf),
            ("instruction", 2, 0.01, 9.0),
            ("token", 2, 0.005, 9.0),
        )
        for seed in (0, 1)
    ]
    found = sweep.read(write(tmp_path / "sweep.jsonl", records), "instruction", 0.005)
    assert {sizes: [run["test"] for run in runs.values()] for sizes, runs in found.items()} == {
        (8, 16, 1): [math.inf] * 2,
        (8, 16, 2): [0.5] * 2,
        (8, 16, 4): [1.0] * 2,
    }
    shown = [line.split("|")[5].strip() for line in sweep.table(found).splitlines()[2:]]
    assert shown == ["inf", "0.500", "1.000"]
    assert sweep.plot(found, tmp_path / "sweep.svg").read_text().endswith("</svg>\n")


def test_the_front_of_a_sweep():
    points = [(1, 5.0), (2, 6.0), (3, 4.0), (4, 4.0), (5, 1.0)]
    assert sweep.front(points[::-1]) == [(1, 5.0), (3, 4.0), (5, 1.0)]
