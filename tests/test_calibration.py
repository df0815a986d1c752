"""A calibrated rule flags no more clean rows than asked for, by the float64 definition."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution
from scipy.stats import binom

import genkl_ext as gk
from genkl_ext import calibration, reference
from genkl_ext.calibration import alpha_reached_by, alpha_reached_by_at_most, calibrate, interval

RULE = gk.GenKL(10, 1.0, 0.042, 0.07)
HOLE = np.where(np.arange(300).reshape(30, 10) == 21, np.nan, 0.5)


def rows(count: int, classes: int = 10, seed: int = 0, scale: float = 1.5) -> np.ndarray:
    return reference.softmax(np.random.default_rng(seed).normal(size=(count, classes)) * scale)


def exact(rule: gk.GenKL, q: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """Critical alphas by the float64 definition."""
    return reference.nc_score(q, rule.vectors, rule.alpha, rule.tau).critical_alpha


def flagged(rule: gk.GenKL, q: np.ndarray | list[np.ndarray]) -> int:
    return int((reference.nc_score(q, rule.vectors, rule.alpha, rule.tau).votes > 0).sum())


@st.composite
def clean_rows(draw: st.DrawFn) -> np.ndarray:
    """Few classes, and few different entries: rows tie, exactly or up to their last bits."""
    classes = draw(st.sampled_from([2, 3, 10]))
    count = draw(st.integers(1, 40))
    stream = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["any", "few", "permuted", "one-hot", "shaken"]))
    q = reference.softmax(stream.normal(size=(count, classes)) * 1.5)
    if kind == "few":
        q = q[stream.integers(0, min(3, count), count)]
    elif kind == "permuted":  # equal in exact arithmetic at sigma = 0, not in floating point
        q = np.array([stream.permutation(q[0]) for _ in range(count)])
    elif kind == "one-hot":
        q[stream.random(count) < 0.7] = np.eye(classes, dtype=np.float32)[0]
    elif kind == "shaken":
        q = q[:1] * (1 + stream.integers(-3, 4, (count, classes)) * np.float32(2**-23))
    return q.astype(draw(st.sampled_from([np.float16, np.float32, np.float64])))


@settings(max_examples=150)
@given(clean_rows(), st.floats(0, 0.99), st.sampled_from([0.0, 0.05]), st.integers(0, 3))
def test_flags_at_most_the_share_and_no_less_than_it_can(
    q: np.ndarray, share: float, sigma: float, seed: int
) -> None:
    classes = q.shape[1]
    rule = gk.GenKL(classes, 1.0, 0.42 / classes, sigma, seed=seed)
    found = rule.calibrate(q, false_positives=share)
    assert dataclasses.replace(found.rule, alpha=rule.alpha) == rule
    count = flagged(found.rule, q)
    assert count / len(q) <= share
    assert found.share == count / len(q) and found.rows == len(q)
    # The next rows down (with those that a float32 does not tell from them) would be too many.
    critical = exact(found.rule, q)
    below = critical[critical < found.rule.alpha]
    if len(below):
        slack = 4 * rule.resolution * max(1, abs(below.max()))
        assert (critical >= below.max() - slack).sum() / len(q) > share
    else:
        assert count == len(q)


@pytest.mark.parametrize("seed", range(28, 34))
def test_rows_closer_than_a_stored_critical_alpha_can_tell(seed: int) -> None:
    """No fewer are flagged than with the alpha that the exact critical alphas, rounded, give."""
    stream = np.random.default_rng(seed)
    classes = [10, 101, 200][seed % 3]
    q = np.repeat(rows(1, classes, seed, 0.8), 120, axis=0)
    q *= 1 + stream.integers(-40, 41, q.shape) * np.float32(2**-23)
    rule = gk.GenKL(classes, 1.0, 0.42 / classes, 0.7 / classes)
    critical = exact(rule, q)
    for share in (0.05, 0.2, 0.33):
        allowed = int(120 * share)
        alpha = alpha_reached_by_at_most(critical.astype(np.float32), allowed)
        count = flagged(calibrate(rule, q, false_positives=share).rule, q)
        assert (critical >= alpha).sum() <= count <= allowed


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.29, 0.5])
@pytest.mark.parametrize("count", [1, 19, 20, 21, 100, 160])
def test_without_ties_the_share_is_used_up(count: int, share: float) -> None:
    q = rows(count)
    found = calibrate(RULE, q, false_positives=share)
    allowed = max(c for c in range(count + 1) if c / count <= share)
    assert flagged(found.rule, q) == allowed
    values = np.sort(exact(RULE, q))[::-1]
    if allowed:  # one float32 below the last row that is flagged, so above all that are not
        assert 0 < values[allowed - 1] - found.rule.alpha < 3e-7
    else:
        assert 0 < found.rule.alpha - values[0] < 3e-7


def test_rows_that_tie_are_flagged_together_or_not_at_all() -> None:
    q = np.repeat(rows(10), 10, axis=0)
    for share, expected in [(0.05, 0), (0.1, 10), (0.19, 10), (0.2, 20)]:
        assert flagged(calibrate(RULE, q, false_positives=share).rule, q) == expected
    certain = np.eye(10, dtype=np.float32)[np.zeros(30, int)]
    found = calibrate(RULE, certain)
    assert found.share == 0 and 0 < found.rule.alpha < 1e-30


def test_several_models_files_tensors_and_rows_without_prediction(tmp_path: Path) -> None:
    q = [rows(60, seed=s) for s in range(3)]
    found = calibrate(RULE, q, false_positives=0.1)
    assert flagged(found.rule, q) == 6
    holes = [np.insert(values, 7, np.nan, axis=0) for values in q[:2]]
    holes.append(np.insert(q[2], 7, 0.1, axis=0))  # one model without a prediction is enough
    files = [tmp_path / f"{s}.npy" for s in range(3)]
    for file, values in zip(files, holes, strict=True):
        np.save(file, values)
    tensors = [torch.tensor(values) for values in holes]
    for given_as in (holes, files, tensors):
        assert calibrate(RULE, given_as, false_positives=0.1) == found
    logits = np.log(q[0])
    again = calibrate(RULE, logits, false_positives=0.1, logits=True)
    assert RULE.calibrate(q[0], false_positives=0.1).rule.alpha == pytest.approx(again.rule.alpha)


def test_the_order_of_the_rows_does_not_matter() -> None:
    q, noisy = rows(200), rows(300, seed=5)
    choice = {"betas": [0.01, 0.03, 0.05], "noisy": noisy}
    found = calibrate(RULE, q, **choice)
    assert calibrate(RULE, q[::-1], **choice) == found == calibrate(RULE, q, **choice)
    assert calibrate(dataclasses.replace(RULE, alpha=0.2, beta=0.0), q, **choice) == found


def test_the_beta_that_flags_most() -> None:
    q, noisy = rows(200), rows(300, seed=5, scale=1.2)
    noisy[11] = np.nan
    betas = [0.01, 0.03, 0.05, 0.07]
    found = calibrate(RULE, q, betas=betas, noisy=[noisy])
    assert [c.rule.beta for c in found.candidates] == betas
    kept = np.delete(noisy, 11, axis=0)
    shares = []
    for beta, candidate in zip(betas, found.candidates, strict=True):
        alone = calibrate(dataclasses.replace(RULE, beta=beta), q)
        assert alone.rule == candidate.rule
        assert candidate.flagged == flagged(candidate.rule, q) == 10
        shares.append(flagged(candidate.rule, kept) / 299)
    assert [c.noisy_share for c in found.candidates] == pytest.approx(shares)
    assert len(set(shares)) > 1 and found.chosen == int(np.argmax(shares))
    assert found.rule == found.candidates[found.chosen].rule


def labelled(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, features that tell them with some doubt, and fitting predictions."""
    stream = np.random.default_rng(seed)
    labels = stream.integers(0, 10, count)
    features = np.eye(10)[labels] + stream.normal(size=(count, 10)) * 0.25
    return labels, features, reference.softmax(6 * features)


