"""Judging a run: hand-made scores, and the tables."""

import math

import numpy as np
import pytest

from genkl_ext.demo import results
from genkl_ext.demo.results import Accuracy, Identification, Results


def test_identify():
    score = np.array([0.9, 0.8, 0.5, 0.4, 0.1])
    truth = np.array([True, False, True, False, False])
    found = results.identify(1, "GenKL", score, 0.5, truth)
    assert (found.iteration, found.score, found.threshold) == (1, "GenKL", 0.5)
    assert found.flagged == 3 / 5
    assert found.recall == 1
    assert found.precision == pytest.approx(2 / 3)
    assert found.auroc == pytest.approx(5 / 6)  # 5 of the 6 pairs are in the right order


def test_identify_without_a_flagged_image():
    found = results.identify(0, "GenKL", np.array([0.1, 0.2]), 0.5, np.array([True, False]))
    assert found.recall == found.flagged == 0
    assert math.isnan(found.precision)


@pytest.fixture
def made_up():
    return Results(
        accuracies=[Accuracy("plain", [0.9, 0.8], [0.7, 0.7]), Accuracy("GenKL", [1, 1], [1, 1])],
        identifications=[Identification(0, "GenKL", 0.25, 0.3, 0.9, math.nan, 0.95)],
        noisy=None,
        critical=[],
        top_class=np.zeros(3, np.int32),
        nonconforming=np.zeros(3, bool),
        notes=["A note."],
    )


def test_markdown(made_up):
    text = results.markdown(made_up)
    assert "| plain | 85.00 ± 7.07 | 70.00 ± 0.00 |" in text
    assert "| GenKL, iteration 0 | 0.250 | 30.0 | 90.0 | nan | 95.0 |" in text
    assert "mean and standard deviation of 2 seeds" in text
    assert text.endswith("- A note.\n")
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (4, 7)


def test_one_seed_has_no_spread(made_up):
    made_up.accuracies[:] = [Accuracy("plain", [0.9], [0.8])]
    text = results.markdown(made_up)
    assert "| plain | 90.00 | 80.00 |" in text
    assert "one seed" in text
