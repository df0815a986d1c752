"""The definition against other people's arithmetic: NumPy's logarithm, the published program."""

import warnings

import numpy as np
import pytest

import genkl_ext as gk
from genkl_ext import reference


def ulps(values, expected):
    return np.abs(values - expected) / np.spacing(np.abs(expected))


@pytest.mark.parametrize("low, high", [(-60, 0), (-1, 1), (-0.01, 0.01), (0, 20)])
def test_log2_is_within_three_ulp(low, high):
    x = np.exp2(np.random.default_rng(0).uniform(low, high, 100_000))
    assert ulps(reference.log2(x), np.log2(x)).max() <= 3


def test_log2_is_exact_at_powers_of_two_and_passes_nan_and_infinity():
    x = np.exp2(np.arange(-1000.0, 1000.0))
    np.testing.assert_array_equal(reference.log2(x), np.arange(-1000.0, 1000.0))
    assert np.isnan(reference.log2(np.array([np.nan]))).all()
    assert reference.log2(np.array([np.inf])) == np.inf


def test_exp_is_within_two_ulp_and_ends_at_zero():
    x = -np.random.default_rng(0).uniform(0, 690, 100_000)
    assert ulps(reference.exp(x), np.exp(x)).max() <= 2
    np.testing.assert_array_equal(
        reference.exp(np.array([0.0, -701.0, -1e300, -np.inf])), [1.0, 0.0, 0.0, 0.0]
    )


@pytest.mark.parametrize("classes", [2, 31, 32, 33, 100])
def test_softmax(classes):
    x = np.random.default_rng(classes).normal(0, 5, (50, classes))
    e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(reference.softmax(x), e / e.sum(1, keepdims=True), rtol=1e-7)


def published(models, vectors, alpha, tau):
    """The published program, step by step (GenKL, non-conforming identification): the (m, N, k)
    product and NumPy's own logarithm, in the dtype of the averaged predictions."""
    q = np.stack(models, axis=1).astype(np.float32).mean(axis=1) if len(models) > 1 else models[0]
    entropy_part = alpha * (vectors * np.log2(vectors)).sum(axis=1)
    kept = q.copy()
    kept[kept < tau] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log_q = np.log2(kept)
    log_q[np.isneginf(log_q)] = 0
    cross = (vectors[:, None, :] * log_q[None]).sum(axis=2)
    return (entropy_part[:, None] >= cross).sum(axis=0)


@pytest.mark.parametrize("preset", ["clothing1m", "webvision", "food101n"])
@pytest.mark.parametrize("models", [1, 3])
def test_votes_are_those_of_the_published_program(preset, models):
    rule = gk.GenKL.preset(preset, seed=3)
    rng = np.random.default_rng(models)
    spread = rng.choice([0.3, 0.6, 1.0, 2.0], size=(4000, 1))
    predictions = [
        reference.softmax(rng.normal(size=(4000, rule.num_classes)) * spread) for _ in range(models)
    ]
    got = reference.nc_score(predictions, rule.vectors, rule.alpha, rule.tau)
    wanted = published(predictions, rule.vectors, rule.alpha, rule.tau)
    # The program's float32 logarithms and pairwise mean decide a row in a thousand otherwise.
    assert (got.votes != wanted).mean() < 1e-3
    sure = np.abs(got.critical_alpha - rule.alpha) > 1e-4
    np.testing.assert_array_equal((got.votes > 0)[sure], (wanted > 0)[sure])


def test_an_entry_on_the_threshold_is_compared_in_its_own_precision():
    tau = 1 / 14 - 0.03  # float32(tau) lies below tau
    q = np.array([[np.float32(tau), np.nextafter(np.float32(tau), np.float32(0))]])
    np.testing.assert_array_equal(reference.dominant(q, tau), [[True, False]])
    np.testing.assert_array_equal(reference.dominant(q.astype(np.float64), tau), [[False, False]])


def test_special_rows():
    rule = gk.GenKL.preset("clothing1m")
    rows = np.zeros((4, 14), dtype=np.float32)
    rows[1, 3] = np.nan
    rows[2, 0] = np.inf
    rows[3] = -1
    got = reference.nc_score(rows, rule.vectors, rule.alpha, rule.tau)
    assert got.critical_alpha[0] == 0 and got.votes[0] == 0  # nothing dominant
    assert np.isnan(got.critical_alpha[1]) and got.votes[1] == 0 and got.top_class[1] == 3
    assert got.divergence[2] == -np.inf and got.votes[2] == 0
    assert got.critical_alpha[3] == 0 and got.votes[3] == 0


def test_first_bad_row():
    good = np.full((5, 4), 0.25, dtype=np.float32)
    bad = good.copy()
    bad[3, 1] = -0.1
    bad[4, 0] = np.nan
    assert reference.first_bad_row([good], logits=False, tolerance=1e-3) == -1
    assert reference.first_bad_row([good, bad], logits=False, tolerance=1e-3) == 3
    assert reference.first_bad_row([good, bad], logits=True, tolerance=1e-3) == 4
    assert reference.first_bad_row([good * 1.01], logits=False, tolerance=1e-3) == 0
