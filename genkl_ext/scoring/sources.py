"""Prediction files of every kind, read a piece at a time: a :class:`Source` of (N, k) numbers.

    .npy                      an array, C or Fortran order, any byte order
    .npz                      one of its arrays, stored or compressed
    .safetensors              one of its tensors
    .parquet .arrow .feather  a column of lists of k numbers, or k columns of numbers
    .zarr                     an array (needs the package zarr)
    .bin .raw                 numbers and nothing else, of a stated type

Local files, or URLs of any file system that fsspec knows. Several files in a row are one source
(:class:`Shards`). Nothing is unpickled, and no size that a file states is believed before the file
has that many bytes.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("float16", "bfloat16", "float32", "float64")
SUFFIXES = (
    ".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".feather", ".zarr", ".bin", ".raw",
)  # fmt: skip
SAMPLE_BLOCKS = 64
SAMPLE_BYTES = 1 << 16
_LARGEST_HEADER = 100 << 20  # bytes; what safetensors itself allows
# What zipfile raises on archives that are damaged, or use what it does not know.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a prediction file was when it was scored.

    ``sample`` is not a digest of everything: reading is limited by memory or disk, and a digest
    of every byte would take several times as long as scoring. It is the BLAKE2b-128 of up to 64
    blocks of 64 KiB, evenly spaced from the first byte (with the header) to the last; files up to
    4 MiB are digested whole. Predictions of another model, or in another order, differ in it; a
    few entries changed by hand between the blocks show in ``modified`` only.
    """

    name: str  #: file name without folder; its array's after a colon, where it has several
    size: int  #: bytes
    shape: tuple[int, int]  #: (N, k)
    dtype: str
    modified: int  #: last change, nanoseconds since 1970; 0 where the file system does not say
    sample: str  #: hexadecimal


class Source:
    """(N, k) numbers in a file, read a piece at a time, by any threads.

    Attributes:
        name: path or URL, for messages.
        shape: (N, k).
        dtype: one of ``DTYPES``.
    """

    name: str
    shape: tuple[int, int]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, once read."""
        return self.shape[1] * _itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, once read."""
        return self.shape[0] * self.row_bytes

    def rows(self, start: int, stop: int) -> Any:
        """(stop - start, k) rows, in this machine's byte order; bfloat16 as a torch tensor.

        Raises:
            OSError: they cannot be read, or the file has become shorter.
        """
        raise NotImplementedError

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """Of the files, in their order."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if a file was written to since it was opened."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the files."""
        raise NotImplementedError

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Bytes:
    """A file, local or of fsspec, as bytes at places."""

    def __init__(self, path: PathLike) -> None:
        self.name = os.fspath(path)
        self._remote: Any = None
        if _URL.match(self.name) and not self.name.startswith("file://"):
            self._open_remote()
        else:
            self._open_local()

    def _open_local(self) -> None:
        path = Path(self.name.removeprefix("file://"))
        require_file(path)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._stat = os.fstat(self._file)
        self.size, self.modified = self._stat.st_size, self._stat.st_mtime_ns

    def _open_remote(self) -> None:
        import fsspec

        system, path = fsspec.core.url_to_fs(self.name)
        try:
            about = system.info(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"score: {self.name} does not exist") from None
        if about.get("type") == "directory":
            raise IsADirectoryError(f"score: {self.name} is a folder")
        self._remote, self._path = system, path
        self.size, self.modified = int(about["size"]), 0
        self._identity = _identity(about)

    @property
    def basename(self) -> str:
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    def read(self, offset: int, count: int) -> bytearray:
        """Exactly so many bytes."""
        if offset + count > self.size:
            raise EOFError(f"score: {self.name} is truncated: it has {self.size} bytes")
        content = bytearray(count)
        self.read_into(offset, memoryview(content))
        return content

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out``, bytes, from a place of the file."""
        if self._remote is not None:
            got = self._remote.cat_file(self._path, start=offset, end=offset + len(out))
            if len(got) != len(out):
                raise OSError(f"score: {self.name} became shorter while it was read")
            out[:] = got
            return
        while out:
            try:
                count = os.preadv(self._file, [out], offset)
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise OSError(error.errno, f"score: {self.name} cannot be read: {reason}") from None
            if count == 0:
                raise OSError(f"score: {self.name} became shorter while it was read")
            out, offset = out[count:], offset + count

    def open(self) -> Any:
        """A seekable file object of one's own."""
        if self._remote is not None:
            return self._remote.open(self._path, "rb")
        return open(os.dup(self._file), "rb", closefd=True)

    def sample(self) -> str:
        """BLAKE2b-128 of evenly spaced blocks, as :class:`Fingerprint` describes."""
        return sample_digest(self.size, lambda begin, count: self.read(begin, count))

    def check_unchanged(self) -> None:
        if self._remote is not None:
            same = _identity(self._remote.info(self._path)) == self._identity
        else:
            now = os.fstat(self._file)
            same = (now.st_size, now.st_mtime_ns) == (self.size, self.modified)
        if not same:
            raise ValueError(f"score: {self.name} was changed while it was read")

    def close(self) -> None:
        if self._remote is None:
            os.close(self._file)


