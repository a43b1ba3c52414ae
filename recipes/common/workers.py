"""Processes that train side by side, with a bar that shows how far they are."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from queue import Queue
from typing import TypeVar

import torch
from tqdm import tqdm

Result = TypeVar("Result")


class Workers:
    """Up to `processes` processes, each on one CPU thread: two processes gain more than two threads."""

    def __init__(self, processes: int) -> None:
        context = get_context("spawn")  # what CUDA needs
        self.manager = context.Manager()
        self.pool = ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.manager.shutdown()

    def results(
        self, tasks: Sequence[Callable[[Queue], Result]], epochs: int, description: str, unit: str = "epoch"
    ) -> Iterator[Result]:
        """What `tasks` return, as they end.

        Args:
            tasks: called with a queue that takes one item per epoch. If one fails, the others go on, and its error is
                raised after them.
            epochs: number of epochs of each task.
            description: text beside the bar.
            unit: what the bar counts, if not epochs.
        """
        finished, errors = self.manager.Queue(), []
        pending = {self.pool.submit(task, finished) for task in tasks}
        with tqdm(total=epochs * len(tasks), desc=description, unit=unit) as bar:
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                bar.update(finished.qsize() - bar.n)
                for task in done:
                    if error := task.exception():
                        errors.append(error)
                    else:
                        yield task.result()
        if errors:
            raise errors[0]
