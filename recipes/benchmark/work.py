"""The work that recipes/benchmark.py times: what a model does, in turn with other models."""

import gc
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmark_methods import INSTRUCTED, INSTRUCTION_DIM, Setup, sharing
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

Run = Callable[[], float]  # does a piece of work, and says how many seconds it took
WARM_UP = 2  # runs: the first allocates, makes the optimiser's state and compiles


def inputs(method: str, setup: Setup, batch: int, length: int) -> dict[str, Tensor]:
    """The same for every method, but for the instruction."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(setup.config.vocab_size, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if method in INSTRUCTED:
        given["instruction_embeds"] = torch.randn(batch, INSTRUCTION_DIM, generator=generator)
    return {name: tensor.to(setup.device) for name, tensor in given.items()}


def clocked(work: Callable[[], object], setup: Setup) -> Run:
    def run() -> float:
        wait(setup)
        start = time.perf_counter()
        work()
        wait(setup)
        return time.perf_counter() - start

    return run


def wait(setup: Setup) -> None:
    if setup.device == "cuda":
        torch.cuda.synchronize()


def prefill(model: nn.Module, method: str, setup: Setup, compiled: bool) -> Run:
    """A forward call that fills a cache and gives the logits of the last token, as `generate` starts."""
    given = inputs(method, setup, setup.batch, setup.length)
    call = torch.compile(model.eval()) if compiled else model.eval()
    return clocked(torch.no_grad()(partial(call, **given, use_cache=True, logits_to_keep=1)), setup)


class Stamps(BaseStreamer):
    """The times at which `generate` has a token ready, the prompt's being the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: nn.Module, method: str, setup: Setup, compiled: bool, batch: int) -> Run:
    """Seconds between two tokens of `generate`, on average, after its first."""
    given = inputs(method, setup, batch, setup.prompt)
    settings = GenerationConfig(max_new_tokens=setup.new_tokens, do_sample=False, pad_token_id=0)
    if compiled:
        settings.cache_implementation = "static"  # what makes `generate` compile
        settings.compile_config = CompileConfig()
        settings.compile_config._compile_all_devices = True  # by itself it compiles on accelerators only
    model.eval()

    def run() -> float:
        stamps = Stamps()
        model.generate(**given, generation_config=settings, streamer=stamps)
        _, first, *_, last = stamps.seconds
        return (last - first) / (setup.new_tokens - 1)

    return run


def train(model: nn.Module, method: str, setup: Setup, compiled: bool, checkpointing: bool = False) -> Run:
    """A step of AdamW in the form that transformers' Trainer takes; half of each row is a prompt."""
    given = inputs(method, setup, setup.batch, setup.length)
    labels = given["input_ids"].clone()
    labels[:, : setup.length // 2] = -100
    model.train()
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> None:
        call(**given, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return clocked(step, setup)


WORKS: dict[str, Callable[..., Run]] = {
    "prefill": prefill,
    "decode_1": partial(decode, batch=1),
    "decode_8": partial(decode, batch=8),
    "train": train,
    "train_checkpointed": partial(train, checkpointing=True),
}


def can_do(method: str, work: str) -> bool:
    return method != "base" or not work.startswith("train")


def paired(runs: dict[str, Callable[[], Run]], rounds: int) -> dict:
    """Seconds of each run in each round, every round in another order, and the errors of those that cannot run.

    Args:
        runs: by method, what makes the run.
        rounds: number of rounds, after those that warm up.
    """
    ready, failed = {}, {}
    for method, make in runs.items():
        try:
            run = make()
            for _ in range(WARM_UP):
                run()
            ready[method] = run
        except Exception as error:  # of any kind: what a method cannot do is a result
            failed[method] = f"{type(error).__name__}: {error}"
    seconds: dict[str, list[float]] = {method: [] for method in ready}
    gc.collect()
    gc.freeze()  # or collections would walk through the models of all methods, at the cost of whichever runs
    order = random.Random(0)
    for _ in range(rounds):
        for method in order.sample(list(ready), len(ready)):
            seconds[method].append(ready[method]())
    gc.unfreeze()
    return {"seconds": seconds, "failed": failed}


def load_times(models: dict[str, nn.Module], base: nn.Module, setup: Setup, rounds: int) -> dict:
    """Seconds in which saved adapters load onto a model, and the bytes of their weights."""
    with TemporaryDirectory() as folder:
        runs = {}
        for method, model in models.items():
            if method not in ("base", "xlora"):  # whose folder holds base weights, too
                model.save_pretrained(f"{folder}/{method}")
                runs[method] = partial(loading, base, f"{folder}/{method}", setup)
        sizes = {m: sum(f.stat().st_size for f in Path(folder, m).rglob("*.safetensors")) for m in runs}
        return paired(runs, rounds) | {"bytes": sizes}


def loading(base: nn.Module, folder: str, setup: Setup) -> Run:
    return lambda: clocked(partial(PeftModel.from_pretrained, sharing(base), folder), setup)()


def flops(run: Run) -> int:
    """Operations of matrix products and attention, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
