"""How well identifiers find what they are to find: ``evaluate``, and the measures it consists of.

    truth = np.isin(kinds, ["ambiguous", "other"])
    found = evaluate({"GenKL": scores.critical_alpha, "entropy": entropy}, truth,
                     decisions={"GenKL": scores.nc}, groups=labels)
    print(found.table()); found.overall["entropy"].metrics["auroc"].low; found.to_json()

    listed = read_verified("NC_instances.txt", manifest)        # only some positives are known
    evaluate({"GenKL": scores.critical_alpha}, verified=listed)

Rows are flagged from the largest score down. Rows with equal scores are flagged in random order,
and what is reported is the expected value over these orders. A row whose score is NaN, such as a
broken image, is never flagged: it is missed if it is positive, and below all others for the AUROC.

With TP and FP the positives and negatives among the rows flagged, P and Q those among all N:

    flagged share     (TP + FP) / N
    recall            TP / P, the true-positive rate
    false positives   FP / Q, the false-positive rate
    precision         TP / (TP + FP)
    F1                2 TP / (TP + FP + P)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .rule import num_threads

if TYPE_CHECKING:
    from .data import Manifest

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
FALSE_POSITIVES = 0.05

_CELLS = 1 << 20  # draws times rows at one time: they stay in the cache
_STRIPE = 1 << 13  # rows that are drawn from at a time, for the same reason
_CURVE_POINTS = 384  # at most
_ROUNDING = 8 * np.finfo(np.float64).eps  # relative, of a share that was computed
_CLASSES_SHOWN, _IDENTIFIERS_SHOWN = 30, 6  # in the table of classes, which may have hundreds

_Table = tuple[str, list[str], list[list[str]]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A share, or a difference of two, with its bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well one identifier does among all rows, or among those of one class.

    ``metrics`` are, by name: ``auroc``, ``average_precision``, ``recall_at_5_fpr`` (full truth
    only), ``area``, ``recall_at_1_flagged`` ... (the numbers are those asked for, in per cent), and
    for an identifier with decisions ``flagged``, ``recall``, ``precision``, ``f1`` (the last two
    with full truth only). For a class, those at a share of the rows are left out.
    """

    rows: int
    positives: int
    unscored: int  #: rows whose score is NaN
    metrics: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]  #: less those of the first identifier; empty for itself


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is found as more rows are flagged: each number at the same, at most 384, thresholds."""

    flagged: tuple[float, ...]  #: share of the rows, ascending from 0
    recall: tuple[float, ...]
    false_positives: tuple[float, ...]  #: share of the negatives; empty if only positives are known
    precision: tuple[float, ...]  #: begins with that of the first threshold; empty as above


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`: plain numbers. The first identifier is the one the others
    are compared with."""

    rows: int  #: evaluated
    positives: int
    unknown: int  #: rows that were left out: nobody knows what they are
    positives_only: bool
    draws: int
    seed: int
    level: float  #: of the intervals
    shares: tuple[float, ...]
    false_positives: float
    overall: Mapping[str, Quality]  #: by identifier
    classes: Mapping[str, Mapping[str, Quality]]  #: by class, then by identifier
    curves: Mapping[str, Curve]  #: by identifier

    def table(self) -> str:
        """Tables for a screen: all numbers in %, the interval under each value."""
        return "\n\n".join([self._heading(), *(_grid(*table) for table in self._tables())])

    def to_json(self) -> str:
        """Everything as JSON text; what is undefined is ``null``."""
        facts = _without_nan(dataclasses.asdict(self))
        return json.dumps(facts, indent=1, allow_nan=False) + "\n"

    def _heading(self) -> str:
        what = "known to be positive" if self.positives_only else "positive"
        share = 100 * self.positives / self.rows
        lines = [f"{self.rows:,} rows, {self.positives:,} ({share:.3g} %) {what}"]
        if self.unknown:
            lines.append(f"{self.unknown:,} rows of which nothing is known are left out")
        for name, quality in self.overall.items():
            if quality.unscored:
                lines.append(f"{quality.unscored:,} rows have no score of {name}: never flagged")
        if self.draws:
            lines.append(
                f"in %, with {100 * self.level:g} % intervals from {self.draws:,} bootstrap draws"
            )
        return "\n".join(lines)

    def _tables(self) -> Iterable[_Table]:
        """Title, header and rows of each table."""
        main = at_shares = [*map(_share_name, self.shares), "area"]
        one = "area"
        if not self.positives_only:
            main = ["auroc", "average_precision", _fpr_name(self.false_positives)]
            one = "auroc"
            yield self._of("All thresholds", main, self.overall)
        yield self._of("Recall at a flagged share", at_shares, self.overall)
        own = {name: q for name, q in self.overall.items() if "flagged" in q.metrics}
        if own:
            names = ["flagged", "recall", "precision", "f1"][: 2 if self.positives_only else 4]
            yield self._of("At its own threshold", names, own)
        first, *others = self.overall
        if others:
            header = [f"less {first}", *map(self._title, main)]
            rows = [
                [name, *(_cell(self.overall[name].differences[metric], "+") for metric in main)]
                for name in others
            ]
            yield "Differences, in percentage points", header, rows
        by_size = sorted(self.classes, key=lambda c: -self.classes[c][first].positives)
        shown = [c for c in by_size[:_CLASSES_SHOWN] if self.classes[c][first].positives]
        if shown:
            columns = list(self.overall)[:_IDENTIFIERS_SHOWN]
            rows = [
                [name, f"{of[first].rows:,}", f"{of[first].positives:,}"]
                + [_cell(of[column].metrics[one]) for column in columns]
                for name, of in self.classes.items()
                if name in shown
            ]
            title = f"Within each class: {self._title(one)}"
            some = [
                f"{part} of {whole} {what}"
                for part, whole, what in (
                    (len(shown), len(self.classes), "classes"),
                    (len(columns), len(self.overall), "identifiers"),
                )
                if part < whole
            ]
            title += f" ({', '.join(some)})" if some else ""
            yield title, ["given label", "rows", "positive", *columns], rows

    def _of(self, title: str, metrics: list[str], qualities: Mapping[str, Quality]) -> _Table:
        """A table with a row for each identifier and a column for each metric."""
        rows = [
            [name, *(_cell(quality.metrics[metric]) for metric in metrics)]
            for name, quality in qualities.items()
        ]
        return title, ["identifier", *map(self._title, metrics)], rows

    def _title(self, metric: str) -> str:
        titles = {
            "auroc": "AUROC",
            "average_precision": "average precision",
            "area": "area under recall",
            "f1": "F1",
            _fpr_name(self.false_positives): (
                f"recall at {100 * self.false_positives:g} % false pos."
            ),
            **{_share_name(share): f"at {100 * share:g} %" for share in self.shares},
        }
        return titles.get(metric, metric)


