"""Every row-wise identifier against its formula in float64 NumPy and scipy, on awkward rows."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from awkward_rows import as_kind, assert_rounded, awkward, softmax, some_labels, strided

from genkl_ext import GenKL, identifiers, reference

CLASSES = [2, 10, 101]
DTYPES = ["float32", "float64", "float16"]


def collision_of_interpolated(q: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -np.log((((q + np.eye(q.shape[1])[y]) / 2) ** 2).sum(1))


def jensen_shannon(q: np.ndarray, y: np.ndarray) -> np.ndarray:
    """From scipy's relative entropies, elementwise, so that rows need not sum to 1."""
    label = np.eye(q.shape[1])[y]
    m = (q + label) / 2
    both = scipy.special.rel_entr(q, m).sum(1) + scipy.special.rel_entr(label, m).sum(1)
    return both / 2 / math.log(2)


def second(q: np.ndarray) -> np.ndarray:
    return np.sort(q, axis=1)[:, -2]


def largest_but(q: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([np.delete(row, c).max() for row, c in zip(q, y, strict=True)])


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "entropy": lambda q: scipy.special.entr(q).sum(1) / math.log(q.shape[1]),
    "max_softmax": lambda q: 1 - q.max(1),
    "margin": lambda q: 1 - (q.max(1) - second(q)),
    "collision_entropy": lambda q: -np.log((q**2).sum(1)),
    "kl_uniform": lambda q: math.log(q.shape[1]) + np.log(np.maximum(q, 2.0**-126)).mean(1),
}
OF_LABELS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "self_confidence": lambda q, y: 1 - q[np.arange(len(q)), y],
    "normalised_margin": lambda q, y: (1 - q[np.arange(len(q)), y] + largest_but(q, y)) / 2,
    "dsos": collision_of_interpolated,
    "jo_src": jensen_shannon,
}
OF_LOGITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "energy": lambda z: -scipy.special.logsumexp(z, axis=1),
    "max_logit": lambda z: -z.max(1),
}
OF_MEMBERS: dict[str, Callable[[list[np.ndarray]], np.ndarray]] = {
    "mutual_information": lambda models: (
        scipy.special.entr(np.mean(models, axis=0)).sum(1)
        - np.mean([scipy.special.entr(q).sum(1) for q in models], axis=0)
    ),
    "vote_entropy": lambda models: np.array(
        [
            scipy.stats.entropy(np.bincount(votes, minlength=models[0].shape[1]))
            for votes in np.stack([q.argmax(1) for q in models], axis=1)
        ]
    ),
}


def test_every_rowwise_identifier_is_here() -> None:
    rowwise = {
        name for name in identifiers.names() if not identifiers.get(name).needs & {"features"}
    }
    elsewhere = {"genkl", "confident_learning"}
    assert rowwise - elsewhere == {*FORMULAS, *OF_LABELS, *OF_LOGITS, *OF_MEMBERS}


@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_of_predictions(name: str, dtype: str, k: int, kind: str, small_pieces: None) -> None:
    q = awkward(k, dtype)
    assert_rounded(getattr(identifiers, name)(as_kind(kind, q)), FORMULAS[name](q.astype(float)))


@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_LABELS)
def test_of_labels(name: str, dtype: str, k: int, kind: str, small_pieces: None) -> None:
    q = awkward(k, dtype)
    labels = some_labels(q)
    exact = np.where(labels >= 0, OF_LABELS[name](q.astype(float), labels.clip(0)), np.nan)
    came = getattr(identifiers, name)(as_kind(kind, q), as_kind(kind, labels))
    assert_rounded(came, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_LOGITS)
def test_of_logits(name: str, dtype: str, kind: str, small_pieces: None) -> None:
    scale = 10.0 if dtype == "float16" else 300.0  # e^300 is no float32
    z = (scale * np.random.default_rng(2).standard_normal((60, 14))).astype(dtype)
    assert_rounded(getattr(identifiers, name)(as_kind(kind, z)), OF_LOGITS[name](z.astype(float)))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.5])
def test_energy_with_temperature(temperature: float, kind: str) -> None:
    z = np.random.default_rng(3).standard_normal((50, 5)).astype(np.float32)
    exact = -temperature * scipy.special.logsumexp(z.astype(float) / temperature, axis=1)
    assert_rounded(identifiers.energy(as_kind(kind, z), temperature=temperature), exact)


@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_MEMBERS)
def test_of_members(name: str, dtype: str, members: int, kind: str, small_pieces: None) -> None:
    models = [awkward(10, dtype, seed) for seed in range(members)]
    exact = OF_MEMBERS[name]([q.astype(float) for q in models])
    function = getattr(identifiers, name)
    assert_rounded(function(as_kind(kind, models)), exact)
    if kind == "numpy":
        assert_rounded(function(np.stack(models)), exact)


