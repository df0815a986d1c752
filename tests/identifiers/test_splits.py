"""The clean / in-distribution / out-of-distribution splits of DSOS and Jo-SRC."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from awkward_rows import as_kind, awkward, softmax

from genkl_ext import identifiers
from genkl_ext.identifiers.given_label import _lower_component


def three_kinds(
    rows: int = 300, k: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, labels and kind: 0 sure of the label, 1 sure of another, 2 of nothing."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, rows)
    labels = rng.integers(0, k, rows)
    believed = np.where(kinds == 1, (labels + rng.integers(1, k, rows)) % k, labels)
    logits = 0.4 * rng.standard_normal((rows, k))
    logits[np.arange(rows), believed] += np.where(kinds == 2, 0.0, 9.0)
    return softmax(logits).astype(np.float32), labels, kinds


def assert_partition(split: identifiers.NoiseSplit, counted: np.ndarray) -> None:
    parts = [split.clean, split.in_distribution, split.out_of_distribution]
    assert all(np.asarray(p).dtype == bool for p in parts)
    np.testing.assert_array_equal(np.sum([np.asarray(p) for p in parts], axis=0), counted)


class TestDsos:
    def test_finds_the_three_kinds(self, kind: str) -> None:
        q, labels, kinds = three_kinds()
        split = identifiers.dsos_split(as_kind(kind, q), as_kind(kind, labels))
        assert type(split.clean) is type(as_kind(kind, labels))
        assert_partition(split, np.ones(len(q)))
        np.testing.assert_array_equal(np.asarray(split.clean), kinds == 0)
        outside = np.asarray(split.out_of_distribution)
        assert (outside == (kinds == 2)).mean() > 0.99
        assert outside[np.argmax(np.asarray(split.score))]
        assert len(split) == len(q)

    def test_clean_is_below_ln_2(self) -> None:
        q, labels, _ = three_kinds(seed=5)
        split = identifiers.dsos_split(q, labels)
        np.testing.assert_array_equal(split.clean, split.score < math.log(2))
        # Sure of another class: at ln 2, and noisy.
        sure = np.eye(4, dtype=np.float32)
        one = identifiers.dsos_split(sure, np.array([1, 1, 2, 3]))
        np.testing.assert_array_equal(one.clean, [False, True, True, True])
        np.testing.assert_array_equal(one.in_distribution, [True, False, False, False])

    def test_rows_without_a_label_are_in_no_part(self) -> None:
        q, labels, _ = three_kinds()
        labels[::7] = -1
        split = identifiers.dsos_split(q, labels)
        assert_partition(split, labels >= 0)

    def test_a_stricter_confidence_leaves_fewer_in_distribution(self) -> None:
        rng = np.random.default_rng(0)
        q = softmax(2 * rng.standard_normal((500, 10)))
        labels = rng.integers(0, 10, 500)
        splits = [identifiers.dsos_split(q, labels, confidence=c) for c in (0.1, 0.5, 0.9)]
        counts = [int(s.in_distribution.sum()) for s in splits]
        assert counts[0] > counts[1] > counts[2]
        assert (splits[2].in_distribution <= splits[0].in_distribution).all()

    def test_no_rows_and_no_noise(self) -> None:
        empty = identifiers.dsos_split(np.empty((0, 3)), np.empty(0, dtype=int))
        assert len(empty) == 0
        sure = np.eye(3, dtype=np.float32)
        clean = identifiers.dsos_split(sure, np.arange(3))
        assert clean.clean.all()
        assert not clean.out_of_distribution.any()

    def test_a_lone_score_is_compared_with_the_middle(self) -> None:
        # One noisy row has no mixture: a uniform prediction fits no class, a sure one another.
        sure, undecided = np.eye(10, dtype=np.float32), np.full((1, 10), 0.1, np.float32)
        for row, inside in ((sure[:1], True), (undecided, False)):
            q = np.concatenate([row, sure])
            split = identifiers.dsos_split(q, np.array([1, *range(10)]))
            assert not split.clean[0] and split.clean[1:].all()
            assert split.in_distribution[0] == inside
            assert split.out_of_distribution[0] != inside
        of_two = identifiers.dsos_split(np.eye(2, dtype=np.float32), np.array([1, 1]))
        assert of_two.in_distribution.tolist() == [True, False]

    @pytest.mark.parametrize(("classes", "clean"), [(2, True), (4, False), (10, False)])
    def test_a_uniform_prediction(self, classes: int, clean: bool) -> None:
        uniform = np.full((1, classes), 1 / classes)
        split = identifiers.dsos_split(uniform, np.zeros(1, int))
        assert split.clean[0] == clean
        expected = math.log(4) - math.log(1 + 3 / classes)
        assert split.score[0] == pytest.approx(expected, rel=1e-6)

    def test_the_mixture_recovers_what_it_was_drawn_from(self) -> None:
        rng = np.random.default_rng(1)
        low, high = scipy.stats.beta(2, 12), scipy.stats.beta(10, 3)
        x = np.concatenate([low.rvs(3000, random_state=rng), high.rvs(1000, random_state=rng)])
        truth = 0.75 * low.pdf(x) / (0.75 * low.pdf(x) + 0.25 * high.pdf(x))
        between = (x > low.mean()) & (x < high.mean())
        posterior = _lower_component(x, 200)
        assert np.abs(posterior - truth)[between].mean() < 0.05
        order = np.argsort(x)
        assert (np.diff(posterior[order]) <= 1e-12).all()

    def test_the_mixture_survives_extremes(self) -> None:
        for x in ([0.0, 1.0], [0.0] * 50 + [1.0], [0.0, 0.5, 1.0] * 5):
            posterior = _lower_component(np.array(x), 100)
            assert np.isfinite(posterior).all()
            assert posterior[0] > 0.5 > posterior[np.argmax(x)]


class TestJoSrc:
    def test_by_the_published_steps(self, kind: str) -> None:
        first, second = awkward(10, seed=1), awkward(10, seed=2)
        labels = np.random.default_rng(0).integers(0, 10, len(first))
        y = np.full(first.shape, 0.6 / 9)
        y[np.arange(len(first)), labels] = 0.4
        clean = np.array(
            [
                1
                - scipy.stats.entropy(m, qk=None, base=2)
                + (scipy.stats.entropy(q, base=2) + scipy.stats.entropy(t, base=2)) / 2
                >= 0.75
                for q, t, m in zip(first, y, (first + y) / 2, strict=True)
            ]
        )
        agree = first.argmax(1) == second.argmax(1)
        split = identifiers.jo_src_split(
            as_kind(kind, first),
            as_kind(kind, second),
            as_kind(kind, labels),
            tau_clean=0.75,
            smoothing=0.6,
        )
        assert 0 < clean.sum() < len(clean)
        np.testing.assert_array_equal(np.asarray(split.clean), clean)
        np.testing.assert_array_equal(np.asarray(split.in_distribution), ~clean & agree)
        np.testing.assert_array_equal(np.asarray(split.out_of_distribution), ~clean & ~agree)

    def test_clean_from_the_threshold_on(self) -> None:
        q = awkward(6)
        labels = np.zeros(len(q), dtype=int)
        likelihood = 1 - identifiers.jo_src(q, labels).astype(np.float64)
        tau = float(np.sort(likelihood)[len(q) // 2])
        split = identifiers.jo_src_split(q, q, labels, tau_clean=tau)
        np.testing.assert_array_equal(split.clean, likelihood >= tau)

    def test_rows_without_a_label_are_in_no_part(self) -> None:
        first, second = awkward(5, seed=1), awkward(5, seed=2)
        labels = np.arange(len(first)) % 6 - 1
        split = identifiers.jo_src_split(first, second, labels)
        assert_partition(split, labels >= 0)

    def test_nan_in_either_view_without_validation(self) -> None:
        first, second = awkward(5, seed=1), awkward(5, seed=2)
        first[3, 0] = second[8, 2] = np.nan
        labels = np.zeros(len(first), dtype=int)
        split = identifiers.jo_src_split(first, second, labels, validate=False)
        counted = np.ones(len(first), dtype=int)
        counted[[3, 8]] = 0
        assert_partition(split, counted)

    def test_errors(self) -> None:
        q = awkward(4)
        labels = np.zeros(len(q), dtype=int)
        with pytest.raises(ValueError, match=r"^jo_src_split: second must have \d+ rows like fi"):
            identifiers.jo_src_split(q, q[:-1], labels)
        with pytest.raises(ValueError, match="^jo_src_split: tau_clean must be from 0 to 1, got 2"):
            identifiers.jo_src_split(q, q, labels, tau_clean=2)
        bad = q.copy()
        bad[4] = 0
        with pytest.raises(ValueError, match="^jo_src_split: rows of second must sum .* row 4$"):
            identifiers.jo_src_split(q, bad, labels)


def test_errors_of_dsos_split() -> None:
    q, labels, _ = three_kinds()
    with pytest.raises(ValueError, match="^dsos_split: confidence must be from 0 to 1, got -1"):
        identifiers.dsos_split(q, labels, confidence=-1)
    with pytest.raises(TypeError, match="^dsos_split: iterations must be an integer, got 1.5"):
        identifiers.dsos_split(q, labels, iterations=1.5)  # type: ignore[arg-type]