def test_the_beta_after_which_a_head_is_best() -> None:
    clean_labels, clean_features, clean = labelled(150, 0)
    labels, features, noisy = labelled(400, 1)
    # A third of the noisy rows mislead; their predictions have many entries of middling size,
    # which only a small threshold 1/k - beta lets count.
    bad = np.arange(400) % 3 == 0
    labels = np.where(bad, (labels + 1) % 10, labels)
    spread = np.full((bad.sum(), 10), 0.04, np.float32)
    spread[:, 0] = 0.64
    noisy[bad] = spread
    data = {
        "noisy": noisy, "features": features, "labels": labels,
        "clean_features": clean_features, "clean_labels": clean_labels,
    }  # fmt: skip
    betas = [0.0, 0.07]
    found = calibrate(RULE, clean, betas=betas, by="accuracy", folds=3, **data)
    assert found.by == "accuracy" and found.chosen == 1
    blind, seeing = found.candidates
    assert blind.noisy_share < 0.2 < seeing.noisy_share
    assert seeing.accuracy > blind.accuracy
    assert calibrate(RULE, clean, betas=betas, by="accuracy", folds=3, **data) == found
    # Rows without label or prediction, noisy or clean, change nothing.
    more = {
        "noisy": np.vstack([noisy, noisy[:1], np.full((1, 10), np.nan)]),
        "features": np.vstack([features, np.full((2, features.shape[1]), np.nan)]),
        "labels": [*labels, -1, -1],
        "clean_features": np.vstack([clean_features[:1], clean_features]),
        "clean_labels": [0, *clean_labels],
    }
    holes = np.vstack([np.full((1, 10), np.nan), clean])
    again = calibrate(RULE, holes, betas=betas, by="accuracy", folds=3, **more)
    assert [c.accuracy for c in again.candidates] == [c.accuracy for c in found.candidates]
    assert "accuracy %" in found.table() and f"{100 * seeing.accuracy:.2f} ± " in found.table()


