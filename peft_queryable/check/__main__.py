"""`python -m peft_queryable.check ADAPTER_OR_MODEL`: the check of an adapter or of a base model of text."""

from __future__ import annotations

import argparse
import sys

import transformers

from ..command import encode, load, read
from .checking import check_model

TEXTS = (
    "The river rose in the night and took the bridge with it, and the ferry has not run since the spring.",
    "Seven times eight is fifty-six.",
    "To bake bread you need flour, water, salt, yeast, and more patience than most recipes admit.",
    "She opened the letter, read it twice, and put it back into the drawer without a word to anyone.",
)
DESCRIPTION = """\
Run a model of text in every way that has to give one answer, and compare: alone and in a batch, padded, packed,
cached, saved and loaded. The exit code is 1 if something differs. docs/check.md says what the verdicts mean.

  python -m peft_queryable.check outputs/my-adapter --data train.jsonl
  python -m peft_queryable.check Qwen/Qwen2.5-0.5B --scope causal
"""


def main(arguments: list[str] | None = None) -> int:
    """Check what the command line names, print the report, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_queryable.check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="ADAPTER_OR_MODEL", help="a folder, or a name on the Hub")
    parser.add_argument("--base", help="the base model, if it is elsewhere than the adapter says")
    parser.add_argument("--data", metavar="FILE.jsonl", help="lines with text, messages, or prompt and completion")
    parser.add_argument("--rows", type=int, default=4, help="lines of it to take (default: 4)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to keep of each (default: 48)")
    parser.add_argument("--scope", default="auto", help="of the new adapter, for a base model (default: auto)")
    parser.add_argument("--dtype", default="float32", help="of the base model (default: float32, the sharpest)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)

    model, source = load(options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    lines = read(options.data, options.rows) if options.data else [{"text": text} for text in TEXTS]
    batch = encode(tokenizer, lines, options.tokens)
    report = check_model(model, {name: tensor.to(options.device) for name, tensor in batch.items()}, progress=True)
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
