import gc
from collections.abc import Callable
from typing import Any

import pytest
from clock import Times, host_time, significant, take_turns


class Recorder:
    """A timer that takes no time: call number n took n seconds."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, candidate: Callable[[int], Any], turn: int) -> float:
        self.calls.append((candidate(turn), turn))
        return float(turn)


def test_candidates_take_turns_and_the_first_round_is_not_counted() -> None:
    timer = Recorder()
    times = take_turns(
        {"a": lambda turn: "a", "b": lambda turn: "b"}, seconds=0, rounds=(3, 9), timer=timer
    )
    assert timer.calls == [(name, turn) for turn, name in enumerate("ab" * 4)]
    assert times["a"] == Times.of([2.0, 4.0, 6.0])
    assert times["b"] == Times.of([3.0, 5.0, 7.0])


def test_goes_on_until_the_time_is_over_or_the_rounds_are() -> None:
    timer = Recorder()
    times = take_turns({"a": lambda turn: "a"}, seconds=1e9, rounds=(2, 7), timer=timer)
    assert times["a"].samples == 7
    assert len(timer.calls) == 8


def test_times() -> None:
    times = Times.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert times == Times(median=3.0, lower=2.0, upper=4.0, best=1.0, samples=5)
    assert times.as_json() == {
        "median_ms": 3000.0,
        "lower_ms": 2000.0,
        "upper_ms": 4000.0,
        "best_ms": 1000.0,
        "samples": 5,
    }


def test_garbage_is_not_collected_during_a_call_and_is_again_afterwards() -> None:
    seen: list[bool] = []

    def fail(turn: int) -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        take_turns({"fail": fail}, seconds=0)
    assert seen == [False]
    assert gc.isenabled()


def test_host_time_hands_the_turn_on() -> None:
    turns: list[int] = []
    assert host_time(turns.append, 5) >= 0
    assert turns == [5]


def test_significant() -> None:
    assert significant(123456.789, 4) == 123500.0
    assert significant(0.000123456789) == 0.000123457
