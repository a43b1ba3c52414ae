"""How an adapter routes a stack."""

from __future__ import annotations

from dataclasses import dataclass

from ..method.router import Router
from ..method.scope import Scope


@dataclass(frozen=True)
class Plan:
    """How one adapter routes one stack.

    Args:
        adapter_name: the adapter.
        router: its router.
        scope: which tokens its routes see in this stack.
        first_block: index, among the router's blocks, of the stack's first one.
        num_blocks: number of blocks of the stack.
        mixed: pattern of those of its modules that may see tokens of several kinds together, which no mask of the
            call is known to be about; "" if there are none.
    """

    adapter_name: str
    router: Router
    scope: Scope
    first_block: int
    num_blocks: int
    mixed: str = ""

    @property
    def last_read(self) -> int:
        """Index of the first of the last blocks whose mean no later block reads: those before it have one that is."""
        return self.num_blocks - 1 if self.router.uses_depth else 0
