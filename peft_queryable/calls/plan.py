"""What is known of a stack before it runs, and how an adapter routes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..method.router import Router
from ..method.scope import Scope


@dataclass(frozen=True)
class StackTraits:
    """What is known of a stack from where it stands in its model.

    Args:
        name: its name in messages and caches.
        reads_memory: whether its modules see an encoder's output, which they cross-attend to.
        is_loose: whether it stands outside every list of layers, and so may read the output of another stack.
        is_denoiser: whether its owner is a denoiser, whose masks are about the text beside its own tokens.
        predicts: whether its outputs may predict or generate later tokens. Labels, prompts and key/value cache of the
            model call are then about its tokens.
    """

    name: str
    reads_memory: bool
    is_loose: bool
    is_denoiser: bool
    predicts: bool


@dataclass(eq=False)
class Plan:
    """How one adapter routes one stack.

    Args:
        adapter_name: the adapter.
        traits: of the stack.
        router: the adapter's router.
        scope: which tokens its routes see in this stack.
        first_block: index, among the router's blocks, of the stack's first one.
        num_blocks: number of blocks of the stack.
        mixed: pattern of those of its modules that may see tokens of several kinds together, which no mask of the
            call is known to be about; "" if there are none.

    Attributes:
        seen: what a training call has shown once, so that no later one waits for the device.
    """

    adapter_name: str
    traits: StackTraits
    router: Router
    scope: Scope
    first_block: int
    num_blocks: int
    mixed: str = ""
    seen: set[str] = field(default_factory=set, init=False)

    @property
    def last_read(self) -> int:
        """Index of the first of the last blocks whose mean no later block reads: those before it have one that is."""
        return self.num_blocks - 1 if self.router.uses_depth else 0
