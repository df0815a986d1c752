"""The definition of the GenKL score, in float64 NumPy.

Everything the C++ and CUDA kernels decide is defined here and tested against this page. It is
written to be believed at sight, not to be fast: it holds several (N, k) float64 temporaries.

Only IEEE-754 operations whose result is fixed to the last bit (``+ - * /``, comparisons, changes
of exponent) are used, always in a stated order. A library ``log2`` or ``exp`` differs in its last
bit between machines, and a prediction that sits exactly on the threshold would then be decided
differently on a CPU, on a GPU and here. With the two functions below it is not: the kernels reach
the same float64 bits.

Source: GenKL (arXiv 2307.09810), the divergence D_(alpha,beta)(u || q) and the vote over m
uniform-like vectors, as computed by the published program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

LOG2_E = 1.4426950408889634  # log2(e), nearest float64
LN2_HIGH = 0.6931471803691238  # ln 2, its low 21 bits cleared: n * LN2_HIGH is exact
LN2_LOW = 1.9082149292705877e-10  # ln 2 - LN2_HIGH
SUM_LANES = 32  # partial sums of a softmax denominator


class ReferenceScores(NamedTuple):
    """What :func:`nc_score` returns; one entry per row, float64 where the value is a float."""

    critical_alpha: Float64  # (N,) max_j a_j
    divergence: Float64  # (N,) max_j D_j
    votes: NDArray[np.int32]  # (N,) number of j with D_j >= 0
    top_class: NDArray[np.int32]  # (N,) lowest index of the largest entry
    top_prob: Float64  # (N,) the largest entry


def log2(x: Float64) -> Float64:
    """Base-2 logarithm of positive float64 numbers (normal range) to 3 units in the last place.

    x = 2^e m with m in [0.75, 1.5), s = (m - 1) / (m + 1), and then
    log2 x = e + 2 log2(e) (s + s^3/3 + s^5/5 + ...), cut after s^27. Exact for powers of two.
    NaN and infinity are returned as they are.
    """
    x = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(x)
    m, e = np.frexp(np.where(finite, x, 1.0))  # m in [0.5, 1)
    low = m < 0.75
    m, e = np.where(low, 2.0 * m, m), np.where(low, e - 1, e)
    r = m - 1.0
    s = r / (2.0 + r)
    z = s * s
    p = np.full_like(z, 2.0 * LOG2_E / 27.0)
    for n in range(25, 0, -2):
        p = p * z + 2.0 * LOG2_E / n
    return np.where(finite, e + s * p, x)


def exp(x: Float64) -> Float64:
    """e^x of float64 numbers x <= 0 to 2 units in the last place; 0 below -700."""
    x = np.asarray(x, dtype=np.float64)
    y = np.where(x < -700.0, -700.0, x)
    n = np.rint(y * LOG2_E)
    r = (y - n * LN2_HIGH) - n * LN2_LOW  # |r| <= ln(2) / 2
    p = np.full_like(r, 1.0 / 6227020800.0)  # 1 / 13!
    for factorial in (
        479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
        720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0,
    ):  # fmt: skip
        p = p * r + 1.0 / factorial
    scaled = np.ldexp(p, np.where(np.isnan(n), 0.0, n).astype(np.int32))
    return np.where(x < -700.0, 0.0, scaled)


def softmax(logits: NDArray) -> NDArray[np.float32]:
    """Softmax over the last axis of (N, k) logits: float64 inside, rounded to float32.

    The denominator is the sum of 32 partial sums, partial sum l taking the classes l, l + 32,
    l + 64, ... in order; they are then folded in halves (16 + 16, 8 + 8, ...).
    """
    x = np.asarray(logits, dtype=np.float64)
    rows, classes = x.shape
    with np.errstate(invalid="ignore"):
        e = exp(x - x.max(axis=1, initial=-np.inf, keepdims=True))
    strides = -(-classes // SUM_LANES)
    padded = np.zeros((rows, strides * SUM_LANES))
    padded[:, :classes] = e
    lanes = np.zeros((rows, SUM_LANES))
    for i in range(strides):
        lanes = lanes + padded[:, i * SUM_LANES : (i + 1) * SUM_LANES]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return (e / lanes).astype(np.float32)


def average(predictions: Sequence[NDArray], *, logits: bool = False) -> NDArray:
    """The (N, k) averaged prediction of M models.

    One model's probabilities are taken as they are, in their own dtype. Otherwise every model is
    rounded to float32 and the sum, in model order, is divided by M, all in float32.
    """
    if logits:
        predictions = [softmax(p) for p in predictions]
    if len(predictions) == 1:
        return np.asarray(predictions[0])
    total = np.asarray(predictions[0]).astype(np.float32)
    for p in predictions[1:]:
        total = total + np.asarray(p).astype(np.float32)
    return total / np.float32(len(predictions))


def dominant(q: NDArray, tau: float) -> NDArray[np.bool_]:
    """Which entries count: not below tau, compared in the dtype of ``q``; zeros never count."""
    return ~(q < np.asarray(tau).astype(q.dtype)) & (q != 0)


def cross_terms(q: NDArray, vectors: Float64, tau: float) -> Float64:
    """(N, m): S_nj = sum over dominant i, in class order, of u_ji log2 q_ni."""
    keep = dominant(q, tau)
    log_q = np.where(keep, log2(np.where(keep, q, 1.0).astype(np.float64)), 0.0)
    total = np.zeros((q.shape[0], vectors.shape[0]))
    for i in range(q.shape[1]):
        total = total + log_q[:, i, None] * vectors[None, :, i]
    return total


def entropies(vectors: Float64) -> Float64:
    """(m,): sum_i u_ji log2 u_ji = -H(u_j), in class order, in bits."""
    total = np.zeros(vectors.shape[0])
    for i in range(vectors.shape[1]):
        total = total + vectors[:, i] * log2(vectors[:, i])
    return total


def nc_score(
    predictions: NDArray | Sequence[NDArray],
    vectors: Float64,
    alpha: float,
    tau: float,
    *,
    logits: bool = False,
) -> ReferenceScores:
    """Score (N, k) predictions against (m, k) uniform-like vectors.

    D_j = alpha sum_i u_ji log2 u_ji - sum_{dominant i} u_ji log2 q_i, and a row is
    non-conforming when some D_j >= 0. Equivalently max_j a_j >= alpha with
    a_j = sum_{dominant i} u_ji log2(1/q_i) / H(u_j), the row's critical alpha.

    Args:
        predictions: (N, k) array, or a sequence of M of them to be averaged.
        vectors: (m, k) float64, positive, rows summing to 1.
        alpha: scale of the entropy part.
        tau: threshold of a dominant entry, 1/k - beta.
        logits: take the softmax of the predictions first.
    """
    models = predictions if isinstance(predictions, (list, tuple)) else [np.asarray(predictions)]
    vectors = np.asarray(vectors, dtype=np.float64)
    q = average(models, logits=logits)
    with np.errstate(invalid="ignore"):
        cross = cross_terms(q, vectors, tau)
        entropy = entropies(vectors)
        divergence = alpha * entropy - cross
        critical = cross / entropy
        return ReferenceScores(
            critical_alpha=critical.max(axis=1),
            divergence=divergence.max(axis=1),
            votes=(divergence >= 0).sum(axis=1).astype(np.int32),
            top_class=q.argmax(axis=1).astype(np.int32),
            top_prob=q.max(axis=1).astype(np.float64),
        )


def first_bad_row(predictions: Sequence[NDArray], *, logits: bool, tolerance: float) -> int:
    """The first row that is not a valid prediction, or -1.

    Every entry must be finite and, for probabilities, not negative; the averaged row must sum
    to 1 within ``tolerance`` (summed in class order in float64).
    """
    bad = np.zeros(len(predictions[0]), dtype=bool)
    for p in predictions:
        values = np.asarray(p).astype(np.float64)
        bad |= ~np.isfinite(values).all(axis=1)
        if not logits:
            bad |= (values < 0).any(axis=1)
    if not logits:
        q = average(predictions).astype(np.float64)
        total = np.zeros(len(q))
        with np.errstate(invalid="ignore"):
            for i in range(q.shape[1]):
                total = total + q[:, i]
            bad |= ~(np.abs(total - 1.0) <= tolerance)
    return int(bad.argmax()) if bad.any() else -1
