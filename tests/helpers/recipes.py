"""A tiny model and data in files, for the recipes, and their command lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*command) -> str:
    """What `python -m COMMAND` prints, run from the root of the repository as its users run it."""
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cells(text: str) -> str:
    """`text` with its tables' cells not padded."""
    return re.sub(r" +\|", " |", text)


def save_model(folder: Path) -> Path:
    """Save a random Llama that reads bytes."""
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


def save_data(folder: Path) -> Path:
    """Save train.jsonl and test.jsonl: questions of unequal lengths, answered with their first letter twice."""
    questions = [letter * (1 + i % 5) for i in range(40) for letter in "ab"]
    examples = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": question[0] * 2}],
        }
        for question in questions
    ]
    folder.mkdir(exist_ok=True)
    for name, part in (("train", examples[10:]), ("test", examples[:10])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def sft_arguments(model_folder: Path, data_folder: Path, output: Path) -> list:
    """Arguments of recipes.sft for the tiny model and data."""
    return [
        *("--model_name_or_path", model_folder, "--output_dir", output),
        *("--train_file", data_folder / "train.jsonl", "--test_file", data_folder / "test.jsonl"),
        *("--test_batch_size", 4, "--logging_steps", 1, "--report_to", "none", "--max_new_tokens", 4),
    ]
