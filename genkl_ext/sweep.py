"""What other alpha, beta, sigma, number of vectors or seed would flag: many rules in one read.

    rules = grid(GenKL.preset("clothing1m"), betas=[0.01, 0.03, 0.05], seeds=[0, 1, 2])
    found = sweep(["p0.npy", "p1.npy"], rules)
    found.shares                    # (R, A) share of NC rows of each rule at each alpha
    found.stability()               # Jaccard index of the NC sets of different seeds
    print(found.table())

A row is NC at every alpha up to its critical alpha, so one score answers for the whole alpha axis.
What else changes needs a score of its own; here the rows come by once, a chunk that fits in the
processor's cache at a time, and every rule scores the chunk before the next one is read.

Memory does not grow with the rows: of a chunk's critical alphas only counts are kept, exact at each
alpha of the grid. With the truth given, the critical alphas themselves are kept, 4 bytes for each
row and rule, because the area under the ROC curve needs their order.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _native
from .rule import GenKL, _check_models, _describe_bad_row, _is_tensor, num_threads
from .scoring.chunks import empty_rows
from .scoring.sources import Source, open_models

if TYPE_CHECKING:
    from .rule import Array

    PathLike = str | os.PathLike[str]
    Inputs = Array | PathLike | Sequence[Array] | Sequence[PathLike]
Progress = Callable[[int, int], None]

CHUNK_BYTES = 1 << 21  # of predictions; with what they are scored to, it stays in the cache
_DEVICE_CHUNK_BYTES = 1 << 28  # a GPU wants more rows at a time, and its memory is fast anyway
ALPHAS = tuple(i / 100 for i in range(201))
QUALITIES = ("f1", "precision", "recall", "balanced_accuracy")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How many rows each of R rules flags at each of A alphas.

    A row counts as NC by its stored critical alpha: exact at the rule's own alpha, elsewhere within
    ``rule.resolution``, as :meth:`Scores.at`.
    """

    rules: tuple[GenKL, ...]
    alphas: NDArray[np.float64]  #: (A,) ascending; the rules' own are among them
    rows: int  #: rows that were scored
    left_out: int  #: rows of nothing but NaN, which have no prediction
    nc_counts: NDArray[np.int64]  #: (R, A) NC rows
    #: (rule, rule) -> (A,) rows that both call NC; of rules that differ in nothing but the seed
    both_counts: dict[tuple[int, int], NDArray[np.int64]]
    truly_nc: int | None = None  #: rows that are NC in truth, or known to be, if that was given
    true_counts: NDArray[np.int64] | None = None  #: (R, A) NC rows that are among these
    #: (R,) of critical alpha; NaN if truth has one side; None without truth of all rows
    auroc: NDArray[np.float64] | None = None
    positives_only: bool = False  #: of the other rows nothing is known: there is only recall
    clean_rows: int | None = None  #: verified rows that were scored, if given
    clean_counts: NDArray[np.int64] | None = None  #: (R, A) verified rows that are called NC

    @property
    def shares(self) -> NDArray[np.float64]:
        """(R, A) share of the rows that is NC, from 0 to 1; NaN without rows."""
        return _ratio(self.nc_counts, self.rows)

    @property
    def false_positives(self) -> NDArray[np.float64]:
        """(R, A) share of the verified rows that is called NC.

        Raises:
            ValueError: no verified rows were given.
        """
        if self.clean_counts is None or self.clean_rows is None:
            raise ValueError("sweep: false_positives needs clean, predictions of verified rows")
        return _ratio(self.clean_counts, self.clean_rows)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The rules that differ in nothing but the seed, as indices, in order of appearance."""
        return _groups(self.rules)

    def names(self) -> tuple[str, ...]:
        """A name for each group: what differs between groups, as "beta 0.03, sigma 0.05"."""
        heads = [self.rules[group[0]] for group in self.groups]
        words = {"beta": "beta", "sigma": "sigma", "num_vectors": "m"}
        differ = [n for n in words if len({getattr(rule, n) for rule in heads}) > 1] or ["beta"]
        return tuple(
            ", ".join(f"{words[name]} {getattr(rule, name):.4g}" for name in differ)
            for rule in heads
        )

    def stability(self) -> NDArray[np.float64]:
        """(G, A) mean Jaccard index over all pairs of seeds, for each group.

        |A and B| / |A or B| of the two NC sets, exact from counts of both; 1 where both are empty.
        NaN for a group with one seed.
        """
        means = np.full((len(self.groups), len(self.alphas)), np.nan)
        for g, group in enumerate(self.groups):
            pairs = list(itertools.combinations(group, 2))
            if pairs:
                means[g] = np.mean([self._jaccard(*pair) for pair in pairs], axis=0)
        return means

    def _jaccard(self, a: int, b: int) -> NDArray[np.float64]:
        both = self.both_counts[a, b]
        either = self.nc_counts[a] + self.nc_counts[b] - both
        return np.where(either > 0, both / np.maximum(either, 1), 1.0)

    def quality(self, name: str = "f1") -> NDArray[np.float64]:
        """(R, A) how well the NC rows agree with the truth.

        Args:
            name: "f1", "precision" (NaN where nothing is flagged), "recall" or "balanced_accuracy"
                (the mean of recall and of the share of conforming rows that is not flagged).

        Raises:
            ValueError: no truth was given, or another name; or only some NC rows are known
                (``verified``), and it is not "recall".
        """
        if self.true_counts is None or self.truly_nc is None:
            raise ValueError("sweep: quality needs truth, which rows are NC")
        if self.positives_only and name != "recall":
            raise ValueError(
                f"sweep: quality must be 'recall' where only some NC rows are known, got {name!r}"
            )
        hits, flagged, positives = self.true_counts, self.nc_counts, self.truly_nc
        if name == "precision":
            return _ratio(hits, flagged)
        if name == "recall":
            return _ratio(hits, positives)
        if name == "f1":
            return _ratio(2 * hits, flagged + positives)
        if name == "balanced_accuracy":
            wrong = _ratio(flagged - hits, self.rows - positives)
            return (_ratio(hits, positives) + 1 - wrong) / 2
        raise ValueError(f"sweep: quality must be one of {', '.join(QUALITIES)}, got {name!r}")

    def mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G, ...) means over the seeds of each group, of values for each rule."""
        return np.array([values[list(group)].mean(axis=0) for group in self.groups])

    def best(self, name: str = "f1") -> tuple[GenKL, float]:
        """The rule and alpha of the best :meth:`quality`, and that quality.

        It is chosen with the truth of these very rows, so on others it will be worse.

        Raises:
            ValueError: as :meth:`quality`, or it is defined nowhere.
        """
        values = self.quality(name)
        if np.isnan(values).all():
            raise ValueError(f"sweep: {name} is defined at no alpha")
        r, a = np.unravel_index(np.nanargmax(values), values.shape)
        rule = dataclasses.replace(self.rules[r], alpha=float(self.alphas[a]))
        return rule, float(values[r, a])

    def to_json(self) -> str:
        """Everything, as JSON; shares and qualities follow from the counts."""
        groups = [
            {"name": name, "rules": list(group), "jaccard": _plain(jaccard)}
            for name, group, jaccard in zip(
                self.names(), self.groups, self.stability(), strict=True
            )
        ]
        result: dict[str, Any] = {
            "rules": [_settings(rule) for rule in self.rules],
            "alphas": self.alphas.tolist(),
            "rows": self.rows,
            "left_out": self.left_out,
            "nc_counts": self.nc_counts.tolist(),
            "groups": groups,
        }
        if self.true_counts is not None:
            known = {"nc": self.truly_nc, "true_counts": self.true_counts.tolist()}
            if self.auroc is not None:
                known["auroc"] = _plain(self.auroc)
            result["verified" if self.positives_only else "truth"] = known
        if self.clean_counts is not None:
            result["clean"] = {"rows": self.clean_rows, "nc_counts": self.clean_counts.tolist()}
        return json.dumps(result, indent=1) + "\n"

    def table(self) -> str:
        """A line for each group at its own alpha, means over its seeds, in columns of text.

        Shares in %. "J" is the mean Jaccard index between seeds, "FP" the share of verified rows
        that is flagged; with truth come AUROC, F1 and, over the whole alpha axis, the best F1.
        Where only some NC rows are known it is the recall, the share of these that is flagged.
        """
        shares = self.shares
        header = ["beta", "sigma", "m", "seeds", "alpha", "NC %", "J"]
        header += ["FP %"] if self.clean_counts is not None else []
        header += ["AUROC", "F1", "best F1", "at alpha"] if self.auroc is not None else []
        header += ["recall %"] if self.positives_only else []
        lines = [header]
        for group, jaccard in zip(self.groups, self.stability(), strict=True):
            rule, rules = self.rules[group[0]], list(group)
            at = int(np.searchsorted(self.alphas, rule.alpha))
            seeds = ",".join(str(self.rules[r].seed) for r in group)
            line = [f"{rule.beta:.4g}", f"{rule.sigma:.4g}", str(rule.num_vectors), seeds]
            line += [f"{rule.alpha:.4g}", _text(100 * shares[rules, at].mean(), 2)]
            line += [_text(jaccard[at], 3)]
            if self.clean_counts is not None:
                line += [_text(100 * self.false_positives[rules, at].mean(), 2)]
            if self.auroc is not None:
                f1 = self.quality("f1")[rules].mean(axis=0)
                best = int(np.nanargmax(f1)) if not np.isnan(f1).all() else at
                line += [_text(self.auroc[rules].mean(), 4), _text(f1[at], 4), _text(f1[best], 4)]
                line += [f"{self.alphas[best]:.4g}"]
            if self.positives_only:
                line += [_text(100 * self.quality("recall")[rules, at].mean(), 2)]
            lines.append(line)
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(entry.rjust(width) for entry, width in zip(line, widths, strict=True))
            for line in lines
        )


