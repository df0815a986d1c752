"""A CSV, TSV or Parquet file with a row per image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ..manifest import SCHEMA, Manifest, PathLike
from .assemble import Column, assemble

SUFFIXES = (".csv", ".tsv", ".parquet")
# Without class names, the largest label says how many there are; one wild number may not make
# names for all below it.
MOST_CLASSES = 1_000_000
_TEXTS = ("path", "key", "split", "kind")


def read(
    path: PathLike,
    *,
    root: PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    splits: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Manifest:
    """A table with the columns ``path`` and ``label``.

    Columns ``key`` (else the path is the key), ``split`` (else all images are in "train"),
    ``verified`` and ``kind`` are used where they are there, others are not. Labels are class
    numbers from 0 or class names; an empty cell is no label.

    Args:
        path: ``.csv``, ``.tsv`` or ``.parquet``; a file, or a URL that fsspec understands.
        root: where relative paths start from; by default the folder of the table.
        columns: the names that the table has for these columns: ``{"path": "file"}``.
        splits: our words for the table's splits: ``{"validation": "val"}``.
        class_names: of classes 0, 1, ...; by default the names among the labels, in the order of
            their characters, or "0" to the largest number.

    Raises:
        OSError: it cannot be read. ValueError: another suffix, a column that is missing or of
            another type, an image without a path, an unknown split, a label that is no class;
            with the row.
    """
    path = os.fspath(path)
    name_of = {name: name for name in ("label", *SCHEMA.names)} | dict(columns or {})
    source = _read_file(path, [name_of[ours] for ours in _TEXTS])
    for ours in ("path", "label"):
        if name_of[ours] not in source.column_names:
            raise ValueError(
                f"from_table: {path} must have a column {name_of[ours]}, "
                f"got {', '.join(source.column_names) or 'none'}"
            )
    found = {ours: source[name] for ours, name in name_of.items() if name in source.column_names}
    try:
        if found["path"].null_count:
            row = pc.index(found["path"].is_null(), True)
            raise ValueError(f"each row must have a {name_of['path']}, got none in row {row}")
        labels, class_names = _labels(found.pop("label"), class_names)
        rows = {
            "key": found["path"],
            "split": pa.repeat("train", len(source)),
            **found,
            "given_label": labels,
        }
        given = rows["split"]  # each word is compared with this: they may change places
        for theirs, ours in (splits or {}).items():
            rows["split"] = pc.if_else(pc.equal(given, theirs), ours, rows["split"])
        return assemble("table", _folder_of(path, root), class_names, [pa.table(rows)])
    except ValueError as error:
        reason = str(error).removeprefix("manifest: ")
        raise ValueError(f"from_table: {path}: {reason}") from error


def _read_file(path: str, texts: Sequence[str]) -> pa.Table:
    """The table; the columns ``texts`` of a CSV or TSV file are read as text."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"from_table: {path} must have a suffix of {', '.join(SUFFIXES)}")
    try:
        with fsspec.open(path, "rb") as file:
            if suffix == ".parquet":
                return pq.read_table(file)
            return pacsv.read_csv(
                file,
                parse_options=pacsv.ParseOptions(
                    delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True
                ),
                # Text stays as it is: 007 is no number, and NA no missing value.
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(texts, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
    except pa.ArrowInvalid as error:
        raise ValueError(f"from_table: {path} is no {suffix[1:]} table: {error}") from error


def _labels(given: Column, class_names: Sequence[str] | None) -> tuple[Column, Sequence[str]]:
    """Class numbers and class names, from a column of either."""
    if pa.types.is_floating(given.type):  # as pandas keeps whole numbers beside missing ones
        given = given.cast(pa.int64())
    if pa.types.is_integer(given.type) or pa.types.is_null(given.type):
        if class_names is not None:
            return given, class_names
        largest = pc.max(given).as_py()
        if largest is not None and largest >= MOST_CLASSES:
            raise ValueError(
                f"label must be below {MOST_CLASSES:,}, "
                f"got {largest:,} in row {pc.index(given, largest)}"
            )
        return given, [str(c) for c in range(0 if largest is None else largest + 1)]
    names = given.cast(pa.string())
    if class_names is None:
        class_names = sorted(pc.unique(names).drop_null().to_pylist())
    labels = pc.index_in(names, value_set=pa.array(class_names, pa.string()))
    strange = pc.and_(labels.is_null(), names.is_valid())
    if (row := pc.index(strange, True).as_py()) >= 0:
        raise ValueError(
            f"label must be one of the {len(class_names)} class names, "
            f"got {names[row].as_py()!r} in row {row}"
        )
    return labels, class_names


def _folder_of(path: str, root: PathLike | None) -> str:
    if root is not None:
        return os.fspath(root) if "://" in os.fspath(root) else os.path.abspath(root)
    return path.rpartition("/")[0] if "://" in path else os.path.dirname(os.path.abspath(path))
