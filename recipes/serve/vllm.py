# /// script
# dependencies = ["peft_queryable[vllm,instructions]"]
# ///
"""vLLM's server with the plugin, compared with the routed adapter: greedy tokens of a tiny random Llama.

python -m recipes.serve.vllm

# Put the table into docs/serving.md as well
python -m recipes.serve.vllm --write_docs

It makes the models in outputs/serve-vllm, starts vLLM's server, asks for the base model, for an adapter under two
instructions and for a group of another adapter, and compares the tokens with those of our own `generate`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_queryable import Routes, fix_routes, use_instructions
from recipes.common.report import fill_place, markdown_table
from recipes.serve.tiny import OUTPUT, VOCAB, make_models

PROMPTS, NEW, PORT = 8, 24, 8123
INSTRUCTIONS = ["w5 w6 w7", "w50"]
VARIABLES = {
    "PEFT_QUERYABLE_ADAPTERS": str(OUTPUT / "adapters"),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_PLUGINS": "peft_queryable",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "2",
}
SETTINGS = ["--enable-lora", "--max-loras", "4", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]


def main() -> int:
    torch.manual_seed(0)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    routes = make_models()
    prompts = torch.randint(3, VOCAB, (PROMPTS, 10))
    expected = ours(prompts, routes)
    with server() as url:
        served = {name: [ask(url, name, prompt) for prompt in prompts.tolist()] for name in expected}
    rows = []
    for name, answers in expected.items():
        equal = sum(a == b for a, b in zip(answers, served[name], strict=True))
        others = [each for other, each in expected.items() if other != name]
        own = sum(all(answer != each[i] for each in others) for i, answer in enumerate(answers))
        rows.append([f"`{Path(name).name}`", f"{equal} of {PROMPTS}", f"{own} of {PROMPTS}"])
    text = markdown_table(["model", "answers equal to ours", "unlike those of all other models"], rows)
    print(text)
    if "--write_docs" in sys.argv:
        fill_place("serving.md", "recipes.serve.vllm", text, {})
    return int(served != expected)


def ours(prompts: torch.Tensor, routes: Routes) -> dict[str, list[list[int]]]:
    """By the name that vLLM is asked for, the greedy tokens of our own models."""
    base = AutoModelForCausalLM.from_pretrained(OUTPUT / "base")
    found = {str(OUTPUT / "base"): tokens(base, prompts)}
    told = PeftModel.from_pretrained(base, OUTPUT / "adapters/told").eval()
    for text in INSTRUCTIONS:
        with use_instructions(told, text):
            found[f"told@{text}"] = tokens(told, prompts)
    base = AutoModelForCausalLM.from_pretrained(OUTPUT / "base")
    routed = PeftModel.from_pretrained(base, OUTPUT / "adapters/routed").eval()
    with fix_routes(routed, routes):
        found["routed@legal"] = tokens(routed, prompts)
    return found


def tokens(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ids = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **settings)
    return ids[:, prompts.shape[1] :].tolist()


@contextmanager
def server() -> Iterator[str]:
    """The address of vLLM's server of the base model, once it answers."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(OUTPUT / "base")]
    url = f"http://127.0.0.1:{PORT}"
    with ExitStack() as undo:
        log = undo.enter_context(open(OUTPUT / "vllm.log", "w"))
        process = subprocess.Popen(
            [*command, "--port", str(PORT), *SETTINGS],
            env=os.environ | VARIABLES,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        undo.callback(process.wait)
        undo.callback(process.terminate)
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                raise SystemExit(f"vllm has ended: see {log.name}.")
            time.sleep(1)
        yield url


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def ask(url: str, name: str, prompt: list[int]) -> list[int]:
    body = {"model": name, "prompt": prompt, "max_tokens": NEW, "min_tokens": NEW, "temperature": 0}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"vLLM refuses {name}: {error.read().decode()}") from error


if __name__ == "__main__":
    sys.exit(main())
