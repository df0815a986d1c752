"""Identifiers of features against the same in plain NumPy, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from awkward_rows import as_kind, assert_rounded, strided

from genkl_ext import identifiers


def clusters(rows: int = 60, width: int = 6, classes: int = 3, seed: int = 0):
    """Embeddings around a few centres, and the labels of the centres."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = 3 * rng.standard_normal((classes, width))
    return (centres[labels] + rng.standard_normal((rows, width))).astype(np.float32), labels


def nearest(x: np.ndarray, pool: np.ndarray, leave_out: int | None) -> np.ndarray:
    """Distances of one row to a pool, in float64, the row itself at infinity."""
    distances = np.linalg.norm(pool.astype(float) - x.astype(float), axis=1)
    if leave_out is not None:
        distances[leave_out] = np.inf
    return distances


def unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    return x.astype(float) / np.where(lengths == 0, 1, lengths)


class TestKnnDistance:
    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("neighbours", [1, 5])
    def test_itself_left_out(self, neighbours: int, normalise: bool, kind: str) -> None:
        x, _ = clusters()
        x[7] = x[8] = x[9]  # duplicates are neighbours
        x[20] = 0
        z = unit(x) if normalise else x.astype(float)
        exact = np.array([np.sort(nearest(z[i], z, i))[neighbours - 1] for i in range(len(z))])
        came = identifiers.knn_distance(
            as_kind(kind, x), neighbours=neighbours, normalise=normalise
        )
        assert_rounded(came, exact)

    def test_with_reference(self, kind: str) -> None:
        x, _ = clusters()
        pool, _ = clusters(30, seed=1)
        pool[:5] = x[:5]  # the same image among the verified ones counts
        exact = np.array([np.sort(nearest(row, unit(pool), None))[2] for row in unit(x)])
        came = identifiers.knn_distance(
            as_kind(kind, x), reference=as_kind(kind, pool), neighbours=3
        )
        assert_rounded(came, exact)

    def test_many_duplicates(self) -> None:
        x = np.ones((8, 2), dtype=np.float32)
        assert (identifiers.knn_distance(x, neighbours=7) == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        x = torch.as_tensor(clusters()[0]).to(dtype)
        came = identifiers.knn_distance(x, neighbours=4)
        assert came.dtype == torch.float32
        assert_rounded(came, identifiers.knn_distance(x.double().numpy(), neighbours=4))

    def test_strides_and_no_rows(self) -> None:
        x, _ = clusters()
        np.testing.assert_array_equal(
            identifiers.knn_distance(strided(x)), identifiers.knn_distance(x)
        )
        assert identifiers.knn_distance(x[:0], reference=x).shape == (0,)
        assert identifiers.knn_distance(x[:0]).shape == (0,)

    def test_errors(self) -> None:
        x, _ = clusters()
        with pytest.raises(ValueError, match="^knn_distance: neighbours must be at most 59, the"):
            identifiers.knn_distance(x, neighbours=60)
        with pytest.raises(ValueError, match="^knn_distance: reference must have 6 columns .* 5$"):
            identifiers.knn_distance(x, reference=x[:, :5])
        with pytest.raises(TypeError, match="^knn_distance: features must be floating.* int64$"):
            identifiers.knn_distance(np.ones((3, 2), dtype=int))
        with pytest.raises(TypeError, match="^knn_distance: features must be a NumPy.* NoneType$"):
            identifiers.get("knn_distance")(x)
        x[4, 2] = np.inf
        with pytest.raises(ValueError, match="features must be finite, got inf at row 4, column 2"):
            identifiers.knn_distance(x)

    def test_rows_that_are_not_finite_are_nobodys_neighbour(self) -> None:
        x, _ = clusters()
        x[4, 2] = np.nan
        came = identifiers.knn_distance(x, validate=False)
        kept = np.delete(np.arange(len(x)), 4)
        np.testing.assert_array_equal(came[kept], identifiers.knn_distance(x[kept]))
        assert np.isnan(came[4])


class TestNeighbourDisagreement:
    def test_itself_left_out(self, kind: str) -> None:
        x, labels = clusters()
        labels[::9] = -1
        z = unit(x)
        exact = np.full(len(x), np.nan)
        for i in np.flatnonzero(labels >= 0):
            distances = nearest(z[i], z, i)
            distances[labels < 0] = np.inf
            exact[i] = (labels[np.argsort(distances)[:5]] != labels[i]).mean()
        came = identifiers.neighbour_disagreement(
            as_kind(kind, x), as_kind(kind, labels), neighbours=5
        )
        assert_rounded(came, exact)

    def test_with_reference(self, kind: str) -> None:
        x, labels = clusters()
        pool, pool_labels = clusters(40, seed=2)
        pool_labels[::3] = -1
        labels[5] = -1
        voters = pool[pool_labels >= 0], pool_labels[pool_labels >= 0]
        exact = np.array(
            [
                (voters[1][np.argsort(nearest(row, unit(voters[0]), None))[:4]] != label).mean()
                for row, label in zip(unit(x), labels, strict=True)
            ]
        )
        exact[5] = np.nan
        came = identifiers.neighbour_disagreement(
            as_kind(kind, x),
            as_kind(kind, labels),
            reference=as_kind(kind, pool),
            reference_labels=as_kind(kind, pool_labels),
            neighbours=4,
        )
        assert_rounded(came, exact)

    def test_errors(self) -> None:
        x, labels = clusters()
        name = "neighbour_disagreement"
        with pytest.raises(TypeError, match=rf"^{name}: labels must be \(N,\) integers, got None"):
            identifiers.get(name)(features=x)
        with pytest.raises(TypeError, match=rf"^{name}: reference_labels must be .* got None"):
            identifiers.neighbour_disagreement(x, labels, reference=x)
        with pytest.raises(ValueError, match=rf"^{name}: reference_labels needs reference"):
            identifiers.neighbour_disagreement(x, labels, reference_labels=labels)
        with pytest.raises(ValueError, match=rf"^{name}: labels must have shape \(60,\), got \(3"):
            identifiers.neighbour_disagreement(x, labels[:3])


class TestMahalanobis:
    @staticmethod
    def exact(
        x: np.ndarray, pool: np.ndarray, labels: np.ndarray, shrinkage: float, ridge: float
    ) -> float:
        """Of one row, from a pool of rows; ``ridge`` is what shrinkage adds to the covariance."""
        pool = pool.astype(float)
        means = {c: pool[labels == c].mean(axis=0) for c in np.unique(labels)}
        centred = pool - np.stack([means[c] for c in labels])
        covariance = (1 - shrinkage) * centred.T @ centred / len(pool) + ridge * np.eye(x.size)
        inverse = np.linalg.inv(covariance)
        return min(float((x - m) @ inverse @ (x - m)) for m in means.values())

    @pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
    def test_with_reference(self, shrinkage: float, kind: str) -> None:
        x, _ = clusters()
        pool, labels = clusters(50, seed=3)
        centred = pool.astype(float)
        for c in range(3):
            centred[labels == c] -= centred[labels == c].mean(axis=0)
        ridge = shrinkage * (centred**2).sum() / len(pool) / x.shape[1]
        exact = np.array([self.exact(row, pool, labels, shrinkage, ridge) for row in x])
        came = identifiers.mahalanobis(
            as_kind(kind, x),
            reference=as_kind(kind, pool),
            reference_labels=as_kind(kind, labels),
            shrinkage=shrinkage,
        )
        assert_rounded(came, exact, slack=1e-10)

    @pytest.mark.parametrize("shrinkage", [0.0, 0.2])
    def test_itself_left_out(self, shrinkage: float, kind: str) -> None:
        x, labels = clusters(40)
        labels[[3, 11]] = -1  # scored, but in no class
        labels[5] = 3  # a class of one
        known = labels >= 0
        centred = x[known].astype(float)
        for c in range(4):
            mine = labels[known] == c
            centred[mine] -= centred[mine].mean(axis=0)
        ridge = shrinkage * (centred**2).sum() / x.shape[1]  # of the scatter: it stays
        exact = np.empty(len(x))
        for i in range(len(x)):
            pool = known & (np.arange(len(x)) != i)
            exact[i] = self.exact(
                x[i].astype(float), x[pool], labels[pool], shrinkage, ridge / pool.sum()
            )
        came = identifiers.mahalanobis(as_kind(kind, x), as_kind(kind, labels), shrinkage=shrinkage)
        assert_rounded(came, exact, slack=1e-9)

    def test_shrinkage_is_ledoit_and_wolfs(self) -> None:
        from sklearn.covariance import LedoitWolf

        x, labels = clusters(30, width=40)  # fewer rows than features
        centred = x.astype(float)
        for c in range(3):
            centred[labels == c] -= centred[labels == c].mean(axis=0)
        fitted = LedoitWolf(assume_centered=True).fit(centred)
        queries, _ = clusters(10, width=40, seed=4)
        means = [x[labels == c].astype(float).mean(axis=0) for c in range(3)]
        exact = np.min([fitted.mahalanobis(queries - m) for m in means], axis=0)
        came = identifiers.mahalanobis(queries, reference=x, reference_labels=labels)
        assert_rounded(came, exact, slack=1e-9)

    def test_a_stray_row_is_far(self) -> None:
        x, labels = clusters(200)
        x[17] = 40
        came = identifiers.mahalanobis(x, labels, shrinkage=0.0)
        assert came.argmax() == 17
        # With itself inside it would lie at less than N, whatever it is.
        assert came[17] > 10 * len(x)

    def test_errors(self) -> None:
        x, labels = clusters(10, width=20)
        with pytest.raises(ValueError, match="^mahalanobis: the covariance of 10 rows of 20 feat"):
            identifiers.mahalanobis(x, labels, shrinkage=0.0)
        with pytest.raises(ValueError, match="^mahalanobis: labels must give at least one class"):
            identifiers.mahalanobis(x, np.arange(10))
        with pytest.raises(TypeError, match=r"^mahalanobis: labels must be \(N,\) integers, got N"):
            identifiers.mahalanobis(x)
        with pytest.raises(ValueError, match="^mahalanobis: shrinkage must be from 0 to 1, got 2"):
            identifiers.mahalanobis(x, labels, shrinkage=2)
        assert identifiers.mahalanobis(x[:0], labels[:0]).shape == (0,)


def test_labels_may_be_a_list() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((30, 4)), rng.integers(0, 3, 30)
    for features in (x, torch.from_numpy(x)):
        for function in (identifiers.mahalanobis, identifiers.neighbour_disagreement):
            given = function(features, labels.tolist())
            np.testing.assert_array_equal(given, function(x, labels))
