"""How much the M members of an ensemble disagree on a row; in nats, larger is more non-conforming.

Members are given as a sequence of M (N, k) arrays of probabilities, or as one (M, N, k) array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .inputs import Rows
from .row_statistics import RowStatistics

if TYPE_CHECKING:
    from ..rule import Array


def mutual_information(members: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """H(mean_m q_m) - mean_m H(q_m), from 0 (all members agree) to ln min(M, k).

    The part of the mean's entropy that is due to the members' disagreement. The mean is taken in
    float64.

    Args:
        members: at least two (N, k) arrays of probabilities, of one kind, shape and dtype.
        validate: raise for the first invalid row; otherwise rows with NaN or infinity score NaN.

    Returns:
        (N,) float32.

    Source: Houlsby et al. 2011 (arXiv 1112.5745), BALD; Lakshminarayanan et al., NeurIPS 2017.
    """
    rows = Rows.of("mutual_information", "members", members, least=2)

    def formula(models: list[Any], _: Any, __: RowStatistics) -> Any:
        exact = [rows.exact(model) for model in models]
        mean = sum(exact[1:], exact[0]) / len(exact)
        terms = [rows.statistics(q, entropy=True).plogp for q in exact]
        own = sum(terms[1:], terms[0]) / len(terms)
        return (own - rows.statistics(mean, entropy=True).plogp).clip(0.0)

    return rows.score_members(formula, validate=validate)


def vote_entropy(members: Array | Sequence[Array], *, validate: bool = True) -> Array:
    """-sum_c v_c ln v_c, v_c the share of the members whose most probable class is c.

    From 0 (all members agree) to ln min(M, k). A member's ties take the lowest class.

    Arguments and result as for :func:`mutual_information`.

    Source: Dagan and Engelson, ICML 1995.
    """
    rows = Rows.of("vote_entropy", "members", members, least=2)

    def formula(models: list[Any], _: Any, __: RowStatistics) -> Any:
        shares = rows.xp.zeros_like(rows.exact(models[0]))
        number = rows.xp.arange(len(shares))
        for model in models:
            top_class = rows.xp.asarray(rows.statistics(model).top_class, dtype=rows.xp.int64)
            shares[number, top_class] += 1.0 / len(models)
        return -rows.statistics(shares, entropy=True).plogp

    return rows.score_members(formula, validate=validate)
