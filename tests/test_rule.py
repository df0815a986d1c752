"""GenKL and Scores: the published check values, the messages, the small promises."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

import genkl_ext as gk
from genkl_ext import reference
from genkl_ext.rule import num_threads

PRESETS = {"clothing1m": 14, "food101n": 101, "webvision": 50}


def row(*runs):
    """A float32 row from (value, count) runs."""
    return np.concatenate([np.full(n, value) for value, n in runs]).astype(np.float32)[None]


@pytest.mark.parametrize(
    "preset, seed, first, entropy, total",
    [
        ("clothing1m", 0, [0.106915, 0.061241, 0.080616, 0.122884], 3.678103, 69.855017),
        ("clothing1m", 1, [0.157135, 0.042042, 0.046344, 0.018303], 3.387975, 70.588337),
        ("clothing1m", 2, [0.060492, 0.082045, 0.005979, 0.183474], 3.217803, 69.525601),
        ("webvision", 42, [0.035346, 0.010317, 0.041297, 0.075801], 4.861981, 99.021795),
        ("food101n", 7, [1 / 101] * 4, 6.658211, 133.164230),
    ],
)
def test_vectors(preset, seed, first, entropy, total):
    rule = gk.GenKL.preset(preset, seed=seed)
    assert rule.vectors.shape == (20, PRESETS[preset]) and rule.vectors.dtype == np.float64
    np.testing.assert_allclose(rule.vectors[0, :4], first, atol=6e-7)
    np.testing.assert_allclose(rule.vectors.sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(-rule.entropies[0], entropy, atol=6e-7)
    np.testing.assert_allclose(-rule.entropies.sum(), total, atol=6e-7)
    np.testing.assert_array_equal(rule.entropies, reference.entropies(rule.vectors))


def test_vectors_are_the_legacy_global_stream():
    np.random.seed(5)
    u = np.random.normal(1 / 50, 0.05, (20, 50))
    u[u < 0] = 0.005
    u[u > 1] = 1.0
    np.testing.assert_array_equal(
        gk.GenKL.preset("webvision", seed=5).vectors, u / u.sum(1, keepdims=True)
    )


@pytest.mark.parametrize(
    "preset, seed, q, votes, divergence",
    [
        ("clothing1m", 0, row((1 / 14, 14)), 18, 0.318397),
        ("clothing1m", 1, row((1 / 14, 14)), 16, 0.337316),
        ("clothing1m", 0, row((0.40, 1), (0.6 / 13, 13)), 20, 0.917930),
        ("clothing1m", 0, row((0.60, 1), (0.4 / 13, 13)), 0, -3.450885),
        ("clothing1m", 0, row((0.25, 4), (0, 10)), 0, -2.626835),
        ("clothing1m", 0, row((0.125, 8), (0, 6)), 0, -1.490826),
        ("clothing1m", 0, row((1, 1), (0, 13)), 0, -3.488958),
        ("clothing1m", 0, row((0.5, 1), (0.05, 10), (0, 3)), 0, -0.064857),
        ("clothing1m", 1, row((0.5, 1), (0.05, 10), (0, 3)), 2, 0.439953),
        ("clothing1m", 2, row((0.5, 1), (0.05, 10), (0, 3)), 1, 0.367797),
        ("food101n", 0, row((1 / 101, 101)), 0, -0.665821),
        ("food101n", 0, row((0.5, 1), (0.005, 100)), 20, 0.254043),
        ("food101n", 0, row((0.80, 1), (0.002, 100)), 20, 1.556169),
        ("food101n", 0, row((0.85, 1), (0.0015, 100)), 0, -7.321711),
        ("webvision", 42, row((1 / 50, 50)), 20, 1.344702),
        ("webvision", 42, row((0.70, 1), (0.3 / 49, 49)), 20, 2.980181),
        ("webvision", 42, row((0.80, 1), (0.2 / 49, 49)), 0, -4.295748),
        ("webvision", 42, row((0.04, 25), (0, 25)), 0, -1.214212),
    ],
)
def test_hand_made_predictions(preset, seed, q, votes, divergence):
    scores = gk.GenKL.preset(preset, seed=seed).score(q)
    assert scores.votes[0] == votes and scores.nc[0] == (votes > 0)
    # The printed value was computed with float32 logarithms of float32 entries.
    np.testing.assert_allclose(scores.divergence[0], divergence, atol=3e-6)


@pytest.mark.parametrize(
    "preset, seed, counts",
    [
        ("clothing1m", 0, [4944, 2195, 55, 2, 1, 0]),
        ("clothing1m", 1, [4946, 2046, 41, 0, 0, 0]),
        ("clothing1m", 2, [4956, 2457, 101, 5, 1, 0]),
        ("food101n", 0, [0, 0, 0, 0, 0, 0]),
        ("webvision", 42, [5000, 5000, 4963, 1791, 105, 0]),
    ],
)
def test_bulk_counts(preset, seed, counts):
    rule = gk.GenKL.preset(preset, seed=seed)
    normal = np.random.RandomState(7).standard_normal((5000, rule.num_classes))
    for scale, wanted in zip([0.25, 0.5, 1.0, 1.5, 2.0, 3.0], counts, strict=True):
        e = np.exp(normal * scale)
        q = (e / e.sum(1, keepdims=True)).astype(np.float32)
        assert rule.score(q).nc.sum() == wanted


def test_at_decides_other_alphas_without_the_data():
    rng = np.random.default_rng(0)
    q = reference.softmax(rng.normal(size=(20_000, 14)) * 0.5)
    rule = gk.GenKL.preset("clothing1m")
    scores = rule.score(q)
    np.testing.assert_array_equal(scores.at(rule.alpha), scores.nc)
    for alpha in (0.0, 0.8, 1.0, 1.2, 3.0):
        fresh = gk.GenKL.preset("clothing1m", alpha=alpha).score(q)
        near = np.abs(scores.critical_alpha / np.float64(alpha or 1) - 1) <= rule.resolution
        assert (scores.at(alpha=alpha) == fresh.nc)[~near].all()
    with pytest.raises(ValueError, match="at: alpha must be a finite number >= 0, got nan"):
        scores.at(alpha=float("nan"))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_at_does_not_round_alpha_to_float32(kind):
    alpha = 1.1659202933311463
    below = np.float32(alpha)
    assert float(below) < alpha
    rule = gk.GenKL(10, alpha, beta=0.042, sigma=0.07)
    q = reference.softmax(np.random.default_rng(0).normal(size=(20_000, 10)) * 0.8)
    scores = rule.score(q if kind == "numpy" else torch.from_numpy(q))
    np.testing.assert_array_equal(scores.at(alpha), scores.nc)
    ends = np.array([below, np.nextafter(below, np.float32(2)), np.nan], np.float32)
    known = np.array([False, True, False])
    made = {"critical_alpha": ends, "nc": known}
    if kind == "torch":
        made = {name: torch.from_numpy(column) for name, column in made.items()}
    scores = dataclasses.replace(scores, **made)
    assert scores.at(alpha).tolist() == known.tolist()
    other = dataclasses.replace(scores, rule=gk.GenKL(10, 1.0, beta=0.042, sigma=0.07))
    assert other.at(alpha).tolist() == known.tolist()


def test_numpy_in_numpy_out_tensors_in_tensors_out(device):
    rule = gk.GenKL.preset("clothing1m")
    q = reference.softmax(np.random.default_rng(0).normal(size=(100, 14)))
    for scores, kind in ((rule.score(q), np.ndarray), (rule.score(torch.tensor(q)), torch.Tensor)):
        for name in ("critical_alpha", "divergence", "votes", "nc", "top_class", "top_prob"):
            column = getattr(scores, name)
            assert isinstance(column, kind) and column.shape == (100,)
        dtypes = [str(c.dtype).removeprefix("torch.") for c in (scores.votes, scores.divergence)]
        assert dtypes == ["int32", "float32"] and len(scores) == 100
    tensors = rule.score(torch.tensor(q, device=device))
    assert tensors.critical_alpha.device.type == device
    assert isinstance(tensors.numpy().nc, np.ndarray)
    assert tensors.cpu().nc.device.type == "cpu"


def test_rules_are_values():
    rule = gk.GenKL.preset("webvision", num_vectors=5)
    rule.score(np.full((1, 50), 0.02, dtype=np.float32))
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule and hash(again) == hash(rule)
    np.testing.assert_array_equal(again.vectors, rule.vectors)
    with pytest.raises(ValueError, match="read-only"):
        rule.vectors[0, 0] = 1
    with pytest.raises(AttributeError):
        rule.alpha = 2.0


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"num_classes": 1}, ValueError, "num_classes must be from 2 to 16777216, got 1"),
        ({"num_classes": 14.0}, TypeError, "num_classes must be an integer, got 14.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
        ({"num_vectors": 0}, ValueError, "num_vectors must be from 1 to 65536, got 0"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 4294967295, got -1"),
        ({"alpha": -0.1}, ValueError, "alpha must be a finite number >= 0, got -0.1"),
        ({"alpha": "1"}, TypeError, "alpha must be a finite number >= 0, got '1'"),
        ({"alpha": float("inf")}, ValueError, "alpha must be a finite number >= 0, got inf"),
        ({"sigma": -1}, ValueError, "sigma must be a finite number >= 0, got -1"),
        ({"beta": 1 / 14}, ValueError, "beta must be below 1/num_classes = 0.0714286"),
    ],
)
def test_bad_hyper_parameters(changes, error, message):
    with pytest.raises(error, match=message):
        gk.GenKL.preset("clothing1m", **changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="one of clothing1m, food101n, webvision, got 'cifar'"):
        gk.GenKL.preset("cifar")


GOOD = np.full((6, 14), 1 / 14, dtype=np.float32)


def changed(row, column, value):
    q = GOOD.copy()
    q[row, column] = value
    return q


@pytest.mark.parametrize(
    "predictions, error, message",
    [
        (GOOD[:, :13], ValueError, r"predictions must have shape \(N, 14\), got \(6, 13\)"),
        (GOOD[0], ValueError, r"predictions must have shape \(N, 14\), got \(14,\)"),
        (GOOD.astype(int), TypeError, "predictions must be float32, float16, float64, got int64"),
        (GOOD.astype(">f4"), TypeError, "predictions must be float32, .* got >f4"),
        (GOOD.tolist(), TypeError, r"predictions\[0\] must be a NumPy array .* got list"),
        ([], ValueError, "predictions must be 1 to 64 arrays, got a sequence of 0"),
        ([GOOD, GOOD[1:]], ValueError, r"predictions\[1\] must be like predictions\[0\]"),
        ([GOOD, GOOD.astype(np.float64)], ValueError, r"got \(6, 14\) float64"),
        ([GOOD, torch.tensor(GOOD)], TypeError, r"predictions\[1\] must be a NumPy array, got Ten"),
        ([torch.tensor(GOOD), GOOD], TypeError, r"predictions\[1\] must be a torch tensor like"),
        (torch.tensor(GOOD).int(), TypeError, "predictions must be torch.float32, .* torch.int32"),
        (changed(4, 2, np.nan), ValueError, "must be finite .* got nan at row 4, class 2"),
        (changed(4, 2, np.inf), ValueError, "must be finite .* got inf at row 4, class 2"),
        (changed(4, 2, -0.5), ValueError, "not negative, got -0.5 at row 4, class 2"),
        (changed(4, 2, 0.2), ValueError, "must sum to 1 within 0.001, got 1.128571 at row 4"),
        ([GOOD, changed(4, 2, -0.5)], ValueError, r"predictions\[1\] must be .* row 4, class 2"),
        ([GOOD, changed(4, 2, 0.2)], ValueError, "average of 2 models must sum to 1 .* row 4"),
        (GOOD * 14, ValueError, "got 14 at row 0; pass logits=True for logits"),
        (torch.tensor(changed(4, 2, -0.5)), ValueError, "got -0.5 at row 4, class 2"),
    ],
)
def test_bad_predictions(predictions, error, message):
    with pytest.raises(error, match=message):
        gk.GenKL.preset("clothing1m").score(predictions)


def test_when_a_bad_row_is_raised(device):
    """At once on the CPU; on CUDA when the host first asks for the numbers."""
    rule = gk.GenKL.preset("clothing1m")
    bad = torch.tensor(changed(4, 2, -0.5), device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="row 4, class 2"):
            rule.score(bad)
        return
    scores = rule.score(bad)
    for ask in (scores.check, scores.cpu, scores.numpy):
        with pytest.raises(ValueError, match="got -0.5 at row 4, class 2"):
            ask()
    del bad
    with pytest.raises(ValueError, match="row 4 of predictions is no valid prediction"):
        scores.check()
    rule.score(torch.tensor(GOOD, device=device)).check()


def test_bad_logits():
    rule = gk.GenKL.preset("clothing1m")
    rule.score(GOOD - 3, logits=True)
    with pytest.raises(ValueError, match="predictions must be finite, got -inf at row 4, class 2"):
        rule.score(changed(4, 2, -np.inf), logits=True)


def test_validate_false_scores_anything():
    rule = gk.GenKL.preset("clothing1m")
    for value in (np.nan, np.inf, -0.5, 0.2):
        q = changed(4, 2, value)
        scores = rule.score(q, validate=False)
        wanted = reference.nc_score(q, rule.vectors, rule.alpha, rule.tau)
        np.testing.assert_array_equal(scores.votes, wanted.votes)
        np.testing.assert_allclose(scores.divergence, wanted.divergence, rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-2), ("bfloat16", 2e-2)])
def test_half_precision_rows_may_be_further_from_one(dtype, tolerance):
    rule = gk.GenKL.preset("clothing1m")
    q = torch.full((3, 14), 1 / 14).to(getattr(torch, dtype))
    rule.score(q)
    q[2, 0] += 0.04
    with pytest.raises(ValueError, match=f"within {tolerance:g}, got .* at row 2"):
        rule.score(q)


def test_threads(monkeypatch):
    assert num_threads() == torch.get_num_threads()
    monkeypatch.delitem(__import__("sys").modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert num_threads() >= 1
