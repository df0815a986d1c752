"""How far a row's features lie from the others, and whether its neighbours share its label.

Features are (N, d) embeddings, of any network. They are compared with ``reference`` embeddings,
such as those of verified images; without these, with each other, every row with all rows but
itself. Tensors are copied to the host for scikit-learn, and the result back to their device.

Rows with NaN or infinity are refused, or, with ``validate=False``, score NaN and are nobody's
neighbour. So does a row without a label (-1) where its label counts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..rule import _is_tensor
from .inputs import (
    FLOATS,
    as_kind,
    check_labels,
    dtype_name,
    host,
    require_integer,
    require_number,
)

if TYPE_CHECKING:
    from ..rule import Array

Float64 = NDArray[np.float64]


def knn_distance(
    features: Array,
    *,
    reference: Array | None = None,
    neighbours: int = 10,
    normalise: bool = True,
    validate: bool = True,
) -> Array:
    """Euclidean distance to the n-th nearest of the reference rows, n = ``neighbours``.

    Args:
        features: (N, d) float16, float32, float64 (tensors: bfloat16).
        reference: (R, d) rows to compare with; by default the features, without the row itself.
        neighbours: n, at most the number of rows to compare with.
        normalise: scale every row to length 1 first, as the source does; the result is then from
            0 to 2. A row of zeros stays as it is.
        validate: raise for the first row that is not finite; otherwise it scores NaN.

    Returns:
        (N,) float32. All N R distances are computed, so for many rows give fewer reference rows.

    Source: Sun et al., ICML 2022 (arXiv 2204.06507).
    """
    task = _Task.of("knn_distance", features, reference, validate=validate)
    if normalise:
        task = task.normalised()
    last = task.nearest(neighbours)[:, -1]
    return task.result(np.linalg.norm(task.queries - task.reference[last], axis=1))


def neighbour_disagreement(
    features: Array,
    labels: Array,
    *,
    reference: Array | None = None,
    reference_labels: Array | None = None,
    neighbours: int = 10,
    normalise: bool = True,
    validate: bool = True,
) -> Array:
    """Share of the n nearest labelled reference rows whose label is not the row's, from 0 to 1.

    Args:
        features, reference, neighbours, normalise, validate: as for :func:`knn_distance`.
        labels: (N,) integers; -1 for a row without a label, which scores NaN.
        reference_labels: (R,) integers; rows with -1 are nobody's neighbour. Needed with
            ``reference``; without it, the labels.

    Returns:
        (N,) float32.

    Source: Bahri et al., ICML 2020 (arXiv 2004.12289); Zhu et al., ICML 2022 (arXiv 2110.06283).
    """
    task = _Task.of(
        "neighbour_disagreement",
        features,
        reference,
        labels,
        reference_labels,
        ask_labels=True,
        compare_labels=True,
        validate=validate,
    )
    if normalise:
        task = task.normalised()
    differ = task.reference_labels[task.nearest(neighbours)] != task.labels[:, None]
    return task.result(differ.mean(axis=1))


def mahalanobis(
    features: Array,
    labels: Array | None = None,
    *,
    reference: Array | None = None,
    reference_labels: Array | None = None,
    shrinkage: float | None = None,
    validate: bool = True,
) -> Array:
    """Squared Mahalanobis distance to the nearest class, min_c (x - mu_c)' S^-1 (x - mu_c).

    mu_c is the mean of the reference rows of class c, S the covariance of all of them around the
    means of their classes, shared by the classes: S = (1 - s) C + s tr(C)/d I with the maximum
    likelihood estimate C and the shrinkage s.

    Without ``reference``, a labelled row is taken out of its class mean and of C (its part in s
    and in tr(C) stays), so that it does not pull its own class towards it.

    Args:
        features: (N, d), as for :func:`knn_distance`.
        labels: (N,) integers; rows with -1 are scored, but belong to no class. Not needed with
            ``reference``.
        reference, reference_labels: (R, d) rows and their (R,) labels to estimate means and
            covariance from.
        shrinkage: s, from 0 (the source's; needs many more rows than features) to 1; by default
            that of Ledoit and Wolf, from the data.
        validate: raise for the first row that is not finite; otherwise it scores NaN.

    Returns:
        (N,) float32.

    Raises:
        ValueError: S is singular, or no class has two rows.

    Source: Lee et al., NeurIPS 2018 (arXiv 1807.03888), equation 2; Ledoit and Wolf, Journal of
    Multivariate Analysis 2004.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    where = "mahalanobis"
    if shrinkage is not None:
        require_number(where, "shrinkage", shrinkage, 0.0, 1.0)
    task = _Task.of(
        where, features, reference, labels, reference_labels, compare_labels=True, validate=validate
    )
    if not len(task.queries):
        return task.result(np.empty(0))
    names, member = np.unique(task.reference_labels, return_inverse=True)
    sizes = np.bincount(member, minlength=1)
    if sizes.max() < 2:
        raise ValueError(
            f"{where}: labels must give at least one class two rows, got {len(names)} "
            f"classes and {len(member)} rows"
        )
    x = task.reference
    means = np.stack([x[member == c].mean(axis=0) for c in range(len(names))])
    centred = x - means[member]
    if shrinkage is None:
        shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    factor = covariance_factor(where, centred, shrinkage)
    queries, means = (whitened(factor, a - means.mean(axis=0)) for a in (task.queries, means))
    own = np.where(task.itself >= 0, member[task.itself], -1)
    return task.result(_nearest_class(queries, own, means, sizes, 1.0 - shrinkage))


def covariance_factor(where: str, centred: Float64, shrinkage: float) -> Float64:
    """Lower Cholesky factor of R S, where S is the shrunk covariance of the R centred rows."""
    from scipy.linalg import LinAlgError, cholesky

    rows, width = centred.shape
    scatter = centred.T @ centred
    scatter *= 1.0 - shrinkage
    scatter[np.diag_indices(width)] += shrinkage * (centred * centred).sum() / width
    singular = ValueError(
        f"{where}: the covariance of {rows} rows of {width} features is singular; give more rows, "
        f"or a shrinkage above {shrinkage:g}"
    )
    try:
        factor = cholesky(scatter, lower=True)
    except LinAlgError:
        raise singular from None
    pivots = np.diag(factor) ** 2
    if pivots.min() <= 10.0 * width * np.finfo(np.float64).eps * pivots.max():  # only rounding
        raise singular
    return factor


def whitened(factor: Float64, x: Float64) -> Float64:
    """Rows in coordinates in which R S is the identity."""
    from scipy.linalg import solve_triangular

    return solve_triangular(factor, x.T, lower=True).T


def _nearest_class(
    x: Float64,  # (n, d), whitened like the means: R S is the identity
    own: NDArray[np.int64],  # (n,) the class whose mean and covariance a row is in, or -1
    means: Float64,  # (classes, d)
    sizes: NDArray[np.int64],  # (classes,)
    weight: float,  # 1 - s
) -> Float64:
    """Squared distance of each row to its nearest class, the row itself left out.

    A row that lies r away from the mean of its class of n rows lies r n/(n-1) away once it is
    taken out, and R S loses g r r' with g = (1 - s) n/(n-1). By Sherman and Morrison the squared
    length of v is then |v|^2 + g (v'r)^2 / (1 - g |r|^2).
    """
    total = sizes.sum()
    inside = np.flatnonzero(own >= 0)
    n = sizes[own[inside]].astype(np.float64)
    stretch = n / np.maximum(n - 1.0, 1.0)
    r = x[inside] - means[own[inside]]
    gain = weight * stretch
    rest = np.maximum(1.0 - gain * (r * r).sum(axis=1), np.finfo(np.float64).eps)
    best = np.full(len(x), np.inf)
    for c, mean in enumerate(means):
        v = x - mean
        squared = (v * v).sum(axis=1)
        without = squared[inside] + gain * (v[inside] * r).sum(axis=1) ** 2 / rest
        mine = own[inside] == c
        without = np.where(mine, without * stretch**2, without)
        without[mine & (n == 1)] = np.inf  # without its only row there is no such class
        squared *= total
        squared[inside] = without * (total - 1)
        np.minimum(best, squared, out=best)
    return best


@dataclasses.dataclass(frozen=True)
class _Task:
    """Features as float64 on the host: rows that are asked about, rows they are compared with."""

    where: str
    given: Any  # the features as they came
    places: NDArray[np.int64]  # (n,) of the queries among the N features
    queries: Float64  # (n, d)
    labels: NDArray[np.int64]  # (n,)
    reference: Float64  # (r, d)
    reference_labels: NDArray[np.int64]  # (r,)
    itself: NDArray[np.int64]  # (n,) which reference row a query is; -1: none

    @classmethod
    def of(
        cls,
        where: str,
        features: Any,
        reference: Any,
        labels: Any = None,
        reference_labels: Any = None,
        *,
        ask_labels: bool = False,
        compare_labels: bool = False,
        validate: bool,
    ) -> _Task:
        """Checked. With ``ask_labels`` only rows with a label are asked about, with
        ``compare_labels`` they are compared only with such rows."""
        x = as_matrix(where, "features", features)
        asked = finite_rows(where, "features", x, validate)
        y = np.full(len(x), -1)
        if ask_labels or (compare_labels and reference is None):
            y = check_labels(where, "labels", on_host(labels), len(x), x)
        compared, kept, compared_y = x, asked, y
        if reference is not None:
            compared = as_matrix(where, "reference", reference)
            if compared.shape[1] != x.shape[1]:
                raise ValueError(
                    f"{where}: reference must have {x.shape[1]} columns like features, "
                    f"got {compared.shape[1]}"
                )
            kept = finite_rows(where, "reference", compared, validate)
            compared_y = np.full(len(compared), -1)
            if compare_labels:
                compared_y = check_labels(
                    where, "reference_labels", on_host(reference_labels), len(compared), x
                )
        elif reference_labels is not None:
            raise ValueError(f"{where}: reference_labels needs reference, got none")
        if ask_labels:
            asked = asked & (y >= 0)
        if compare_labels:
            kept = kept & (compared_y >= 0)
        itself = np.full(len(x), -1)
        if reference is None:
            itself[kept] = np.arange(kept.sum())
        return cls(
            where=where,
            given=features,
            places=np.flatnonzero(asked),
            queries=x[asked],
            labels=y[asked],
            reference=compared[kept],
            reference_labels=compared_y[kept],
            itself=itself[asked],
        )

    def normalised(self) -> _Task:
        """The same with every row scaled to length 1; rows of zeros stay."""

        def scaled(x: Float64) -> Float64:
            lengths = np.linalg.norm(x, axis=1, keepdims=True)
            return x / np.where(lengths == 0, 1.0, lengths)

        return dataclasses.replace(
            self, queries=scaled(self.queries), reference=scaled(self.reference)
        )

    def nearest(self, neighbours: int) -> NDArray[np.int64]:
        """(n, neighbours) nearest reference rows of each query, itself left out, nearest first."""
        from sklearn.neighbors import NearestNeighbors

        wanted = require_integer(self.where, "neighbours", neighbours, 1)
        if not len(self.queries):
            return np.empty((0, wanted), dtype=np.int64)
        extra = int((self.itself >= 0).any())  # it may come first, or behind its duplicates
        if wanted + extra > len(self.reference):
            raise ValueError(
                f"{self.where}: neighbours must be at most {len(self.reference) - extra}, "
                f"the number of rows to compare with, got {neighbours}"
            )
        search = NearestNeighbors(n_neighbors=wanted + extra, algorithm="brute")
        found = search.fit(self.reference).kneighbors(self.queries, return_distance=False)
        if not extra:
            return found
        others = found != self.itself[:, None]
        others[others.all(axis=1), -1] = False
        return found[others].reshape(len(found), wanted)

    def result(self, scores: Float64) -> Any:
        """(N,) float32 of the kind of the features, NaN where no score was asked for."""
        out = np.full(len(self.given), np.nan, dtype=np.float32)
        out[self.places] = scores
        return as_kind(self.given, out)


def as_matrix(where: str, name: str, array: Any) -> Float64:
    """An (N, d) floating-point array or tensor as float64 on the host."""
    if not hasattr(array, "dtype") or not hasattr(array, "ndim"):
        raise TypeError(
            f"{where}: {name} must be a NumPy array or torch tensor, got {type(array).__name__}"
        )
    if dtype_name(array) not in FLOATS:
        raise TypeError(f"{where}: {name} must be floating-point, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{where}: {name} must have shape (N, d), got {tuple(array.shape)}")
    if not isinstance(array, np.ndarray):
        array = array.detach().double()
    return host(array).astype(np.float64)


def on_host(labels: Any) -> Any:
    """Labels as a NumPy array: of an array, a tensor or a list; None stays."""
    return labels if labels is None else np.asarray(host(labels) if _is_tensor(labels) else labels)


def finite_rows(where: str, name: str, x: Float64, validate: bool) -> NDArray[np.bool_]:
    """(N,) bool: rows that are finite; with ``validate`` an error for the first that is not."""
    finite = np.asarray(np.isfinite(x).all(axis=1))
    if validate and not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        column = int(np.flatnonzero(~np.isfinite(x[row]))[0])
        raise ValueError(
            f"{where}: {name} must be finite, got {x[row, column]} at row {row}, column {column}"
        )
    return finite