@pytest.mark.parametrize(("count", "rows_"), [(0, 1), (1, 1), (0, 20), (5, 100), (100, 100)])
@pytest.mark.parametrize("together", [1, 4])
def test_interval_of_clopper_and_pearson(count: int, rows_: int, together: int) -> None:
    low, high = interval(count, rows_, 0.9, together)
    tail = 0.1 / 2 / together
    assert low == 0 if count == 0 else binom.sf(count - 1, rows_, low) == pytest.approx(tail)
    assert high == 1 if count == rows_ else binom.cdf(count, rows_, high) == pytest.approx(tail)


def test_interval_holds_although_alpha_was_chosen_on_the_same_rows() -> None:
    """By the law of order statistics that calibration.py states, and by drawing rows."""
    n, target = 60, 0.1
    found = calibrate(RULE, rows(n), false_positives=target)
    count = round(found.share * n)
    law = beta_distribution(count, n - count + 1)
    low, high = found.interval
    assert law.cdf(high) - law.cdf(low) >= 0.95 and law.mean() < target
    stream = np.random.default_rng(0)
    shares = []
    for _ in range(4000):
        alpha = alpha_reached_by_at_most(stream.random(n).astype(np.float32), count)
        shares.append(1 - alpha)  # of a uniform distribution
    assert np.mean(shares) == pytest.approx(law.mean(), abs=0.003)
    assert np.mean([low <= share <= high for share in shares]) >= 0.95


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.25000003, 0.5, 1.5]) | st.floats(0, 3, width=32),
             min_size=1, max_size=30),
    st.integers(0, 30),
)  # fmt: skip
@example([0.25, 0.25000003], 1)
def test_alphas_from_critical_alphas(values: list[float], count: int) -> None:
    critical = np.array(values, np.float32)
    alpha = alpha_reached_by_at_most(critical, count)
    assert alpha >= 0 and (critical >= alpha).sum() <= count
    lower = critical[critical < alpha]
    if len(lower):  # one more, and all that lie a float32 beside it
        assert (critical >= np.nextafter(lower.max(), np.float32(-1))).sum() > count
    # Below them by one float32: their exact values may be, too.
    reached = critical[critical >= alpha]
    if len(reached) and reached.min() > 0:
        assert alpha == np.nextafter(reached.min(), np.float32(0))
    share = min(count, len(values)) / len(values)
    alpha = alpha_reached_by(critical, share)
    assert (critical >= alpha).sum() >= share * len(values) - 1e-4
    assert alpha == 0 or np.nextafter(np.float32(alpha), np.float32(9)) in critical


