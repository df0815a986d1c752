"""``Manifest``: a data set as one table, one row per image.

manifest = Manifest.from_clothing1m(root)
noisy = manifest.split("train")        # row i is row i of every prediction file
noisy.labels, noisy.paths(), noisy.lookup(keys)
manifest.save("manifest.parquet"); Manifest.load("manifest.parquet")

key          string               as the lists of the data set write it
path         string               below ``root`` with "/", or absolute, or a URL
given_label  int32                null: no label
split        dictionary<string>   "train": the noisy crawled images, in the order of prediction
                                  files; "clean": verified training images; "val"; "test"
verified     bool                 the label was checked and is right, or wrong; null: nobody
                                  looked
kind         dictionary<string>   what a source says the picture is; for judging only, or null
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from ..files import atomic_write, settings_of
from ..relabel import class_ratio
from .folders import by_name, is_file

PathLike = str | os.PathLike[str]

SPLITS = ("train", "clean", "val", "test")
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("given_label", pa.int32()),
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("verified", pa.bool_()),
        pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
    ]
)
METADATA_KEY = b"genkl_ext.manifest"
# Splits whose class sizes make the published class ratios; for other data sets the clean images,
# or the noisy ones where no image is verified.
RATIO_SPLITS = {
    "clothing1m": ("clean",),
    "food101n": ("train", "clean", "val"),
    "webvision": ("train",),
}
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_NOT_BELOW_ROOT = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something odd that was found while a manifest was made, and did not stop it."""

    where: str  #: a file below the root, or a split
    what: str  #: in words, with the first case
    count: int  #: how many rows or lines

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    @classmethod
    def of_names(cls, odd: Sequence[str]) -> tuple[Problem, ...]:
        """The problem of files left out because their names are not UTF-8; none without such."""
        what = f"{len(odd):,} files whose name is not UTF-8, first {min(odd, default='')!r}"
        return (cls(".", what, len(odd)),) if odd else ()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Manifest:
    """A data set: its images in order, its classes, and where its files are. Never changes.

    Args:
        table: columns as in ``SCHEMA`` (``manifest.py`` describes them); columns that may be null
            may be absent.
        class_names: k names; class c is the c-th.
        dataset: name of the data set.
        root: folder or URL that relative paths start from.
        problems: what was odd when it was made.

    Raises:
        ValueError: a column is missing or of another type, a null where none may be, a label that
            is no class, or an unknown split; with the first row.
    """

    table: pa.Table
    class_names: tuple[str, ...]
    dataset: str
    root: str
    problems: tuple[Problem, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "root", os.fspath(self.root) or ".")
        object.__setattr__(self, "table", _normalised(self.table, len(self.class_names)))

    @classmethod
    def from_clothing1m(cls, root: PathLike, class_names: Sequence[str] | None = None) -> Manifest:
        """See :func:`genkl_ext.data.layouts.clothing1m.read`."""
        from .layouts import clothing1m

        return clothing1m.read(root, class_names)

    @classmethod
    def from_food101n(cls, root: PathLike) -> Manifest:
        """See :func:`genkl_ext.data.layouts.food101n.read`."""
        from .layouts import food101n

        return food101n.read(root)

    @classmethod
    def from_webvision(cls, root: PathLike, num_classes: int | None = None) -> Manifest:
        """See :func:`genkl_ext.data.layouts.webvision.read`."""
        from .layouts import webvision

        return webvision.read(root, num_classes)

    @classmethod
    def from_folder(cls, root: PathLike) -> Manifest:
        """See :func:`genkl_ext.data.layouts.folder.read`."""
        from .layouts import folder

        return folder.read(root)

    @classmethod
    def from_table(
        cls,
        path: PathLike,
        *,
        root: PathLike | None = None,
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Manifest:
        """See :func:`genkl_ext.data.layouts.table.read`."""
        from .layouts import table

        return table.read(path, root=root, columns=columns, splits=splits, class_names=class_names)

    @classmethod
    def load(cls, path: PathLike, root: PathLike | None = None) -> Manifest:
        """A manifest that was saved.

        Args:
            path: the Parquet file.
            root: where the images are now; by default where they were when it was saved.

        Raises:
            OSError: the file cannot be read. ValueError: it is not a manifest.
        """
        wanted = "a manifest that genkl_ext saved"
        saved = settings_of(path, METADATA_KEY, "manifest", wanted)
        return cls(
            pq.read_table(path),
            tuple(saved["class_names"]),
            saved["dataset"],
            saved["root"] if root is None else os.fspath(root),
            tuple(Problem(**problem) for problem in saved["problems"]),
        )

    def save(self, path: PathLike) -> None:
        """Write a Parquet file that :meth:`load` reads, complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        about = {
            "dataset": self.dataset,
            "root": self.root,
            "class_names": self.class_names,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
        }
        metadata = {METADATA_KEY: json.dumps(about).encode()}
        with atomic_write(path) as temporary:
            # Keys and paths hardly repeat: a dictionary of them costs time and saves nothing.
            table = self.table.replace_schema_metadata(metadata)
            pq.write_table(table, temporary, use_dictionary=["split", "kind"])

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        sizes = ", ".join(f"{count:,} {name}" for name, count in self.split_sizes().items())
        odd = f", {len(self.problems)} odd" if self.problems else ""
        return (
            f"Manifest({self.dataset}: {sizes or 'no images'}; {self.num_classes} classes"
            f"{odd}; root {self.root!r})"
        )

    @property
    def num_classes(self) -> int:
        """k."""
        return len(self.class_names)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(N,) int32, the given label of each row, -1 where there is none. Read-only."""
        labels: NDArray[np.int32] = _numpy(self.table["given_label"], -1).astype(np.int32)
        labels.flags.writeable = False
        return labels

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split, ascending; none if the data set lacks it."""
        _require_split(split)
        return np.flatnonzero(self._split_codes == SPLITS.index(split))

    def split(self, name: str) -> Manifest:
        """The rows of one split as a manifest of their own."""
        _require_split(name)
        return self.select(self._split_codes == SPLITS.index(name))

    def select(self, rows: ArrayLike) -> Manifest:
        """Some rows as a manifest: (n,) row numbers in the order wanted, or an (N,) bool mask."""
        chosen = np.asarray(rows)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(
                    f"manifest: a mask of rows must have shape ({len(self)},), got {chosen.shape}"
                )
            chosen = np.flatnonzero(chosen)
        table = self.table.take(self._row_numbers(chosen))
        return dataclasses.replace(self, table=table, problems=())

    def keys(self, rows: ArrayLike | None = None) -> list[str]:
        """Keys of all rows, or of these, in their order."""
        return self._column("key", rows).to_pylist()

    def paths(self, rows: ArrayLike | None = None) -> list[str]:
        """Full paths or URLs of all rows, or of these, in their order."""
        column = self._column("path", rows)
        full = pc.binary_join_element_wise(self.root.rstrip("/"), column, "/")
        return pc.if_else(
            pc.match_substring_regex(column, _NOT_BELOW_ROOT), column, full
        ).to_pylist()

    def path(self, row: int) -> str:
        """Full path or URL of one row."""
        return self.paths([row])[0]

    def lookup(
        self,
        keys: Any,
        *,
        split: str | None = None,
        prefix: str = "",
        missing: Literal["raise", "null"] = "raise",
    ) -> NDArray[np.int64]:
        """Rows of keys; the first row where several have the key.

        Args:
            keys: (n,) strings: a list, or an Arrow or NumPy array.
            split: look in this split only. A key may be in several.
            prefix: is not part of a key, here and there: "images/" makes "images/0/99/a.jpg" and
                "0/99/a.jpg" the same.
            missing: "null": unknown keys get the row -1.

        Returns:
            (n,) int64.

        Raises:
            KeyError: keys that no row has, with their number and the first few.
        """
        wanted = keys if isinstance(keys, (pa.Array, pa.ChunkedArray)) else pa.array(keys)
        wanted = wanted.cast(pa.string())
        rows = None if split is None else self.rows(split)
        known = self._column("key", rows)
        found = pc.index_in(without_prefix(wanted, prefix), value_set=without_prefix(known, prefix))
        position = _numpy(found, -1).astype(np.int64)
        absent = position < 0
        if missing == "raise" and absent.any():
            some = pc.drop_null(wanted.filter(pa.array(absent)).slice(0, 3)).to_pylist()
            where = "the manifest" if split is None else f"split {split}"
            raise KeyError(
                f"manifest: keys must be in {where}, got {absent.sum()} of {len(wanted)} that are "
                f"not: {', '.join(map(repr, some))}{', ...' if absent.sum() > len(some) else ''}"
            )
        return position if rows is None else np.where(absent, -1, rows[position])

    def split_sizes(self) -> dict[str, int]:
        """Number of rows of each split that has any."""
        counts = np.bincount(self._split_codes, minlength=len(SPLITS)).tolist()
        return {name: count for name, count in zip(SPLITS, counts, strict=True) if count}

    def class_counts(self, *splits: str) -> NDArray[np.int64]:
        """(k,) int64, how many rows of these splits, by default of all, carry each label."""
        labels = self.labels[self._in(splits)] if splits else self.labels
        return np.bincount(labels[labels >= 0], minlength=self.num_classes)

    def class_ratio(self, *splits: str) -> NDArray[np.float64]:
        """(k,) float64 normalized class ratio r of the labels of these splits.

        By default of those that the published ratios were made from: the clean images for
        Clothing1M, all but the test images for Food-101N, the noisy ones for mini WebVision; for
        other data sets the clean images or, where there are none, the noisy ones.

        Raises:
            ValueError: a class without an image.
        """
        if not splits:
            default = ("clean",) if "clean" in self.split_sizes() else ("train",)
            splits = RATIO_SPLITS.get(self.dataset, default)
        labels = self.labels[self._in(splits)]
        ratio: NDArray[np.float64] = class_ratio(labels[labels >= 0], self.num_classes)  # type: ignore[assignment]
        return ratio

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content: rows in order, class names, name of the data set.

        Two manifests that agree in these have the same, whatever their roots and however they
        were made or saved.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.dataset, self.class_names, len(self)]).encode())
        for name in SCHEMA.names:
            _feed(digest, self.table[name])
        return digest.hexdigest()

    def missing_files(self) -> NDArray[np.int64]:
        """Rows whose path is no file, ascending. URLs are not looked up.

        One listing of each folder, not a question per file: minutes less on a network disk.
        """
        paths = pa.array(self.paths(), pa.string())
        folders = pc.unique(pc.replace_substring_regex(paths, "/[^/]*$", "/"))
        present = pa.chunked_array(
            [_files_in(folder) for folder in folders.to_pylist()], pa.string()
        )
        local = pc.invert(pc.match_substring(paths, "://"))
        missing = pc.and_(local, pc.invert(pc.is_in(paths, value_set=present)))
        return np.flatnonzero(_numpy(missing))

    def describe(self) -> dict[str, Any]:
        """The facts for a screen or JSON: sizes, classes, labels, problems, fingerprint."""
        splits = {
            name: {
                "images": size,
                "without_label": int((self.labels[self.rows(name)] < 0).sum()),
                "classes": self.class_counts(name).tolist(),
            }
            for name, size in self.split_sizes().items()
        }
        return {
            "dataset": self.dataset,
            "root": self.root,
            "images": len(self),
            "class_names": list(self.class_names),
            "splits": splits,
            "verified_right": pc.sum(self.table["verified"]).as_py() or 0,
            "verified_wrong": pc.sum(pc.invert(self.table["verified"])).as_py() or 0,
            "kinds": {
                item["values"]: item["counts"]
                for item in pc.value_counts(self.table["kind"].cast(pa.string())).to_pylist()
                if item["values"] is not None
            },
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "fingerprint": self.fingerprint,
        }

    @cached_property
    def _split_codes(self) -> NDArray[np.int8]:
        """(N,) position in ``SPLITS`` of each row's split."""
        return _numpy(self.table["split"].combine_chunks().indices)

    def _in(self, splits: Sequence[str]) -> NDArray[np.bool_]:
        for split in splits:
            _require_split(split)
        return np.isin(self._split_codes, [SPLITS.index(split) for split in splits])

    def _column(self, name: str, rows: ArrayLike | None) -> pa.ChunkedArray:
        column = self.table[name]
        return column if rows is None else column.take(self._row_numbers(np.asarray(rows)))

    def _row_numbers(self, rows: NDArray[Any]) -> pa.Array:
        """``rows`` for Arrow, once each of them is known to be a row."""
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise ValueError(f"manifest: rows must be (n,) integers, got {rows.shape} {rows.dtype}")
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise IndexError(
                f"manifest: rows must be from 0 to {len(self) - 1}, got {rows[outside][0]}"
            )
        return pa.array(rows.astype(np.int64))


def is_manifest(path: PathLike) -> bool:
    """Whether a file is a manifest that :meth:`Manifest.save` wrote.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except pa.ArrowInvalid:
        return False


def without_prefix(keys: pa.Array | pa.ChunkedArray, prefix: str) -> pa.Array | pa.ChunkedArray:
    """Keys less the prefix, where they have it."""
    if not prefix:
        return keys
    rest = pc.utf8_slice_codeunits(keys, len(prefix))
    return pc.if_else(pc.starts_with(keys, prefix), rest, keys)


def _require_split(name: str) -> None:
    if name not in SPLITS:
        raise ValueError(f"manifest: split must be one of {', '.join(SPLITS)}, got {name!r}")


def _normalised(table: pa.Table, classes: int) -> pa.Table:
    """The columns of ``SCHEMA``, checked; a split is coded by its place in ``SPLITS``."""
    columns = []
    for field in SCHEMA:
        if field.name not in table.column_names and not field.nullable:
            raise ValueError(
                f"manifest: a table must have a column {field.name}, "
                f"got {', '.join(table.column_names) or 'none'}"
            )
        columns.append(_column(table, field))
    normal = pa.table(columns, SCHEMA).combine_chunks()

    label = normal["given_label"]
    outside = pc.or_(pc.less(label, 0), pc.greater_equal(label, classes))
    row = pc.index(outside, True).as_py()
    if row >= 0:
        raise ValueError(
            f"manifest: given_label must be from 0 to {classes - 1}, or null, "
            f"got {label[row]} at row {row}, key {normal['key'][row].as_py()!r}"
        )
    return normal


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """One column of ``SCHEMA``, from a table that has it in some form, or lacks it."""
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), field.type)])
    words = pa.types.is_dictionary(field.type)
    given = table[field.name]
    try:
        column = given.cast(pa.string() if words else field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"manifest: column {field.name} must be {field.type}, got {given.type}: {error}"
        ) from error
    if column.null_count and not field.nullable:
        row = pc.index(column.is_null(), True)
        raise ValueError(f"manifest: column {field.name} must not be null, got null at row {row}")
    if field.name != "split":
        return pc.dictionary_encode(column).cast(field.type) if words else column
    codes = pc.index_in(column, value_set=pa.array(SPLITS))
    if codes.null_count:
        row = pc.index(codes.is_null(), True).as_py()
        raise ValueError(
            f"manifest: split must be one of {', '.join(SPLITS)}, "
            f"got {column[row].as_py()!r} at row {row}"
        )
    chunks = [
        pa.DictionaryArray.from_arrays(chunk.cast(pa.int8()), pa.array(SPLITS))
        for chunk in codes.chunks
    ]
    return pa.chunked_array(chunks, field.type)


def _numpy(column: pa.Array | pa.ChunkedArray, null: Any = None) -> NDArray[Any]:
    """A column as a NumPy array, with ``null`` in the place of nulls."""
    if null is not None:
        column = pc.fill_null(column, null)
    return np.asarray(column)


def _feed(digest: Any, column: pa.ChunkedArray) -> None:
    """Feed a column's values to a digest: the same bytes however it is chunked or encoded."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if not pa.types.is_string(column.type):
        digest.update(_numpy(column.cast(pa.int32()), -1).astype("<i4"))
        return
    lengths = _numpy(pc.binary_length(column), -1)
    digest.update(lengths.astype("<i4"))
    for chunk in column.chunks:
        _, offsets, text = chunk.buffers()
        if text is None:
            continue  # nulls only
        first = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        digest.update(memoryview(text)[first[0] : first[-1]])


def _files_in(folder: str) -> pa.Array:
    """Full paths of the files in a folder; none if there can be no such folder.

    Files whose name is not UTF-8 are left out: no row can mean them.
    """
    try:
        with os.scandir(folder) as entries:
            files, _ = by_name(folder + entry.name for entry in entries if is_file(entry))
    except ValueError:  # a NUL in the path
        files = []
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            raise
        files = []
    return pa.array(files, pa.string())
