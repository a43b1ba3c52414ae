"""What a check found, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

OK, DIFFERS, RAISES = "ok", "differs", "raises"
BASE_DIFFERS, NOT_APPLICABLE, REFUSED = "the base model itself differs", "not applicable", "refused"


@dataclass(frozen=True)
class StackFound:
    """A stack that an adapter routes.

    Args:
        adapter_name: the adapter.
        name: the stack, by the module that runs its layers.
        scope: its routing scope.
        layers: number of layers that hold an adapted module.
        blocks: number of blocks.
        modules: number of adapted modules.
    """

    adapter_name: str
    name: str
    scope: str
    layers: int
    blocks: int
    modules: int


@dataclass(frozen=True)
class Check:
    """One way to run the model, compared with another.

    Args:
        name: what was compared.
        verdict: "ok", "differs", "raises", "the base model itself differs", "not applicable" or "refused".
        difference: the largest difference of the adapter's outputs; None if there is none to compare.
        lora: the largest difference of plain LoRA's, its rounding; None likewise.
        allowed: the largest difference that is "ok"; None likewise.
        reason: why the check is not applicable, or what was raised.
    """

    name: str
    verdict: str
    difference: float | None = None
    lora: float | None = None
    allowed: float | None = None
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the library did not give one answer."""
        return self.verdict in (DIFFERS, RAISES)


@dataclass
class CheckReport:
    """What [`check_model`] found; printed, it is two tables.

    Args:
        stacks: the stacks that the active adapters route.
        notes: what was compared: values, tolerance, sensitivity.
        checks: the checks, in order.
    """

    stacks: list[StackFound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check found a difference or an error; a refusal is neither."""
        return not any(check.failed for check in self.checks)

    def __str__(self) -> str:
        stacks = [(s.adapter_name, s.name, s.scope, str(s.layers), str(s.blocks), str(s.modules)) for s in self.stacks]
        checks = [
            (c.name, _number(c.difference), _number(c.lora), _number(c.allowed), _verdict(c)) for c in self.checks
        ]
        return "\n".join(
            [
                *_table(("adapter", "stack", "scope", "layers", "blocks", "modules"), stacks),
                "",
                *self.notes,
                "",
                *_table(("check", "difference", "LoRA's", "allowed", "verdict"), checks),
                "",
                "passed" if self.passed else "FAILED: " + ", ".join(c.name for c in self.checks if c.failed),
            ]
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _verdict(check: Check) -> str:
    return f"{check.verdict}: {check.reason}" if check.reason else check.verdict


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
