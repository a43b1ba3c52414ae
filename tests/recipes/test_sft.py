"""The recipes, run as their users run them, on a tiny random model."""

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft_queryable  # noqa: F401  for PeftModel.from_pretrained

RECIPES = Path(__file__).parents[1] / "recipes"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # SFTConfig sets it
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]
needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=RECIPES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,  # logits large enough to be sure of a token
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_files(tmp_path_factory):
    """Questions of unequal lengths, answered with their first letter twice."""
    folder = tmp_path_factory.mktemp("data")
    questions = [letter * (1 + i % 5) for i in range(40) for letter in "ab"]
    examples = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": question[0] * 2}],
        }
        for question in questions
    ]
    for name, part in (("train", examples[10:]), ("test", examples[:10])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def arguments(model_folder, data_files, output):
    return [
        *("--model_name_or_path", model_folder, "--output_dir", output),
        *("--train_file", data_files / "train.jsonl", "--test_file", data_files / "test.jsonl"),
        *("--test_batch_size", 4, "--logging_steps", 1, "--report_to", "none", "--max_new_tokens", 4),
    ]


@pytest.fixture(scope="module")
def sft(model_folder, data_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("sft")
    settings = ["--learning_rate", 3e-2, "--max_steps", 40, "--queryable_num_atoms", 6, "--queryable_top_k", 2]
    settings += ["--save_strategy", "steps", "--save_steps", 40]
    stdout = run("sft.py", *arguments(model_folder, data_files, output), *settings)
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
def test_evaluation_equals_one_example_at_a_time(sft, model_folder, data_files, method):
    output, _, results = sft
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    if method != "base":
        model = PeftModel.from_pretrained(model, output / method)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    loss = tokens = correct = 0
    for line in (data_files / "test.jsonl").read_text().splitlines():
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


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe's module, with a command line to parse."""

    def import_recipe(name, *command_line):
        monkeypatch.syspath_prepend(RECIPES)
        monkeypatch.setattr(sys, "argv", [name, *map(str, command_line)])
        return importlib.import_module(name)

    return import_recipe


def test_both_methods_see_the_same_batches(recipe, model_folder, data_files, tmp_path):
    command_line = [*arguments(model_folder, data_files, tmp_path), "--learning_rate", 0, "--max_steps", 5]
    sft = recipe("sft", *command_line)
    script_args, test_args, training_args, model_args, queryable_args = sft.parse()
    train_dataset, _ = sft.load_data(script_args, test_args)
    configs = sft.adapter_configs(model_args, queryable_args)
    losses = {
        method: sft.finetune(sft.make_trainer(tmp_path / method, config, train_dataset, training_args, model_args))[
            "losses"
        ]
        for method, config in configs.items()
    }
    assert len(losses["lora"]) == 5
    assert len({loss for _, loss in losses["lora"]}) == 5
    assert losses["queryable"] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses["lora"]]


def test_a_config_file_sets_all_kinds_of_arguments(recipe):
    sft = recipe("sft", "--config", RECIPES / "sft.yaml", "--lora_r", 3, "--bf16", "false")
    script_args, test_args, training_args, model_args, queryable_args = sft.parse()
    settings = yaml.safe_load((RECIPES / "sft.yaml").read_text()) | {"lora_r": 3, "bf16": False}
    parsed = {}
    for group in (script_args, test_args, training_args, model_args, queryable_args):
        parsed |= vars(group)
    assert {name: parsed[name] for name in settings} == settings
    assert sft.adapter_configs(model_args, queryable_args)["queryable"].r == 3


def test_what_queryable_lora_lacks_is_refused(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("sft", "--use_dora").parse()
    assert "--use_dora has no counterpart" in capsys.readouterr().err


@needs_reasoning_gym
def test_default_data_is_fixed_and_held_out_questions_are_new(recipe):
    reasoning_data = recipe("reasoning_data").reasoning_data
    train, test = reasoning_data()
    again, _ = reasoning_data(train_size=50)
    questions = [{row["prompt"][1]["content"] for row in split} for split in (train, test)]
    assert [len(train), len(test)] == [len(part) for part in questions]  # none twice
    assert not questions[0] & questions[1]
    assert set(train["family"]) == set(test["family"])
    assert [row for row in train if row["family"] == again[0]["family"]][:10] == list(again)[:10]


@pytest.fixture(scope="module")
def instructed(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("instructed")
    settings = ["--train_size", 320, "--test_size", 20, "--max_steps", 40, "--learning_rate", 3e-2]
    names = ["--model_name_or_path", model_folder, "--output_dir", output, "--report_to", "none"]
    stdout = run("instruction_sft.py", *names, *settings, "--max_new_tokens", 3)
    return output, stdout, json.loads((output / "results.json").read_text())["held_out"]


@needs_reasoning_gym
def test_the_instruction_alone_names_the_task(instructed):
    """A model that was trained with instructions is worse with another task's, with none and with a random one."""
    _, _, held_out = instructed
    losses = {kind: sum(task["held_out_loss"] for task in results.values()) / 4 for kind, results in held_out.items()}
    assert list(losses) == ["right", "none", "generic", "paraphrase", "shuffled", "adversarial", "random"]
    assert losses["right"] + 0.2 < min(losses["none"], losses["shuffled"], losses["random"])


@needs_reasoning_gym
def test_routes_follow_the_instruction(instructed):
    """Mean routes [blocks, atoms] of a task are those of the instruction it is given, whatever the numbers."""
    output, stdout, held_out = instructed
    routes = {kind: torch.tensor([task["routes"] for task in results.values()]) for kind, results in held_out.items()}
    right, shuffled = routes["right"], routes["shuffled"]  # [tasks, blocks, atoms]
    assert right.shape == (4, 4, 16)
    torch.testing.assert_close(right.sum(-1), torch.ones(4, 4))
    assert (right - shuffled).abs().max() > 0.05
    torch.testing.assert_close(right.roll(-1, dims=0), shuffled, atol=0.05, rtol=0)
    assert (output / "routes.svg").stat().st_size > 0
    assert (output / "results.md").read_text() in stdout


def test_instruction_config_file(recipe):
    arguments = recipe("instruction_sft", "--config", RECIPES / "instruction_sft.yaml", "--bf16", "false").parse()
    settings = yaml.safe_load((RECIPES / "instruction_sft.yaml").read_text()) | {"bf16": False}
    parsed = {}
    for group in arguments:
        parsed |= vars(group)
    assert {name: parsed[name] for name in settings} == settings


@needs_reasoning_gym
def test_no_question_names_its_task(recipe):
    """Questions are two numbers each, so that tasks look alike; held-out ones are new."""
    train, test = recipe("instruction_data").instruction_data(train_size=80, test_size=40)
    seen = [{(row["task"], row["prompt"][1]["content"]) for row in split} for split in (train, test)]
    assert all(re.fullmatch(r"\d\d, \d\d", question) for _, question in seen[0] | seen[1])
    assert not seen[0] & seen[1]
    assert len(seen[0]) == 80 and len(seen[1]) == 40


@needs_reasoning_gym
def test_answers_are_those_of_the_instruction(recipe):
    train, _ = recipe("instruction_data").instruction_data(train_size=80, test_size=4)
    answers = {
        "sum": lambda a, b: f"{a + b}",
        "difference": lambda a, b: f"{a - b}",
        "divisor": lambda a, b: f"{math.gcd(a, b)}",
        "order": lambda a, b: f"{max(a, b)}, {min(a, b)}",
    }
    for row in train:
        numbers = map(int, row["prompt"][1]["content"].split(", "))
        assert row["completion"][0]["content"] == answers[row["task"]](*numbers)


@pytest.mark.slow
def test_default_model_answers(recipe):
    folder = recipe("smollm2").smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])