def evaluate(
    scores: Mapping[str, ArrayLike],
    truth: ArrayLike | None = None,
    *,
    verified: ArrayLike | None = None,
    decisions: Mapping[str, ArrayLike] | None = None,
    groups: ArrayLike | None = None,
    group_names: Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    false_positives: float = FALSE_POSITIVES,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare identifiers with the truth, and with each other.

    Intervals are percentiles of a bootstrap: each draw takes as many rows as there are, with
    replacement, and evaluates every identifier on the same rows, so that differences are paired.
    Classes are parts of the same draws. A draw that leaves a metric undefined, such as one without
    positives, does not count for it. What draw d takes depends on the seed, d and the number of
    rows only: adding an identifier or more draws changes no other number, nor do threads.

    Args:
        scores: name -> (N,) scores, larger means more likely positive; NaN: never flagged. NumPy
            arrays or tensors. The others are compared with the first.
        truth: (N,) bool, or integers: 1 positive, 0 negative, -1 unknown, which is left out.
        verified: instead of ``truth``, where only some positives are known: their row numbers, or
            an (N,) bool mask. Nothing is said of the other rows, so there are no false positives.
        decisions: name -> (N,) bool, what an identifier flags by its own rule.
        groups: (N,) integers, the given labels: each class is evaluated by itself, too. Rows with
            -1 are in no class.
        group_names: names of the classes 0, 1, ...; by default their numbers. A name that several
            classes have, as two of ImageNet's, is followed by the number: "crane (134)".
        shares: flagged shares of all rows at which recall is reported.
        false_positives: share of the negatives at which recall is reported.
        draws: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
        level: of the intervals.
        progress: called with (draws done, draws).

    Raises:
        TypeError, ValueError: an argument of another shape or kind; nothing to be found, or with
            ``truth`` nothing else.
    """
    named = {name: _scores(f"scores[{name!r}]", column) for name, column in scores.items()}
    if not named:
        raise ValueError("evaluate: scores must name at least one identifier, got none")
    rows = len(next(iter(named.values())))
    for name, column in named.items():
        if len(column) != rows:
            raise ValueError(
                f"evaluate: scores must have one length, got {len(column)} for {name!r} and "
                f"{rows} for {next(iter(named))!r}"
            )
    if (truth is None) == (verified is None):
        raise ValueError("evaluate: either truth or verified must be given, and not both")
    kind = _truth(truth, rows) if verified is None else _verified(verified, rows)
    flagged = _decisions(decisions or {}, named, rows)
    labels = None if groups is None else _labels(groups, rows, group_names)
    class_names = None if group_names is None else _told_apart(group_names)
    _require_shares("shares", shares)
    _require_shares("false_positives", [false_positives])
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
        raise ValueError(f"evaluate: draws must be an integer of at least 0, got {draws!r}")
    if not 0 < level < 1:
        raise ValueError(f"evaluate: level must be between 0 and 1, got {level}")

    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"evaluate: seed must be an integer of at least 0, got {seed!r}")

    known = np.flatnonzero(kind >= 0)
    positive = kind[known] == 1
    if not positive.any() or (verified is None and positive.all()):
        wanted = "verified must name a row" if truth is None else "truth must have both 0 and 1"
        raise ValueError(f"evaluate: {wanted}, got {positive.sum()} of {len(known)} rows positive")
    named = {name: column[known] for name, column in named.items()}
    flagged = {name: column[known] for name, column in flagged.items()}
    parts: dict[str | None, NDArray[np.intp]] = {None: np.arange(len(known))}
    if labels is not None:
        for c in np.unique(labels[known]):
            if c >= 0:
                group = str(c) if class_names is None else class_names[c]
                parts[group] = np.flatnonzero(labels[known] == c)
    jobs = {
        (group, name): _Job(
            _Ranking(column[part], positive[part], part),
            _flagged_rows(flagged.get(name), positive, part),
            full=verified is None,
            shares=tuple(shares) if group is None else (),
            false_positives=false_positives if group is None else None,
        )
        for group, part in parts.items()
        for name, column in named.items()
    }
    values = {job: jobs[job].measure(np.ones((1, len(known)), np.uint8)) for job in jobs}
    samples = {job: {metric: np.empty(draws, np.float32) for metric in values[job]} for job in jobs}
    _bootstrap(jobs, len(known), seed, samples, draws, progress)

    first = next(iter(named))
    qualities: dict[str | None, dict[str, Quality]] = {group: {} for group in parts}
    for (group, name), job in jobs.items():
        differences = {}
        if name != first:
            reference = group, first
            differences = {
                metric: _estimate(
                    float(values[group, name][metric][0] - values[reference][metric][0]),
                    samples[group, name][metric] - samples[reference][metric],
                    level,
                )
                for metric in values[group, name]
                if metric in values[reference]
            }
        qualities[group][name] = Quality(
            rows=len(parts[group]),
            positives=job.ranking.positives,
            unscored=job.ranking.unscored,
            metrics={
                metric: _estimate(float(value[0]), samples[group, name][metric], level)
                for metric, value in values[group, name].items()
            },
            differences=differences,
        )
    return Evaluation(
        rows=len(known),
        positives=int(positive.sum()),
        unknown=rows - len(known),
        positives_only=verified is not None,
        draws=draws,
        seed=seed,
        level=level,
        shares=tuple(shares),
        false_positives=false_positives,
        overall=qualities[None],
        classes={group: of for group, of in qualities.items() if group is not None},
        curves={name: jobs[None, name].ranking.curve(verified is None) for name in named},
    )


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Area under the ROC curve: the share of the P Q pairs of a positive and a negative in which
    the positive has the larger score; pairs with equal scores count half.

    Args:
        scores: (N,), larger means more likely positive; NaN: below all others.
        truth: (N,) bool.

    Returns:
        From 0 to 1; NaN without a positive or without a negative.
    """
    ranking, tally = _ranked(scores, truth)
    return float(ranking.auroc(tally)[0])


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float:
    """Sum over thresholds n of (recall_n - recall_(n-1)) precision_n, without interpolation.

    Rows with equal scores are one threshold. Arguments as in :func:`auroc`; NaN without positives.
    """
    ranking, tally = _ranked(scores, truth)
    return float(ranking.average_precision(tally)[0])


def recall_at_false_positives(
    scores: ArrayLike, truth: ArrayLike, rate: float = FALSE_POSITIVES
) -> float:
    """The largest recall on the ROC curve with a false-positive rate of at most ``rate``.

    Between thresholds, which are steps unless scores are equal, the curve is a straight line.
    Arguments as in :func:`auroc`; NaN without a positive or without a negative.
    """
    _require_shares("rate", [rate])
    ranking, tally = _ranked(scores, truth)
    return float(ranking.recall_at_false_positives(tally, rate)[0])


def recall_at_flagged(scores: ArrayLike, truth: ArrayLike, share: float) -> float:
    """Expected recall when ``share`` of the N rows are flagged, those with the largest scores.

    Of the rows with the score at which the share is reached, a random part is flagged. Needs no
    complete truth: rows that are not known to be positive are just rows. Arguments as in
    :func:`auroc`; NaN without positives.
    """
    _require_shares("share", [share])
    ranking, tally = _ranked(scores, truth)
    return float(ranking.recall_at_flagged(tally, (share,))[0, 0])


def area_under_recall(scores: ArrayLike, truth: ArrayLike) -> float:
    """Area under recall as a function of the flagged share, from 0 to 1.

    0.5 for random scores, 1 - P / (2 N) at most; with pi = P / N and all rows scored it is
    (1 - pi) AUROC + pi / 2. Arguments as in :func:`auroc`; NaN without positives.
    """
    ranking, tally = _ranked(scores, truth)
    return float(ranking.area(tally)[0])


def read_verified(path: str | os.PathLike[str], manifest: Manifest) -> NDArray[np.bool_]:
    """Which noisy rows a list of verified keys names, such as ``NC_instances.txt``.

    Keys are compared as :func:`genkl_ext.data.published.read_row_list` does: "images/" before a
    key and CR LF do not matter. A key that is listed twice counts once, with a warning.

    Returns:
        (N,) bool, one for each row of ``manifest.split("train")``.

    Raises:
        ValueError: a line is no key of these rows; with the line. OSError: it cannot be read.
    """
    from .data.layouts.clothing1m import KEY_PREFIX
    from .data.manifest import without_prefix
    from .data.published import read_row_list
    from .scoring.keys import read_nc_list

    keys = read_nc_list(path)
    try:
        listed = read_row_list(path, manifest)
    except KeyError as error:
        where = ""
        if manifest.dataset not in ("food101n", "webvision"):  # there a line is more than its key
            found = manifest.lookup(keys, split="train", prefix=KEY_PREFIX, missing="null")
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
            first = [line.removesuffix("\r") for line in lines].index(keys[found.argmin()])
            where = f" in line {first + 1}"
        raise ValueError(f"{error.args[0]}{where}") from error
    named = manifest.split("train").table["key"].filter(np.asarray(listed))
    repeated = len(keys) - len(without_prefix(named, KEY_PREFIX).unique())
    if repeated:
        warnings.warn(
            f"{os.fspath(path)}: {repeated} keys are listed more than once, and count once",
            stacklevel=2,
        )
    return listed


@dataclasses.dataclass(frozen=True)
class _Tally:
    """Positives and negatives among the first rows of a ranking, in each of B draws."""

    found: NDArray[np.int32]  #: (B, P + 1), positives drawn among the first 0 ... P positives
    false: NDArray[np.int32]  #: (B, Q + 1), negatives drawn among the first 0 ... Q negatives
    around: list[NDArray[np.float64]] = dataclasses.field(default_factory=list)  # once it is known

    @property
    def positives(self) -> NDArray[np.float64]:
        """(B,)"""
        return self.found[:, -1].astype(np.float64)

    @property
    def negatives(self) -> NDArray[np.float64]:
        """(B,)"""
        return self.false[:, -1].astype(np.float64)


class _Ranking:
    """Rows sorted by score, the largest first, positives and negatives apart.

    Level g ends after the g-th different score. Sorted once, a bootstrap draw is only how often
    it took each row; nothing is sorted again.
    """

    def __init__(
        self, scores: NDArray[Any], positive: NDArray[np.bool_], rows: NDArray[np.intp]
    ) -> None:
        """``rows``: where the counts of these rows are among those of all."""
        order = np.argsort(-scores, kind="stable")  # NaN comes last
        hit = positive[order]
        self.unscored = int(np.isnan(scores).sum())
        ordered = scores[order][: len(order) - self.unscored]
        changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        ends = np.unique([0, *changes, len(ordered)])
        self.levels = len(ends) - 1
        if self.unscored:  # one more level, which is never flagged
            ends = np.append(ends, len(order))
        # Level g begins after found_at[g] positives and false_at[g] negatives.
        self.found_at = np.append(0, np.cumsum(hit))[ends]
        self.false_at = ends - self.found_at
        self.with_positives = np.flatnonzero(np.diff(self.found_at))
        # Of the levels that have positives: positives through it, negatives above and through it.
        edges = self.with_positives, self.with_positives + 1
        self._around_at = [self.found_at[edges[1]], *(self.false_at[edge] for edge in edges)]
        self._found_rows, self._false_rows = rows[order[hit]], rows[order[~hit]]

    @property
    def positives(self) -> int:
        return len(self._found_rows)

    def tally(self, counts: NDArray[np.uint8]) -> _Tally:
        """``counts``: (B, all rows), how often each draw took each row."""
        return _Tally(_running(counts, self._found_rows), _running(counts, self._false_rows))

    def auroc(self, tally: _Tally) -> NDArray[np.float64]:
        hits, _, above, through = self._around_positives(tally)
        below = tally.negatives[:, None] - (above + through) / 2  # of a tie, half
        pairs = np.einsum("ij,ij->i", hits, below)
        return _ratio(pairs, tally.positives * tally.negatives)

    def average_precision(self, tally: _Tally) -> NDArray[np.float64]:
        hits, found, _, through = self._around_positives(tally, scored_only=True)
        precision = found / np.maximum(found + through, 1)
        return _ratio(np.einsum("ij,ij->i", hits, precision), tally.positives)

    def area(self, tally: _Tally) -> NDArray[np.float64]:
        hits, found, above, through = self._around_positives(tally, scored_only=True)
        # A positive is found from its place on, which among equal scores is in the middle.
        total = tally.positives + tally.negatives
        after = total[:, None] - (found - hits / 2) - (above + through) / 2
        return _ratio(np.einsum("ij,ij->i", hits, after), tally.positives * total)

    def recall_at_flagged(self, tally: _Tally, shares: Sequence[float]) -> NDArray[np.float64]:
        """(B, number of shares)"""
        total = (tally.positives + tally.negatives)[:, None]

        def flagged(level: NDArray[np.intp]) -> NDArray[np.float64]:
            rows = self._upto(tally.found, self.found_at, level)
            return _ratio(rows + self._upto(tally.false, self.false_at, level), total)

        return self._recall_where(flagged, shares, tally)

    def recall_at_false_positives(self, tally: _Tally, rate: float) -> NDArray[np.float64]:
        def false(level: NDArray[np.intp]) -> NDArray[np.float64]:
            rows = self._upto(tally.false, self.false_at, level)
            return _ratio(rows, tally.negatives[:, None])

        return self._recall_where(false, (rate,), tally)[:, 0]

    def curve(self, full: bool) -> Curve:
        """At all levels, or at enough of them to draw it."""
        found, false = self.found_at[: self.levels + 1], self.false_at[: self.levels + 1]
        flagged = found + false
        wanted = np.arange(len(flagged))
        if len(wanted) > _CURVE_POINTS:
            steps = np.linspace(0, 1, _CURVE_POINTS // 3)
            # Evenly along both axes, and, as single rows matter at the beginning, closely there.
            evenly = (flagged, steps * flagged[-1]), (found, steps * found[-1])
            places = [*evenly, (flagged, np.append(0, flagged[-1] ** steps[1:]))]
            wanted = np.unique(np.concatenate([np.searchsorted(*place) for place in places]))
        tp, fp, positives, rows = found[wanted], false[wanted], self.found_at[-1], len(self)
        precision = _ratio(tp, tp + fp, undefined=0.0)
        precision[:1] = precision[1:2].sum()  # nothing is flagged: that of the first threshold
        return Curve(
            flagged=_plain((tp + fp) / rows),
            recall=_plain(tp / positives),
            false_positives=_plain(fp / (rows - positives)) if full else (),
            precision=_plain(precision) if full else (),
        )

    def __len__(self) -> int:
        return len(self._found_rows) + len(self._false_rows)

    def _around_positives(self, tally: _Tally, scored_only: bool = False) -> list[NDArray[Any]]:
        """Four (B, levels), of the levels that have positives: these, the positives through the
        level, and the negatives above and through it."""
        if not tally.around:
            found, above, through = (
                np.take(running, at, axis=1).astype(np.float64)
                for running, at in zip(
                    (tally.found, tally.false, tally.false), self._around_at, strict=True
                )
            )
            tally.around.extend([np.diff(found, axis=1, prepend=0.0), found, above, through])
        if scored_only and self.unscored:
            scored = int(np.searchsorted(self.with_positives, self.levels))
            return [column[:, :scored] for column in tally.around]
        return tally.around

    def _recall_where(
        self,
        measure: Callable[[NDArray[np.intp]], NDArray[np.float64]],
        limits: Sequence[float],
        tally: _Tally,
    ) -> NDArray[np.float64]:
        """(B, limits): recall where ``measure``, which grows with the level, reaches each limit;
        the largest one if it stays there for a while. Linear within a level."""
        wanted = np.asarray(limits, np.float64)[None, :]
        # 0.7 / 100 is less than 7 / 1000 by rounding, and means the same.
        reached = wanted * (1 + _ROUNDING)
        low = np.zeros((len(tally.found), len(limits)), np.intp)
        high = np.full_like(low, self.levels)
        while (low < high).any():
            middle = (low + high + 1) // 2
            within = measure(middle) <= reached
            low = np.where(within, middle, low)
            high = np.where(within, high, middle - 1)
        after = np.minimum(low + 1, self.levels)
        begin, end = measure(low), measure(after)
        part = _ratio((wanted - begin).clip(0), end - begin, undefined=0.0)
        found = self._upto(tally.found, self.found_at, low)
        more = self._upto(tally.found, self.found_at, after) - found
        return _ratio(found + part * more, tally.positives[:, None])

    @staticmethod
    def _upto(
        running: NDArray[np.int32], at: NDArray[np.intp], level: NDArray[np.intp]
    ) -> NDArray[np.int32]:
        """(B, limits): rows above the end of a level, another one for each draw and limit."""
        return np.take_along_axis(running, at[level], axis=1)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is to be measured of one identifier among some rows."""

    ranking: _Ranking
    flagged: tuple[NDArray[np.intp], NDArray[np.intp]] | None  # rows flagged: positives, negatives
    full: bool  # negatives are known, too
    shares: tuple[float, ...]
    false_positives: float | None

    def measure(self, counts: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
        """Name -> (B,) for B draws, which took each row so often: (B, all rows)."""
        ranking, tally = self.ranking, self.ranking.tally(counts)
        made = {}
        if self.full:
            made["auroc"] = ranking.auroc(tally)
            made["average_precision"] = ranking.average_precision(tally)
        if self.full and self.false_positives is not None:
            rate = self.false_positives
            made[_fpr_name(rate)] = ranking.recall_at_false_positives(tally, rate)
        made["area"] = ranking.area(tally)
        if self.shares:
            recalls = ranking.recall_at_flagged(tally, self.shares)
            made |= {_share_name(s): recalls[:, i] for i, s in enumerate(self.shares)}
        if self.flagged is not None:
            tp, fp = (counts[:, rows].sum(1, dtype=np.int64) for rows in self.flagged)
            made["flagged"] = _ratio(tp + fp, tally.positives + tally.negatives)
            made["recall"] = _ratio(tp, tally.positives)
            if self.full:
                made["precision"] = _ratio(tp, tp + fp)
                made["f1"] = _ratio(2 * tp, tp + fp + tally.positives)
        return made


def _flagged_rows(
    flagged: NDArray[np.bool_] | None, positive: NDArray[np.bool_], part: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """The positives and the negatives among the rows of a part that are flagged."""
    if flagged is None:
        return None
    rows = part[flagged[part]]
    return rows[positive[rows]], rows[~positive[rows]]


def _bootstrap(
    jobs: Mapping[Any, _Job],
    rows: int,
    seed: int,
    samples: Mapping[Any, Mapping[str, NDArray[np.float32]]],
    draws: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill in what each job measures in each draw: ``samples[job][metric]`` is (draws,)."""
    block = max(1, _CELLS // rows)

    def measure(start: int) -> int:
        stop = min(start + block, draws)
        counts = np.stack([_resample(rows, seed, draw) for draw in range(start, stop)])
        for name, job in jobs.items():
            for metric, values in job.measure(counts).items():
                samples[name][metric][start:stop] = values
        return stop

    pool = ThreadPoolExecutor(num_threads())
    try:
        for done in pool.map(measure, range(0, draws, block)):
            if progress is not None:
                progress(done, draws)
    finally:
        pool.shutdown(cancel_futures=True)


def _resample(rows: int, seed: int, draw: int) -> NDArray[np.uint8]:
    """(rows,) how often each row is taken when as many are drawn, with replacement.

    A count of 256 would be lost, and does not happen: its probability is below 1 / 256!.
    """
    stream = np.random.default_rng((seed, draw))
    counts = np.empty(rows, np.uint8)
    starts = np.arange(0, rows, _STRIPE)
    sizes = np.minimum(rows - starts, _STRIPE)
    # First how many fall into each stripe, then where in it: counting stays in the cache.
    for start, size, taken in zip(
        starts, sizes, stream.multinomial(rows, sizes / rows), strict=True
    ):
        places = stream.integers(0, size, taken, np.uint16)
        counts[start : start + size] = np.bincount(places, minlength=size)
    return counts


def _running(counts: NDArray[np.uint8], rows: NDArray[np.intp]) -> NDArray[np.int32]:
    """(B, n + 1): sums of the counts of the first 0 ... n of these rows."""
    sums = np.zeros((len(counts), len(rows) + 1), np.int32)
    np.cumsum(np.take(counts, rows, axis=1), axis=1, dtype=np.int32, out=sums[:, 1:])
    return sums


def _ratio(part: Any, whole: Any, undefined: float = np.nan) -> NDArray[np.float64]:
    """part / whole; ``undefined`` where the whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    result = np.full(part.shape, undefined, np.float64)
    return np.divide(part, whole, out=result, where=whole != 0)


def _estimate(value: float, sample: NDArray[np.float32], level: float) -> Estimate:
    """The value with percentiles of the draws in which it is defined."""
    sample = sample[~np.isnan(sample)]
    if math.isnan(value) or not len(sample):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _fpr_name(rate: float) -> str:
    return f"recall_at_{100 * rate:g}_fpr"


def _share_name(share: float) -> str:
    return f"recall_at_{100 * share:g}_flagged"


def _ranked(scores: ArrayLike, truth: ArrayLike) -> tuple[_Ranking, _Tally]:
    """A ranking, and the tally that has each row once."""
    column = _scores("scores", scores)
    kind = _truth(truth, len(column))
    if (kind < 0).any():
        raise ValueError(f"evaluate: truth must be 0 or 1, got -1 at row {np.argmin(kind)}")
    ranking = _Ranking(column, kind == 1, np.arange(len(column)))
    return ranking, ranking.tally(np.ones((1, len(column)), np.uint8))


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _scores(name: str, values: Any) -> NDArray[np.floating[Any]]:
    column = _array(values)
    if column.dtype.kind not in "fiub":
        raise TypeError(f"evaluate: {name} must be numbers, got {column.dtype}")
    if column.ndim != 1 or not len(column):
        raise ValueError(f"evaluate: {name} must have shape (N,), N > 0, got {column.shape}")
    return column if column.dtype.kind == "f" else column.astype(np.float64)


def _truth(values: Any, rows: int) -> NDArray[np.int8]:
    """(N,) 1, 0 or -1."""
    kind = _array(values)
    if kind.dtype.kind not in "iub":
        raise TypeError(f"evaluate: truth must be bool or integers, got {kind.dtype}")
    if kind.shape != (rows,):
        raise ValueError(f"evaluate: truth must have shape ({rows},), got {kind.shape}")
    wrong = ~np.isin(kind, (-1, 0, 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"evaluate: truth must be 1, 0 or -1, got {kind[row]} at row {row}")
    return kind.astype(np.int8)


def _verified(values: Any, rows: int) -> NDArray[np.int8]:
    """(N,) 1 for the rows named, else 0."""
    named = _array(values)
    if named.dtype == bool:
        if named.shape != (rows,):
            raise ValueError(f"evaluate: verified must have shape ({rows},), got {named.shape}")
        return named.astype(np.int8)
    if named.ndim != 1 or (named.size and named.dtype.kind not in "iu"):
        raise ValueError(
            "evaluate: verified must be a mask or (n,) row numbers, "
            f"got {named.shape} {named.dtype}"
        )
    outside = (named < 0) | (named >= rows)
    if outside.any():
        raise ValueError(
            f"evaluate: verified must be rows from 0 to {rows - 1}, got {named[outside][0]}"
        )
    kind = np.zeros(rows, np.int8)
    kind[named.astype(np.intp)] = 1
    return kind


def _decisions(
    decisions: Mapping[str, Any], scores: Mapping[str, Any], rows: int
) -> dict[str, NDArray[np.bool_]]:
    made = {}
    for name, values in decisions.items():
        if name not in scores:
            raise ValueError(
                f"evaluate: decisions must be of {', '.join(map(repr, scores))}, got {name!r}"
            )
        flagged = _array(values)
        if flagged.dtype != bool or flagged.shape != (rows,):
            raise ValueError(
                f"evaluate: decisions[{name!r}] must be ({rows},) bool, "
                f"got {flagged.shape} {flagged.dtype}"
            )
        made[name] = flagged
    return made


def _labels(groups: Any, rows: int, names: Sequence[str] | None) -> NDArray[np.integer[Any]]:
    labels = _array(groups)
    if labels.dtype.kind not in "iu" or labels.shape != (rows,):
        raise ValueError(
            f"evaluate: groups must be ({rows},) integers, got {labels.shape} {labels.dtype}"
        )
    if names is not None and labels.max() >= len(names):
        row = int(np.argmax(labels))
        raise ValueError(
            f"evaluate: groups must be below {len(names)}, the number of group_names, "
            f"got {labels[row]} at row {row}"
        )
    return labels


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names that are there more than once are followed by their class numbers."""
    made = [name if names.count(name) == 1 else f"{name} ({c})" for c, name in enumerate(names)]
    if len(set(made)) < len(made):  # one of them is the other's name and number
        raise ValueError("evaluate: group_names must differ from each other")
    return made


def _require_shares(name: str, shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"evaluate: {name} must be above 0 and at most 1, got {share}")


def _plain(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(values.tolist())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(estimate: Estimate, sign: str = "") -> str:
    """The value in %, over its interval."""
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (
        f"{round(100 * number, 1) + 0.0:{sign}.1f}"  # not -0.0
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return value if math.isnan(estimate.low) else f"{value}\n{low} to {high}"


def _grid(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A table as text: words at the left, numbers at the right, cells of one line or more."""
    titles = [
        header[0],
        *("\n".join(textwrap.wrap(name, 14, break_long_words=False)) for name in header[1:]),
    ]
    cells = [[cell.split("\n") for cell in row] for row in (titles, *rows)]
    widths = [max(len(line) for row in cells for line in row[c]) for c in range(len(header))]
    lines = [title]
    for row in cells:
        for i in range(max(map(len, row))):
            parts = [cell[i] if i < len(cell) else "" for cell in row]
            line = [parts[0].ljust(widths[0])]
            line += [part.rjust(width) for part, width in zip(parts[1:], widths[1:], strict=True)]
            lines.append("   ".join(line).rstrip())
    return "\n".join(lines)
