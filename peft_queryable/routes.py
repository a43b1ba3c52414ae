"""Fixed routes: one set of weights over the atoms in place of a router's choice, which makes an adapter a LoRA."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .encoders import InstructionEncoder
from .instruction import check_adapter, embed_instruction, only_active, tuner_of, use_instructions
from .tracing import RoutingTrace, record_routing
from .tuner.merging import static_weights
from .tuner.model import QueryableLoraModel

_SUM_TOLERANCE = 1e-4  # weights come from a softmax in float32


@dataclass(frozen=True)
class Routes:
    """A set of routes of one adapter: what its router would choose, as numbers.

    Args:
        weights: by block, counted through all stacks, weights over the atoms [M], at least zero and of sum one.
        adapter_name: the adapter.
        source: what they were made from, for the card of an export.
    """

    weights: Mapping[int, Tensor]
    adapter_name: str = "default"
    source: str = "given by hand"


def mean_routes(trace: RoutingTrace, adapter_name: str = "default", by: Sequence[Hashable] | None = None) -> Any:
    """The mean of recorded routes, over the tokens or, where one route serves a sequence, over the sequences.

    One mean over a mixture of tasks throws much of an adapter away: see docs/serving.md.

    Args:
        trace: what `record_routing` recorded.
        adapter_name: the adapter.
        by: the group (a task, a tenant, a language) of each row of the recorded calls, in order; None for one mean.
            Each stack must have been called once with each row, so record `model(**batch)` rather than `generate`.

    Returns:
        [`Routes`], in float64; with `by`, a dict of them by group.

    Raises:
        ValueError: if no call of the adapter was recorded, or if `by` has another length than there were rows.
    """
    trace.weights(adapter_name)  # raises where nothing was recorded
    labels = [None] if by is None else list(by)
    sums: dict[Any, dict[int, Tensor]] = {label: {} for label in labels}
    counts: dict[tuple[Any, int], int] = {}
    rows: dict[str, int] = {}
    for call in trace.calls:
        if call.adapter_name != adapter_name:
            continue
        batch = next(iter(call.weights.values())).shape[0]
        start = rows.get(call.stack, 0)
        rows[call.stack] = start + batch
        groups = [None] * batch if by is None else labels[start : start + batch]
        for block, weights in call.weights.items():
            for row, label in enumerate(groups):
                tokens = weights[row] if call.real is None else weights[row][call.real[row]]
                sums[label][block] = sums[label].get(block, 0) + tokens.double().sum(0)
                counts[label, block] = counts.get((label, block), 0) + len(tokens)
    if by is not None and (wrong := {stack: n for stack, n in rows.items() if n != len(labels)}):
        stack, number = next(iter(wrong.items()))
        raise ValueError(
            f"`by` has {len(labels)} groups, but {stack} was called with {number} rows: give the group of each row, "
            "in the order of the calls, and record each row once, with `model(**batch)` rather than `generate`."
        )
    means = {}
    for label, by_block in sums.items():
        number = max(count for (of, _), count in counts.items() if of == label)
        source = f"mean of {number} routes" + ("" if by is None else f" of group {label!r}")
        mean = {block: total / max(counts[label, block], 1) for block, total in sorted(by_block.items())}
        means[label] = Routes(mean, adapter_name, source)
    return means[None] if by is None else means


def instruction_routes(
    model: nn.Module,
    instruction: str | Tensor | None,
    encoder: InstructionEncoder | None = None,
    adapter_name: str | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Routes:
    """The routes that an instruction chooses.

    They are exact, and need no data, if the adapter's query has neither state nor depth (`query_terms`). In all other
    adapters the tokens have a say: there they are the mean of the routes on calibration data under the instruction,
    and their `source` says so. That is another set than the route at the mean state: it gives the mean operator S,
    and agrees with `mean_routes`.

    Args:
        model: a `PeftModel` with Queryable LoRA.
        instruction: a text, an embedding [1, d_c], or None for no instruction.
        encoder: default: the one that the adapter's configuration names.
        adapter_name: default: the active adapter.
        calibration: batches, as keyword arguments of the model, run without gradients.

    Raises:
        ValueError: as `use_instructions` does; also if routes depend on tokens and there is no calibration.
    """
    tuner = tuner_of(model)
    name = adapter_name or only_active(tuner)
    embeds = embed_instruction(tuner, name, instruction, encoder)
    router, said = tuner.queryable_lora_router[name], repr(instruction) if isinstance(instruction, str) else "given"
    said = "no instruction" if instruction is None else f"the instruction {said}"
    if len(embeds) != 1:
        raise ValueError(f"A set of routes follows one instruction, [1, d_c], got {len(embeds)} of them.")
    if not router.reads_states:
        return Routes(dict(enumerate(static_weights(router, embeds))), name, f"{said}, exactly")
    if calibration is None:
        raise ValueError(
            f"The routes of adapter {name!r} depend on the tokens too: its `query_terms` are "
            f"{tuner.peft_config[name].query_terms}. Give data to take the mean over: "
            "`instruction_routes(model, text, calibration=batches)`, or train with `query_terms=('instruction',)`."
        )
    with torch.no_grad(), use_instructions(model, embeds, adapter_names=[name]), record_routing(model) as trace:
        for batch in calibration:
            model(**batch)
    means = mean_routes(trace, name)
    return Routes(means.weights, name, f"{said}: {means.source}")


@contextmanager
def fix_routes(model: nn.Module, routes: Routes | Sequence[Routes]) -> Iterator[None]:
    """While the block lasts, calls of `model` in this thread use these routes in place of the router's.

        routes = mean_routes(trace)
        with fix_routes(model, routes):
            model.generate(**prompt)

    Args:
        model: a `PeftModel` with Queryable LoRA.
        routes: one set for all rows, or a list of one for each row of a call, all of one adapter.

    Raises:
        ValueError: if the adapter does not exist, or if blocks, atoms or sums are not those of its router.
    """
    tuner = tuner_of(model)
    name, weights = checked_weights(tuner, routes)
    hooks = tuner.model_hooks
    with hooks.entered(routes={**hooks.call.routes, name: weights}):
        yield


def set_fixed_routes(
    model: nn.Module, routes: Routes | Sequence[Routes] | None, adapter_name: str = "default"
) -> None:
    """Fix the routes of an adapter for all calls of `model`, in every thread, until they are set anew.

    `save_pretrained` saves the routed adapter all the same; `export_lora` writes the fixed one.

    Args:
        model: a `PeftModel` with Queryable LoRA.
        routes: as [`fix_routes`] takes them; None to let the router choose again.
        adapter_name: the adapter, where `routes` is None.

    Raises:
        ValueError: as [`fix_routes`] does.
    """
    tuner = tuner_of(model)
    if routes is None:
        check_adapter(tuner, adapter_name)
        tuner.model_hooks.fix(adapter_name, None)
    else:
        tuner.model_hooks.fix(*checked_weights(tuner, routes))


def checked_weights(tuner: QueryableLoraModel, routes: Routes | Sequence[Routes]) -> tuple[str, Tensor]:
    """The adapter of `routes` and their weights [n, blocks, M], if they are its router's."""
    sets = [routes] if isinstance(routes, Routes) else list(routes)
    if not sets or not all(isinstance(each, Routes) for each in sets):
        raise TypeError(f"Fixed routes are one `Routes` or a list of them, one for each row, got {routes!r}.")
    names = sorted({each.adapter_name for each in sets})
    if len(names) > 1:
        raise ValueError(f"The sets of routes belong to adapters {names}: fix each adapter in a block of its own.")
    check_adapter(tuner, names[0])
    router = tuner.queryable_lora_router[names[0]]
    weights = [_checked(each, router.settings.num_blocks, router.settings.num_atoms) for each in sets]
    return names[0], torch.stack(weights).to(router.keys.weight.device)


