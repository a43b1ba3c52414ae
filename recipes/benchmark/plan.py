"""What is measured: the arguments, and the sections of the JSON that follow from them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch

from peft_queryable import RoutingCallback
from recipes.benchmark.launches import launches
from recipes.benchmark.memory import memory_in_new_process
from recipes.benchmark.methods import COUNTED, METHODS, adapted
from recipes.benchmark.shapes import MODELS, Setup, base_model
from recipes.benchmark.timing import flops, load_times, paired
from recipes.benchmark.work import WORKS, can_do, train

WATCHED = "causal"  # the scope with most routes
GROWTH_LAYERS = 8  # enough for eight blocks
SWEEPS = {
    "length": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
    "r": (4, 8, 16, 32, 64),
    "num_atoms": (4, 8, 16, 32, 64),
    "top_k": (1, 2, 4, 8, 16),
    "num_blocks": (1, 2, 4, 8),
    "modules": (1, 2, 3, 4, 5, 6, 7),
}
QUICK = {"models": ["tiny"], "rounds": 2, "length": 16, "prompt": 8, "new_tokens": 3}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder for the JSON, tables and figures."})
    models: list[str] = field(
        default_factory=lambda: ["SmolLM2-135M", "Qwen2.5-0.5B"],
        metadata={"help": "Shapes to measure, with random weights.", "choices": list(MODELS)},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "lora must be among them.", "choices": list(METHODS)}
    )
    works: list[str] = field(
        default_factory=lambda: list(WORKS),
        metadata={"help": "What the models do; `none` leaves the sweeps alone.", "choices": [*WORKS, "none"]},
    )
    modes: list[str] = field(
        default_factory=lambda: ["eager"],
        metadata={
            "help": "Without or with torch.compile; memory and sweeps are eager.",
            "choices": ["eager", "compile"],
        },
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    dtype: str = field(default="float32", metadata={"help": "Type of the base model's weights."})
    threads: int = field(default=os.cpu_count() or 1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=15, metadata={"help": "Measurements of each method."})
    length: int = field(default=256, metadata={"help": "Tokens per row in prefill and training."})
    batch: int = field(default=2, metadata={"help": "Rows in prefill and training."})
    prompt: int = field(default=64, metadata={"help": "Tokens per row before decoding."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens per row that are decoded."})
    sweeps: list[str] = field(
        default_factory=lambda: list(SWEEPS),
        metadata={"help": "Sizes to sweep, on the first of the models.", "choices": [*SWEEPS, "none"]},
    )
    quick: bool = field(default=False, metadata={"help": "A tiny model, few rounds and two values per sweep."})
    profile: bool = field(default=False, metadata={"help": "Profile instead of measuring."})
    write_docs: bool = field(default=False, metadata={"help": "Put the tables and figures into docs/speed.md."})


def setups(args: Arguments) -> list[Setup]:
    common = {name: getattr(args, name) for name in ("device", "dtype", "threads", "length", "batch", "prompt")}
    return [Setup(model, new_tokens=args.new_tokens, **common) for model in args.models]


def sections(args: Arguments) -> dict[str, Callable[[], dict]]:
    """Everything that is to be measured, by name. Each result goes into the JSON as soon as it is there."""
    todo: dict[str, Callable[[], dict]] = {}
    for setup in setups(args) if args.works != ["none"] else []:
        for mode in args.modes:
            for work in args.works:
                todo[f"{setup.model}/{mode}/{work}"] = partial(
                    times, setup, tuple(args.methods), work, args.rounds, mode == "compile"
                )
        for work in args.works:
            todo[f"{setup.model}/memory/{work}"] = partial(memory, setup, tuple(args.methods), work)
        if "train" in args.works and WATCHED in args.methods:
            todo[f"{setup.model}/callback"] = partial(callback_times, setup, tuple(args.methods), args.rounds)
        todo[f"{setup.model}/sizes"] = partial(sizes, setup, tuple(args.methods), args.rounds)
    for name in args.sweeps:
        for value in SWEEPS.get(name, ())[: 2 if args.quick else None]:
            setup = replace(setups(args)[0], layers=GROWTH_LAYERS, **{name: value})
            for work in ("prefill", "train"):
                todo[f"growth/{name}/{value}/{work}"] = partial(times, setup, COUNTED, work, args.rounds)
            todo[f"growth/{name}/{value}/memory"] = partial(memory, setup, COUNTED, "train")
    return todo


@lru_cache(maxsize=1)
def models(setup: Setup, methods: tuple[str, ...]) -> dict:
    """The base model under the key None, and one model per method."""
    base = base_model(setup)
    return {None: base} | {method: adapted(method, base, setup) for method in methods}


def times(setup: Setup, methods: tuple[str, ...], work: str, rounds: int, compiled: bool = False) -> dict:
    built = models(setup, methods)
    runs = {
        method: partial(WORKS[work], built[method], method, setup, compiled)
        for method in methods
        if can_do(method, work)
    }
    try:
        return paired(runs, rounds)
    finally:
        torch.compiler.reset()


def callback_times(setup: Setup, methods: tuple[str, ...], rounds: int) -> dict:
    """Training steps with and without `RoutingCallback`, which counts the routes of each of them."""
    model = models(setup, methods)[WATCHED]
    runs = {
        "plain": partial(train, model, WATCHED, setup, False),
        "counted": partial(train, model, WATCHED, setup, False, callback=RoutingCallback(every=1)),
    }
    return paired(runs, rounds)


def memory(setup: Setup, methods: tuple[str, ...], work: str) -> dict:
    """Bytes by method, and the errors of the methods that cannot run."""
    peaks: dict = {"bytes": {}, "failed": {}}
    for method in (method for method in methods if can_do(method, work)):
        try:
            peaks["bytes"][method] = memory_in_new_process(setup, method, work)
        except Exception as error:  # as for times
            peaks["failed"][method] = f"{type(error).__name__}: {error}"
    return peaks


def sizes(setup: Setup, methods: tuple[str, ...], rounds: int) -> dict:
    """Trainable parameters, operations, weights on disk, and times to load them."""
    built = dict(models(setup, methods))
    loaded = load_times({m: built[m] for m in methods}, built[None], setup, rounds)
    return loaded | {
        # New models: checkpointing, once enabled, leaves a gradient of the inputs behind.
        "launches": {m: launches(adapted(m, built[None], setup), m, setup) for m in methods if m in COUNTED},
        "trainable": {m: sum(p.numel() for p in built[m].parameters() if p.requires_grad) for m in methods},
        "flops": {
            work: {m: flops(WORKS[work](built[m], m, setup, False)) for m in methods if can_do(m, work)}
            for work in ("prefill", "train")
        },
    }
