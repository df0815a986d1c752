"""Confident learning: which labels are wrong, by what the model believes of each class.

    found = find_wrong_labels(predictions, labels)
    found.wrong         # (N,) bool, the off-diagonal rows of the confident joint
    found.joint         # (k, k) counts: given label, confident class

Source: Northcutt, Jiang, Chuang: Confident Learning, JAIR 2021 (arXiv 1911.00068), as the package
cleanlab computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .given_label import margin_against
from .inputs import Rows, host
from .row_statistics import RowStatistics

if TYPE_CHECKING:
    from ..rule import Array

SLACK = 1e-6  # cleanlab's, of every comparison; a threshold is at least twice as large
NEVER = 2.0  # threshold of a class that no row is labelled with: no probability reaches it


@dataclasses.dataclass(frozen=True)
class ConfidentLearning:
    """What confident learning says of N labelled rows."""

    wrong: Array  #: (N,) bool, the label is wrong
    score: Array  #: (N,) float32, above 0.5 exactly where ``wrong``; see `confident_learning`
    guess: Array  #: (N,) int64, the class a row confidently belongs to; -1: none, or no label
    joint: Array  #: (k, k) int64, rows by given label and guess; rows without a guess left out
    thresholds: Array  #: (k,) float64, t_j

    def __len__(self) -> int:
        return len(self.wrong)


def find_wrong_labels(
    predictions: Array | Sequence[Array], labels: Array, *, validate: bool = True
) -> ConfidentLearning:
    """Confident joint of predictions and given labels, and the rows off its diagonal.

    The threshold t_j of class j is the mean probability q_j of the rows labelled j. A row belongs
    confidently to the one class with q_j >= t_j, to its most probable class where there are
    several, and to none where there is none. Its label y is wrong when that class is not y, and
    neither is the most probable one.

    Args:
        predictions: (N, k) probabilities, or a sequence of M of them, averaged in float32. They
            should come from models that have not been trained on the row (cross-validation).
        labels: (N,) integers from 0 to k - 1; -1 for a row without a label, which counts nowhere.
        validate: raise for the first invalid row; otherwise rows with NaN or infinity are left
            out and score NaN.

    Returns:
        ConfidentLearning, arrays of the kind and on the device of the predictions.

    cleanlab's ``find_label_issues(filter_by="confident_learning")`` finds the same rows, and its
    ``compute_confident_joint(calibrate=False)`` the same counts, except that it raises an empty
    diagonal to 1. Where several classes are confident, the paper takes the most probable of
    these; cleanlab, and this function, the most probable of all.
    """
    rows = Rows.of("confident_learning", "predictions", predictions)
    y = rows.labels(labels)
    thresholds = _thresholds(rows, y, validate)
    xp, k = rows.xp, rows.classes
    guess = xp.full_like(y, -1)
    wrong = xp.zeros_like(y, dtype=xp.bool)
    score = xp.full_like(y, np.nan, dtype=xp.float32)
    joint = xp.bincount(y[:0], minlength=k * k)
    ones = xp.ones_like(thresholds)
    counting = xp.stack([ones, ones.cumsum(0) - 1.0], 1)

    def work(q: Any, s: RowStatistics, sound: Any, part: slice) -> None:
        nonlocal joint
        known, given = sound & (y[part] >= 0), y[part].clip(0)
        top_class = s.top_class
        confident = rows.exact(q) >= thresholds - SLACK
        # How many are confident, and the sum of their numbers: which one, where it is the only one.
        found = xp.asarray(confident, dtype=xp.float64) @ counting
        count, only = found[:, 0], xp.asarray(found[:, 1], dtype=xp.int64)
        best = xp.where(count > 1, top_class, xp.where(count == 1, only, -1))
        favoured = s.own(given) + SLACK
        agrees = (top_class == given) | (favoured > s.top)
        agrees = agrees | ((favoured == s.top) & (given < top_class))
        off = known & (best >= 0) & (best != given) & ~agrees
        counted = known & (best >= 0)
        joint += xp.bincount(given[counted] * k + best[counted], minlength=k * k)
        guess[part] = xp.where(known, best, -1)
        wrong[part] = off
        margin = margin_against(s, given).clip(0.0, 1.0)  # not by a sum that is a little off
        score[part] = xp.where(known, (off + margin) / 2.0, np.nan)

    rows.walk(work, validate=False)  # the thresholds' walk has validated
    return ConfidentLearning(
        wrong=wrong, score=score, guess=guess, joint=joint.reshape(k, k), thresholds=thresholds
    )


def confident_learning(
    predictions: Array | Sequence[Array], labels: Array, *, validate: bool = True
) -> Array:
    """(o + m) / 2: o is 1 for the rows off the diagonal of the confident joint and 0 for the
    others, m the normalised margin, from 0 to 1. Above 0.5 exactly for wrong labels, among which
    the normalised margin decides the order.

    Arguments as for :func:`find_wrong_labels`, which gives decision, counts and thresholds too.

    Returns:
        (N,) float32. Rows without a label score NaN.
    """
    return find_wrong_labels(predictions, labels, validate=validate).score


def _thresholds(rows: Rows, y: Any, validate: bool) -> Any:
    """(k,) float64 mean self-confidence of the valid rows of each label."""
    xp, k = rows.xp, rows.classes
    sums, counts = np.zeros(k), np.zeros(k, dtype=np.int64)

    def work(_: Any, s: RowStatistics, sound: Any, part: slice) -> None:
        nonlocal sums, counts
        known = sound & (y[part] >= 0)
        given = y[part][known]
        own = s.own(y[part].clip(0))[known]
        sums += host(xp.bincount(given, weights=own, minlength=k))
        counts += host(xp.bincount(given, minlength=k))

    rows.walk(work, validate=validate)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), NEVER).clip(2.0 * SLACK)
    return means if xp is np else xp.as_tensor(means, device=y.device)