def _checked(routes: Routes, num_blocks: int, num_atoms: int) -> Tensor:
    """The weights of one set, [blocks, M]."""
    weights, name = routes.weights, routes.adapter_name
    if set(weights) != set(range(num_blocks)):
        missing = sorted(set(range(num_blocks)) - set(weights))
        raise ValueError(
            f"The routes of adapter {name!r} must be of blocks 0 to {num_blocks - 1}, got {sorted(weights)}. If no "
            f"recorded call ran a module of the blocks that are missing, {missing}, their weights change nothing that "
            f"such calls do: add {{block: torch.full(({num_atoms},), 1 / {num_atoms})}} for each."
        )
    for block, each in weights.items():
        if tuple(each.shape) != (num_atoms,):
            raise ValueError(
                f"Block {block} of the routes of adapter {name!r} has weights of shape {tuple(each.shape)}, but the "
                f"adapter has {num_atoms} atoms, [{num_atoms}]."
            )
        total = each.sum().item()
        if not each.isfinite().all() or (each < 0).any() or abs(total - 1) > _SUM_TOLERANCE:
            raise ValueError(
                f"Block {block} of the routes of adapter {name!r} has weights of sum {total:.6g} and least value "
                f"{each.min().item():.6g}: they must be finite, at least 0 and of sum 1."
            )
    return torch.stack([weights[block] for block in range(num_blocks)])
