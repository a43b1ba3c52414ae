"""Command lines of the recipes that train through TRL: what is wrong is said before anything is loaded."""

import json
import shutil
import signal

import pytest
import torch
from helpers.recipes import sft_arguments
from safetensors.torch import load_file

import recipes.instructions.__main__ as instructions
import recipes.sft.__main__ as sft
from recipes.common.files import columns_of, hold_out, read_lines
from recipes.common.finetune import StepTimer

EXAMPLE = {"prompt": "a", "completion": "b"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with a good file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text("\n".join([json.dumps(EXAMPLE)] * 30))
    (tmp_path / "settings.yaml").write_text("queryable_routing_scope: casual")
    (tmp_path / "unknown.yaml").write_text("queryable_atoms: 4")
    return tmp_path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--queryable_routing_scope", "casual"], "invalid choice: 'casual' (choose from"),
        (["--config", "settings.yaml"], "--queryable_routing_scope must be one of auto, causal, prompt, sequence"),
        (["--config", "unknown.yaml"], "unknown argument 'queryable_atoms'; is it --queryable_num_atoms?"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--learning_rte", "1"], "unknown argument 'learning_rte'; is it --learning_rate?"),
        (["--queryable_top_k", "17"], "`top_k` must be between 1 and `num_atoms`=16"),
        (["--queryable_init_gate", "2"], "`init_gate` must be between 0 and 1"),
        (["--methods", "loar"], "invalid choice: 'loar'"),
        (["--train_file", "missing.jsonl"], "--train_file: there is no file missing.jsonl"),
        (["--test_file", "good.jsonl"], "--test_file needs --train_file"),
        (["--train_file", "good.jsonl", "--dataset_name", "x"], "pass one of them"),
        (["--assistant_only_loss"], "write the data as prompt and completion"),
        (["--resume_from_checkpoint", "nowhere"], "takes `true` or the folder of a checkpoint, got 'nowhere'"),
        (["--resume_from_checkpoint", "."], "pass --methods queryable, or lora"),
    ],
)
def test_mistakes_are_named(command_line, capsys, files, arguments, message):
    command_line(*arguments)
    with pytest.raises(SystemExit) as end:
        sft.parse()
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said
    assert said.startswith("usage: python -m recipes.sft [--config")


def test_a_settings_file_gives_one_value_of_a_list(command_line, files):
    (files / "one.yaml").write_text("train_file: good.jsonl\nmethods: queryable\nlora_target_modules: all-linear")
    command_line("--config", "one.yaml")
    script_args, _, _, model_args, _ = sft.parse()
    assert script_args.methods == ["queryable"] and model_args.lora_target_modules == "all-linear"


@pytest.mark.parametrize("recipe, own", [(sft, "--train_file"), (instructions, "--train_size")])
def test_help_is_short_and_begins_with_ours(command_line, capsys, recipe, own):
    texts = {}
    for option in ("--help", "--help-all"):
        command_line(option)
        with pytest.raises(SystemExit):
            recipe.parse()
        texts[option] = capsys.readouterr().out
    short, everything = texts.values()
    places = [short.index(f"\n  {name} ") for name in (own, "--queryable_num_atoms", "--lora_r", "--learning_rate")]
    assert places == sorted(places)
    assert "--torch_compile" in everything and "--torch_compile" not in short
    assert len(short.splitlines()) < 150 < len(everything.splitlines())


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "completion": }', "line 3, column 31: not JSON (Expecting value)"),
        ('["a"]', "line 3: needs `prompt` and `completion`, or `messages`, got list"),
        (
            '{"prompt": "a", "answer": "b"}',
            "line 3: needs `prompt` and `completion`, or `messages`, got ['prompt', 'answ",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 3: has messages, unlike the lines before"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([json.dumps(EXAMPLE), "", line]))
    with pytest.raises(SystemExit) as end:
        read_lines(str(file))
    assert f"{file}, {message}" in str(end.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a", "answer": }', "line 3, column 29: not JSON (Expecting value)"),
        ('["a"]', "line 3: needs columns and their values, got list"),
    ],
)
def test_a_bad_row_for_templates_is_named(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([json.dumps({"question": "a", "answer": "b"}), "", line]))
    with pytest.raises(SystemExit) as end:
        read_lines(str(file), columns_of)
    assert f"{file}, {message}" in str(end.value)


