"""What recipes/benchmark.py measures: its arguments, and the sections of its JSON that follow from them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from benchmark_memory import memory_in_new_process
from benchmark_methods import METHODS, MODELS, SCOPES, Setup, adapted, base_model
from benchmark_work import WORKS, can_do, flops, load_times, paired

GROWTH_METHODS = ("lora", *SCOPES)
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
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder for the JSON, table and plots."})
    models: list[str] = field(
        default_factory=lambda: ["SmolLM2-135M", "Qwen2.5-0.5B"],
        metadata={"help": "Shapes to measure; weights are random.", "choices": list(MODELS)},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "lora must be among them.", "choices": list(METHODS)}
    )
    works: list[str] = field(
        default_factory=lambda: list(WORKS),
        metadata={"help": "What the models do; none for the sweeps alone.", "choices": [*WORKS, "none"]},
    )
    modes: list[str] = field(
        default_factory=lambda: ["eager"],
        metadata={"help": "Whether by torch.compile; memory and sweeps are eager.", "choices": ["eager", "compile"]},
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    dtype: str = field(default="float32", metadata={"help": "Of the base model."})
    threads: int = field(default=os.cpu_count() or 1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=15, metadata={"help": "Measurements of each method."})
    length: int = field(default=256, metadata={"help": "Tokens of a row in prefill and training."})
    batch: int = field(default=2, metadata={"help": "Rows in prefill and training."})
    prompt: int = field(default=64, metadata={"help": "Tokens of a row before decoding."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens of a row that are decoded."})
    sweeps: list[str] = field(
        default_factory=lambda: list(SWEEPS),
        metadata={"help": "Sizes to sweep, on the first of the models.", "choices": [*SWEEPS, "none"]},
    )
    quick: bool = field(default=False, metadata={"help": "A tiny model, few rounds and two values a sweep."})
    profile: bool = field(default=False, metadata={"help": "Profile instead of measuring."})
    write_docs: bool = field(default=False, metadata={"help": "Put the table and plots into docs/speed.md."})


def setups(args: Arguments) -> list[Setup]:
    common = {name: getattr(args, name) for name in ("device", "dtype", "threads", "length", "batch", "prompt")}
    return [Setup(model, new_tokens=args.new_tokens, **common) for model in args.models]


def sections(args: Arguments) -> dict[str, Callable[[], dict]]:
    """By name, everything that is to be measured; each result goes into the JSON as it comes."""
    todo: dict[str, Callable[[], dict]] = {}
    for setup in setups(args) if args.works != ["none"] else []:
        for mode in args.modes:
            for work in args.works:
                todo[f"{setup.model}/{mode}/{work}"] = partial(
                    times, setup, tuple(args.methods), work, args.rounds, mode == "compile"
                )
        for work in args.works:
            todo[f"{setup.model}/memory/{work}"] = partial(memory, setup, tuple(args.methods), work)
        todo[f"{setup.model}/sizes"] = partial(sizes, setup, tuple(args.methods), args.rounds)
    for name in args.sweeps:
        for value in SWEEPS.get(name, ())[: 2 if args.quick else None]:
            setup = replace(setups(args)[0], layers=GROWTH_LAYERS, **{name: value})
            for work in ("prefill", "train"):
                todo[f"growth/{name}/{value}/{work}"] = partial(times, setup, GROWTH_METHODS, work, args.rounds)
            todo[f"growth/{name}/{value}/memory"] = partial(memory, setup, GROWTH_METHODS, "train")
    return todo


@lru_cache(maxsize=1)
def models(setup: Setup, methods: tuple[str, ...]) -> dict:
    """The base model under None, and one model for each method."""
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


def memory(setup: Setup, methods: tuple[str, ...], work: str) -> dict:
    """Bytes by method, and the errors of those that cannot run."""
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
        "trainable": {m: sum(p.numel() for p in built[m].parameters() if p.requires_grad) for m in methods},
        "flops": {
            work: {m: flops(WORKS[work](built[m], m, setup, False)) for m in methods if can_do(m, work)}
            for work in ("prefill", "train")
        },
    }
