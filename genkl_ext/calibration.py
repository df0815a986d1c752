"""Choose alpha, and beta, so that a rule flags no more than a share of verified clean rows.

    found = rule.calibrate(clean, false_positives=0.05)
    found.rule                      # the same rule with its alpha chosen
    found.share, found.interval     # what it flags of the clean rows, and how sure that is

Which alpha is right depends on how sharp the networks' predictions are, and so does not carry over
from one data set, or one training, to the next. Rows that are known to conform show it: alpha is
put where the rule flags as many of them as may be, and no more. The rows must not have been
trained on, or the networks are surer of them than of what is to be scored.

How sure. Let the rule flag c of n clean rows. Alpha was chosen on these very rows, so c is no
binomial count; but whatever the distribution of critical alpha, as long as it has no ties, the
share that the rule flags of all clean images there are follows Beta(c, n - c + 1) over draws of the
n rows (it is an order statistic of a uniform distribution), or Beta(1, n) for c = 0. For c > 0 its
mean is c / (n + 1), below the target. The interval of Clopper and Pearson for c of n, from the
quantile of Beta(c, n - c + 1) to that of Beta(c + 1, n - c), contains the equal-tailed interval of
it. With B betas each gets the confidence 1 - (1 - confidence) / B, so that all intervals hold
together, and with them that of the chosen one.

Which beta. The false-positive share does not say: every beta reaches it with some alpha. Two ways:

- ``by="flagged"``: the beta that flags most of the noisy rows. If conforming noisy rows are flagged
  as often as clean ones, this is the beta of the highest recall. Where noisy images differ from the
  clean ones in more than conformity, it favours what finds that difference.
- ``by="accuracy"``: the beta after which a linear head (logistic regression on given features),
  trained on the noisy rows that are not flagged, is best on the clean rows. Each fold of the clean
  rows is predicted with the alpha that the other folds give. It measures what the rule is for, but
  a head differs little with a few rows more or less: look at the standard error beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .rule import GenKL, _check_models, _is_tensor, _require_number
from .scoring.sources import open_source
from .sweep import _settings, critical_alphas

if TYPE_CHECKING:
    from .rule import Array
    from .sweep import Inputs, Progress

Float32 = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One beta: the alpha that keeps the target, and what it comes to."""

    rule: GenKL
    flagged: int  #: clean rows that it flags
    interval: tuple[float, float]  #: of the share of clean images that it flags
    noisy_share: float | None = None  #: of the noisy rows that it flags
    accuracy: float | None = None  #: of the head on the clean rows, mean over folds
    accuracy_error: float | None = None  #: standard error of that mean


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A rule chosen on verified clean rows, and what it was chosen from."""

    candidates: tuple[Candidate, ...]  #: one for each beta, in the order given
    chosen: int  #: index of the candidate that was taken
    rows: int  #: clean rows with a prediction
    false_positives: float  #: the share that was asked for
    confidence: float  #: that all intervals hold
    by: str

    @property
    def rule(self) -> GenKL:
        """The rule that was chosen."""
        return self.candidates[self.chosen].rule

    @property
    def share(self) -> float:
        """Share of the clean rows that it flags; at most ``false_positives``."""
        return self.candidates[self.chosen].flagged / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of the share that it flags of clean images there are."""
        return self.candidates[self.chosen].interval

    def to_json(self) -> str:
        """Everything, as JSON."""
        candidates = [{**dataclasses.asdict(c), "rule": _settings(c.rule)} for c in self.candidates]
        return json.dumps({**dataclasses.asdict(self), "candidates": candidates}, indent=1) + "\n"

    def table(self) -> str:
        """A line for each beta, the chosen one marked, in columns of text; shares in %."""
        level = f"{100 * self.confidence:g} %"
        header = [
            "",
            "beta",
            "alpha",
            "clean flagged",
            f"{level} interval",
            "noisy %",
            "accuracy %",
        ]
        lines = [header]
        for i, c in enumerate(self.candidates):
            low, high = (100 * end for end in c.interval)
            noisy = "-" if c.noisy_share is None else f"{100 * c.noisy_share:.2f}"
            accuracy = "-"
            if c.accuracy is not None and c.accuracy_error is not None:
                accuracy = f"{100 * c.accuracy:.2f} ± {100 * c.accuracy_error:.2f}"
            share = f"{c.flagged} of {self.rows} ({100 * c.flagged / self.rows:.2f} %)"
            lines.append([
                "*" if i == self.chosen else "", f"{c.rule.beta:.4g}", f"{c.rule.alpha:.5g}", share,
                f"{low:.2f} to {high:.2f}", noisy, accuracy,
            ])  # fmt: skip
        used = [i for i in range(len(header)) if i < 5 or any(x[i] != "-" for x in lines[1:])]
        widths = {i: max(len(line[i]) for line in lines) for i in used}
        return "\n".join("  ".join(line[i].rjust(widths[i]) for i in used) for line in lines)


