"""Which calls are running in this thread: each thread has its own, and a call that ends restores its outer one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

_MODULE_CALL = nn.Module._call_impl.__code__


@dataclass(frozen=True)
class _Opened:
    """A running call, the one outside it, and the frame of the module call whose hook opened it."""

    call: Any
    outer: _Opened | None
    frame: FrameType | None


class _Top:
    """The innermost running call. A plain object: torch.compile follows its changes, but not a threading.local's."""

    opened: _Opened | None = None


class Current(threading.local):
    """The innermost running call of one kind, for each thread; a copied or unpickled one starts without any."""

    def __init__(self) -> None:
        self.top = _Top()

    def __reduce__(self) -> tuple[type, tuple]:
        return Current, ()

    @property
    def call(self) -> Any:
        """The innermost running call, or None."""
        opened = self.top.opened
        return None if opened is None else opened.call

    def open(self, call: Any) -> None:
        """In a forward pre-hook: make `call` the innermost one until the module's hook calls `close`."""
        is_compiling = torch.compiler.is_compiling()
        self.drop_ended()
        self.top.opened = _Opened(call, self.top.opened, None if is_compiling else _module_call())

    def drop_ended(self) -> None:
        """Forget calls that a KeyboardInterrupt ended: torch runs no hook after it."""
        if torch.compiler.is_compiling():
            return
        while (opened := self.top.opened) is not None and opened.frame is not None and not _is_running(opened.frame):
            self.top.opened = opened.outer

    def close(self) -> Any:
        """In a forward hook: end the call that this module call opened, and return it.

        None if it opened none: torch runs always-called hooks even where a pre-hook before ours has raised.
        """
        opened = self.top.opened
        if opened is None:
            return None
        is_known = opened.frame is not None and not torch.compiler.is_compiling()
        if is_known and opened.frame is not _module_call():
            return None
        self.top.opened = opened.outer
        return opened.call

    @contextmanager
    def entered(self, call: Any) -> Iterator[None]:
        """Make `call` the innermost one while the block lasts."""
        outer = self.top.opened
        self.top.opened = _Opened(call, outer, None)
        try:
            yield
        finally:
            self.top.opened = outer


def _module_call() -> FrameType | None:
    """The frame of the module call whose hook is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _MODULE_CALL:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType) -> bool:
    running: FrameType | None = sys._getframe(1)
    while running is not None and running is not frame:
        running = running.f_back
    return running is not None
