"""Some rows, scored; rows that hold no valid prediction are raised, or set apart.

What files are scored by, chunk after chunk, and what a Ray or Spark job calls on its batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..rule import GenKL, _describe_bad_row, sum_tolerance
from .tables import LEFT_OUT

OnBadRow = Literal["raise", "nan", "skip"]
_EDGE = 1e-3  # relative; nearer to the tolerance than this, only the kernel knows


class BadRow(ValueError):
    """A row holds no valid prediction; ``row`` is its number."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def score_rows(
    models: Sequence[Any],
    rule: GenKL,
    *,
    logits: bool = False,
    validate: bool = True,
    missing: NDArray[np.int64] | None = None,
    on_bad_row: OnBadRow = "raise",
    names: Sequence[str] | None = None,
    first_row: int = 0,
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Score a piece of something larger.

    Args:
        models: M arrays or CPU tensors of (n, k), as for ``GenKL.score``.
        rule: what to score with.
        logits: they are logits.
        validate: look for rows that are no predictions.
        missing: rows known to hold none, ascending; they are not looked at.
        on_bad_row: what such a row does that is not known: raise, or be set apart.
        names: of the models, for messages.
        first_row: number of the first row, for messages.

    Returns:
        The columns of :mod:`.tables`, with ``LEFT_OUT`` in rows that are missing or bad; and the
        bad rows, ascending.

    Raises:
        BadRow: the first one, where it is to be raised.
    """
    rows = np.empty(0, np.int64) if missing is None else missing
    bad = np.empty(0, np.int64)
    while True:
        valid = [_with_one_hot(model, rows) for model in models] if len(rows) else list(models)
        scores = rule._score(valid, logits=logits, validate=validate)
        first = int(scores._first_bad_row)
        if first < 0:
            break
        if on_bad_row == "raise":
            message = _describe_bad_row(list(models), first, logits, names, first_row)
            raise BadRow(message, first_row + first)
        found = _bad_rows(valid, rule, logits)
        bad = np.union1d(bad, found if first in found else np.append(found, first))
        rows = np.union1d(rows, bad)
    columns = {name: np.asarray(getattr(scores, name)) for name in LEFT_OUT}
    if len(rows):
        for name, value in LEFT_OUT.items():
            columns[name][rows] = value
    return columns, bad


def empty_rows(models: Sequence[Any]) -> NDArray[np.bool_]:
    """(n,) the rows in which any of M arrays or CPU tensors of (n, k) has nothing but NaN."""
    empty = np.zeros(len(models[0]), bool)
    for model in models:
        # Nearly every row is cleared by its first entry.
        begins_so = np.flatnonzero(np.isnan(_numbers(model[:, :1])).any(axis=1))
        empty[begins_so[np.isnan(_numbers(model[begins_so])).all(axis=1)]] = True
    return empty


def _with_one_hot(model: Any, rows: NDArray[np.int64]) -> Any:
    """A copy with a prediction in rows that have none. Rows do not see each other, so it does not
    matter which."""
    model = model.copy(order="K") if isinstance(model, np.ndarray) else model.detach().clone()
    model[rows] = 0
    model[rows, 0] = 1
    return model


def _numbers(model: Any) -> NDArray[Any]:
    """A model's rows for NumPy, exactly: bfloat16, which it does not have, as float32."""
    if isinstance(model, np.ndarray):
        return model
    model = model.detach()
    rows: NDArray[Any] = (model.float() if str(model.dtype) == "torch.bfloat16" else model).numpy()
    return rows


def _bad_rows(models: Sequence[Any], rule: GenKL, logits: bool) -> NDArray[np.int64]:
    """All rows that the kernel finds bad. It tells the first one only, so most are found here, and
    the few at the edge of the tolerance are shown to it one by one."""
    bad = np.zeros(len(models[0]), bool)
    sums = np.zeros(len(models[0]))
    with np.errstate(invalid="ignore", over="ignore"):
        for model in map(_numbers, models):
            bad |= ~np.isfinite(model).all(axis=1)
            if not logits:
                bad |= (model < 0).any(axis=1)
                sums += model.sum(axis=1, dtype=np.float64) / len(models)
        if not logits:
            off = np.abs(sums - 1) / sum_tolerance(models[0].dtype)
            edge = ~bad & (np.abs(off - 1) <= _EDGE)
            bad |= off > 1 + _EDGE
            for row in np.flatnonzero(edge):
                one = [model[row : row + 1] for model in models]
                bad[row] = int(rule._score(one, logits=False, validate=True)._first_bad_row) == 0
    return np.flatnonzero(bad)
