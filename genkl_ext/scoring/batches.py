"""``BatchScorer``: what a Ray Data or Spark job calls on its batches.

    dataset.map_batches(BatchScorer(rule, column="probs"))                       # Ray Data
    frame.mapInArrow(scorer.arrow, schema=...)                                   # Spark
    frame.mapInPandas(scorer.pandas, schema=...)

It can be pickled, and imports neither engine, nor torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..rule import GenKL
from .chunks import OnBadRow, score_rows
from .tables import COLUMNS, LEFT_OUT

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_FLOATS = ("float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class BatchScorer:
    """Adds the scores to batches of rows that hold predictions.

    Called with a batch, it gives a batch of the same kind with the columns ``critical_alpha``,
    ``divergence``, ``votes``, ``nc``, ``top_class`` and ``top_prob`` after its own
    (``scoring/tables.py`` names their types).

    Args:
        rule: what to score with.
        column: the column of predictions: k numbers in each row, float16, float32 or float64. Or
            the columns of M models, to be averaged.
        logits: they are logits.
        validate: check every row.
        on_bad_row: what a row does that is null or no valid prediction: "raise"; "nan": it has
            NaN, no votes and the top class -1; "skip": it is not in the result.
        keep: columns of the input that stay; all by default. ``keep=("key",)`` leaves out the
            predictions, which are most of the bytes.
        prefix: goes before the names of the new columns.

    Raises:
        TypeError, ValueError: settings that are wrong; a batch that is not as said, with the
        column and the row in the batch.
    """

    rule: GenKL
    column: str | tuple[str, ...] = "probs"
    logits: bool = False
    validate: bool = True
    on_bad_row: OnBadRow = "raise"
    keep: tuple[str, ...] | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.rule, GenKL):
            raise TypeError(f"BatchScorer: rule must be a GenKL, got {type(self.rule).__name__}")
        if self.on_bad_row not in ("raise", "nan", "skip"):
            raise ValueError(
                f"BatchScorer: on_bad_row must be raise, nan or skip, got {self.on_bad_row!r}"
            )
        if not self._sources:
            raise ValueError("BatchScorer: column must name at least one column, got none")
        # Lists would not be hashable, nor the same after a change by somebody else.
        for name in ("column", "keep"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def _sources(self) -> tuple[str, ...]:
        return (self.column,) if isinstance(self.column, str) else tuple(self.column)

    def __call__(self, batch: Any) -> Any:
        """A batch with its scores: dict of arrays, ``pyarrow.Table`` or ``RecordBatch``, or
        ``pandas.DataFrame``."""
        if isinstance(batch, Mapping):
            return self._of_arrays(batch)
        kind = type(batch).__module__.partition(".")[0]
        if kind == "pyarrow":
            return self._of_arrow(batch)
        if kind == "pandas":
            return self._of_pandas(batch)
        raise TypeError(
            "BatchScorer: batch must be a dict of arrays, a pyarrow Table or RecordBatch, or a "
            f"pandas DataFrame, got {type(batch).__name__}"
        )

    def arrow(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """For Spark's ``mapInArrow``."""
        return map(self._of_arrow, batches)

    def pandas(self, frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        """For Spark's ``mapInPandas``."""
        return map(self._of_pandas, frames)

    def schema(self, of: pa.Schema) -> pa.Schema:
        """The schema of the result, for input of this schema."""
        import pyarrow as pa

        self._require(of.names)
        kept = [of.field(name) for name in self._kept(of.names)]
        new = [pa.field(self.prefix + n, pa.type_for_alias(COLUMNS[n])) for n in LEFT_OUT]
        return pa.schema([*kept, *new])

    def spark_schema(self, of: Any) -> Any:
        """The Spark ``StructType`` of the result, for a data frame's ``schema``."""
        from pyspark.sql import types

        self._require(of.names)
        kinds = {
            "float32": types.FloatType(),
            "int32": types.IntegerType(),
            "bool": types.BooleanType(),
        }
        kept = [of[name] for name in self._kept(of.names)]
        new = [types.StructField(self.prefix + n, kinds[COLUMNS[n]], False) for n in LEFT_OUT]
        return types.StructType([*kept, *new])

    def _of_arrays(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        self._require(list(batch))
        parts = [_from_values(batch[name], name, self.rule.num_classes) for name in self._sources]
        columns, there = self._score(parts)
        kept = {name: batch[name] for name in self._kept(list(batch))}
        if there is not None:
            kept = {name: np.asarray(values)[there] for name, values in kept.items()}
        return {**kept, **columns}

    def _of_arrow(self, batch: Any) -> Any:
        import pyarrow as pa

        names = batch.schema.names
        self._require(names)
        parts = [
            _from_arrow(batch.column(name), name, self.rule.num_classes) for name in self._sources
        ]
        columns, there = self._score(parts)
        batch = batch.select(self._kept(names))
        if there is not None:
            batch = batch.filter(pa.array(there))
        arrays = [*batch.columns, *(pa.array(column) for column in columns.values())]
        fields = [*batch.schema, *(pa.field(n, pa.array(c).type) for n, c in columns.items())]
        return type(batch).from_arrays(arrays, schema=pa.schema(fields))

    def _of_pandas(self, frame: Any) -> Any:
        self._require(list(frame.columns))
        k = self.rule.num_classes
        parts = [_from_values(frame[name].to_numpy(), name, k) for name in self._sources]
        columns, there = self._score(parts)
        kept = frame[self._kept(list(frame.columns))]
        if there is not None:
            kept = kept[there]
        return kept.assign(**columns)

    def _score(
        self, parts: Sequence[tuple[NDArray[Any], NDArray[np.int64]]]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_] | None]:
        """The new columns, and which rows are in the result (None: all)."""
        missing = np.unique(np.concatenate([nulls for _, nulls in parts]))
        if len(missing) and self.on_bad_row == "raise":
            name = next(n for n, (_, nulls) in zip(self._sources, parts, strict=True) if len(nulls))
            raise ValueError(f"BatchScorer: column {name} is null at row {missing[0]} of a batch")
        columns, bad = score_rows(
            [model for model, _ in parts],
            self.rule,
            logits=self.logits,
            validate=self.validate,
            missing=missing,
            on_bad_row=self.on_bad_row,
            names=[f"column {name}" for name in self._sources],
        )
        columns = {self.prefix + name: column for name, column in columns.items()}
        if self.on_bad_row != "skip" or not len(missing) + len(bad):
            return columns, None
        there = np.ones(len(parts[0][0]), bool)
        there[missing] = there[bad] = False
        return {name: column[there] for name, column in columns.items()}, there

    def _kept(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.keep is None or name in self.keep]

    def _require(self, names: Sequence[str]) -> None:
        for name in (*self._sources, *(self.keep or ())):
            if name not in names:
                raise ValueError(
                    f"BatchScorer: column {name} must be in the batch, which has {', '.join(names)}"
                )
        taken = {self.prefix + name for name in LEFT_OUT} & set(self._kept(names))
        if taken:
            raise ValueError(
                f"BatchScorer: the batch has {', '.join(sorted(taken))} already; give a prefix "
                "for the new columns, or keep without them"
            )


def _from_values(
    values: Any, name: str, num_classes: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(n, k) floats, and the rows that are null, from an array of numbers or of arrays."""
    array = np.asarray(values)
    nulls = np.empty(0, np.int64)
    if array.dtype == object and array.ndim == 1:
        rows = [_one(value) for value in array]
        nulls = np.array([i for i, row in enumerate(rows) if row is None], np.int64)
        for i, row in enumerate(rows):
            if row is not None and row.shape != (num_classes,):
                raise ValueError(
                    f"BatchScorer: column {name} must hold {num_classes} numbers in each row, got "
                    f"shape {row.shape} at row {i} of a batch"
                )
        kinds = [row.dtype for row in rows if row is not None]
        array = np.zeros((len(rows), num_classes), np.result_type(*kinds) if kinds else np.float32)
        for i, row in enumerate(rows):
            if row is not None:
                array[i] = row
    if array.shape == (0,):  # a batch of no rows says nothing of their shape
        array = np.empty((0, num_classes), np.float32)
    return _floats(array, name, num_classes), nulls


def _one(value: Any) -> NDArray[Any] | None:
    """A row; None if it is null, or one of its numbers is."""
    row = np.asarray(value)
    return None if row.ndim == 0 or row.dtype == object else row


def _from_arrow(column: Any, name: str, num_classes: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(n, k) floats, without a copy where that is possible, and the rows that are null or have a
    null in them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if hasattr(column, "to_numpy_ndarray"):  # Ray's tensors
        return _from_values(column.to_numpy_ndarray(), name, num_classes)
    kind = column.type
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    if not any(is_so(kind) for is_so in lists):
        raise TypeError(
            f"BatchScorer: column {name} must be lists of {num_classes} numbers, got {kind}"
        )
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), num_classes))
    wrong = np.flatnonzero(lengths != num_classes)
    if len(wrong):
        raise ValueError(
            f"BatchScorer: column {name} must hold {num_classes} numbers in each row, got "
            f"{lengths[wrong[0]]} at row {wrong[0]} of a batch"
        )
    null = np.asarray(column.is_null())
    numbers = column.flatten()  # less the null rows
    array = numbers.to_numpy(zero_copy_only=False).reshape(-1, num_classes)
    if null.any():
        array, there = np.zeros((len(null), num_classes), array.dtype), array
        array[~null] = there
    if numbers.null_count:
        gaps = np.asarray(numbers.is_null()).reshape(-1, num_classes).any(axis=1)
        null[np.flatnonzero(~null)[gaps]] = True
    return _floats(array, name, num_classes), np.flatnonzero(null)


def _floats(array: NDArray[Any], name: str, num_classes: int) -> NDArray[Any]:
    if array.dtype.newbyteorder("=").name not in _FLOATS:
        raise TypeError(
            f"BatchScorer: column {name} must hold {', '.join(_FLOATS)}, got {array.dtype}"
        )
    if array.ndim != 2 or array.shape[1] != num_classes:
        raise ValueError(
            f"BatchScorer: column {name} must hold {num_classes} numbers in each row, got shape "
            f"{array.shape}"
        )
    return array