class _OneFile(Source):
    """What sources of one file share."""

    def __init__(self, file: Bytes, array: str | None = None) -> None:
        self._file = file
        self._array = array
        self.name = file.name

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        name = self._file.basename + (f":{self._array}" if self._array else "")
        return (
            Fingerprint(
                name, self._file.size, self.shape, self.dtype, self._file.modified,
                self._file.sample(),
            ),
        )  # fmt: skip

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


class Packed(_OneFile):
    """Numbers that lie in a file one after another, from a place on."""

    def __init__(
        self,
        file: Bytes,
        offset: int,
        shape: tuple[int, ...],
        dtype: str,
        *,
        column_major: bool = False,
        byte_order: str = "<",
        array: str | None = None,
        end: int | None = None,
    ) -> None:
        super().__init__(file, array)
        if dtype not in DTYPES:
            raise ValueError(f"score: {file.name} must hold {', '.join(DTYPES)}, got {dtype}")
        if len(shape) != 2:
            raise ValueError(f"score: {file.name} must have shape (N, k), got {shape}")
        self.shape, self.dtype = (shape[0], shape[1]), dtype
        stored = "<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder(byte_order)  # type: ignore[arg-type]
        self._stored = np.dtype(stored)
        self._offset, self._column_major = offset, column_major
        wanted = offset + self.nbytes
        size = file.size if end is None else end
        if size != wanted:
            what = "is truncated" if size < wanted else "has more after its array"
            raise ValueError(
                f"score: {file.name} {what}: {self.shape} {dtype} takes {wanted} bytes, "
                f"the file has {size}"
            )

    def rows(self, start: int, stop: int) -> Any:
        n, k, size = stop - start, self.shape[1], self._stored.itemsize
        if self._column_major:
            columns = np.empty((k, n), self._stored)
            for c in range(k):
                place = self._offset + (c * self.shape[0] + start) * size
                self._file.read_into(place, _bytes(columns[c]))
            rows = columns.T
        else:
            rows = np.empty((n, k), self._stored)
            self._file.read_into(self._offset + start * k * size, _bytes(rows))
        return _native(rows, self.dtype)


