"""How much a prediction speaks against the given label; and who is clean, by DSOS and Jo-SRC.

Rows without a label (-1) score NaN. A larger score means more likely mislabelled, or, for
:func:`dsos`, more non-conforming.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .inputs import Rows, as_kind, host, require_integer, require_number
from .row_statistics import RowStatistics

if TYPE_CHECKING:
    from ..rule import Array


@dataclasses.dataclass(frozen=True)
class NoiseSplit:
    """Rows by the kind of their label noise; a row without a label, or with NaN, is in none."""

    clean: Array  #: (N,) bool, the given label is believed
    in_distribution: Array  #: (N,) bool, wrong label, but one of the classes applies
    out_of_distribution: Array  #: (N,) bool, no class applies
    score: Array  #: (N,) float32, what clean rows were told by; larger is noisier

    def __len__(self) -> int:
        return len(self.clean)


def self_confidence(
    predictions: Array | Sequence[Array], labels: Array, *, validate: bool = True
) -> Array:
    """1 - q_y, the probability that is not given to the label y; from 0 to 1.

    Args:
        predictions: (N, k) probabilities, or a sequence of M of them, averaged in float32.
        labels: (N,) integers from 0 to k - 1; -1 for a row without a label, which scores NaN.
        validate: raise for the first invalid row; otherwise rows with NaN or infinity score NaN.

    Returns:
        (N,) float32.

    Source: Northcutt et al., JAIR 2021 (arXiv 1911.00068); 1 - cleanlab's self-confidence.
    """
    rows = Rows.of("self_confidence", "predictions", predictions)
    return rows.score(lambda s, y: 1.0 - s.own(y), rows.labels(labels), validate=validate)


def normalised_margin(
    predictions: Array | Sequence[Array], labels: Array, *, validate: bool = True
) -> Array:
    """(1 - q_y + max_{j != y} q_j) / 2, from 0 (surely y) to 1 (surely another class).

    Arguments and result as for :func:`self_confidence`.

    Source: Northcutt et al., JAIR 2021 (arXiv 1911.00068); 1 - cleanlab's normalized margin.
    """
    rows = Rows.of("normalised_margin", "predictions", predictions)
    return rows.score(margin_against, rows.labels(labels), validate=validate)


def margin_against(s: RowStatistics, y: Any) -> Any:
    """(n,) normalised margin of rows against the classes ``y``."""
    return (1.0 - s.own(y) + s.best_of_others(y)) / 2.0


def dsos(predictions: Array | Sequence[Array], labels: Array, *, validate: bool = True) -> Array:
    """Collision entropy of the interpolated label, -ln sum_i ((q_i + y_i) / 2)^2, y one-hot.

    About 0 for a confident prediction of the given label, ln 2 for one of another class, up to
    ln 4 - ln(1 + 3/k) for a uniform prediction: the rows that fit no class come last.

    Arguments and result as for :func:`self_confidence`.

    Source: Albert et al., DSOS, WACV 2022 (arXiv 2110.13699).
    """
    rows = Rows.of("dsos", "predictions", predictions)
    xp = rows.xp

    def formula(s: RowStatistics, y: Any) -> Any:  # the square of the sum, taken apart
        return math.log(4.0) - xp.log(s.squares + 2.0 * s.own(y) + 1.0)

    return rows.score(formula, rows.labels(labels), validate=validate)


def dsos_split(
    predictions: Array | Sequence[Array],
    labels: Array,
    *,
    confidence: float = 0.5,
    iterations: int = 100,
    validate: bool = True,
) -> NoiseSplit:
    """Clean, in-distribution and out-of-distribution rows as DSOS tells them apart.

    A row is clean when its :func:`dsos` score is below ln 2. The scores of the others are scaled
    to [0, 1] and a mixture of two beta distributions is fitted to them; a noisy row is
    in-distribution when its posterior of the component with the lower mean is at least
    ``confidence``, and out-of-distribution otherwise. Without two different scores to fit, noisy
    rows are in-distribution if their score is below the middle of ln 2, that of a sure wrong label,
    and ln 4 - ln(1 + 3/k), that of a uniform prediction. Deterministic.

    The split is meant for k >= 4. With 3 classes a uniform prediction scores ln 2 itself and lies
    on the border of clean rows, with 2 it scores less and counts as clean. There a lone noisy
    score is in-distribution.

    Args:
        predictions, labels, validate: as for :func:`self_confidence`; k >= 4 is of use.
        confidence: the published program relabels what is above 0.9, and softens the label of
            the rest by its posterior of the other component.
        iterations: at most so many of expectation-maximization.

    Source: Albert et al., DSOS, WACV 2022 (arXiv 2110.13699). The published program takes the
    scaled score for the posterior where the mode of a component leaves [-0.1, 1.1]. Here it is
    the posterior always, and a score beyond the mean of a component counts as the mean: at the
    ends of the scale the wider component would win again.
    """
    require_number("dsos_split", "confidence", confidence, 0.0, 1.0)
    require_integer("dsos_split", "iterations", iterations, 1)
    scores = dsos(predictions, labels, validate=validate)
    values = host(scores).astype(np.float64)
    noisy = np.flatnonzero(values >= math.log(2.0))
    inside = np.zeros(len(values), dtype=bool)
    if noisy.size:
        low, high = values[noisy].min(), values[noisy].max()
        if low < high:
            scaled = (values[noisy] - low) / (high - low)
            inside[noisy] = _lower_component(scaled, iterations) >= confidence
        else:
            classes = Rows.of("dsos_split", "predictions", predictions).classes
            undecided = math.log(4.0) - math.log1p(3.0 / classes)
            inside[noisy] = classes < 4 or low < (math.log(2.0) + undecided) / 2
    outside = np.zeros_like(inside)
    outside[noisy] = ~inside[noisy]
    return NoiseSplit(
        clean=as_kind(scores, values < math.log(2.0)),
        in_distribution=as_kind(scores, inside),
        out_of_distribution=as_kind(scores, outside),
        score=scores,
    )


def jo_src(
    predictions: Array | Sequence[Array],
    labels: Array,
    *,
    smoothing: float = 0.0,
    validate: bool = True,
) -> Array:
    """Jensen-Shannon divergence of prediction q and label y in bits, from 0 to 1.

    JS = sum_i [q_i log2(q_i / m_i) + y_i log2(y_i / m_i)] / 2 with m = (q + y) / 2, where y is
    1 - smoothing at the given label and smoothing / (k - 1) elsewhere. Without smoothing it is a
    function of q_y alone, and orders rows as :func:`self_confidence` does.

    Args:
        predictions, labels, validate: as for :func:`self_confidence`.
        smoothing: from 0 to 1. The published program has 0.6 (CIFAR-100), 0.7 (Clothing1M),
            0.65 (Food-101N).

    Returns:
        (N,) float32.

    Source: Yao et al., Jo-SRC, CVPR 2021 (arXiv 2103.13029): 1 - JS is the likelihood of being
    clean.
    """
    rows = Rows.of("jo_src", "predictions", predictions)
    require_number("jo_src", "smoothing", smoothing, 0.0, 1.0)
    y = rows.labels(labels)
    if smoothing == 0.0:
        return rows.score(functools.partial(_one_hot_divergence, rows.xp), y, validate=validate)
    xp, rest = rows.xp, smoothing / (rows.classes - 1)

    def formula(models: list[Any], y: Any, _: RowStatistics) -> Any:
        q = rows.averaged(models)
        label = xp.full_like(q, rest)
        label[xp.arange(len(q)), y] = 1.0 - smoothing
        middle = (q + label) / 2.0
        bits = _plogp(xp, q, middle) + _plogp(xp, label, middle)
        return (bits / (2.0 * math.log(2.0))).clip(0.0)

    return rows.score_members(formula, y, validate=validate)


def jo_src_split(
    first: Array | Sequence[Array],
    second: Array | Sequence[Array],
    labels: Array,
    *,
    tau_clean: float = 0.75,
    smoothing: float = 0.0,
    validate: bool = True,
) -> NoiseSplit:
    """Clean, in-distribution and out-of-distribution rows as Jo-SRC tells them apart.

    A row is clean when 1 - :func:`jo_src` of the first view is at least ``tau_clean``. Of the
    others, those whose two views have the same most probable class (ties: the lowest) are
    in-distribution, those whose views disagree out-of-distribution.

    Args:
        first, second: (N, k) probabilities of two views of the images (two augmentations, or two
            models), each of them one array or a sequence that is averaged.
        labels, smoothing, validate: as for :func:`jo_src`.
        tau_clean: from 0 to 1. The published program raises it while training, from 0 to
            ``tau_clean`` in the warm-up (0.75 for CIFAR-100 and Food-101N, 0.9 for Clothing1M,
            each with its own smoothing) and on to 0.95.

    Source: Yao et al., Jo-SRC, CVPR 2021 (arXiv 2103.13029).
    """
    require_number("jo_src_split", "tau_clean", tau_clean, 0.0, 1.0)
    views = {"first": first, "second": second}
    tops = []
    for name, view in views.items():
        rows = Rows.of("jo_src_split", name, view)
        tops.append(host(rows.score(lambda s: s.top_class, validate=validate)))
    if len(tops[0]) != len(tops[1]):
        raise ValueError(
            f"jo_src_split: second must have {len(tops[0])} rows like first, got {len(tops[1])}"
        )
    scores = jo_src(first, labels, smoothing=smoothing, validate=validate)
    values = host(scores).astype(np.float64)
    known = ~np.isnan(values) & ~np.isnan(tops[1])
    clean = known & (1.0 - values >= tau_clean)
    agree = tops[0] == tops[1]
    return NoiseSplit(
        clean=as_kind(scores, clean),
        in_distribution=as_kind(scores, known & ~clean & agree),
        out_of_distribution=as_kind(scores, known & ~clean & ~agree),
        score=scores,
    )


def _one_hot_divergence(xp: Any, s: RowStatistics, y: Any) -> Any:
    """(n,) Jensen-Shannon divergence in bits of q and a one-hot label: off the label m = q / 2."""
    own = s.own(y)
    bits = own * xp.log2(xp.where(own == 0, 1.0, own)) - (1.0 + own) * xp.log2(1.0 + own)
    return ((s.total + 1.0 + bits) / 2.0).clip(0.0)


def _plogp(xp: Any, p: Any, m: Any) -> Any:
    """(n,) sum_i p_i ln(p_i / m_i), in nats, 0 where p_i is 0."""
    return (p * xp.log(xp.where(p == 0, 1.0, p / m))).sum(1)


def _lower_component(x: np.ndarray, iterations: int) -> np.ndarray:
    """Posterior of the component with the lower mean, of a mixture of two beta distributions
    fitted to ``x`` in [0, 1]: expectation-maximization with the method of moments for its second
    step, starting from beta(1, 3) and beta(2, 2) in equal parts."""
    x = x.clip(1e-4, 1.0 - 1e-4)  # a beta density may be infinite at 0 and 1
    components = [(0.5, 1.0, 3.0), (0.5, 2.0, 2.0)]  # weight, a, b
    for _ in range(iterations):
        first = _posterior(x, components)
        before = components
        components = [_beta_of_moments(x, r) for r in (first, 1.0 - first)]
        if np.allclose(before, components, rtol=1e-9, atol=0.0):
            break
    components.sort(key=_mean)
    # Beyond the means the wider component would win again, at both ends.
    return _posterior(x.clip(_mean(components[0]), _mean(components[1])), components)


def _posterior(x: np.ndarray, components: list[tuple[float, float, float]]) -> np.ndarray:
    """Of the first of two beta components."""
    from scipy.special import betaln, expit

    log_x, log_rest = np.log(x), np.log1p(-x)
    first, second = (
        math.log(weight) + (a - 1.0) * log_x + (b - 1.0) * log_rest - betaln(a, b)
        for weight, a, b in components
    )
    return expit(first - second)


def _mean(component: tuple[float, float, float]) -> float:
    _, a, b = component
    return a / (a + b)


def _beta_of_moments(x: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Share, a and b of the beta distribution with the weighted mean and variance of ``x``. The
    bounds only matter where a component has lost all its rows, or stands on a single value."""
    total = max(float(weights.sum()), 1e-9)
    mean = min(max(float(weights @ x) / total, 1e-6), 1.0 - 1e-6)
    variance = max(float(weights @ (x - mean) ** 2) / total, 1e-9)
    spread = max(mean * (1.0 - mean) / variance - 1.0, 1e-6)
    return total / len(x), mean * spread, (1.0 - mean) * spread
