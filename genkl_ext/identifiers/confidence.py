"""How undecided a prediction is: scores of a row of predictions, or of logits, alone.

All logarithms are natural. A larger score means more non-conforming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..rule import GenKL
from .inputs import Rows, require_number
from .row_statistics import RowStatistics

if TYPE_CHECKING:
    from ..rule import Array

FLOOR = 2.0**-126  # the smallest normal float32: what a float32 softmax of 0 may stand for


def genkl(
    predictions: Array | Sequence[Array], *, rule: GenKL | None = None, validate: bool = True
) -> Array:
    """GenKL's critical alpha: the row is NC exactly for every alpha up to it.

    max_j sum_{i: q_i >= tau} u_ji log2(1/q_i) / H(u_j), with the uniform-like vectors u_j of the
    rule; see ``GenKL.score``, which this calls.

    Args:
        predictions: (N, k) probabilities, or a sequence of M of them, averaged in float32.
        rule: gives tau and the vectors; its alpha does not matter here.
        validate: raise for the first invalid row; otherwise a row with NaN scores NaN.

    Returns:
        (N,) float32.

    Source: Huang and Chong, GenKL, IJCV 2023 (arXiv 2307.09810).
    """
    if not isinstance(rule, GenKL):
        raise TypeError(
            f"genkl: rule must be a GenKL, such as GenKL.preset('clothing1m'), got {rule!r}"
        )
    scores = rule.score(predictions, validate=validate)
    return scores.check().critical_alpha


def entropy(predictions: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """Normalised entropy, -sum_i q_i ln q_i / ln k, from 0 (one-hot) to 1 (uniform).

    Args:
        predictions: (N, k) probabilities, or a sequence of M of them, averaged in float32.
        validate: raise for the first invalid row; otherwise rows with NaN or infinity score NaN.

    Returns:
        (N,) float32.

    Source: Shannon 1948; the "entropy maximization" that GenKL is compared with.
    """
    rows = Rows.of("entropy", "predictions", predictions)
    scale = -1.0 / math.log(rows.classes)
    return rows.score(lambda s: scale * s.plogp, entropy=True, validate=validate)


def max_softmax(predictions: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """1 - max_i q_i, from 0 to 1 - 1/k.

    Arguments and result as for :func:`entropy`.

    Source: Hendrycks and Gimpel, ICLR 2017 (arXiv 1610.02136), maximum softmax probability.
    """
    rows = Rows.of("max_softmax", "predictions", predictions)
    return rows.score(lambda s: 1.0 - s.top, validate=validate)


def margin(predictions: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """1 - (largest - second largest entry), from 0 (one-hot) to 1 (two classes tie).

    Arguments and result as for :func:`entropy`.

    Source: Scheffer et al., IDA 2001, margin sampling.
    """
    rows = Rows.of("margin", "predictions", predictions)
    return rows.score(lambda s: 1.0 - (s.top - s.second), validate=validate)


def collision_entropy(predictions: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """Collision entropy (Renyi entropy of order 2), -ln sum_i q_i^2, from 0 to ln k.

    Arguments and result as for :func:`entropy`. DSOS takes it of the mean of prediction and
    label: see :func:`~genkl_ext.identifiers.dsos`.

    Source: Renyi 1961; used by Albert et al., WACV 2022 (arXiv 2110.13699).
    """
    rows = Rows.of("collision_entropy", "predictions", predictions)
    xp = rows.xp
    return rows.score(lambda s: -xp.log(s.squares), validate=validate)


def kl_uniform(
    predictions: Array | Sequence[Array], *, floor: float = FLOOR, validate: bool = True
) -> Array:
    """-KL(uniform || q) = ln k + sum_i ln(max(q_i, floor)) / k, from below 0 to 0 (uniform).

    A conforming row is far from uniform, so the divergence is negated. The smallest entries
    decide it, where entropy hardly sees them.

    Args:
        predictions: (N, k) probabilities, or a sequence of M of them, averaged in float32.
        floor: entries below it count as it, among them 0, whose logarithm is not finite. The
            default is the smallest normal float32. Float16 rounds all below 3e-8 to 0: give such
            predictions a floor of that size, or every 0 weighs as much as one of 1e-38.
        validate: raise for the first invalid row; otherwise rows with NaN or infinity score NaN.

    Returns:
        (N,) float32.

    Source: Kullback and Leibler 1951; Lee et al., ICLR 2018 (arXiv 1711.09325) train with it.
    """
    require_number("kl_uniform", "floor", floor, 2.0**-1022, 1.0)
    rows = Rows.of("kl_uniform", "predictions", predictions)
    k = rows.classes
    return rows.score(lambda s: math.log(k) + s.logs / k, floor=floor, validate=validate)


def energy(
    logits: Array | Sequence[Array], *, temperature: float = 1.0, validate: bool = True
) -> Array:
    """Free energy -T ln sum_i exp(z_i / T) of logits z.

    Args:
        logits: (N, k), any finite numbers; or a sequence of M of them, averaged in float32.
        temperature: T, above 0.
        validate: raise for the first row that is not finite; otherwise it scores NaN.

    Returns:
        (N,) float32.

    Source: Liu et al., NeurIPS 2020 (arXiv 2010.03759), equation 4.
    """
    t = require_number("energy", "temperature", temperature, 1e-6, 1e6)
    rows = Rows.of("energy", "logits", logits)
    xp = rows.xp

    def formula(models: list[Any], _: Any, s: RowStatistics) -> Any:
        z = rows.averaged(models)
        return -(s.top + t * xp.log(xp.exp((z - s.top[:, None]) / t).sum(1)))

    return rows.score_members(formula, validate=validate)


def max_logit(logits: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """-max_i z_i of logits z.

    Arguments and result as for :func:`energy`.

    Source: Hendrycks et al., ICML 2022 (arXiv 1911.11132).
    """
    rows = Rows.of("max_logit", "logits", logits)
    return rows.score(lambda s: -s.top, validate=validate)