class Zipped(_OneFile):
    """A compressed array of an ``.npz`` file: read in order, from the beginning."""

    def __init__(self, file: Bytes, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        name = member.filename.removesuffix(".npy")
        super().__init__(file, name)
        self._archive, self._member = archive, member
        with archive.open(member) as stream:
            shape, column_major, dtype, self._offset = _npy_header(stream, file.name)
        if column_major:
            raise ValueError(
                f"score: {file.name}: {name} is compressed and in Fortran order, which cannot be "
                "read a piece at a time; save it with np.savez, or in C order"
            )
        if len(shape) != 2 or dtype.newbyteorder("=").name not in DTYPES:
            raise ValueError(
                f"score: {file.name}: {name} must be (N, k) of {', '.join(DTYPES)}, got {shape} "
                f"{dtype}"
            )
        self.shape, self.dtype = (shape[0], shape[1]), dtype.newbyteorder("=").name
        self._stored = dtype
        self._stream: Any = None
        self._at = 0
        self._lock = Lock()
        wanted = self._offset + self.nbytes
        if member.file_size != wanted:
            raise ValueError(
                f"score: {file.name}: {name} must take {wanted} bytes, got {member.file_size}"
            )

    def rows(self, start: int, stop: int) -> Any:
        with self._lock:
            row = self.shape[1] * self._stored.itemsize
            if self._stream is None or start < self._at:
                self._stream = self._archive.open(self._member)
                self._at = 0
                self._skip(self._offset)
            self._skip((start - self._at) * row)
            rows = np.empty((stop - start, self.shape[1]), self._stored)
            view = _bytes(rows)
            while view:
                piece = self._some(len(view))
                view[: len(piece)] = piece
                view = view[len(piece) :]
            self._at = stop
            return _native(rows, self.dtype)

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._some(count))

    def _some(self, most: int) -> bytes:
        """The next bytes of the array, at least one."""
        try:
            piece: bytes = self._stream.read(min(most, 1 << 20))
        except _ZIP_ERRORS as error:
            raise OSError(f"score: {self.name} is damaged: {error}") from error
        if not piece:
            raise OSError(f"score: {self.name} is damaged: {self._array} ends early")
        return piece

    def close(self) -> None:
        self._archive.close()
        super().close()


class Table(_OneFile):
    """A Parquet or Arrow file: one column of lists of k numbers, or k columns of numbers."""

    def __init__(self, file: Bytes, columns: Sequence[str] | None) -> None:
        import pyarrow as pa

        super().__init__(file)
        self._handle = file.open()
        try:
            self._read_group, self._starts, schema = (
                _parquet if file.basename.endswith(".parquet") else _arrow
            )(self._handle)
        except (pa.ArrowInvalid, OSError) as error:
            self._handle.close()
            kind = "Parquet" if file.basename.endswith(".parquet") else "Arrow"
            raise ValueError(f"score: {file.name} is not {kind} or is damaged: {error}") from error
        try:
            self._columns = _columns_of(schema, columns, file.name)
            self._array = ",".join(self._columns)
            self.dtype, k = self._kind(schema)
        except BaseException:
            self._handle.close()
            raise
        self.shape = (int(self._starts[-1]), k)
        self._group: tuple[int, NDArray[Any]] | None = None
        self._lock = Lock()

    def rows(self, start: int, stop: int) -> Any:
        k = self.shape[1]
        pieces = []
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        while start < stop:
            begin, end = int(self._starts[first]), int(self._starts[first + 1])
            until = min(stop, end)
            if until > start:
                pieces.append(self._group_rows(first)[start - begin : until - begin])
                start = until
            first += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, k), self.dtype)

    def close(self) -> None:
        self._handle.close()
        super().close()

    def _group_rows(self, group: int) -> NDArray[Any]:
        """The rows of a row group; the last one stays in memory."""
        with self._lock:
            if self._group is None or self._group[0] != group:
                self._group = None  # before the next one is there
                self._group = (group, self._decode(group))
            return self._group[1]

    def _decode(self, group: int) -> NDArray[Any]:
        import pyarrow as pa

        try:
            table = self._read_group(group, self._columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise OSError(f"score: {self.name} is damaged: {error}") from error
        begin, k = int(self._starts[group]), self.shape[1]
        if len(self._columns) == 1 and k > 1:
            column = table.column(0)
            column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            numbers = column.flatten()
            if column.null_count or numbers.null_count or len(numbers) != len(column) * k:
                raise ValueError(self._describe_gap(column, begin))
            return numbers.to_numpy(zero_copy_only=False).reshape(-1, k)
        rows = np.empty((table.num_rows, k), self.dtype)
        for c in range(k):
            column = table.column(c)
            if column.null_count:
                row = begin + int(np.asarray(column.is_null()).argmax())
                raise ValueError(
                    f"score: {self.name}: column {self._columns[c]} is null at row {row}"
                )
            rows[:, c] = column.to_numpy()
        return rows

    def _describe_gap(self, column: Any, begin: int) -> str:
        for i in range(len(column)):
            row = column[i].as_py()
            where = f"score: {self.name}: column {self._columns[0]}"
            if row is None or None in row:
                return f"{where} is null at row {begin + i}"
            if len(row) != self.shape[1]:
                return (
                    f"{where} must hold {self.shape[1]} numbers, got {len(row)} at row {begin + i}"
                )
        raise AssertionError("no gap")

    def _kind(self, schema: Any) -> tuple[str, int]:
        """dtype and k."""
        import pyarrow as pa

        kinds = [schema.field(name).type for name in self._columns]
        lists = [kind for kind in kinds if hasattr(kind, "value_type")]
        if lists and len(kinds) > 1:
            raise ValueError(
                f"score: {self.name} must have one column of lists, or columns of numbers, got "
                f"both: {', '.join(self._columns)}"
            )
        numbers = {kind.value_type if lists else kind for kind in kinds}
        known = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}
        if len(numbers) != 1 or not numbers <= known.keys():
            raise ValueError(
                f"score: {self.name}: {', '.join(self._columns)} must be of one type of "
                f"{', '.join(known.values())}, got {', '.join(sorted(map(str, numbers)))}"
            )
        dtype = known[numbers.pop()]
        if not lists:
            return dtype, len(kinds)
        if pa.types.is_fixed_size_list(lists[0]):
            return dtype, lists[0].list_size
        # Lists of any length: the first row says how long, the others are held to it.
        for group in range(len(self._starts) - 1):
            column = self._read_group(group, self._columns).column(0)
            for i in range(min(1, len(column))):
                value = column[i].as_py()
                if value is not None:
                    return dtype, len(value)
        raise ValueError(f"score: {self.name}: column {self._columns[0]} has no first row")


