"""One generation in a thread: its text piece by piece, and its end where nobody listens any more."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor
from transformers import AsyncTextIteratorStreamer, StoppingCriteria


class Stop(StoppingCriteria):
    """Ends a generation after its next token, once `now` is set."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now.is_set(), device=input_ids.device)


class Answer:
    """A generation of one row, which starts at once in a thread of `pool`. It must be made in an event loop.

    Args:
        model: a `PeftModel`; every thread has its own call context there, so many answers can be made side by side.
        tokenizer: its tokenizer.
        arguments: of the model's `generate`, with `input_ids` [1, T].
        pool: runs it.
    """

    def __init__(self, model: Any, tokenizer: Any, arguments: dict[str, Any], pool: Executor) -> None:
        self.stop, self.ids = Stop(), torch.empty(0, dtype=torch.long)
        self.streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.running = asyncio.get_running_loop().run_in_executor(pool, self._generate, model, arguments)

    def _generate(self, model: Any, arguments: dict[str, Any]) -> Tensor:
        try:
            ids = model.generate(**arguments, streamer=self.streamer, stopping_criteria=[self.stop])
            return ids[0, arguments["input_ids"].shape[1] :]
        finally:
            self.streamer.on_finalized_text("", stream_end=True)  # after an error, too: else the reader waits forever

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it is made. Afterwards `ids` are the new tokens [n]; who leaves earlier ends the generation."""
        try:
            async for piece in self.streamer:
                if piece:
                    yield piece
            self.ids = await self.running
        finally:
            self.stop.now.set()
