# /// script
# dependencies = ["peft_queryable[vllm,instructions]"]
# ///
"""What vLLM's server with the plugin answers to names that cannot be served, and whether it lives on.

python -m recipes.serve.refusals

It makes the models of recipes/serve/vllm.py and some broken ones in outputs/serve-vllm, starts vLLM's server, and
prints the status and the text of each answer. Good names are asked for before and after, and must get the same tokens;
so must an adapter whose damaged file was put right while the server ran.
"""

import json
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch

from recipes.common.report import markdown_table
from recipes.serve.tiny import OUTPUT, make_adapter, make_models
from recipes.serve.vllm import server

ADAPTERS = OUTPUT / "adapters"
GOOD = ["told@w50", "routed@legal"]
REFUSED = {
    "nobody": "no such adapter",
    "nobody@w50": "no such adapter",
    "routed": "routes depend on tokens",
    "routed@w50": "routes depend on tokens",
    "routed@medical": "no such group",
    "static@w50": "no encoder of instructions",
    "told": "no default instruction",
    "elsewhere@w50": "another base model",
    "config@w50": "adapter_config.json is cut off",
    "tensors@w50": "adapter_model.safetensors is cut off",
    "missing@w50": "adapter_model.safetensors is missing",
    "encoder@w50": "the encoder's folder is missing",
    "routed@broken": "tensors of the group are cut off",
    "routed@empty": "tensors of the group are missing",
    "routed@halved": "adapter_config.json of the group is cut off",
}
PROMPT = list(range(3, 13))


def main() -> int:
    torch.manual_seed(0)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    make_models()
    make_broken()
    with server() as url:
        before = [ask(url, name) for name in GOOD]
        rows = [[f"`{name}`", why, *ask(url, name)] for name, why in REFUSED.items()]
        after = [ask(url, name) for name in GOOD]
        left = [path.name.split("-")[0] for path in (OUTPUT / "exports").iterdir()]
        shutil.copy(ADAPTERS / "told/adapter_model.safetensors", ADAPTERS / "tensors")
        mended = ask(url, "tensors@w50")
    print(markdown_table(["model", "what is wrong with it", "status", "text"], rows))
    print(f"Good ones: {dict(zip(GOOD, before, strict=True))}; the same after: {after == before}.")
    print(
        f"Exports that were left are of {left}. Once mended, `tensors@w50` equals `told@w50`: {mended == before[0]}."
    )
    refused = all(row[2] in (400, 404) for row in rows)
    return int(not (refused and after == before and mended == before[0] and left == ["told"]))


def make_broken() -> None:
    """Adapters that cannot be served, each for one reason."""
    make_adapter("static", query_terms=())
    for name in ("elsewhere", "config", "tensors", "missing", "encoder"):
        shutil.copytree(ADAPTERS / "told", ADAPTERS / name)
    change(ADAPTERS / "elsewhere", base_model_name_or_path="somebody/else")
    change(ADAPTERS / "encoder", instruction_encoder=str(OUTPUT / "nowhere"))
    cut(ADAPTERS / "config/adapter_config.json")
    cut(ADAPTERS / "tensors/adapter_model.safetensors")
    (ADAPTERS / "missing/adapter_model.safetensors").unlink()
    for name in ("broken", "empty", "halved"):
        shutil.copytree(ADAPTERS / "routed/groups/legal", ADAPTERS / "routed/groups" / name)
    cut(ADAPTERS / "routed/groups/broken/adapter_model.safetensors")
    (ADAPTERS / "routed/groups/empty/adapter_model.safetensors").unlink()
    cut(ADAPTERS / "routed/groups/halved/adapter_config.json")


def change(adapter: Path, **fields: str) -> None:
    """Write other values into the adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def ask(url: str, name: str) -> tuple[int, str]:
    """The status of an answer, and its tokens or the text of its error."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "min_tokens": 8, "temperature": 0}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, str(json.load(answer)["choices"][0]["token_ids"])
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text)["error"]["message"] if text.startswith("{") else text


if __name__ == "__main__":
    sys.exit(main())