class Zarr(Source):
    """An array of a Zarr store."""

    def __init__(self, path: PathLike, array: str | None) -> None:
        try:
            import zarr
        except ImportError as error:
            raise ImportError(f"score: {path} needs the package zarr: pip install zarr") from error
        self.name = os.fspath(path)
        try:
            store: Any = zarr.open(self.name, mode="r")
        except (FileNotFoundError, KeyError) as error:
            raise FileNotFoundError(f"score: {self.name} does not exist, or is not Zarr") from error
        if isinstance(store, zarr.Group):
            names = sorted(store.array_keys())
            store = store[_choose(names, array, self.name)]
        if len(store.shape) != 2 or str(store.dtype) not in DTYPES:
            raise ValueError(
                f"score: {self.name} must be (N, k) of {', '.join(DTYPES)}, got {store.shape} "
                f"{store.dtype}"
            )
        self._store = store
        self.shape, self.dtype = (store.shape[0], store.shape[1]), str(store.dtype)

    def rows(self, start: int, stop: int) -> Any:
        return np.ascontiguousarray(self._store[start:stop])

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """The sample is of up to 64 pieces of rows; a store has no time of change."""
        n, k = self.shape
        row = k * _itemsize(self.dtype)
        step = max(1, SAMPLE_BYTES // row)
        sample = sample_digest(
            n * row, lambda begin, _: self.rows(begin // row, min(n, begin // row + step)).tobytes()
        )
        name = self.name.rstrip("/").rsplit("/", 1)[-1]
        return (Fingerprint(name, self.nbytes, self.shape, self.dtype, 0, sample),)

    def check_unchanged(self) -> None:
        """A store does not tell."""

    def close(self) -> None:
        """Nothing is open."""


class Shards(Source):
    """Several files as one: the rows of the first, then those of the second ..."""

    def __init__(self, parts: Sequence[Source], name: str) -> None:
        self.name = name
        self._parts = list(parts)
        first = parts[0]
        for part in parts:
            if (part.shape[1], part.dtype) != (first.shape[1], first.dtype):
                raise ValueError(
                    f"score: {part.name} must be like {first.name}, {first.shape[1]} columns of "
                    f"{first.dtype}, got {part.shape[1]} of {part.dtype}"
                )
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape, self.dtype = (int(self._starts[-1]), first.shape[1]), first.dtype

    def rows(self, start: int, stop: int) -> Any:
        pieces = []
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        while start < stop:
            begin, end = int(self._starts[shard]), int(self._starts[shard + 1])
            until = min(stop, end)
            if until > start:
                pieces.append(self._parts[shard].rows(start - begin, until - begin))
                start = until
            shard += 1
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:
            return self._parts[0].rows(0, 0)
        if self.dtype == "bfloat16":
            import torch

            return torch.cat(pieces)
        return np.concatenate(pieces)

    def where(self, row: int) -> tuple[str, int]:
        """Name of the shard that holds a row, and its number there."""
        shard = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._parts[shard].name, row - int(self._starts[shard])

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        return tuple(f for part in self._parts for f in part.fingerprints())

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        for part in self._parts:
            part.close()


def open_source(
    path: PathLike,
    *,
    column: str | Sequence[str] | None = None,
    raw: tuple[str, int] | None = None,
) -> Source:
    """Open the predictions of one model.

    Args:
        path: a file or URL; a pattern (``p-*.npy``) or a folder, whose files in natural order
            (``p-2`` before ``p-10``) are the shards.
        column: which array, tensor or column, where the file has several; or the k columns.
        raw: dtype and k of ``.bin`` and ``.raw`` files.

    Raises:
        OSError: it cannot be read. ValueError: it is not what it should be. Both name the file.
    """
    name = os.fspath(path)
    names = _expand(name)
    if names is None:
        return _open_one(name, column, raw)
    with ExitStack() as stack:
        parts = [stack.enter_context(_open_one(one, column, raw)) for one in names]
        source = Shards(parts, name)
        stack.pop_all()
    return source


def open_shards(
    paths: Sequence[PathLike],
    *,
    column: str | Sequence[str] | None = None,
    raw: tuple[str, int] | None = None,
) -> Source:
    """Several files as the predictions of one model, in this order."""
    with ExitStack() as stack:
        parts = [stack.enter_context(open_source(path, column=column, raw=raw)) for path in paths]
        source = Shards(parts, f"{os.fspath(paths[0])} and {len(paths) - 1} more")
        stack.pop_all()
    return source


def open_models(
    paths: Sequence[PathLike],
    stack: ExitStack,
    *,
    column: str | Sequence[str] | None = None,
    raw: tuple[str, int] | None = None,
) -> list[Source]:
    """The predictions of M models, alike in shape and dtype; ``stack`` closes them."""
    models: list[Source] = []
    for path in paths:
        model = stack.enter_context(open_source(path, column=column, raw=raw))
        models.append(model)
        first = models[0]
        if (model.shape, model.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"score: {model.name} must be like {first.name}, {first.shape} {first.dtype}, "
                f"got {model.shape} {model.dtype}"
            )
    return models


def require_file(path: Path) -> None:
    """Raise ``OSError`` in one line unless ``path`` is a regular file."""
    if path.is_dir():
        raise IsADirectoryError(f"score: {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"score: {path} does not exist")
    if not path.is_file():
        raise OSError(f"score: {path} is not a regular file")


def sample_digest(size: int, read: Callable[[int, int], bytes | bytearray]) -> str:
    """BLAKE2b-128 of evenly spaced blocks of ``size`` bytes, as :class:`Fingerprint` describes."""
    if size <= SAMPLE_BLOCKS * SAMPLE_BYTES:
        places = list(range(0, size, SAMPLE_BYTES))
    else:
        last = SAMPLE_BLOCKS - 1
        places = [i * (size - SAMPLE_BYTES) // last for i in range(SAMPLE_BLOCKS)]
    digest = hashlib.blake2b(digest_size=16)
    for begin in places:
        digest.update(read(begin, min(SAMPLE_BYTES, size - begin)))
    return digest.hexdigest()


def natural(name: str) -> list[Any]:
    """Key for sorting: numbers by value, so that ``p-2`` comes before ``p-10``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _expand(name: str) -> list[str] | None:
    """The shards that a pattern or folder names, in natural order; None for a single file."""
    remote = _URL.match(name) and not name.startswith("file://")
    if name.rstrip("/").endswith(".zarr"):
        return None
    if remote:
        import fsspec

        system, path = fsspec.core.url_to_fs(name)
        if any(c in path for c in "*?["):
            found = [system.unstrip_protocol(one) for one in system.glob(path)]
        elif system.isdir(path):
            found = [system.unstrip_protocol(one) for one in system.ls(path, detail=False)]
        else:
            return None
    else:
        local = name.removeprefix("file://")
        if Path(local).is_dir():
            found = [str(one) for one in Path(local).iterdir()]
        elif not os.path.lexists(local) and any(c in local for c in "*?["):
            found = glob.glob(local)
        else:
            return None
    found = sorted((f for f in found if f.rstrip("/").endswith(SUFFIXES)), key=natural)
    if not found:
        raise FileNotFoundError(f"score: {name} holds no file of {', '.join(SUFFIXES)}")
    return found


def _open_one(name: str, column: str | Sequence[str] | None, raw: tuple[str, int] | None) -> Source:
    suffix = os.path.splitext(name.rstrip("/"))[1].lower()
    one = column if isinstance(column, str) or column is None else None
    if suffix == ".zarr":
        return Zarr(name, one)
    file = Bytes(name)
    try:
        if file.size == 0:
            raise ValueError(f"score: {name} is empty")
        if suffix == ".npz":
            return _open_npz(file, one)
        if suffix == ".safetensors":
            return _open_safetensors(file, one)
        if suffix in (".parquet", ".arrow", ".feather"):
            return Table(file, [column] if isinstance(column, str) else column)
        if suffix in (".bin", ".raw"):
            return _open_raw(file, raw)
        return _open_npy(file)
    except BaseException:
        file.close()
        raise


def _open_npy(file: Bytes) -> Source:
    with file.open() as stream:
        shape, column_major, dtype, offset = _npy_header(stream, file.name)
    kind = dtype.newbyteorder("=").name
    order = ">" if dtype.byteorder == ">" else "<"
    return Packed(file, offset, shape, kind, column_major=column_major, byte_order=order)


def _npy_header(stream: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, dtype, and where the numbers begin."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, column_major, dtype = read(stream)
    # NumPy reads the header as Python, and says what it meets there as Python does.
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"score: {name} is not a .npy file of numbers") from error
    if dtype.hasobject:
        raise ValueError(f"score: {name} holds pickled Python objects, which are not read")
    return shape, column_major, dtype, stream.tell()


def _open_npz(file: Bytes, array: str | None) -> Source:
    try:
        archive = zipfile.ZipFile(file.open())
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
    except _ZIP_ERRORS as error:
        raise ValueError(f"score: {file.name} is not a .npz file: {error}") from error
    try:
        member = members[_choose(list(members), array, file.name)]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            return Zipped(file, archive, member)
        with archive.open(member) as stream:
            shape, column_major, dtype, header = _npy_header(stream, file.name)
    except _ZIP_ERRORS as error:
        archive.close()
        raise ValueError(f"score: {file.name} is not a .npz file: {error}") from error
    except BaseException:
        archive.close()
        raise
    archive.close()
    # The local header, which may be longer than what the directory at the end says.
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(member.header_offset + 26, 4))
    begin = member.header_offset + 30 + name_bytes + extra_bytes
    kind = dtype.newbyteorder("=").name
    order = ">" if dtype.byteorder == ">" else "<"
    end = begin + member.file_size
    if end > file.size:
        raise ValueError(f"score: {file.name} is truncated: it has {file.size} bytes")
    return Packed(
        file, begin + header, shape, kind, column_major=column_major, byte_order=order,
        array=member.filename.removesuffix(".npy"), end=end,
    )  # fmt: skip


def _open_safetensors(file: Bytes, tensor: str | None) -> Source:
    kinds = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    try:
        length = int.from_bytes(file.read(0, 8), "little")
        if length > min(_LARGEST_HEADER, file.size - 8):
            raise ValueError(f"its header would have {length} bytes")
        header = json.loads(file.read(8, length))
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        places = {
            name: (
                about["dtype"],
                tuple(map(int, about["shape"])),
                *map(int, about["data_offsets"]),
            )
            for name, about in tensors.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, RecursionError) as error:
        raise ValueError(f"score: {file.name} is not a safetensors file: {error}") from error
    name = _choose(list(places), tensor, file.name)
    dtype, shape, begin, end = places[name]
    if not 0 <= begin <= end <= file.size - 8 - length or any(n < 0 for n in shape):
        raise ValueError(f"score: {file.name} is truncated: {name} ends beyond the file")
    offset = 8 + length + begin
    kind = kinds.get(dtype, dtype)
    return Packed(file, offset, shape, kind, array=name, end=8 + length + end)


def _open_raw(file: Bytes, raw: tuple[str, int] | None) -> Source:
    if raw is None:
        raise ValueError(f"score: {file.name} is raw numbers: raw must say their dtype and k")
    dtype, k = raw
    if dtype not in DTYPES:
        raise ValueError(f"score: raw must be of {', '.join(DTYPES)}, got {dtype!r}")
    row = k * _itemsize(dtype)
    if file.size % row:
        raise ValueError(
            f"score: {file.name} is truncated: rows of {k} {dtype} take {row} bytes, the file has "
            f"{file.size}"
        )
    return Packed(file, 0, (file.size // row, k), dtype)


def _parquet(handle: Any) -> tuple[Callable[[int, Sequence[str]], Any], NDArray[np.int64], Any]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(handle)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.cumsum([0, *groups])
    return (lambda g, names: file.read_row_group(g, list(names))), starts, file.schema_arrow


def _arrow(handle: Any) -> tuple[Callable[[int, Sequence[str]], Any], NDArray[np.int64], Any]:
    import pyarrow as pa

    file = pa.ipc.open_file(handle)
    rows = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
    starts = np.cumsum([0, *rows])
    return (lambda g, names: file.get_batch(g).select(list(names))), starts, file.schema


def _columns_of(schema: Any, columns: Sequence[str] | None, name: str) -> list[str]:
    """Those asked for; else the only column of lists, else all columns of floats."""
    import pyarrow as pa

    if columns is not None:
        for column in columns:
            if column not in schema.names:
                raise ValueError(
                    f"score: {name} must have a column {column!r}, got {', '.join(schema.names)}"
                )
        return list(columns)
    lists = [field.name for field in schema if hasattr(field.type, "value_type")]
    if lists:
        return [_choose(lists, None, name)]
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    if not floats:
        raise ValueError(
            f"score: {name} must have a column of lists of numbers, or columns of numbers, got "
            f"{', '.join(schema.names)}"
        )
    return floats


def _choose(names: Sequence[str], wanted: str | None, file: str) -> str:
    if wanted is not None and wanted in names:
        return wanted
    if wanted is None and len(names) == 1:
        return names[0]
    has = ", ".join(names) if names else "none"
    asked = "column must say which" if wanted is None else f"it must have {wanted!r}"
    raise ValueError(f"score: {file} holds {has}: {asked}")


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _native(rows: NDArray[Any], dtype: str) -> Any:
    if dtype == "bfloat16":
        import torch  # NumPy has no such numbers

        return torch.from_numpy(np.ascontiguousarray(rows).view(np.int16)).view(torch.bfloat16)
    kind = np.dtype(dtype)
    return rows.view(kind) if rows.dtype == kind else rows.astype(kind)


def _identity(about: dict[str, Any]) -> tuple[Any, ...]:
    """What changes when a file of fsspec does, as far as its system says."""
    return tuple(str(about.get(n)) for n in ("size", "mtime", "LastModified", "ETag", "created"))