def test_without_a_test_file_a_tenth_is_held_out(files, capsys):
    (files / "numbered.jsonl").write_text("\n".join(json.dumps(EXAMPLE | {"prompt": f"{i}"}) for i in range(30)))
    train, test = hold_out(read_lines("numbered.jsonl"))
    assert (len(train), len(test)) == (27, 3)
    assert {*train["prompt"]} | {*test["prompt"]} == {f"{i}" for i in range(30)}
    assert "3 of the 30 examples are held out" in capsys.readouterr().out


# Interruptions


@pytest.fixture
def train(command_line, model_folder, data_folder, monkeypatch):
    """Runs recipes.sft in this process, with a Ctrl-C in the step given; evaluations are counted, not done."""
    evaluated = []

    def evaluate(folder, adapter, *args):
        evaluated.append(folder.name)
        return {"held_out_loss": 1.0, "exact_match": 0.0}

    def run(output, *arguments, interrupt_in=None):
        def on_step_begin(timer, args, state, control, **kwargs):
            timer.start = 0.0
            if state.global_step + 1 == interrupt_in:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(sft, "evaluate", evaluate)
        monkeypatch.setattr(StepTimer, "on_step_begin", on_step_begin)
        evaluated.clear()
        command_line(*sft_arguments(model_folder, data_folder, output), "--max_steps", 12, *arguments)
        sft.main(*sft.parse())
        return evaluated

    return run


def assert_same_training(output, reference):
    """Losses of every step and the saved tensors are equal to the bit, and nothing is left of an interruption."""
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (output, reference))
    for method in list(expected)[1:]:
        assert len(results[method]["losses"]) == 12
        assert results[method]["losses"] == expected[method]["losses"]
        tensors, wanted = (load_file(f / method / "adapter_model.safetensors") for f in (output, reference))
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert not (output / "unfinished.json").exists()


def test_the_same_command_goes_on_after_ctrl_c(train, tmp_path):
    """From the step of the interruption, and not from the beginning: the plain LoRA is not trained again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole) == ["base", "lora", "queryable"]
    with pytest.raises(SystemExit, match=r"Interrupted\. The same command goes on from here\."):
        train(parts, interrupt_in=3)
    assert (parts / "lora/checkpoint-3").is_dir()
    with pytest.raises(SystemExit, match="Interrupted"):
        train(parts, interrupt_in=2)  # of the second method
    assert train(parts) == ["queryable"]
    assert_same_training(parts, whole)
    assert not list(parts.rglob("checkpoint-*"))  # which nobody asked for


@pytest.mark.parametrize("by_folder", [False, True])
def test_resume_from_checkpoint(train, tmp_path, by_folder):
    """From checkpoints of a run that ended otherwise, in either of the ways to name them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = "--methods", "queryable", "--save_strategy", "steps", "--save_steps", 8
    train(whole, *settings)
    shutil.copytree(whole / "queryable/checkpoint-8", parts / "queryable/checkpoint-8")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"checkpoint-8 is of another run\. Pass --resume_from_checkpoint true"):
            train(parts, *settings)
    train(parts, *settings, "--resume_from_checkpoint", parts / "queryable/checkpoint-8" if by_folder else "true")
    assert_same_training(parts, whole)
    state = json.loads((parts / "queryable/checkpoint-12/trainer_state.json").read_text())
    assert state["log_history"][0]["step"] == 1  # that of the checkpoint is kept
