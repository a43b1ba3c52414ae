"""What is measured: the sections of the JSON, as they follow from the arguments."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch

from peft_queryable import RoutingCallback
from recipes.benchmark.arguments import SWEEPS, Arguments
from recipes.benchmark.launches import launches
from recipes.benchmark.memory import memory_in_new_process
from recipes.benchmark.methods import COUNTED, adapted
from recipes.benchmark.shapes import Setup, base_model
from recipes.benchmark.timing import flops, load_times, paired
from recipes.benchmark.work import WORKS, can_do, train

WATCHED = "causal"  # the scope with most routes
GROWTH_LAYERS = 8  # enough for eight blocks


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
