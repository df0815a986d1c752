"""The table of scores: one row per row of the predictions, in their order.

    row             int64    number of the row, from 0
    key             string   its line of the key list, where one was given
    critical_alpha  float32  larger means more non-conforming
    divergence      float32  in bits
    votes           int32    vectors that vote non-conforming
    nc              bool     votes > 0
    top_class       int32    the most probable class
    top_prob        float32  its probability

A row without a prediction has NaN, no votes, and the top class -1 (``LEFT_OUT``), which no other
row has.

The suffix of the file name chooses the format. Parquet carries the settings and fingerprints with
it (:func:`read_settings`); CSV and NumPy files have no place for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import naming, settings_of
from .keys import BLOCK_ROWS, KeyList

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "row": "int64",
    "key": "string",
    "critical_alpha": "float32",
    "divergence": "float32",
    "votes": "int32",
    "nc": "bool",
    "top_class": "int32",
    "top_prob": "float32",
}
LEFT_OUT = {
    "critical_alpha": np.nan,
    "divergence": np.nan,
    "votes": 0,
    "nc": False,
    "top_class": -1,
    "top_prob": np.nan,
}
SUFFIXES = (".parquet", ".csv", ".npy")
SETTINGS_KEY = b"genkl_ext"


def require_suffix(path: Path) -> None:
    """Raise ``ValueError`` unless the suffix names a format."""
    if path.suffix not in SUFFIXES:
        got = repr(path.suffix) if path.suffix else "none"
        raise ValueError(f"score: {path} must have a suffix of {', '.join(SUFFIXES)}, got {got}")


class TableWriter:
    """Writes a table while its columns are being filled, in blocks that do not depend on how.

    Args:
        path: the file to write; its suffix chooses the format.
        columns: the columns but ``row`` and ``key``, N rows each, of which slices are taken.
        keys: the key column, or None.
        settings: go with the table as JSON where the format has room.
        skip: the rows from a first to a last, excluded, that are not in the table, ascending;
            asked for when the columns are filled so far.

    Raises:
        OSError: from writing.
    """

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, Any],
        keys: KeyList | None,
        settings: Mapping[str, Any],
        skip: Callable[[int, int], NDArray[np.int64]] | None = None,
    ) -> None:
        require_suffix(path)
        self._path = path
        self._skip = skip
        self._columns = columns
        self._rows = len(columns["votes"])
        self._keys = keys
        self._written = 0
        names = [name for name in COLUMNS if name != "key" or keys is not None]
        self._sink: _ParquetSink | _CsvSink | _NpySink
        with naming(path):
            if path.suffix == ".parquet":
                self._sink = _ParquetSink(path, names, settings)
            elif path.suffix == ".csv":
                self._sink = _CsvSink(path, names)
            else:
                longest = 0 if keys is None else keys.longest()
                self._sink = _NpySink(path, names, self._rows, longest)

    def advance(self, filled: int) -> None:
        """Write every block whose rows are among the first ``filled``."""
        while self._written < self._rows:
            start, stop = self._written, min(self._written + BLOCK_ROWS, self._rows)
            if stop > filled:
                return
            block: dict[str, NDArray[Any] | list[str]] = {"row": np.arange(start, stop)}
            if self._keys is not None:
                block["key"] = self._keys.slice(start, stop)
            block.update({name: column[start:stop] for name, column in self._columns.items()})
            skipped = np.empty(0, np.int64) if self._skip is None else self._skip(start, stop)
            if len(skipped):
                there = np.ones(stop - start, bool)
                there[skipped - start] = False
                block = {
                    name: list(compress(column, there))
                    if isinstance(column, list)
                    else column[there]
                    for name, column in block.items()
                }
            with naming(self._path):
                self._sink.write(block)
            self._written = stop

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path):
            self._sink.close()


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What made a Parquet table of scores: rule, package version, fingerprints of the inputs.

    Raises:
        OSError: it cannot be read. ValueError: ``score_files`` did not write it as Parquet.
    """
    wanted = "a table of genkl scores"
    settings: dict[str, Any] = settings_of(path, SETTINGS_KEY, "scores", wanted)
    return settings


class _ParquetSink:
    def __init__(self, path: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        import pyarrow.parquet as pq

        self._schema = _schema(names, {SETTINGS_KEY: json.dumps(settings).encode()})
        # Scores hardly repeat: a dictionary of them, or compression, costs time and saves 1 %.
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            use_dictionary=["votes", "top_class"],
            compression={name: "SNAPPY" if name == "key" else "NONE" for name in names},
            column_encoding={"row": "DELTA_BINARY_PACKED"},
        )

    def write(self, block: Mapping[str, Any]) -> None:
        self._writer.write_batch(_batch(block, self._schema))

    def close(self) -> None:
        self._writer.close()


class _CsvSink:
    def __init__(self, path: Path, names: Sequence[str]) -> None:
        import pyarrow.csv

        self._schema = _schema(names, None)
        self._writer = pyarrow.csv.CSVWriter(path, self._schema)

    def write(self, block: Mapping[str, Any]) -> None:
        self._writer.write_batch(_batch(block, self._schema))

    def close(self) -> None:
        self._writer.close()


class _NpySink:
    """A structured array; keys are text of fixed width."""

    _STEP = 1 << 14  # rows put together at a time: they stay in the cache while columns are filled

    def __init__(self, path: Path, names: Sequence[str], rows: int, longest_key: int) -> None:
        kinds = {**COLUMNS, "key": f"U{max(longest_key, 1)}"}
        self._dtype = np.dtype([(name, kinds[name]) for name in names])
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._rows = 0
        self._write_header(rows)

    def _write_header(self, rows: int) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (rows,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, block: Mapping[str, Any]) -> None:
        rows = len(block["row"])
        for start in range(0, rows, self._STEP):
            piece = slice(start, min(start + self._STEP, rows))
            records = np.empty(piece.stop - piece.start, self._dtype)
            for name in self._dtype.names or ():
                records[name] = block[name][piece]
            self._file.write(records.data)
        self._rows += rows

    def close(self) -> None:
        with self._file:
            # NumPy leaves room in the header for any number of rows.
            self._file.seek(0)
            self._write_header(self._rows)


def _schema(names: Sequence[str], metadata: dict[bytes, bytes] | None) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field(name, pa.type_for_alias(COLUMNS[name]), nullable=False) for name in names]
    return pa.schema(fields, metadata)


def _batch(block: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.record_batch([pa.array(block[f.name], f.type) for f in schema], schema)
