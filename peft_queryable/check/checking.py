"""`check_model`: whether a model gives one answer, however it is run."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calls.cache import CACHE_NAMES
from ..metrics import layer_name
from ..tracing import record_routing
from ..tuner.model import QueryableLoraModel
from .copies import layers_of, mix_all_atoms, plain_lora, randomise, shared_copy
from .report import (
    BASE_DIFFERS,
    DIFFERS,
    NOT_APPLICABLE,
    OK,
    RAISES,
    REFUSED,
    Check,
    CheckReport,
    StackFound,
)
from .runs import RUNS, Run, Runner, largest
from .sequences import Batch, num_rows

FACTOR = 8  # times plain LoRA's own rounding
SLACK = 4  # times what one rounding of A moves the outputs by: a router can make more of a rounding than LoRA does
FLOOR = 8  # times the dtype's epsilon and the size of the outputs
PACKAGE = Path(__file__).parents[1]


def check_model(model: PeftModel, batch: Mapping[str, Any], progress: bool = False) -> CheckReport:
    """Whether `model` gives one answer however it is run, on a batch of yours.

    Each way of running is measured twice: with the model, and with plain LoRA of the same A and B in its place, whose
    difference is rounding or the base model's own. All of it happens on copies, which share the base weights: the
    model, its mode and the random numbers of torch stay as they are. The copies mix all atoms instead of the top k,
    because a tie between two atoms turns a rounding into a jump. An adapter that has learned nothing yet, or whose
    routes hardly differ, would pass unseen: its copy gets random values, and a note says so.

    Args:
        model: a `PeftModel` with Queryable LoRA, of one or several active adapters.
        batch: arguments of its forward, tensors [B, ...] of at least two rows. With `input_ids` [B, T] (and
            `attention_mask`) everything is checked; rows of different lengths show most. `labels` or `prompt_mask`
            mark the prompts of scope `prompt`, by default the first half of each sequence.
        progress: whether to show a bar.

    Raises:
        TypeError: if `model` is no `PeftModel` with Queryable LoRA.
        ValueError: if the batch has fewer than two rows, or names an adapter for each.
        Exception: what the model raises on the batch as it is.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, QueryableLoraModel):
        raise TypeError(
            f"`check_model` takes a PeftModel with Queryable LoRA, got {type(model).__name__}. Unwrap it first, from "
            "DistributedDataParallel say."
        )
    if num_rows(dict(batch)) < 2 or "adapter_names" in batch:
        raise ValueError(
            f"`check_model` takes a batch of at least two rows without `adapter_names`, got {num_rows(dict(batch))} "
            f"with {sorted(batch)}. Check one adapter after another, with `set_adapter`."
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return _check(model, dict(batch), progress)
    finally:
        for parameter, requires_grad in trainable:  # loading an adapter freezes the base, which the copies share
            parameter.requires_grad_(requires_grad)


def _check(model: PeftModel, batch: Batch, progress: bool) -> CheckReport:
    copied = mix_all_atoms(shared_copy(model))
    batch = complete(Runner(copied, batch))
    run, plain = Runner(copied, batch), Runner(plain_lora(copied), batch, is_plain=True)
    report, eps = CheckReport(stacks=stacks_of(copied)), epsilon(model)
    effect = routing_effect(run, plain)
    if effect > eps**0.5:
        report.notes.append("Values: the adapter's own, but with all atoms mixed instead of the top k.")
    else:
        report.notes.append(
            f"Values: random; with the adapter's own a wrong route would move the outputs by about {effect:.1e} of "
            "their size, too little to be seen."
        )
        randomise(copied)
        effect = routing_effect(run, plain)
    size, moved = size_of(plain.output(batch)), rounding_effect(run, eps)
    floor = max(SLACK * moved, FLOOR * eps * size)
    report.notes += [
        f"Sight: a wrong route would move the outputs by about {effect:.1e} of their size, which is {size:.1e}.",
        f"Allowed: {FACTOR} times plain LoRA's own difference; at least {SLACK} times the {moved:.1e} by which one "
        f"rounding ({eps:.1e}) of A moves the outputs, and {FLOOR} roundings of their size.",
    ]
    if effect * size < 2 * floor:
        report.notes.append("Weak: rounding can hide a wrong route here; load the model in float32 to see more.")
    for name in (bar := tqdm(RUNS, disable=not progress, leave=False)):
        bar.set_description(name)
        report.checks.append(compare(name, RUNS[name], run, plain, floor, eps**0.5 * size))
    return report


def complete(run: Runner) -> Batch:
    """The batch with what the checks need: prompts in scope `prompt`, and tokens for a decoder beside an encoder."""
    batch = {name: value for name, value in run.batch.items() if name not in (*CACHE_NAMES, "use_cache")}
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return batch
    if run.is_encoder_decoder and "decoder_input_ids" not in batch:
        labels = batch.pop("labels", None)
        if labels is None:
            start = torch.full_like(ids[:, :1], run.config.decoder_start_token_id or 0)
            batch["decoder_input_ids"] = torch.cat([start, ids[:, :7]], dim=1)
        else:
            batch["decoder_input_ids"] = run.base.prepare_decoder_input_ids_from_labels(labels=labels)
    marked = "prompt_mask" in batch or ("labels" in batch and batch["labels"].ndim == 2)
    if "prompt" in run.scopes() and not marked:
        leading = batch[run.leading]
        real = batch.get("attention_mask", torch.ones_like(ids)) if leading is ids else torch.ones_like(leading)
        batch["prompt_mask"] = real.cumsum(1) <= (real.sum(1, keepdim=True) + 1) // 2
    return batch


def stacks_of(model: PeftModel) -> list[StackFound]:
    """The stacks that the active adapters of `model` route."""
    found = []
    for adapter_name in model.base_model.active_adapters:
        for stack in model.base_model.stacks:
            if adapter_name not in stack.plans:
                continue
            places = {
                name: layer.places[adapter_name]
                for name, layer in layers_of(model)
                if adapter_name in layer.places and layer.places[adapter_name].stack is stack
            }
            layers = {layer_name(name) for name in places}
            blocks = {place.block for place in places.values()}
            scope = stack.plans[adapter_name].scope.name
            found.append(StackFound(adapter_name, stack.traits.name, scope, len(layers), len(blocks), len(places)))
    return found


def epsilon(model: nn.Module) -> float:
    """The coarsest rounding among the parameters of `model` that have two bytes or more."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def size_of(output: Tensor) -> float:
    """Root mean square of `output`."""
    return output.double().square().mean().sqrt().item()


def routing_effect(run: Runner, plain: Runner) -> float:
    """About how far a wrong route would move the outputs, in units of their size.

    That is how far routing moves them at all, times how far the weights over the atoms differ from route to route.
    """
    with record_routing(run.model) as trace:
        routed = run.output(run.batch)
    unrouted = plain.output(run.batch)
    weights = [w for name in run.model.base_model.active_adapters for w in trace.weights(name).values()]
    spread = max((w.amax(0) - w.amin(0)).max().item() for w in weights)
    return spread * largest([routed], [unrouted]) / size_of(unrouted)


@torch.no_grad()
def rounding_effect(run: Runner, eps: float) -> float:
    """How far the outputs move when every number of A moves by one rounding, `eps` of itself."""
    expected = run.output(run.batch)
    factors = [part.weight for _, layer in layers_of(run.model) for part in layer.lora_A.values()]
    kept = [weight.clone() for weight in factors]
    for weight in factors:
        weight.mul_(1 + eps * torch.randn_like(weight).sign())
    moved = run.output(run.batch)
    for weight, old in zip(factors, kept, strict=True):
        weight.copy_(old)
    return largest([moved], [expected])


def compare(name: str, compute: Run, run: Runner, plain: Runner, floor: float, ceiling: float) -> Check:
    """Run one check with the model and with plain LoRA, and judge.

    Args:
        name: its name.
        compute: the check.
        run: the model.
        plain: plain LoRA in its place.
        floor: a difference that is rounding in any case.
        ceiling: a difference of plain LoRA's that cannot be rounding.
    """
    try:
        lora = compute(plain)
    except Exception as error:
        return Check(name, NOT_APPLICABLE, reason=f"plain LoRA raises {_said(error)}")
    if isinstance(lora, str):
        return Check(name, NOT_APPLICABLE, reason=lora)
    try:
        difference = compute(run)
    except Exception as error:
        return Check(name, REFUSED if is_refusal(error) else RAISES, lora=lora, reason=_said(error))
    if isinstance(difference, str):
        return Check(name, NOT_APPLICABLE, reason=difference)
    if not lora <= ceiling:
        return Check(name, BASE_DIFFERS, difference, lora)
    allowed = max(FACTOR * lora, floor)
    return Check(name, OK if difference <= allowed else DIFFERS, difference, lora, allowed)


def is_refusal(error: Exception) -> bool:
    """Whether `error` is one that this library raises on purpose, rather than a crash."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = PACKAGE in Path(last.filename).parents and (last.line or "").startswith("raise ")
    return is_ours and isinstance(error, ValueError | RuntimeError | NotImplementedError)


def _said(error: Exception) -> str:
    """The error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
