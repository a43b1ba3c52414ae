# /// script
# dependencies = ["peft_queryable[serve]"]
# ///
"""Serve several adapters of one base model over HTTP: each request names its adapter, and may give an instruction.

python -m recipes.serve outputs/sft/queryable french=outputs/french --port 8000

curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "french", "prompt": "Good", "max_tokens": 20, "instruction": "Be brief.", "stream": true}'

An adapter is a folder or a name on the Hub; requests know it by the name before "=", or else by the folder's.
"""

import argparse
from pathlib import Path

import uvicorn
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_queryable  # noqa: F401  registers the method with PEFT
from recipes.serve.service import BASE, Service, make_app


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    app = make_app(load(options))
    uvicorn.run(app, host=options.host, port=options.port)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", metavar="[NAME=]ADAPTER", nargs="+", help="folders or names on the Hub")
    parser.add_argument("--base", help="the base model, if it is elsewhere than the adapters say")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--threads", type=int, default=8, help="answers that are made at once (default: 8)")
    parser.add_argument("--length", type=int, help="tokens of prompt and answer (default: the model's positions)")
    parser.add_argument("--dtype", default="auto", help="of the base model (default: as it was saved)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)
    named = [adapter.rpartition("=") for adapter in options.adapters]
    options.adapters = {name or Path(folder).name: folder for name, _, folder in named}
    if len(options.adapters) < len(named) or BASE in options.adapters:
        parser.error(f"every adapter needs a name of its own, other than {BASE}: NAME=ADAPTER")
    return options


def load(options: argparse.Namespace) -> Service:
    """The base model with all adapters."""
    configs = {folder: PeftConfig.from_pretrained(folder) for folder in options.adapters.values()}
    for folder, config in configs.items():
        if config.peft_type != "QUERYABLE_LORA":
            raise SystemExit(f"{folder} has the type {config.peft_type.value}: this serves QUERYABLE_LORA.")
    bases = {options.base or config.base_model_name_or_path for config in configs.values()}
    if len(bases) > 1 or None in bases:
        raise SystemExit(f"One process serves one base model, but the adapters name {bases}: say which by --base.")
    (base,) = bases
    model = AutoModelForCausalLM.from_pretrained(base, dtype=options.dtype).to(options.device)
    (first, folder), *others = options.adapters.items()
    model = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, name)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = options.length or positions
    if length is None:
        raise SystemExit(f"{base} does not say how many positions it has: name the most tokens by --length.")
    return Service(model, AutoTokenizer.from_pretrained(base), length, options.threads)


if __name__ == "__main__":
    main()
