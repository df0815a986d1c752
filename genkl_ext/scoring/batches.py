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
from .gpu import require_name, scorer_of
from .sources import first_of_other_length, list_rows, native
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
        keep: columns of the input that stay, or the only one that does; all by default.
            ``keep="key"`` leaves out the predictions, which are most of the bytes.
        prefix: goes before the names of the new columns.
        device: what scores: "cpu", "cuda" or "cuda:1" of the worker. The results are the same.

    Raises:
        TypeError, ValueError: settings that are wrong; a batch that is not as said, with the
        column and the row in the batch.
    """

    rule: GenKL
    column: str | tuple[str, ...] = "probs"
    logits: bool = False
    validate: bool = True
    on_bad_row: OnBadRow = "raise"
    keep: str | tuple[str, ...] | None = None
    prefix: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.rule, GenKL):
            raise TypeError(f"BatchScorer: rule must be a GenKL, got {type(self.rule).__name__}")
        if self.on_bad_row not in ("raise", "nan", "skip"):
            raise ValueError(
                f"BatchScorer: on_bad_row must be raise, nan or skip, got {self.on_bad_row!r}"
            )
        require_name(self.device, "BatchScorer")
        for name in ("column", "keep"):
            value = getattr(self, name)
            if isinstance(value, str) or (name == "keep" and value is None):
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise TypeError(
                    f"BatchScorer: {name} must be the name of a column, or names, got {value!r}"
                )
            # Lists would not be hashable, nor the same after a change by somebody else.
            object.__setattr__(self, name, tuple(value))
        if not self._sources:
            raise ValueError("BatchScorer: column must name at least one column, got none")

    @property
    def _sources(self) -> tuple[str, ...]:
        return (self.column,) if isinstance(self.column, str) else self.column

    @property
    def _keep(self) -> tuple[str, ...] | None:
        return (self.keep,) if isinstance(self.keep, str) else self.keep

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
        new = [types.StructField(self.prefix + n, kinds[COLUMNS[n]]) for n in LEFT_OUT]
        return types.StructType([*kept, *new])

    def _of_arrays(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        self._require(list(batch))
        parts = [_from_values(batch[name], name, self.rule.num_classes) for name in self._sources]
        columns, there = self._score(parts)
        kept = {name: batch[name] for name in self._kept(list(batch))}
        if there is not None:
            kept = {name: _array(values)[there] for name, values in kept.items()}
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
        models = self._alike(parts)
        missing = np.unique(np.concatenate([nulls for _, nulls in parts]))
        if len(missing) and self.on_bad_row == "raise":
            name = next(n for n, (_, nulls) in zip(self._sources, parts, strict=True) if len(nulls))
            raise ValueError(f"BatchScorer: column {name} is null at row {missing[0]} of a batch")
        gpu = scorer_of(self.rule, self.device, self.logits, self.validate)
        scored = None
        if gpu is not None and not len(missing):
            scored = gpu.begin(gpu.stage(models)).result()
        if scored is not None:
            return {self.prefix + name: column.copy() for name, column in scored.items()}, None
        columns, bad = score_rows(
            models,
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
        there = np.ones(len(models[0]), bool)
        there[missing] = there[bad] = False
        return {name: column[there] for name, column in columns.items()}, there

    def _alike(self, parts: Sequence[tuple[NDArray[Any], NDArray[np.int64]]]) -> list[NDArray[Any]]:
        """The models, of one length and dtype. A column of nulls has the dtype of the others."""
        known = [i for i, (model, nulls) in enumerate(parts) if len(nulls) < len(model)]
        first = known[0] if known else 0
        wanted = parts[first][0]
        for i, (model, _) in enumerate(parts):
            if len(model) != len(wanted):
                raise ValueError(
                    f"BatchScorer: column {self._sources[i]} must have as many rows as "
                    f"{self._sources[first]}, {len(wanted)}, got {len(model)}"
                )
            if i in known and model.dtype != wanted.dtype:
                raise TypeError(
                    f"BatchScorer: column {self._sources[i]} must hold {wanted.dtype} like "
                    f"{self._sources[first]}, got {model.dtype}"
                )
        return [model.astype(wanted.dtype, copy=False) for model, _ in parts]

    def _kept(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._keep is None or name in self._keep]

    def _require(self, names: Sequence[str]) -> None:
        for name in (*self._sources, *(self._keep or ())):
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
    array = _array(values)
    nulls = np.empty(0, np.int64)
    if array.dtype == object and _uniform(array, num_classes):
        array = np.concatenate(array).reshape(len(array), num_classes)
    if array.dtype == object and array.ndim:
        rows = [_one(value, name, i) for i, value in enumerate(array)]
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


def _uniform(rows: NDArray[Any], num_classes: int) -> bool:
    """Whether an array of objects holds nothing but rows of k numbers of one type, as engines give
    them; then they need not be looked at one by one."""
    if rows.ndim != 1 or not all(type(row) is np.ndarray for row in rows):
        return False
    kinds = {(row.dtype, row.shape) for row in rows}
    return len(kinds) == 1 and kinds.pop() in {(np.dtype(kind), (num_classes,)) for kind in _FLOATS}


def _array(values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:  # a list of rows of several lengths, or of nulls and rows
        array = np.empty(len(values), object)
        array[:] = list(values)
        return array


def _one(value: Any, name: str, at: int) -> NDArray[Any] | None:
    """A row; None if it is null, or one of its numbers is."""
    if _is_null(value):
        return None
    try:
        row = np.asarray(value)
        if row.dtype == object and row.ndim:  # what nulls, or pandas, have made of numbers
            there = [one for one in row.ravel() if not _is_null(one)]
            numbers = np.asarray(there) if there else np.empty(0)
            if numbers.dtype.name in _FLOATS:
                return None if len(there) < row.size else numbers.reshape(row.shape)
    except ValueError:  # rows within the row, of several lengths
        row = np.empty((), object)
    if row.ndim == 0 or row.dtype.newbyteorder("=").name not in _FLOATS:
        kind = type(value).__name__ + (f" of {row.dtype}" if row.ndim else "")
        raise TypeError(
            f"BatchScorer: column {name} must hold rows of {', '.join(_FLOATS)}, got {kind} at "
            f"row {at} of a batch"
        )
    return row


def _is_null(value: Any) -> bool:
    """None, NaN, or the NA of pandas."""
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ == "NAType"


def _from_arrow(column: Any, name: str, num_classes: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(n, k) floats, without a copy where that is possible, and the rows that are null or have a
    null in them."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    kind = column.type
    if isinstance(column, pa.ExtensionArray):  # tensors, Arrow's own or Ray's
        shape = tuple(getattr(kind, "shape", None) or (num_classes,))
        if shape != (num_classes,):
            raise ValueError(
                f"BatchScorer: column {name} must hold {num_classes} numbers in each row, got "
                f"shape {shape}"
            )
        column = column.storage
    if not any(is_so(column.type) for is_so in lists):
        raise TypeError(
            f"BatchScorer: column {name} must be lists of {num_classes} numbers, got {kind}"
        )
    if not pa.types.is_floating(column.type.value_type):
        raise TypeError(
            f"BatchScorer: column {name} must hold {', '.join(_FLOATS)}, got "
            f"{column.type.value_type}"
        )
    other = first_of_other_length(column, num_classes)
    if other is not None:
        raise ValueError(
            f"BatchScorer: column {name} must hold {num_classes} numbers in each row, got "
            f"{other[1]} at row {other[0]} of a batch"
        )
    rows, null = list_rows(column, num_classes)
    return _floats(rows, name, num_classes), np.flatnonzero(null)


def _floats(array: NDArray[Any], name: str, num_classes: int) -> NDArray[Any]:
    kind = array.dtype.newbyteorder("=").name
    if kind not in _FLOATS:
        raise TypeError(
            f"BatchScorer: column {name} must hold {', '.join(_FLOATS)}, got {array.dtype}"
        )
    if array.ndim != 2 or array.shape[1] != num_classes:
        raise ValueError(
            f"BatchScorer: column {name} must hold {num_classes} numbers in each row, got shape "
            f"{array.shape}"
        )
    rows: NDArray[Any] = native(array, kind)
    return rows