def calibrate(
    rule: GenKL,
    clean: Inputs,
    *,
    false_positives: float = 0.05,
    betas: Sequence[float] | None = None,
    by: Literal["flagged", "accuracy"] = "flagged",
    noisy: Inputs | None = None,
    features: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    clean_features: ArrayLike | None = None,
    clean_labels: ArrayLike | None = None,
    folds: int = 5,
    confidence: float = 0.95,
    logits: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Choose alpha, and one of several betas, on verified clean rows.

    For each beta, alpha is the largest that still flags as many clean rows as the target allows.
    The decision on these rows is the exact one, not that of a stored critical alpha. Rows that tie
    are flagged together or not at all, so fewer than allowed may be. The result depends on the
    arguments alone.

    Args:
        rule: what is not chosen stays as it is; its alpha does not matter, nor its beta if
            ``betas`` is given.
        clean: predictions of V rows known to conform, not trained on: array, tensor or ``.npy``
            file, or M of them; rows of nothing but NaN (images that cannot be used) do not count.
        false_positives: largest share of the clean rows to flag, from 0 to below 1.
        betas: to choose from; by default the rule's own.
        by: how to choose, with several betas; ties take the first.
        noisy: predictions of the N noisy rows; needed to choose a beta.
        features, labels: (N, d) and (N,) of the noisy rows, -1 where there is no label; for
            "accuracy".
        clean_features, clean_labels: (V, d) and (V,) of the clean rows; for "accuracy".
        folds: parts of the clean rows, for "accuracy".
        confidence: that the intervals hold, all of them together.
        logits: the predictions are logits.
        progress: called with (noisy rows done, N).

    Raises:
        TypeError, ValueError: an argument that is missing or is not what it should be; no clean
            row with a prediction. Predictions: as :meth:`GenKL.score`.
    """
    _require_number("calibrate", "false_positives", false_positives, low=0)
    _require_number("calibrate", "confidence", confidence, low=0)
    if not (false_positives < 1 and confidence < 1):
        name, value = ("confidence", confidence)
        if not false_positives < 1:
            name, value = ("false_positives", false_positives)
        raise ValueError(f"calibrate: {name} must be below 1, got {value}")
    if by not in ("flagged", "accuracy"):
        raise ValueError(f"calibrate: by must be 'flagged' or 'accuracy', got {by!r}")
    if betas is not None and not len(betas):
        raise ValueError("calibrate: betas must be at least one, got none")
    rules = [
        dataclasses.replace(rule, beta=float(beta))
        for beta in ([rule.beta] if betas is None else betas)
    ]
    if noisy is None and (len(rules) > 1 or by == "accuracy"):
        raise ValueError("calibrate: noisy, predictions of the noisy rows, is needed for a choice")
    models, usable = _usable(clean, rule.num_classes)
    head = None
    if by == "accuracy":
        head = _Head(
            _array("features", features, 2),
            _array("labels", labels, 1),
            _array("clean_features", clean_features, 2, len(usable)),
            _array("clean_labels", clean_labels, 1, len(usable)),
            usable,
            folds,
        )
    rows = int(usable.sum())
    if not rows:
        raise ValueError("calibrate: clean must have a row with a prediction, got none")
    allowed = _allowed(rows, false_positives)
    fitted = [_fit(r, models, allowed, logits) for r in rules]
    candidates = [
        Candidate(
            rule=fit, flagged=flagged, interval=interval(flagged, rows, confidence, len(rules))
        )
        for fit, flagged in fitted
    ]
    chosen = 0
    if noisy is not None:
        fits = [c.rule for c in candidates]
        critical = critical_alphas(noisy, fits, logits=logits, progress=progress)
        there = int(np.count_nonzero(~np.isnan(critical[0])))
        for i, c in enumerate(candidates):
            # Exact: the critical alphas were made with the alpha that they are held against.
            nc = int(np.count_nonzero(critical[i] >= c.rule.alpha))
            candidates[i] = dataclasses.replace(c, noisy_share=nc / max(1, there))
        if head is not None:
            for i, c in enumerate(candidates):
                own = np.asarray(_score(c.rule, models, logits))
                mean, error = head.accuracy(critical[i], own, false_positives)
                candidates[i] = dataclasses.replace(c, accuracy=mean, accuracy_error=error)
            chosen = int(np.argmax([c.accuracy or 0.0 for c in candidates]))
        else:
            chosen = int(np.argmax([c.noisy_share or 0.0 for c in candidates]))
    return Calibration(
        candidates=tuple(candidates),
        chosen=chosen,
        rows=rows,
        false_positives=float(false_positives),
        confidence=float(confidence),
        by=by,
    )


def alpha_reached_by(critical: Float32, share: float) -> float:
    """The largest alpha that at least a share of some rows reach, whatever their exact values.

    The row that decides it is the first of those that make up the share, counted from the largest
    critical alpha. Its float32 may lie above the exact value, so alpha is one float32 below it.

    Args:
        critical: (n,) critical alphas, n at least 1.
        share: from 0 to 1.
    """
    return float(_just_below(np.quantile(critical, 1 - share, method="higher")))


def alpha_reached_by_at_most(critical: Float32, count: int) -> float:
    """The least of these alphas that at most ``count`` rows reach: one float32 below each critical
    alpha, or one above them all.

    With n rows and no ties it is the one below the ``count``-th largest.
    """
    values = np.sort(critical)
    below = _just_below(values)
    reached = len(values) - np.searchsorted(values, below, "left")
    few = np.flatnonzero(reached <= count)
    if len(few):
        return float(below[few[0]])
    return float(np.nextafter(max(values[-1], np.float32(0)), np.float32(np.inf)))


def interval(flagged: int, rows: int, confidence: float, together: int = 1) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share of which ``flagged`` of ``rows`` were counted.

    Args:
        flagged: from 0 to ``rows``.
        rows: at least 1.
        confidence: that ``together`` such intervals all hold (Bonferroni).
        together: how many are looked at.

    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    from scipy.special import betaincinv

    tail = (1 - confidence) / (2 * together)
    low = betaincinv(flagged, rows - flagged + 1, tail) if flagged else 0.0
    high = betaincinv(flagged + 1, rows - flagged, 1 - tail) if flagged < rows else 1.0
    return float(low), float(high)


def _fit(rule: GenKL, models: list[Any], allowed: int, logits: bool) -> tuple[GenKL, int]:
    """The rule with its alpha, and how many rows it flags by the exact decision.

    Critical alphas lie within ``rule.resolution`` of the exact ones, but close to the alpha that
    they were scored with they are the exact ones, rounded to the side of alpha on which they are.
    So the rows are scored again with the alpha found, until it is the one that they give.
    """
    critical = _score(rule, models, logits)
    alpha = alpha_reached_by_at_most(critical, allowed)
    too_low = -math.inf
    while True:
        critical = _score(dataclasses.replace(rule, alpha=alpha), models, logits)
        flagged = int(np.count_nonzero(critical >= alpha))
        found = alpha_reached_by_at_most(critical, allowed)
        if flagged > allowed:
            too_low = alpha  # only larger ones from here on: this ends
            found = max(found, float(np.nextafter(np.float32(alpha), np.float32(np.inf))))
        elif found >= alpha or found <= too_low:
            return dataclasses.replace(rule, alpha=alpha), flagged
        alpha = found


def _score(rule: GenKL, models: list[Any], logits: bool) -> Float32:
    critical: Float32 = np.asarray(rule.score(models, logits=logits).numpy().critical_alpha)
    return critical


def _just_below(values: Any) -> Any:
    return np.maximum(np.nextafter(values, np.float32(-np.inf)), np.float32(0))


def _allowed(rows: int, share: float) -> int:
    """The largest count whose share, as a float64 quotient, is not above ``share``."""
    return int(np.searchsorted(np.arange(rows + 1) / rows, share, "right")) - 1


def _usable(predictions: Inputs, classes: int) -> tuple[list[Array], NDArray[np.bool_]]:
    """The models' rows that have a prediction, and (V,) which these are."""
    given = list(predictions) if isinstance(predictions, (list, tuple)) else [predictions]
    models: list[Any] = [_read(m) if isinstance(m, (str, os.PathLike)) else m for m in given]
    _check_models(models, classes)
    missing = [
        m.isnan().all(1).cpu().numpy() if _is_tensor(m) else np.isnan(m).all(axis=1) for m in models
    ]
    usable: NDArray[np.bool_] = ~np.logical_or.reduce(missing)
    if usable.all():
        return models, usable
    rows: Any = np.flatnonzero(usable)
    return [m[rows.tolist()] if _is_tensor(m) else m[rows] for m in models], usable


def _read(path: str | os.PathLike[str]) -> NDArray[Any]:
    with open_source(path) as file:
        rows: NDArray[Any] = file.rows(0, file.shape[0])
        return rows


def _array(name: str, values: ArrayLike | None, dimensions: int, rows: int = -1) -> NDArray[Any]:
    if values is None:
        raise ValueError(f"calibrate: {name} must be given for by='accuracy'")
    array = np.asarray(values)
    if array.dtype.kind not in ("fiu" if dimensions == 2 else "iu"):
        wanted = "numbers" if dimensions == 2 else "integers"
        raise ValueError(f"calibrate: {name} must be {wanted}, got {array.dtype}")
    if array.ndim != dimensions or rows not in (-1, len(array)):
        wanted = f"{rows if rows >= 0 else 'N'}" + (", d" if dimensions == 2 else ",")
        raise ValueError(f"calibrate: {name} must be ({wanted}), got {array.shape}")
    return array


def _require_finite(name: str, features: NDArray[Any], used: NDArray[np.bool_]) -> None:
    """Raise ``ValueError`` for the first of the rows used that has NaN or infinity."""
    bad = used & ~np.isfinite(features).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        column = int(np.argmin(np.isfinite(features[row])))
        raise ValueError(
            f"calibrate: {name} must be finite, got {features[row, column]} at row {row}, "
            f"column {column}"
        )


class _Head:
    """A linear head on features of noisy rows, and how well it does on clean ones."""

    def __init__(
        self,
        features: NDArray[Any],
        labels: NDArray[Any],
        clean_features: NDArray[Any],
        clean_labels: NDArray[Any],
        usable: NDArray[np.bool_],
        folds: int,
    ) -> None:
        """``usable``: (V,) clean rows that have a prediction."""
        if len(features) != len(labels):
            raise ValueError(
                f"calibrate: labels must be ({len(features)},) like features, got {labels.shape}"
            )
        if clean_features.shape[1] != features.shape[1]:
            raise ValueError(
                f"calibrate: clean_features must have {features.shape[1]} columns like features, "
                f"got {clean_features.shape[1]}"
            )
        _require_finite("clean_features", clean_features, usable)
        clean_features, clean_labels = clean_features[usable], clean_labels[usable]
        if not 2 <= folds <= len(clean_labels):
            raise ValueError(
                f"calibrate: folds must be from 2 to {len(clean_labels)} (clean rows), got {folds}"
            )
        self._features, self._labels = features.astype(np.float32), labels
        self._clean_features = clean_features.astype(np.float32)
        self._clean_labels = clean_labels
        order = np.random.RandomState(0).permutation(len(clean_labels))
        self._folds = [np.sort(order[fold::folds]) for fold in range(folds)]
        self._heads: dict[bytes, Any] = {}

    def accuracy(self, noisy: Float32, clean: Float32, share: float) -> tuple[float, float]:
        """Mean accuracy over the folds, and its standard error.

        Args:
            noisy, clean: critical alphas of the rows.
            share: largest share of the clean rows to flag.
        """
        if len(noisy) != len(self._labels):
            raise ValueError(
                f"calibrate: labels must be ({len(noisy)},) like noisy, got {self._labels.shape}"
            )
        _require_finite("features", self._features, ~np.isnan(noisy) & (self._labels >= 0))
        reached = []
        for fold in self._folds:
            others = np.delete(clean, fold)
            alpha = alpha_reached_by_at_most(others, _allowed(len(others), share))
            # False for NaN: without a prediction nothing is known against a row, nor for it.
            kept = (noisy < alpha) & (self._labels >= 0)
            right = self._trained(kept).predict(self._clean_features[fold])
            reached.append(float(np.mean(right == self._clean_labels[fold])))
        return float(np.mean(reached)), float(np.std(reached, ddof=1) / math.sqrt(len(reached)))

    def _trained(self, kept: NDArray[np.bool_]) -> Any:
        """The head that was trained on these rows; once for each set of them."""
        key = np.packbits(kept).tobytes()
        if key not in self._heads:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

            if len(np.unique(self._labels[kept])) < 2:
                raise ValueError(
                    f"calibrate: noisy rows that are not flagged must have two classes at least, "
                    f"got {np.count_nonzero(kept)} rows"
                )
            # Strongly regularised and not fitted to the end: features are many and labels noisy.
            head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=0.01))
            self._heads[key] = head.fit(self._features[kept], self._labels[kept])
        return self._heads[key]
