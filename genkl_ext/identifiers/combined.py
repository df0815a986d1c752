"""Entropy and features together: what the loop has at hand beside the predictions.

    combined(predictions, features, reference=verified, reference_labels=labels)
    least_nc_share(features, reference=verified, reference_labels=labels)    # is it plausible?

An undecided prediction is one sign of a non-conforming image. Another is that there are more images
like it in the crawl than among the verified ones, which all show a class. The two see different
images: entropy those between the classes, the ratio of the densities those that look like one class
and are not, as a polo shirt looks like a t-shirt. docs/beyond.md has the measurements.

Features are (N, d) embeddings of the crawled images, of any network; ``reference`` are those of the
verified ones. Tensors are copied to the host, and the result back to their device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .confidence import entropy
from .features import Float64, as_matrix, covariance_factor, finite_rows, on_host, whitened
from .inputs import as_kind, check_labels, host, require_number

if TYPE_CHECKING:
    from ..rule import Array

_PIECE_BYTES = 32 << 20  # of float64 rows at one time


def combined(
    predictions: Array | Sequence[Array],
    features: Array,
    *,
    reference: Array,
    reference_labels: Array,
    shrinkage: float = 0.5,
    validate: bool = True,
) -> Array:
    """Mean of a row's rank by entropy and its rank by :func:`density_ratio`.

    Ranks are among the N rows, divided by N, ties sharing their mean: 1 is the least conforming
    row by both. So a score says how a row compares with the other rows of the same call. To have
    the scores of verified validation rows for a threshold, score them in one call with the others.

    Args:
        predictions: (N, k) probabilities of the crawled images, or a sequence of M of them,
            averaged in float32.
        features: (N, d) embeddings of the same images.
        reference, reference_labels, shrinkage: as for :func:`density_ratio`.
        validate: raise for the first invalid row; otherwise rows with NaN or infinity in either
            input score NaN and have no rank.

    Returns:
        (N,) float32 above 0 and up to 1, of the kind and on the device of the predictions.
    """
    where = "combined"
    undecided = entropy(predictions, validate=validate)
    ratio = density_ratio(
        features,
        reference=reference,
        reference_labels=reference_labels,
        shrinkage=shrinkage,
        validate=validate,
    )
    if len(undecided) != len(ratio):
        raise ValueError(
            f"{where}: features must be one row for each of the {len(undecided)} predictions, "
            f"got {len(ratio)}"
        )
    scores = np.stack([host(undecided), host(ratio)]).astype(np.float64)
    out = np.full(scores.shape[1], np.nan, dtype=np.float32)
    known = np.flatnonzero(np.isfinite(scores).all(axis=0))
    out[known] = np.mean([_ranks(score[known]) for score in scores], axis=0)
    return as_kind(undecided, out)


def density_ratio(
    features: Array,
    *,
    reference: Array,
    reference_labels: Array,
    crawl: Array | None = None,
    shrinkage: float = 0.5,
    validate: bool = True,
) -> Array:
    """Log ratio of the density of the crawled rows to that of the verified ones, as Gaussians.

        (m - v)' S^-1 (x - (m + v)/2)

    x is the row scaled to length 1, m the mean of the crawled rows, v that of the verified ones. S
    is the covariance of the verified rows around the means of their classes, shrunk: with the
    maximum likelihood estimate C and the shrinkage s, (1 - s) C + s tr(C)/d I. It makes little of
    what varies within a class, such as the background.

    The conforming part of the crawl should be distributed like the verified rows, as when a random
    part of the crawl was verified. Where the verified images come from elsewhere, the ratio finds
    what is from elsewhere; :func:`least_nc_share` tells.

    Args:
        features: (N, d) float16, float32, float64 (tensors: bfloat16), of the rows to score.
        reference: (R, d), of the verified images.
        reference_labels: (R,) integers, their classes; rows with -1 are left out.
        crawl: (C, d), of crawled images, for m; by default the features, without the row itself.
            Verified images are not among them.
        shrinkage: s, from 0 to 1.
        validate: raise for the first row that is not finite; otherwise it scores NaN.

    Returns:
        (N,) float32. A lone row has no others to compare with, and scores 0.

    Raises:
        TypeError: wrong kind or dtype. ValueError: wrong shape, no verified class with two rows, S
            singular, or the first row that is not finite.

    Source: Fisher, Annals of Eugenics 1936 (the discriminant); Hido et al., Knowledge and
    Information Systems 2011 (outliers by the ratio of densities).
    """
    where = "density_ratio"
    require_number(where, "shrinkage", shrinkage, 0.0, 1.0)
    verified = as_matrix(where, "reference", reference)
    kept = finite_rows(where, "reference", verified, validate)
    labels = check_labels(
        where, "reference_labels", on_host(reference_labels), len(verified), verified
    )
    kept = kept & (labels >= 0)
    verified, labels = _unit(verified[kept]), labels[kept]
    names, member = np.unique(labels, return_inverse=True)
    if np.bincount(member, minlength=1).max() < 2:
        raise ValueError(
            f"{where}: reference_labels must give at least one class two rows, got {len(names)} "
            f"classes and {len(labels)} rows"
        )
    means = np.stack([verified[member == c].mean(axis=0) for c in range(len(names))])
    factor = covariance_factor(where, verified - means[member], shrinkage)
    centre = verified.mean(axis=0)

    others = features if crawl is None else crawl
    name = "features" if crawl is None else "crawl"
    width = verified.shape[1]
    total, count = np.zeros(width), 0
    for _, rows in _pieces(where, name, others, width, validate):
        total += (rows - centre).sum(axis=0)
        count += len(rows)
    if crawl is not None and count == 0:
        raise ValueError(f"{where}: crawl must have at least one finite row, got {len(crawl)} rows")

    # In coordinates where S is the identity and v lies at 0, the ratio is m'x - m'm/2.
    to_unit = np.sqrt(len(verified))  # the factor is that of R S
    total = whitened(factor, total[None])[0] * to_unit
    out = np.full(len(features), np.nan, dtype=np.float32)
    for places, rows in _pieces(where, "features", features, width, validate):
        x = whitened(factor, rows - centre) * to_unit
        mean = (total - x) / max(count - 1, 1) if crawl is None else total / count
        out[places] = (mean * (x - mean / 2)).sum(axis=1)
    return as_kind(features, out)


def least_nc_share(
    features: Array,
    *,
    reference: Array,
    reference_labels: Array,
    shrinkage: float = 0.5,
    seed: int = 0,
    validate: bool = True,
) -> float:
    """The least share of NC rows that the density ratio leaves room for, max(0, 2 A - 1).

    A is the AUROC of the density ratio between the crawled rows and verified rows it has not seen:
    the mean of the two halves, each scored with the other as reference. If a share p of the crawl
    is NC and the rest distributed like the verified rows, A is at most p + (1 - p)/2. So a share
    that is far above what the crawl can be says that the verified rows are from elsewhere, and
    that neither :func:`density_ratio` nor :func:`combined` is to be used with them.

    Args:
        features, reference, reference_labels, shrinkage, validate: as for :func:`density_ratio`.
        seed: of the halves.

    Raises:
        TypeError, ValueError: as :func:`density_ratio`, of the reference or a half of it.
    """
    from ..evaluation import auroc

    where = "least_nc_share"
    reference = as_matrix(where, "reference", reference)
    labels = check_labels(
        where, "reference_labels", on_host(reference_labels), len(reference), reference
    )
    halves = np.array_split(np.random.default_rng(seed).permutation(len(reference)), 2)
    areas = []
    for fitted, held in (halves, halves[::-1]):
        ratio = functools.partial(
            density_ratio,
            reference=reference[fitted],
            reference_labels=labels[fitted],
            shrinkage=shrinkage,
            validate=validate,
        )
        scores = [host(ratio(features)), host(ratio(reference[held], crawl=features))]
        crawled, verified = (score[np.isfinite(score)] for score in scores)
        truth = np.repeat([True, False], [len(crawled), len(verified)])
        areas.append(auroc(np.concatenate([crawled, verified]), truth))
    return max(0.0, 2.0 * float(np.mean(areas)) - 1.0)


def _pieces(
    where: str, name: str, array: Any, width: int, validate: bool
) -> Iterator[tuple[NDArray[np.int64], Float64]]:
    """The finite rows, scaled to length 1, piece by piece, and their places among all."""
    if getattr(array, "ndim", None) != 2:
        as_matrix(where, name, array)  # says what is wrong
    if as_matrix(where, name, array[:0]).shape[1] != width:
        raise ValueError(
            f"{where}: {name} must have {width} columns like reference, got {array.shape[1]}"
        )
    step = max(1, _PIECE_BYTES // (8 * width))
    for begin in range(0, len(array), step):
        rows = as_matrix(where, name, array[begin : begin + step])
        finite = np.isfinite(rows).all(axis=1)
        if validate and not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            column = int(np.flatnonzero(~np.isfinite(rows[row]))[0])
            raise ValueError(
                f"{where}: {name} must be finite, got {rows[row, column]} at row {begin + row}, "
                f"column {column}"
            )
        yield begin + np.flatnonzero(finite), _unit(rows[finite])


def _unit(x: Float64) -> Float64:
    """Rows scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths == 0, 1.0, lengths)


def _ranks(scores: Float64) -> Float64:
    """From 1/n for the smallest of n scores to 1 for the largest; ties share their mean."""
    from scipy.stats import rankdata

    ranks: Float64 = rankdata(scores) / max(len(scores), 1)
    return ranks
