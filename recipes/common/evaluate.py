# /// script
# dependencies = ["peft_queryable[recipes]"]
# ///
"""Held-out loss and exact match of a causal language model, with or without an adapter.

python -m recipes.common.evaluate \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
    --adapter outputs/sft/queryable \
    --test_file outputs/sft/test.jsonl

A queryable adapter loads as a plain LoRA does, once peft_queryable is imported.
"""

import json
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, apply_chat_template, get_quantization_config, is_conversational

import peft_queryable  # noqa: F401  registers the method with PEFT
from recipes.common.files import read_lines
from recipes.common.parser import RecipeParser


@dataclass
class ScoreArguments:
    test_batch_size: int = field(default=20, metadata={"help": "Held-out examples per batch."})
    max_new_tokens: int = field(default=24, metadata={"help": "Length at which an answer is cut off."})
    answer_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression whose last match is the answer in a text; else the whole text."},
    )


@dataclass
class EvaluationArguments(ScoreArguments):
    test_file: str = field(kw_only=True, metadata={"help": "JSON lines in TRL's prompt/completion or messages form."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id; without it, the base model."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the numbers."})


def main(args, model_args):
    examples = read_lines(args.test_file)
    model, tokenizer = load(args.adapter, model_args)
    results = score(model, tokenizer, examples, args)
    numbers = "held-out loss {held_out_loss:.3f}, exact match {exact_match:.1%}".format_map(results)
    print(f"{args.adapter or 'the base model'}: {numbers}")
    if args.output_file is not None:
        Path(args.output_file).write_text(json.dumps(results))


def score(model, tokenizer, examples, args) -> dict[str, float]:
    """Mean loss per completion token, and the share of examples whose greedy answer is the completion."""
    examples = sorted((encode(example, tokenizer) for example in examples), key=lambda e: len(e["input_ids"]))
    for example in examples:
        example["answer"] = answer(example["completion"], args.answer_pattern)
        if example["answer"] is None:
            text = (
                f"--answer_pattern {args.answer_pattern!r} matches nothing in the completion {example['completion']!r}"
            )
            raise SystemExit(f"{text}, so that no answer to it could be told right from wrong.")
    batches = [examples[i : i + args.test_batch_size] for i in range(0, len(examples), args.test_batch_size)]
    loss, tokens, correct = 0.0, 0, 0
    for batch in tqdm(batches, desc="evaluating"):
        batch_loss, batch_tokens = completion_loss(model, tokenizer, batch)
        loss, tokens = loss + batch_loss, tokens + batch_tokens
        for example, text in zip(batch, generate(model, tokenizer, batch, args.max_new_tokens), strict=True):
            correct += answer(text, args.answer_pattern) == example["answer"]
    return {"held_out_loss": loss / tokens, "exact_match": correct / len(examples)}


def load(adapter, model_args):
    name, revision = model_args.model_name_or_path, model_args.model_revision
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        device_map={"": PartialState().device},
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval(), tokenizer


def encode(example, tokenizer):
    """The prompt's and the whole text's token ids, as SFTTrainer makes them, and the completion as text."""
    if "messages" in example:
        example = {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]}
    conversational = is_conversational(example)
    if conversational:
        completion = example["completion"][-1]["content"]
        example = apply_chat_template({key: example[key] for key in ("prompt", "completion")}, tokenizer)
    else:
        completion = example["completion"]
        example = {"prompt": example["prompt"], "completion": completion + tokenizer.eos_token}
    texts = [example["prompt"], example["prompt"] + example["completion"]]
    prompt_ids, input_ids = tokenizer(texts, add_special_tokens=not conversational)["input_ids"]
    return {"prompt_ids": prompt_ids, "input_ids": input_ids, "completion": completion}


@torch.no_grad()
def completion_loss(model, tokenizer, batch) -> tuple[float, int]:
    """The sum of the completion tokens' losses, and their number."""
    inputs = pad(model, tokenizer, [example["input_ids"] for example in batch], "right")
    positions = torch.arange(inputs["input_ids"].shape[1], device=model.device)
    prompt_lengths = torch.tensor([len(example["prompt_ids"]) for example in batch], device=model.device)
    is_prompt = positions < prompt_lengths[:, None]
    labels = inputs["input_ids"].masked_fill(is_prompt | (inputs["attention_mask"] == 0), -100)  # [B, T]
    tokens = int((labels != -100).sum())
    return model(**inputs, labels=labels).loss.item() * tokens, tokens


def generate(model, tokenizer, batch, max_new_tokens: int) -> list[str]:
    inputs = pad(model, tokenizer, [example["prompt_ids"] for example in batch], "left")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def pad(model, tokenizer, sequences, side: str):
    return tokenizer.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt").to(model.device)


def answer(text: str, pattern: str | None) -> str | None:
    """The answer in `text`: the last match of `pattern`, None if there is none; all of it without a pattern."""
    matches = [text] if pattern is None else re.findall(pattern, text)
    return matches[-1].strip() if matches else None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the program that started this one says what Ctrl-C has left
    main(*RecipeParser("recipes.common.evaluate", (EvaluationArguments, ModelConfig)).parse({}))
