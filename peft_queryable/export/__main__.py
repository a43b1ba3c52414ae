"""`python -m peft_queryable.export ADAPTER OUT`: an adapter with fixed routes as a LoRA, or as a whole model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from tqdm import tqdm

from ..command import base_class, encode
from ..instruction import tuner_of, use_instructions
from ..routes import Routes, fix_routes, instruction_routes, mean_routes
from ..tracing import record_routing
from .folders import check_folder, whole_folder
from .lora import export_lora, known_weights
from .losses import losses

GAP = 0.05  # in the loss per token, from which a warning says that the routes are worth more than that
HELD_OUT = 4  # every fourth line is held out
DESCRIPTION = """\
Fix the routes of a Queryable LoRA adapter, and write the plain LoRA that it then is. docs/serving.md says who loads
it, and what fixing costs.

  python -m peft_queryable.export ADAPTER OUT --calibrate train.jsonl --group task
  python -m peft_queryable.export ADAPTER OUT --instruction "Answer in French."
"""


def main(arguments: list[str] | None = None) -> int:
    """Export what the command line names, print what it costs, and return the exit code."""
    options = parse(arguments)
    check_folder(options.out)
    config = PeftConfig.from_pretrained(options.adapter)
    if config.peft_type != "QUERYABLE_LORA":
        raise ValueError(
            f"{options.adapter} has the type {config.peft_type.value}: this command exports QUERYABLE_LORA."
        )
    groups = read(options.calibrate, options.group) if options.calibrate else {None: []}
    model, tokenizer = load(options, config)
    if options.calibrate and not model.get_base_model().can_generate():
        raise ValueError(
            f"{type(model.get_base_model()).__name__} is no language model, whose loss on text `--calibrate` could "
            "measure. Record your own data: `export_lora(model, folder, mean_routes(trace))`."
        )
    with whole_folder(options.out) as written:
        for value, lines in groups.items():
            folder = written if options.group is None else written / str(value)
            name = options.adapter if value is None else f"{options.adapter}, {options.group} {value!r}"
            routes, measured = calibrate(model, tokenizer, lines, options)
            if measured:
                report(name, measured)
            if options.merge:
                write_merged(model, tokenizer, folder, routes)
                if len(groups) > 1:
                    model, tokenizer = load(options, config)  # merging has used the other one up
            else:
                export_lora(model, folder, routes, losses=measured)
    print(f"Written to {options.out}.")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m peft_queryable.export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--instruction", metavar="TEXT", help="the routes that this instruction chooses")
    parser.add_argument(
        "--calibrate", metavar="FILE.jsonl", help="lines with text, messages, or prompt and completion"
    )
    parser.add_argument("--group", metavar="COLUMN", help="write one LoRA for each value of this column of the lines")
    parser.add_argument("--merge", action="store_true", help="write a whole model instead of a LoRA")
    parser.add_argument("--base", help="the base model, if it is elsewhere than the adapter says")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to keep of each line (default: 512)")
    parser.add_argument("--dtype", default="float32", help="of the base model (default: float32)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)
    if options.group and not options.calibrate:
        parser.error("--group names a column of the file that --calibrate reads")
    return options


def read(path: str, column: str | None) -> dict[Any, list[dict[str, Any]]]:
    """By value of `column`, or under None, the lines of a JSON Lines file."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            line = json.loads(text)
            if column is not None and column not in line:
                raise ValueError(f"Line {number} of {path} has no column {column!r}; it has {sorted(line)}.")
            value = None if column is None else line[column]
            if column is not None and (str(value) in ("", "..") or Path(str(value)).name != str(value)):
                raise ValueError(f"Line {number} of {path}: {value!r} cannot be the name of a folder.")
            groups.setdefault(value, []).append(line)
    for value, lines in groups.items():
        if len(lines) < HELD_OUT:
            of = "" if column is None else f" with {column} {value!r}"
            raise ValueError(
                f"{path} has {len(lines)} lines{of}: it takes at least {HELD_OUT}, one of which is held out."
            )
    if not groups:
        raise ValueError(f"{path} has no lines to calibrate with.")
    return groups


def load(options: argparse.Namespace, config: PeftConfig) -> tuple[PeftModel, Any]:
    """The adapter on its base model, and the tokenizer where one is needed."""
    base = options.base or config.base_model_name_or_path
    if base is None:
        raise ValueError(f"{options.adapter} does not say what its base model is: name it by `--base`.")
    model = base_class(base, config).from_pretrained(base, dtype=options.dtype).to(options.device)
    model = PeftModel.from_pretrained(model, options.adapter).eval()
    has_own = Path(options.adapter, "tokenizer_config.json").exists()
    if not (options.calibrate or options.merge):
        return model, None
    return model, transformers.AutoTokenizer.from_pretrained(options.adapter if has_own else base)


def calibrate(
    model: PeftModel, tokenizer: Any, lines: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[Routes | None, dict[str, float] | None]:
    """The routes to fix, None for those of a static adapter, and what that costs on the lines that are held out."""
    if not lines:
        return (None if options.instruction is None else instruction_routes(model, options.instruction)), None
    bar = partial(tqdm, unit="line", file=sys.stderr)
    held = [[line] for line in lines[HELD_OUT - 1 :: HELD_OUT]]
    rest = [[line] for number, line in enumerate(lines) if number % HELD_OUT != HELD_OUT - 1]
    block = use_instructions(model, options.instruction) if options.instruction is not None else nullcontext()
    with torch.no_grad(), block, record_routing(model) as trace:
        for batch in batches(bar(rest, desc="routes"), tokenizer, model, options):
            model(**batch)
    routes = mean_routes(trace)
    routes = replace(routes, source=f"{routes.source}, {Path(options.calibrate).name}")
    if options.instruction is not None:
        routes = replace(routes, source=f"{routes.source}, {options.instruction!r}")
    wrapped = partial(bar, desc="loss", total=len(held))
    return routes, losses(model, routes, batches(held, tokenizer, model, options), options.instruction, wrapped)


def batches(lines: Any, tokenizer: Any, model: PeftModel, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each line as a batch of one row, which needs no padding."""
    for line in lines:
        batch = encode(tokenizer, line, options.tokens)
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


def report(name: str, measured: dict[str, float]) -> None:
    """Print the losses side by side, and warn where fixing costs more than `GAP`."""
    print(
        f"{name}: loss per token on every {HELD_OUT}th line: " + ", ".join(f"{k} {v:.4f}" for k, v in measured.items())
    )
    gap = measured["fixed"] - measured["routed"]
    if gap > GAP:
        print(
            f"Warning: fixing the routes costs {gap:.3f} of loss per token, more than {GAP}. If the lines are of "
            "several tasks, write one LoRA for each: --group COLUMN.",
            file=sys.stderr,
        )


def write_merged(model: PeftModel, tokenizer: Any, folder: Path, routes: Routes | None) -> None:
    """Write the base model with the fixed adapter in its weights."""
    weights, _ = known_weights(tuner_of(model), "default", routes)
    with fix_routes(model, Routes(dict(enumerate(weights)))):
        merged: Any = model.merge_and_unload(progressbar=True, safe_merge=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