def grid(
    rule: GenKL,
    *,
    betas: Sequence[float] = (),
    sigmas: Sequence[float] = (),
    num_vectors: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> tuple[GenKL, ...]:
    """All combinations of some hyper-parameters; what is not given is that of ``rule``.

    Raises:
        TypeError, ValueError: a value that :class:`GenKL` does not take, or one given twice.
    """
    asked = {"beta": betas, "sigma": sigmas, "num_vectors": num_vectors, "seed": seeds}
    given = {name: list(values) for name, values in asked.items() if len(values)}
    combinations: list[Any] = [
        dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())
    ]
    rules = tuple(dataclasses.replace(rule, **values) for values in combinations)
    if len(set(rules)) < len(rules):
        twice = next(name for name, values in given.items() if len(set(values)) < len(values))
        raise ValueError(f"grid: values of {twice} must differ, got {given[twice]}")
    return rules


def sweep(
    predictions: Inputs,
    rules: GenKL | Sequence[GenKL],
    *,
    alphas: Sequence[float] | None = None,
    truth: ArrayLike | None = None,
    verified: ArrayLike | None = None,
    clean: Inputs | None = None,
    logits: bool = False,
    validate: bool = True,
    chunk_bytes: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Score predictions with many rules in one read, and count NC rows at every alpha.

    Args:
        predictions: (N, k) array or tensor, or ``.npy`` file of such; or a sequence of M of them,
            to be averaged, as for :meth:`GenKL.score`. In NumPy arrays, CPU tensors (but bfloat16)
            and files, a row of nothing but NaN has no prediction and is left out.
        rules: of k classes each; :func:`grid` makes them.
        alphas: where to count; by default 0 to 2 in steps of 0.01. Those of the rules are added.
        truth: (N,) bool, which rows are NC and which are not; for :meth:`Sweep.quality` and AUROC.
        verified: instead of ``truth``, where only some NC rows are known: (N,) bool, which these
            are. Nothing is said of the others, so there is nothing but recall.
        clean: predictions of verified rows, for :attr:`Sweep.false_positives`.
        logits: the predictions are logits, ``clean`` too.
        validate: check every row, as :meth:`GenKL.score` does.
        chunk_bytes: how much of the predictions is scored by all rules before the next.
        progress: called with (rows done, N).

    Raises:
        OSError, TypeError, ValueError: as :meth:`GenKL.score` and ``score_files``; with the row.
    """
    chosen = _listed(rules)
    points = _alphas(alphas, chosen)
    with _open(predictions, chosen) as source:
        known = _known(truth, verified, source.rows)
        counts = _Counts(chosen, points)
        kept = None if truth is None else np.empty((len(chosen), source.rows), np.float32)

        def take(start: int, critical: NDArray[np.float32]) -> None:
            counts.add(critical, None if known is None else known[start : start + len(critical[0])])
            if kept is not None:
                kept[:, start : start + len(critical[0])] = critical

        _score(source, chosen, logits, validate, chunk_bytes, take, progress)
    checked = None if clean is None else _Counts(chosen, points, pairs=False)
    if clean is not None and checked is not None:
        with _open(clean, chosen) as source:
            _score(
                source,
                chosen,
                logits,
                validate,
                chunk_bytes,
                lambda _, critical: checked.add(critical),
                None,
            )
    return _result(chosen, points, counts, known, kept, checked)


def from_critical_alphas(
    critical: ArrayLike,
    rules: GenKL | Sequence[GenKL],
    *,
    alphas: Sequence[float] | None = None,
    truth: ArrayLike | None = None,
    verified: ArrayLike | None = None,
    clean: ArrayLike | None = None,
) -> Sweep:
    """The same from critical alphas that were stored: nothing is scored.

    Args:
        critical: (R, N) float32, of R rules; NaN where a row has no prediction.
        rules: the R rules, or the one.
        alphas, truth, verified: as for :func:`sweep`.
        clean: (R, V), of verified rows.

    Raises:
        ValueError: another shape.
    """
    chosen = _listed(rules)
    points = _alphas(alphas, chosen)
    values = _stored("critical", critical, chosen)
    known = _known(truth, verified, values.shape[1])
    counts = _Counts(chosen, points)
    counts.add(values, known)
    checked = None
    if clean is not None:
        checked = _Counts(chosen, points, pairs=False)
        checked.add(_stored("clean", clean, chosen))
    return _result(chosen, points, counts, known, None if truth is None else values, checked)


def critical_alphas(
    predictions: Inputs,
    rules: GenKL | Sequence[GenKL],
    *,
    logits: bool = False,
    validate: bool = True,
    chunk_bytes: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """(R, N) critical alpha of every row for every rule, in one read; NaN without prediction.

    Arguments and errors are those of :func:`sweep`.
    """
    chosen = _listed(rules)
    with _open(predictions, chosen) as source:
        result = np.empty((len(chosen), source.rows), np.float32)

        def take(start: int, critical: NDArray[np.float32]) -> None:
            result[:, start : start + critical.shape[1]] = critical

        _score(source, chosen, logits, validate, chunk_bytes, take, progress)
    return result


class _Counts:
    """What is kept of critical alphas that come in chunks, from several threads."""

    def __init__(
        self, rules: tuple[GenKL, ...], alphas: NDArray[np.float64], pairs: bool = True
    ) -> None:
        # The float32 at or above each alpha: a float32 reaches the one where it reaches the other.
        points = alphas.astype(np.float32)
        below = points < alphas
        points[below] = np.nextafter(points[below], np.float32(np.inf))
        self._points = points
        groups = _groups(rules) if pairs else ()
        self._lock = threading.Lock()
        self.rows = self.left_out = self.known = 0
        self.nc = np.zeros((len(rules), len(alphas)), np.int64)
        self.true = np.zeros_like(self.nc)
        self.both = {
            pair: np.zeros(len(alphas), np.int64)
            for group in groups
            for pair in itertools.combinations(group, 2)
        }

    def add(self, critical: NDArray[np.float32], truth: NDArray[np.bool_] | None = None) -> None:
        """Count (R, n) more; what has NaN has no prediction, for no rule."""
        rows = critical.shape[1]
        missing = np.isnan(critical[0])
        if missing.any():
            critical = critical[:, ~missing]
            truth = None if truth is None else truth[~missing]
        nc = np.array([self._reaching(values) for values in critical])
        both = {(a, b): self._reaching(np.minimum(critical[a], critical[b])) for a, b in self.both}
        true = None
        if truth is not None:
            true = np.array([self._reaching(values[truth]) for values in critical])
        with self._lock:
            self.rows += critical.shape[1]
            self.left_out += rows - critical.shape[1]
            self.nc += nc
            for pair, counts in both.items():
                self.both[pair] += counts
            if truth is not None and true is not None:
                self.known += int(np.count_nonzero(truth))
                self.true += true

    def _reaching(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """(A,) how many values are at least each alpha. Sorting a chunk that is in the cache costs
        less than looking each value up among the alphas."""
        return len(values) - np.searchsorted(np.sort(values), self._points, "left")


class _Source:
    """N rows of M models, given out in chunks, wherever they are."""

    def __init__(self, models: list[Any], files: list[Source]) -> None:
        self._models, self._files = models, files
        first: Any = files[0] if files else models[0]
        self.rows, self.classes = int(first.shape[0]), int(first.shape[1])
        if files:
            self.row_bytes = sum(file.row_bytes for file in files)
        else:
            size = first.element_size() if _is_tensor(first) else first.dtype.itemsize
            self.row_bytes = len(models) * self.classes * size
        self.on_host = bool(files) or not _is_tensor(models[0])

    def models(self, start: int, stop: int) -> list[Any]:
        if self._files:
            return [file.rows(start, stop) for file in self._files]
        return [model[start:stop] for model in self._models]

    def names(self) -> list[str] | None:
        return [file.name for file in self._files] or None

    def check_unchanged(self) -> None:
        for file in self._files:
            file.check_unchanged()


@contextmanager
def _open(predictions: Inputs, rules: tuple[GenKL, ...]) -> Iterator[_Source]:
    """The rows of arrays or files, once they are known to have the rules' classes."""
    alone = not isinstance(predictions, (list, tuple))
    given: list[Any] = [predictions] if alone else list(cast("Sequence[Any]", predictions))
    classes = rules[0].num_classes
    with ExitStack() as stack:
        if given and all(isinstance(item, (str, os.PathLike)) for item in given):
            files = open_models(given, stack)
            if files[0].shape[1] != classes:
                raise ValueError(
                    f"sweep: {files[0].name} must have num_classes = {classes} columns, "
                    f"got shape {files[0].shape}"
                )
            source = _Source([], files)
        else:
            if _check_models(given, classes) == "torch" and _numpy_can(given[0]):
                given = [model.detach().numpy() for model in given]
            source = _Source(given, [])
        yield source
        source.check_unchanged()


def _numpy_can(tensor: Any) -> bool:
    return tensor.device.type == "cpu" and str(tensor.dtype) != "torch.bfloat16"


def _score(
    source: _Source,
    rules: tuple[GenKL, ...],
    logits: bool,
    validate: bool,
    chunk_bytes: int | None,
    take: Callable[[int, NDArray[np.float32]], None],
    progress: Progress | None,
) -> None:
    """Call ``take(start, (R, n) critical alphas)`` for every chunk, in any order."""
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"sweep: chunk_bytes must be at least 1, got {chunk_bytes}")
    default = CHUNK_BYTES if source.on_host else _DEVICE_CHUNK_BYTES
    step = max(1, (chunk_bytes or default) // source.row_bytes)
    starts = range(0, source.rows, step)

    def work(start: int) -> int:
        stop = min(start + step, source.rows)
        models = source.models(start, stop)
        if source.on_host:
            critical = _chunk(models, rules, logits, validate, source.names(), start)
        else:
            critical = _tensors(models, rules, logits, validate, source.names(), start)
        take(start, critical)
        return stop

    # A thread for each processor, each with chunks of its own: rules share no data, rows do. On a
    # GPU one thread asks for everything.
    pool = ThreadPoolExecutor(num_threads() if source.on_host else 1, "genkl-sweep")
    try:
        for stop in pool.map(work, starts):  # in order: of several bad rows the first is told
            if progress is not None:
                progress(stop, source.rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _chunk(
    models: list[NDArray[Any]],
    rules: tuple[GenKL, ...],
    logits: bool,
    validate: bool,
    names: list[str] | None,
    first_row: int,
) -> NDArray[np.float32]:
    """(R, n) critical alphas of a chunk, in this thread."""
    missing = empty_rows(models)
    there = np.flatnonzero(~missing)
    critical = np.empty((len(rules), len(there)), np.float32)
    present = models if len(there) == len(missing) else [model[there] for model in models]
    for r, rule in enumerate(rules):
        vectors, entropies, ballot = rule._distinct
        found = _native.nc_score(
            present, vectors, entropies, rule.alpha, rule.tau, ballot, logits, 1
        )
        if r == 0:
            if validate and found[5] >= 0:
                row = int(there[found[5]])
                raise ValueError(_describe_bad_row(models, row, logits, names, first_row))
            if len(present) > 1 and not logits and len(rules) > 1:
                # The average, as it is defined, scores as its models do, and is read faster.
                present = [_average(present)]
        critical[r] = found[0]
    if len(there) == len(missing):
        return critical
    every = np.full((len(rules), len(missing)), np.nan, np.float32)
    every[:, there] = critical
    return every


def _tensors(
    models: list[Any],
    rules: tuple[GenKL, ...],
    logits: bool,
    validate: bool,
    names: list[str] | None,
    first_row: int,
) -> NDArray[np.float32]:
    """The same of tensors that NumPy cannot have, where they are."""
    scores = [rule._score(models, logits=logits, validate=validate) for rule in rules]
    bad = int(scores[0]._first_bad_row)
    if bad >= 0:
        raise ValueError(_describe_bad_row(models, bad, logits, names, first_row))
    return np.stack([s.numpy().critical_alpha for s in scores])


def _average(models: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Of several models, in float32 and in their order; ``reference.average`` in place."""
    total = models[0].astype(np.float32)
    for model in models[1:]:
        total += model.astype(np.float32, copy=False)
    total /= np.float32(len(models))
    return total


def _listed(rules: GenKL | Sequence[GenKL]) -> tuple[GenKL, ...]:
    chosen = (rules,) if isinstance(rules, GenKL) else tuple(rules)
    if not chosen:
        raise ValueError("sweep: rules must be at least one, got none")
    if len({rule.num_classes for rule in chosen}) > 1:
        counts = sorted({rule.num_classes for rule in chosen})
        raise ValueError(f"sweep: rules must have one num_classes, got {counts}")
    if len({dataclasses.replace(rule, alpha=0.0) for rule in chosen}) < len(chosen):
        raise ValueError("sweep: rules must differ in more than alpha, got some that do not")
    return chosen


def _alphas(alphas: Sequence[float] | None, rules: tuple[GenKL, ...]) -> NDArray[np.float64]:
    given = np.asarray(ALPHAS if alphas is None else alphas, np.float64)
    if given.ndim != 1 or not (np.isfinite(given) & (given >= 0)).all():
        raise ValueError(f"sweep: alphas must be finite numbers >= 0, got {alphas}")
    return np.union1d(given, [rule.alpha for rule in rules])


def _known(
    truth: ArrayLike | None, verified: ArrayLike | None, rows: int
) -> NDArray[np.bool_] | None:
    """(N,) which rows are NC in truth, or are known to be."""
    if truth is not None and verified is not None:
        raise ValueError("sweep: truth and verified cannot both be given")
    name, given = ("truth", truth) if verified is None else ("verified", verified)
    if given is None:
        return None
    known = np.asarray(given)
    if known.shape != (rows,) or known.dtype != bool:
        raise ValueError(
            f"sweep: {name} must be ({rows},) booleans, got {known.shape} {known.dtype}"
        )
    if verified is not None and rows and not known.any():
        raise ValueError("sweep: verified must have a row that is NC, got none")
    return known


def _stored(name: str, critical: ArrayLike, rules: tuple[GenKL, ...]) -> NDArray[np.float32]:
    values = np.atleast_2d(np.asarray(critical, np.float32))
    if values.ndim != 2 or len(values) != len(rules):
        raise ValueError(f"sweep: {name} must be ({len(rules)}, N), got {np.shape(critical)}")
    return values


def _result(
    rules: tuple[GenKL, ...],
    alphas: NDArray[np.float64],
    counts: _Counts,
    truth: NDArray[np.bool_] | None,
    critical: NDArray[np.float32] | None,  # with truth of all rows
    clean: _Counts | None,
) -> Sweep:
    known: dict[str, Any] = {}
    if truth is not None and critical is None:
        known = {
            "truly_nc": counts.known,
            "true_counts": counts.true,
            "positives_only": True,
        }
    elif truth is not None and critical is not None:
        from .evaluation import auroc

        there = ~np.isnan(critical[0])
        areas = np.full(len(critical), np.nan)
        if there.any():
            areas[:] = [auroc(values[there], truth[there]) for values in critical]
        known = {
            "truly_nc": counts.known,
            "true_counts": counts.true,
            "auroc": areas,
        }
    if clean is not None:
        known |= {"clean_rows": clean.rows, "clean_counts": clean.nc}
    return Sweep(
        rules=rules,
        alphas=alphas,
        rows=counts.rows,
        left_out=counts.left_out,
        nc_counts=counts.nc,
        both_counts=counts.both,
        **known,
    )


def _groups(rules: tuple[GenKL, ...]) -> tuple[tuple[int, ...], ...]:
    groups: dict[GenKL, list[int]] = {}
    for r, rule in enumerate(rules):
        groups.setdefault(dataclasses.replace(rule, seed=0, alpha=0.0), []).append(r)
    return tuple(map(tuple, groups.values()))


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """NaN for parts of nothing."""
    whole = np.broadcast_to(whole, part.shape)
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _settings(rule: GenKL) -> dict[str, Any]:
    values = dataclasses.asdict(rule)
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _text(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