def test_members_that_agree() -> None:
    q = awkward(7)
    for name in OF_MEMBERS:
        assert (getattr(identifiers, name)([q, q, q]) <= 1e-15).all()
    # Every member is sure, and of another class: the most there can be.
    sure = [np.eye(7, dtype=np.float32)[[c]] for c in range(3)]
    assert identifiers.mutual_information(sure)[0] == pytest.approx(math.log(3))
    assert identifiers.vote_entropy(sure)[0] == pytest.approx(math.log(3))


@pytest.mark.parametrize("name", [*FORMULAS, *OF_LABELS])
def test_several_predictions_are_averaged_as_genkl_averages(
    name: str, kind: str, small_pieces: None
) -> None:
    models = [awkward(14, seed=seed) for seed in range(3)]
    average = reference.average(models)
    labels = np.random.default_rng(0).integers(0, 14, len(average))
    extra = [as_kind(kind, labels)] if name in OF_LABELS else []
    function = getattr(identifiers, name)
    came, wanted = function(as_kind(kind, models), *extra), function(average, *extra_of(extra))
    np.testing.assert_array_equal(np.asarray(came), wanted)


def extra_of(extra: list[Any]) -> list[np.ndarray]:
    return [np.asarray(a) for a in extra]


def test_genkl_is_the_rules_own_score(kind: str) -> None:
    q = awkward(14)
    rule = GenKL.preset("clothing1m", seed=3)
    came = identifiers.genkl(as_kind(kind, q), rule=rule)
    np.testing.assert_array_equal(np.asarray(came), rule.score(q).critical_alpha)


@pytest.mark.parametrize("name", [*FORMULAS, *OF_LABELS])
def test_strides_and_no_rows(name: str, kind: str) -> None:
    q = awkward(10)
    labels = some_labels(q)
    function = getattr(identifiers, name)

    def call(predictions: np.ndarray, y: np.ndarray) -> np.ndarray:
        extra = [as_kind(kind, y)] if name in OF_LABELS else []
        return np.asarray(function(as_kind(kind, predictions), *extra))

    np.testing.assert_array_equal(call(strided(q), labels), call(q, labels))
    np.testing.assert_array_equal(call(q[::-1], labels[::-1]), call(q, labels)[::-1])
    empty = call(q[:0], labels[:0])
    assert empty.shape == (0,)
    assert empty.dtype == np.float32


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    from genkl_ext.identifiers import inputs

    q = awkward(33)
    came = {}
    for threads in (1, 4):
        monkeypatch.setattr(inputs, "num_threads", lambda threads=threads: threads)
        came[threads] = identifiers.entropy(q)
    np.testing.assert_array_equal(came[1], came[4])


@pytest.mark.parametrize("name", ["entropy", "margin", "dsos", "jo_src", "energy"])
def test_nothing_of_the_size_of_the_rows_is_made(name: str) -> None:
    rows = np.full((300_000, 50), 0.02, dtype=np.float32)  # 60 MB
    labels = np.zeros(len(rows), dtype=np.int64)
    identifier = identifiers.get(name)
    identifier(rows[:9], logits=rows[:9], labels=labels[:9])
    tracemalloc.start()
    try:
        identifier(rows, logits=rows, labels=labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize("name", ["entropy", "max_softmax", "margin", "collision_entropy"])
def test_larger_is_less_conforming(name: str) -> None:
    q = np.array([[1, 0, 0], [0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [1 / 3] * 3])
    assert (np.diff(getattr(identifiers, name)(q)) > 0).all()


def test_kl_uniform() -> None:
    uniform, peaked, one_hot = identifiers.kl_uniform(
        np.array([[0.25] * 4, [0.97, 0.01, 0.01, 0.01], [1, 0, 0, 0]])
    )
    assert one_hot < peaked < uniform == 0
    q = softmax(3 * np.random.default_rng(0).standard_normal((30, 6)))
    exact = -np.array([scipy.stats.entropy(np.full(6, 1 / 6), row) for row in q])
    assert_rounded(identifiers.kl_uniform(q), exact)
    half = identifiers.kl_uniform(np.array([[1.0, 0.0]]), floor=0.5)
    assert half[0] == pytest.approx(math.log(2) + math.log(0.5) / 2)


def test_without_smoothing_jo_src_orders_like_self_confidence() -> None:
    q = awkward(10)
    labels = np.random.default_rng(0).integers(0, 10, len(q))
    order = np.argsort(identifiers.self_confidence(q, labels), kind="stable")
    assert (np.diff(identifiers.jo_src(q, labels)[order]) >= -1e-6).all()


@pytest.mark.parametrize("smoothing", [0.1, 0.6, 1.0])
def test_jo_src_with_smoothing(smoothing: float, kind: str) -> None:
    q = awkward(10, "float64")
    y = np.random.default_rng(0).integers(0, 10, len(q))
    label = np.full(q.shape, smoothing / 9)
    label[np.arange(len(q)), y] = 1 - smoothing
    m = (q + label) / 2
    exact = (scipy.special.rel_entr(q, m) + scipy.special.rel_entr(label, m)).sum(1)
    came = identifiers.jo_src(as_kind(kind, q), as_kind(kind, y), smoothing=smoothing)
    assert_rounded(came, exact / 2 / math.log(2))
