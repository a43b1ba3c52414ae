"""`python -m peft_queryable.inspect ADAPTER --data FILE.jsonl`: the report of an adapter's routes, one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

from ..command import load, read
from .measuring import measure
from .page import page

DESCRIPTION = """\
Run an adapter on texts and write what its routes are like: findings in words, tables and pictures, in one HTML file
that needs no other. docs/routes.md says what its numbers mean.

  python -m peft_queryable.inspect outputs/my-adapter --data test.jsonl --group task
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_queryable.inspect",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="ADAPTER", help="a folder, or a name on the Hub")
    parser.add_argument("--data", metavar="FILE.jsonl", required=True, help="text, messages, or prompt and completion")
    parser.add_argument(
        "--group", metavar="COLUMN", help="column that names a line's group, such as a task or language"
    )
    parser.add_argument("--base", help="the base model, if it is elsewhere than the adapter says")
    parser.add_argument("--rows", type=int, default=100, help="lines to take (default: 100)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to keep of each (default: 256)")
    parser.add_argument("--output", default="routes.html", help="default: routes.html")
    parser.add_argument("--scope", default="auto", help="of the new adapter, if ADAPTER is a base model")
    parser.add_argument("--dtype", default="float32", help="of the base model (default: float32)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)

    model, source = load(options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    lines = read(options.data, options.rows)
    measured = measure(model.eval(), tokenizer, lines, options.group, options.tokens)
    config = model.active_peft_config
    facts = {
        "adapter": options.name,
        "base model": config.base_model_name_or_path,
        "configuration": f"r = {config.r}, {config.num_atoms} atoms, top {config.top_k}, {config.num_blocks} blocks",
        "scope": config.routing_scope,
        "data": f"{options.data}, {len(lines)} lines, at most {options.tokens} tokens each",
        "routes per block": f"{measured.statistics.count:,}",
    }
    if config.instruction_dim is not None:  # a group of instructions would seem to decide nothing
        facts["instruction"] = "the adapter's default, or none; no column of instructions is read"
    Path(options.output).write_text(page(measured, f"Routes of {Path(options.name).name}", facts), encoding="utf-8")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
