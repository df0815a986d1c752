"""One clock for every benchmark: candidates take turns in one run, and medians are compared.

    times = take_turns({"ours": ours, "theirs": theirs}, seconds=3)
    times["theirs"].median / times["ours"].median

A, B, C, A, B, C, ...: whatever slows the machine down for a while slows every candidate down.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Candidate = Callable[[int], object]
Timer = Callable[[Candidate, int], float]

CPU_PAUSE = 0.025  # seconds; see take_turns


class Times(NamedTuple):
    """Seconds of one call: the median of ``samples`` calls, their quartiles, the fastest."""

    median: float
    lower: float
    upper: float
    best: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Of at least two calls."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, min(seconds), len(seconds))

    def as_json(self) -> dict[str, float]:
        """Milliseconds to six digits, and the number of calls."""
        fields = zip(("median_ms", "lower_ms", "upper_ms", "best_ms"), self[:4], strict=True)
        return {**{name: significant(1e3 * s) for name, s in fields}, "samples": self.samples}


def take_turns(
    candidates: Mapping[str, Candidate],
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 100),
    pause: float = 0.0,
    timer: Timer | None = None,
) -> dict[str, Times]:
    """Time the candidates in turns: one round to warm up, then rounds until ``seconds`` are over.

    Args:
        candidates: name -> function of the number of the call, counted over all candidates. A
            candidate takes its input by that number (``inputs[turn % len(inputs)]``), so that no
            call finds in the cache what the call before it has read.
        seconds: how long to go on, pauses included, warm-up not.
        rounds: at least and at most so many rounds; at least 2.
        pause: seconds of sleep before each call. The idle threads of OpenMP and OpenBLAS spin for
            up to some 20 ms before they sleep, and would take a core from the next candidate.
        timer: seconds of one call; by default the host's clock around it.

    Returns:
        Name -> the times of its calls. What a call returns is released outside its time.
    """
    timer = timer or host_time
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    turn = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(-1, rounds[1]):
            if number == 0:
                end = time.perf_counter() + seconds
            if number >= rounds[0] and time.perf_counter() >= end:
                break
            for name, candidate in candidates.items():
                if pause:
                    time.sleep(pause)
                taken = timer(candidate, turn)
                turn += 1
                if number >= 0:
                    samples[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return {name: Times.of(taken) for name, taken in samples.items()}


def host_time(candidate: Candidate, turn: int) -> float:
    """Seconds of one call on the host."""
    start = time.perf_counter()
    result = candidate(turn)
    taken = time.perf_counter() - start
    del result
    return taken


class CudaTimer:
    """Seconds of one call on the GPU, between two events on the current stream.

    Before the first event a buffer much larger than the last-level cache is read. That evicts
    the inputs without leaving lines that would have to be written back during the call, and keeps
    the GPU busy while the host enqueues the call, so that launches are not timed.
    """

    def __init__(self, sweep_bytes: int = 1 << 30) -> None:
        import torch

        self._torch: Any = torch
        self._sweep = torch.zeros(sweep_bytes // 4, device="cuda")

    def __call__(self, candidate: Candidate, turn: int) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._sweep.sum()
        start.record()
        result = candidate(turn)
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def significant(value: float, digits: int = 6) -> float:
    """``value`` rounded to so many significant digits, for files that people read."""
    return float(f"{value:.{digits}g}")
