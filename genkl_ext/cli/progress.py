"""Progress of long work: a bar on a terminal, a line now and then in a log; both on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

_QUIET_SECONDS = 0.5  # shorter work shows nothing, and rich is not even imported
_LOG_SECONDS = 10.0


class Progress:
    """``with Progress("scoring", "rows") as progress: ... progress(done, total)``."""

    def __init__(self, title: str, unit: str) -> None:
        self._title = title
        self._unit = unit
        self._bar: Any = None
        self._task: Any = None
        self._start = time.monotonic()
        self._last_line = self._start

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._start < _QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw(done, total)
        elif now - self._last_line >= _LOG_SECONDS:
            self._last_line = now
            rate = done / (now - self._start)
            print(
                f"{self._title}: {done:,} of {total:,} {self._unit} ({done / total:.0%}), "
                f"{rate:,.0f} {self._unit}/s, {(total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} % of {task.total:,} " + self._unit),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=total)
        self._bar.update(self._task, completed=done)
