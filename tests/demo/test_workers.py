"""Trainings side by side."""

import threading

import pytest
import torch

from genkl_ext.demo.workers import Stopped, Workers


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_steps_are_counted():
    seen = []
    workers = Workers(30, lambda done, total: seen.append((done, total)))

    def train(item):
        for _ in range(10):
            workers.tick()
        return item * item

    assert workers.map(train, [3, 1, 2]) == [9, 1, 4]
    assert seen == [(i, 30) for i in range(1, 31)]


def test_each_training_has_one_thread():
    workers = Workers(1, lambda done, total: None)
    assert workers.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
    assert torch.get_num_threads() == 2


def test_an_error_ends_the_others():
    workers = Workers(0, lambda done, total: None)
    other_runs = threading.Event()
    ended = []

    def train(item):
        if item == 0:
            assert other_runs.wait(60)
            raise ValueError("no memory")
        other_runs.set()
        try:
            for _ in range(50_000_000):  # ends early only because tick raises
                workers.tick()
        except Stopped:
            ended.append(item)
            raise

    with pytest.raises(ValueError, match="no memory"):
        workers.map(train, [0, 1, 2, 3])
    assert 1 in ended
