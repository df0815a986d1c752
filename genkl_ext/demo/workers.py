"""Trainings side by side, one thread each.

A network this small gains little from several threads, and loses much where other processes want
the same cores. Two networks on two cores need half the time, and the numbers do not depend on how
many run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ..rule import num_threads

Result = TypeVar("Result")


class Stopped(Exception):
    """Another training failed, or the run was interrupted."""


class Workers:
    """As many trainings or predictions at a time as torch may use threads.

    Args:
        steps: of all trainings together.
        progress: called with (steps done, steps) after every step.
    """

    def __init__(self, steps: int, progress: Callable[[int, int], None]) -> None:
        self._steps = steps
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._count = num_threads()

    def tick(self) -> None:
        """Count one step. Raises ``Stopped`` where the work is no longer wanted."""
        if self._stopped.is_set():
            raise Stopped
        with self._lock:
            self._done += 1
            self._progress(self._done, self._steps)

    def map(self, work: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
        """``list(map(work, *arguments))``; the first error ends them all."""
        with one_thread(), ThreadPoolExecutor(self._count) as pool:
            futures = [pool.submit(work, *one) for one in zip(*arguments, strict=False)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread, here and in threads that start meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
