"""The work that is timed: prefill, decoding, and training steps."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig, TrainerCallback, TrainerState
from transformers.generation.streamers import BaseStreamer

from recipes.benchmark.methods import INSTRUCTED, INSTRUCTION_DIM
from recipes.benchmark.shapes import Setup

Run = Callable[[], float]  # does a piece of work, and returns the seconds it took
WARM_UP = 2  # runs: the first allocates, makes the optimiser's state and compiles


def inputs(method: str, setup: Setup, batch: int, length: int) -> dict[str, Tensor]:
    """The same tokens for every method; the instructed ones get an instruction as well."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(setup.config.vocab_size, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if method in INSTRUCTED:
        given["instruction_embeds"] = torch.randn(batch, INSTRUCTION_DIM, generator=generator)
    return {name: tensor.to(setup.device) for name, tensor in given.items()}


def clocked(work: Callable[[], object], setup: Setup) -> Run:
    """`work` with a clock around it, which waits for the GPU."""

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
    """The times at which `generate` has tokens ready; the first is that of the prompt."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: nn.Module, method: str, setup: Setup, compiled: bool, batch: int) -> Run:
    """Mean seconds between two tokens of `generate`, counted from its first token."""
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


def training_loss(call: Callable, method: str, setup: Setup) -> Tensor:
    """The loss of a batch; half of each row is a prompt."""
    given = inputs(method, setup, setup.batch, setup.length)
    labels = given["input_ids"].clone()
    labels[:, : setup.length // 2] = -100
    return call(**given, labels=labels, use_cache=False).loss


def train(
    model: nn.Module,
    method: str,
    setup: Setup,
    compiled: bool,
    checkpointing: bool = False,
    callback: TrainerCallback | None = None,
) -> Run:
    """A step of AdamW as transformers' Trainer takes it, with a callback's events."""
    model.train()
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    call = torch.compile(model) if compiled else model

    events = (None, TrainerState(), None)
    callback = callback or TrainerCallback()
    callback.on_train_begin(*events, model=model)

    def step() -> None:
        callback.on_step_begin(*events)
        training_loss(call, method, setup).backward()
        callback.on_pre_optimizer_step(*events)
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step_end(*events)

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
