"""The same scores as cleanlab and pytorch-ood, where these have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from awkward_rows import as_kind, assert_rounded, awkward, some_labels

from genkl_ext import identifiers


@pytest.fixture(scope="module")
def cleanlab() -> Any:
    return pytest.importorskip("cleanlab")


@pytest.fixture(scope="module")
def detector() -> Any:
    return pytest.importorskip("pytorch_ood.detector")


class TestCleanlab:
    def test_self_confidence(self, cleanlab, rows) -> None:
        from cleanlab.rank import get_self_confidence_for_each_label

        q, labels = rows
        theirs = get_self_confidence_for_each_label(labels, q.astype(float))
        assert_rounded(identifiers.self_confidence(q, labels), 1 - theirs)

    def test_normalised_margin(self, cleanlab, rows) -> None:
        from cleanlab.rank import get_normalized_margin_for_each_label

        q, labels = rows
        theirs = get_normalized_margin_for_each_label(labels, q.astype(float))
        assert_rounded(identifiers.normalised_margin(q, labels), 1 - theirs)

    def test_wrong_labels(self, cleanlab, rows, kind: str) -> None:
        from cleanlab.count import compute_confident_joint, get_confident_thresholds
        from cleanlab.filter import find_label_issues

        q, labels = rows
        ours = identifiers.find_wrong_labels(as_kind(kind, q), as_kind(kind, labels))
        q = q.astype(float)  # the same numbers: means and comparisons of float16 are coarse
        theirs = find_label_issues(labels, q, filter_by="confident_learning", n_jobs=1)
        assert 0 < theirs.sum() < len(theirs)
        np.testing.assert_array_equal(np.asarray(ours.wrong), theirs)
        np.testing.assert_allclose(
            np.asarray(ours.thresholds), get_confident_thresholds(labels, q), rtol=1e-12
        )
        joint = compute_confident_joint(labels, q, calibrate=False)
        diagonal = np.eye(len(joint), dtype=bool)
        came = np.asarray(ours.joint)
        np.testing.assert_array_equal(came[~diagonal], joint[~diagonal])
        np.testing.assert_array_equal(came[diagonal].clip(1), joint[diagonal])
        np.testing.assert_array_equal(np.asarray(ours.score) > 0.5, theirs)

    def test_a_class_without_a_row(self, cleanlab) -> None:
        from cleanlab.filter import find_label_issues

        q = awkward(4, "float64")
        labels = some_labels(q).clip(0)
        labels[labels == 2] = 3
        theirs = find_label_issues(labels, q, filter_by="confident_learning", n_jobs=1)
        ours = identifiers.find_wrong_labels(q, labels)
        np.testing.assert_array_equal(ours.wrong, theirs)
        assert (ours.joint[:, 2] == 0).all()
        assert not (ours.guess == 2).any()


class TestConfidentLearning:
    def test_by_hand(self, kind: str, small_pieces: None) -> None:
        q = np.array(
            [[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9], [0.45, 0.55], [0.5, 0.5], [0.3, 0.7]]
        )
        labels = np.array([0, 0, 0, 1, 1, 1, -1])
        # t_0 = (0.9 + 0.8 + 0.2) / 3 = 0.6333, t_1 = (0.9 + 0.55 + 0.5) / 3 = 0.65
        found = identifiers.find_wrong_labels(as_kind(kind, q), as_kind(kind, labels))
        np.testing.assert_allclose(np.asarray(found.thresholds), [1.9 / 3, 1.95 / 3])
        assert found.guess.tolist() == [0, 0, 1, 1, -1, -1, -1]
        assert found.joint.tolist() == [[2, 1], [0, 1]]
        assert found.wrong.tolist() == [False, False, True, False, False, False, False]
        assert len(found) == 7
        expected = [0.05, 0.1, 0.9, 0.05, 0.225, 0.25, np.nan]
        np.testing.assert_allclose(np.asarray(found.score), expected, rtol=1e-6)

    def test_no_rows(self, kind: str) -> None:
        empty = as_kind(kind, np.empty((0, 3))), as_kind(kind, np.empty(0, dtype=np.int64))
        found = identifiers.find_wrong_labels(*empty)
        assert len(found) == 0
        assert np.asarray(found.joint).sum() == 0
        assert (np.asarray(found.thresholds) == 2).all()


class TestPytorchOod:
    """It works on float32 or float64 logits and tensors; here on float64."""

    def test_entropy(self, detector, rows) -> None:
        q = rows[0].astype(float)
        # It clips probabilities at 1e-7, which moves the entropy by less than 2e-6 an entry.
        theirs = detector.Entropy.score(torch.as_tensor(q).clip(1e-300).log()).numpy()
        ours = identifiers.entropy(q / q.sum(1, keepdims=True)) * np.log(q.shape[1])
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * q.shape[1])

    def test_max_softmax(self, detector, rows) -> None:
        q = rows[0].astype(float)
        normal = q / q.sum(1, keepdims=True)
        theirs = detector.MaxSoftmax.score(torch.as_tensor(normal).log()).numpy()
        assert_rounded(identifiers.max_softmax(normal), 1 + theirs)

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_energy_and_max_logit(self, detector, temperature: float) -> None:
        z = 20 * torch.randn(500, 14, dtype=torch.float64, generator=torch.manual_seed(0))
        theirs = detector.EnergyBased.score(z, t=temperature).numpy()
        assert_rounded(identifiers.energy(z, temperature=temperature), theirs)
        assert_rounded(identifiers.max_logit(z), detector.MaxLogit(None).predict_logits(z).numpy())

    @pytest.mark.parametrize("neighbours", [1, 10])
    def test_knn(self, detector, neighbours: int) -> None:
        rng = np.random.default_rng(0)
        pool, x = rng.standard_normal((2, 200, 16))
        theirs = detector.KNN(None, k=neighbours)
        theirs.fit_features(torch.as_tensor(pool), torch.zeros(200))
        scores = theirs.predict_features(torch.as_tensor(x)).numpy()
        ours = identifiers.knn_distance(x, reference=pool, neighbours=neighbours)
        np.testing.assert_allclose(ours, scores, rtol=1e-6)

    def test_mahalanobis(self, detector) -> None:
        rng = np.random.default_rng(0)
        pool, x = rng.standard_normal((2, 400, 8))
        labels = rng.integers(0, 4, 400)
        theirs = detector.Mahalanobis(None)
        theirs.fit_features(torch.as_tensor(pool).float(), torch.as_tensor(labels))
        scores = theirs.predict_features(torch.as_tensor(x).float()).numpy()
        ours = identifiers.mahalanobis(x, reference=pool, reference_labels=labels, shrinkage=0.0)
        # Its covariance is a sum, not a mean, and it takes half: float32, and a ridge of 1e-6.
        np.testing.assert_allclose(ours, scores * 2 * 400, rtol=1e-4)