def test_json_and_table() -> None:
    found = calibrate(RULE, rows(40), betas=[0.01, 0.05], noisy=rows(9, seed=2))
    facts = json.loads(found.to_json())
    assert gk.GenKL(**facts["candidates"][facts["chosen"]]["rule"]) == found.rule
    assert facts["rows"] == 40 and facts["false_positives"] == 0.05
    lines = found.table().splitlines()
    assert len(lines) == 3 and [line.lstrip()[0] == "*" for line in lines[1:]].count(True) == 1
    assert lines[1 + found.chosen].lstrip().startswith("*")
    assert "2 of 40 (5.00 %)" in lines[1] and "noisy %" in lines[0] and "accuracy" not in lines[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"false_positives": 1}, ValueError, "false_positives must be below 1, got 1"),
        ({"false_positives": -0.1}, ValueError, "must be a finite number >= 0, got -0.1"),
        ({"false_positives": "5 %"}, TypeError, "false_positives must be a finite number"),
        ({"confidence": 1.0}, ValueError, "confidence must be below 1, got 1"),
        ({"by": "luck"}, ValueError, "by must be 'flagged' or 'accuracy', got 'luck'"),
        ({"betas": []}, ValueError, "betas must be at least one, got none"),
        ({"betas": [0.01, 0.2]}, ValueError, "beta must be below 1/num_classes"),
        ({"betas": [0.01, 0.02]}, ValueError, "noisy, .*, is needed"),
        ({"by": "accuracy"}, ValueError, "noisy, .*, is needed"),
        ({"by": "accuracy", "noisy": rows(3)}, ValueError, "features must be given"),
        ({"clean": rows(0)}, ValueError, "clean must have a row with a prediction, got none"),
        ({"clean": np.full((3, 10), np.nan)}, ValueError, "have a row with a prediction, got none"),
        ({"clean": rows(5, 9)}, ValueError, r"predictions must have shape \(N, 10\), got \(5, 9\)"),
        ({"clean": rows(5) * 3}, ValueError, "must sum to 1"),
    ],
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(**{"rule": RULE, "clean": rows(20), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros(30)}, r"features must be \(N, d\), got \(30,\)"),
        ({"labels": np.zeros(29, int)}, r"labels must be \(30,\) like features, got \(29,\)"),
        ({"noisy": rows(31)}, r"labels must be \(31,\) like noisy, got \(30,\)"),
        ({"clean_labels": np.zeros(19, int)}, r"clean_labels must be \(20,\), got \(19,\)"),
        ({"clean_features": None}, "clean_features must be given"),
        (
            {"clean_features": np.zeros((20, 3))},
            "clean_features must have 10 columns like features",
        ),
        (
            {"clean_features": HOLE[:20]},
            "clean_features must be finite, got nan at row 2, column 1",
        ),
        ({"features": HOLE}, "features must be finite, got nan at row 2, column 1"),
        ({"features": HOLE.astype(str)}, "features must be numbers, got <U"),
        ({"labels": np.zeros(30)}, "labels must be integers, got float64"),
        ({"folds": 1}, "folds must be from 2 to 20"),
        ({"labels": np.zeros(30, int)}, "must have two classes at least, got"),
    ],
)
def test_wrong_arguments_of_the_head(change: dict, message: str) -> None:
    labels, features, noisy = labelled(30, 0)
    clean_labels, clean_features, clean = labelled(20, 1)
    data = {
        "noisy": noisy, "features": features, "labels": labels,
        "clean_features": clean_features, "clean_labels": clean_labels, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"calibrate: .*{message}"):
        calibrate(RULE, clean, by="accuracy", **data)


def test_real_softmax(shared_data: Path) -> None:
    file = sorted((shared_data / "softmax").glob("*_probs.npy"))[0]
    q = np.load(file)[:2000]
    rule = RULE.calibrate(q, false_positives=0.05).rule
    assert flagged(rule, q) <= 100
    assert flagged(rule, q) > 90
    assert math.isfinite(rule.alpha) and calibration.calibrate(RULE, q).rule == rule
