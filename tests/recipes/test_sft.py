"""recipes/sft, run as its users run it, on a tiny random model."""

import importlib.util
import json

import pytest
import torch
import yaml
from helpers.recipes import ROOT, run, sft_arguments
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_queryable  # noqa: F401  for PeftModel.from_pretrained
import recipes.sft.__main__ as recipe
from recipes.common.evaluate import ScoreArguments, answer, score
from recipes.common.smollm2 import smollm2_folder
from recipes.sft.data import reasoning_data

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


@pytest.fixture(scope="module")
def sft(model_folder, data_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("sft")
    settings = ["--learning_rate", 3e-2, "--max_steps", 40, "--queryable_num_atoms", 6, "--queryable_top_k", 2]
    settings += ["--save_strategy", "steps", "--save_steps", 40]
    stdout = run("recipes.sft", *sft_arguments(model_folder, data_folder, output), *settings)
    return output, stdout, json.loads((output / "results.json").read_text())


def test_both_methods_learn_the_task(sft):
    _, stdout, results = sft
    assert list(results) == ["base", "lora", "queryable"]
    assert results["base"]["exact_match"] == 0
    for method in ("lora", "queryable"):
        assert results[method]["held_out_loss"] < 0.2 * results["base"]["held_out_loss"]
        assert results[method]["exact_match"] > 0.8
        assert f"{results[method]['trainable_parameters']:,}" in stdout
        assert f"{results[method]['exact_match']:.1%}" in stdout


def test_the_written_adapters_are_of_their_method(sft):
    output, _, results = sft
    configs = {
        method: json.loads((output / method / "adapter_config.json").read_text()) for method in list(results)[1:]
    }
    assert [config["peft_type"] for config in configs.values()] == ["LORA", "QUERYABLE_LORA"]
    assert configs["queryable"]["num_atoms"] == 6
    for shared in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        ours, theirs = configs["queryable"][shared], configs["lora"][shared]
        assert ours == theirs if not isinstance(ours, list) else set(ours) == set(theirs)
    assert (output / "curves.png").stat().st_size > 0


def test_the_last_card_is_ours(sft):
    """The card of TRL's checkpoints loads an adapter as plain LoRA; the recipe writes ours over it."""
    lora, queryable = ((sft[0] / method / "README.md").read_text() for method in ("lora", "queryable"))
    assert "It has been trained using [TRL]" in lora
    assert "# Queryable LoRA adapter" in queryable
    assert "TRL" not in queryable


@pytest.mark.parametrize("method", ["base", "lora", "queryable"])
def test_evaluation_equals_one_example_at_a_time(sft, model_folder, data_folder, method):
    output, _, results = sft
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    if method != "base":
        model = PeftModel.from_pretrained(model, output / method)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    loss = tokens = correct = 0
    for line in (data_folder / "test.jsonl").read_text().splitlines():
        example = json.loads(line)
        text = f"<user>{example['prompt'][0]['content']}<|end|><assistant>"
        reference = example["completion"][0]["content"]
        prompt, completion = (torch.tensor([tokenizer.encode(part)]) for part in (text, reference + "<|end|>"))
        ids = torch.cat([prompt, completion], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1]
            answer = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
        loss += torch.nn.functional.cross_entropy(logits, completion[0], reduction="sum").item()
        tokens += completion.shape[1]
        correct += tokenizer.decode(answer, skip_special_tokens=True) == reference
    assert results[method]["held_out_loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert results[method]["exact_match"] == correct / 10


def test_tensorboard_has_the_routes(model_folder, data_folder, tmp_path):
    """The event file of a run with `--report_to tensorboard`, read back, has what results.json has, step by step."""
    settings = ["--max_steps", 10, "--methods", "queryable", "--report_to", "tensorboard"]
    run("recipes.sft", *sft_arguments(model_folder, data_folder, tmp_path), *settings)
    logged = json.loads((tmp_path / "results.json").read_text())["queryable"]["routes"]
    (file,) = (tmp_path / "queryable").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    names = {name for entry in logged for name in entry if name.startswith("routing/")}
    assert {"routing/entropy", "routing/by_input", "routing/gradient_concentration"} <= names
    for name in names:
        read = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert read == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logged]
    assert [entry["step"] for entry in logged] == [1, 6]
    assert "by_input" in (tmp_path / "routes.svg").read_text()


def test_both_methods_see_the_same_batches(command_line, model_folder, data_folder, tmp_path):
    command_line(*sft_arguments(model_folder, data_folder, tmp_path), "--learning_rate", 0, "--max_steps", 5)
    script_args, test_args, queryable_args, model_args, training_args = recipe.parse()
    train_dataset, _ = recipe.load_data(script_args, test_args)
    configs = recipe.adapter_configs(model_args, queryable_args)
    losses = {}
    for method, config in configs.items():
        trainer = recipe.make_trainer(tmp_path / method, config, train_dataset, training_args, model_args)
        losses[method] = recipe.finetune(trainer)["losses"]
    assert len(losses["lora"]) == 5
    assert len({loss for _, loss in losses["lora"]}) == 5
    assert losses["queryable"] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses["lora"]]


def test_a_config_file_sets_all_kinds_of_arguments(command_line):
    file = ROOT / "recipes/sft/paper/gsm8k.yaml"
    command_line("--config", file, "--lora_r", 3, "--bf16", "false")
    script_args, test_args, queryable_args, model_args, training_args = recipe.parse()
    settings = yaml.safe_load(file.read_text()) | {"lora_r": 3, "bf16": False}
    parsed = {}
    for group in (script_args, test_args, training_args, model_args, queryable_args):
        parsed |= vars(group)
    assert {name: parsed[name] for name in settings} == settings
    assert recipe.adapter_configs(model_args, queryable_args)["queryable"].r == 3


def test_what_queryable_lora_lacks_is_refused(command_line, capsys):
    command_line("--use_dora")
    with pytest.raises(SystemExit):
        recipe.parse()
    assert "--use_dora has no counterpart" in capsys.readouterr().err


@needs_reasoning_gym
def test_default_data_is_fixed_and_held_out_questions_are_new():
    train, test = reasoning_data()
    again, _ = reasoning_data(train_size=50)
    questions = [{row["prompt"][1]["content"] for row in split} for split in (train, test)]
    assert [len(train), len(test)] == [len(part) for part in questions]  # none twice
    assert not questions[0] & questions[1]
    assert set(train["family"]) == set(test["family"])
    assert [row for row in train if row["family"] == again[0]["family"]][:10] == list(again)[:10]


@pytest.mark.slow
def test_default_model_answers():
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    ("text", "expected"), [("So #### 4", "4"), ("#### 3\n#### 4 ", "4"), ("four", None), ("", None)]
)
def test_the_answer_in_a_text(text, expected):
    assert answer(text, "#### (.*)") == expected
    assert answer(text, None) == text.strip()


def test_a_completion_without_its_answer_is_refused(model_folder):
    """Else a text without an answer, too, would be right."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    arguments = ScoreArguments(answer_pattern="#### (.*)")
    with pytest.raises(SystemExit, match=r"--answer_pattern '#### \(\.\*\)' matches nothing in the completion 'four'"):
        score(model, tokenizer, [{"prompt": "a", "completion": "four"}], arguments)
    assert score(model, tokenizer, [{"prompt": "a", "completion": "#### 4"}], arguments)["exact_match"] == 0
