"""Rows to score, chosen where formulas break, and what "exact up to the last rounding" means."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Cifar(NamedTuple):
    """50,000 real rows, cross-validated softmax of CIFAR-10 with synthetic label noise."""

    predictions: np.ndarray  # (N, 10) float16
    given: np.ndarray  # (N,) int64, noisy label
    true: np.ndarray  # (N,) int64


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def awkward(k: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """(N, k): peaked, flat and confident rows; one-hot, uniform and tied ones."""
    rng = np.random.default_rng(seed)
    blocks = [softmax(scale * rng.standard_normal((40, k))) for scale in (0.3, 4.0, 40.0)]
    tied = np.zeros((3, k))
    tied[0, :2] = 0.5
    tied[1, -2:] = 0.5
    tied[2, [0, -1]] = 0.25, 0.75
    blocks += [np.eye(k)[[0, k - 1, k // 2]], np.full((2, k), 1.0 / k), tied]
    return rng.permutation(np.concatenate(blocks)).astype(dtype)


def some_labels(q: np.ndarray, seed: int = 1) -> np.ndarray:
    """(N,) labels: mostly the most probable class, some others, some missing."""
    rng = np.random.default_rng(seed)
    labels = q.argmax(axis=1)
    other = rng.random(len(q)) < 0.4
    labels[other] = rng.integers(0, q.shape[1], other.sum())
    labels[rng.random(len(q)) < 0.05] = -1
    return labels


def strided(array: np.ndarray) -> np.ndarray:
    """The same entries, contiguous in neither direction."""
    holder = np.full((2 * array.shape[0], 3 * array.shape[1]), 7, dtype=array.dtype)
    holder[::2, ::3] = array
    return holder[::2, ::3]


def as_kind(kind: str, array: Any) -> Any:
    """ "numpy" or "torch"; lists entry by entry."""
    if isinstance(array, list):
        return [as_kind(kind, a) for a in array]
    return torch.as_tensor(np.ascontiguousarray(array)) if kind == "torch" else array


def assert_rounded(came: Any, exact: np.ndarray, slack: float = 1e-12) -> None:
    """``came`` is ``exact`` (float64) rounded to float32, but for ``slack`` in float64."""
    came = np.asarray(came)
    assert came.dtype == np.float32
    assert came.shape == exact.shape
    np.testing.assert_array_equal(np.isnan(came), np.isnan(exact))
    known = ~np.isnan(exact)
    half = np.spacing(np.abs(exact[known]).astype(np.float32)).astype(np.float64) / 2
    off = np.abs(came[known].astype(np.float64) - exact[known])
    assert (off <= half + slack * (1 + np.abs(exact[known]))).all(), off.max()
