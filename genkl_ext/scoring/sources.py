"""Prediction files of every kind, read a piece at a time: a :class:`Source` of (N, k) numbers.

    .npy                      an array, C or Fortran order, any byte order
    .npz                      one of its arrays, stored or compressed
    .safetensors              one of its tensors
    .parquet .arrow .feather  a column of lists of k numbers, or k columns of numbers
    .zarr                     an array (needs the package zarr)
    .bin .raw                 numbers and nothing else, of a stated type

Local files, or URLs of any file system that fsspec knows. Several files in a row are one source
(:class:`Shards`). Nothing is unpickled, and no size that a file states is believed before the file
has that many bytes. Nulls of a table are read as NaN, which validation of the rows finds.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import json
import os
import re
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import naming
from ..rule import processors

DTYPES = ("float16", "bfloat16", "float32", "float64")
SUFFIXES = (
    ".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".feather", ".zarr", ".bin", ".raw",
)  # fmt: skip
_TABLES = (".parquet", ".arrow", ".feather")
SAMPLE_BLOCKS = 64
SAMPLE_BYTES = 1 << 16
OPEN_SHARDS = 64  # of all sources together; each takes up to two file descriptors
_LARGEST_HEADER = 100 << 20  # bytes; what safetensors itself allows
_LARGEST_NPY_HEADER = 1 << 16  # bytes; NumPy reads none above 10,000
# What zipfile raises on archives that are damaged, or use what it does not know.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
# What pyarrow raises, beside its own exceptions, and Zarr with its codecs.
_READER_ERRORS = (
    OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError, MemoryError, OverflowError,
    EOFError, zlib.error,
)  # fmt: skip
_DEFLATE_RATIO = 1032  # that of endless zeros; nothing is smaller
_READS_NEAR, _READS_FAR = 4, 8  # at a time, of a file on disk, and of one behind a URL
_PIECE_BYTES = 4 << 20  # of a row group that is decoded at a time
_BUFFERS = 32 << 20  # bytes that are read of its columns at a time, all together
_LEAST_BUFFER = 1 << 16
# Bytes of a number of a Parquet file once decoded; of text, what is usual.
_PHYSICAL_BYTES = {
    "BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 64,
}  # fmt: skip
_NOTHING = (-1, 0)
# Of what a system of fsspec tells of a file: what changes when it is written to.
_IDENTITY = (
    "size", "mtime", "created", "LastModified", "last_modified", "Last-Modified", "updated",
    "modify", "modificationTime", "ETag", "etag", "generation", "md5Hash", "Content-MD5", "Digest",
    "checksum", "CRC", "chksum", "sha", "blob_id",
)  # fmt: skip
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

# Held while files are read whose system does not allow several threads: members of an archive, say,
# are read from one place of it. One lock for all systems, for an archive may lie in an archive.
_one_by_one = RLock()

PathLike = str | os.PathLike[str]
# Gives the record batches of a row group, with some columns.
_Reader = Callable[[int, Sequence[str]], Iterator[Any]]


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


class MissingColumn(ValueError):
    """A file has no column of this name."""


class Source(ABC):
    """(N, k) numbers in a file, read a piece at a time, by any threads.

    Attributes:
        name: path or URL, for messages.
        shape: (N, k).
        dtype: one of ``DTYPES``.
        knows_k: False of a table of lists without a row that says how many numbers they hold; its
            k is 0 until :class:`Shards` tells it.
        state: what changes when the file is written to.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    knows_k: bool = True
    state: tuple[Any, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, once read."""
        return self.shape[1] * _itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, once read."""
        return self.shape[0] * self.row_bytes

    @abstractmethod
    def rows(self, start: int, stop: int) -> Any:
        """(stop - start, k) rows, in this machine's byte order; bfloat16 as a torch tensor.

        Raises:
            OSError: they cannot be read, or the file has become shorter.
        """

    def where(self, row: int) -> tuple[str, int]:
        """Name of the file that holds a row, and its number there."""
        return self.name, row

    def concurrent_reads(self) -> int:
        """How many pieces are best read at a time; 1 where they are cheapest in order."""
        return 1

    @abstractmethod
    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """Of the files, in their order."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if a file was written to since it was opened."""

    def states(self) -> tuple[str, ...]:
        """For each file, text that changes when it is written to, as far as its system says."""
        return (" ".join(map(str, self.state)),)

    def forget(self) -> None:  # noqa: B027 (most kinds keep none)
        """Let go of rows that are kept in memory for the next reading."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

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
        try:
            with naming(path):
                self._stat = os.fstat(self._file)
        except BaseException:
            os.close(self._file)
            raise
        self.size, self.modified = self._stat.st_size, self._stat.st_mtime_ns
        self.state: tuple[Any, ...] = (self.size, self.modified)

    def _open_remote(self) -> None:
        system, path = _file_system(self.name)
        self._turn = _turn(system)
        try:
            with self._turn:
                about = system.info(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"score: {self.name} does not exist") from None
        if about.get("type") == "directory":
            raise IsADirectoryError(f"score: {self.name} is a folder")
        if about.get("size") is None:
            raise OSError(f"score: {self.name} cannot be read: its server does not say its size")
        self._remote, self._path = system, path
        self.size, self.modified = int(about["size"]), 0
        self.state = (*_identity(about), *_archive_state(self.name))

    @property
    def concurrent_reads(self) -> int:
        """A far file is waited for more than read; a near one is read faster than by one thread
        where there are processors for it."""
        if self._remote is not None:
            return _READS_FAR if _reads_together(self._remote) else 1
        return max(1, min(_READS_NEAR, processors() // 2))

    @property
    def basename(self) -> str:
        return _basename(self.name)

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
            with self._turn:
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
                raise OSError(f"score: {self.name} cannot be read: {reason}") from error
            if count == 0:
                raise OSError(f"score: {self.name} became shorter while it was read")
            out, offset = out[count:], offset + count

    def open(self) -> Any:
        """A seekable file object of one's own."""
        if self._remote is not None:
            if _reads_together(self._remote):
                return self._remote.open(self._path, "rb")
            with self._turn:
                handle = self._remote.open(self._path, "rb")
            return io.BufferedReader(_Handle(handle, self.size))
        with naming(self.name):
            return open(os.dup(self._file), "rb", closefd=True)

    def sample(self) -> str:
        """BLAKE2b-128 of evenly spaced blocks, as :class:`Fingerprint` describes."""
        return sample_digest(self.size, lambda begin, count: self.read(begin, count))

    def check_unchanged(self) -> None:
        if self._remote is not None:
            with self._turn:
                self._remote.invalidate_cache(self._path)  # the listing of its folder
                about = self._remote.info(self._path)
            state: tuple[Any, ...] = (*_identity(about), *_archive_state(self.name))
        else:
            with naming(self.name):
                now = os.fstat(self._file)
            state = (now.st_size, now.st_mtime_ns)
        _require_state(self.name, state, self.state)

    def close(self) -> None:
        if self._remote is None:
            os.close(self._file)


class _Handle(io.RawIOBase):
    """A file object with a place of its own, where those of the system may share one."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"a place in a file must be 0 or more, got {origin + offset}")
        self._at = origin + offset
        return self._at

    def readinto(self, out: Any) -> int:
        with _one_by_one:
            self._file.seek(self._at)
            content = self._file.read(len(out))
        out[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            with _one_by_one:
                self._file.close()
        super().close()


class _OneFile(Source):
    """What sources of one file share."""

    def __init__(self, file: Bytes, array: str | None = None) -> None:
        self._file = file
        self._array = array
        self.name, self.state = file.name, file.state

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
        return native(rows, self.dtype)

    def concurrent_reads(self) -> int:
        return self._file.concurrent_reads


class Zipped(_OneFile):
    """A compressed array of an ``.npz`` file: read in order, from the beginning."""

    def __init__(
        self, file: Bytes, handle: Any, archive: zipfile.ZipFile, member: zipfile.ZipInfo
    ) -> None:
        name = member.filename.removesuffix(".npy")
        super().__init__(file, name)
        self._handle, self._archive, self._member = handle, archive, member
        shape, column_major, dtype, self._offset = _npz_header(archive, member, file.name)
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
        packed = member.compress_size
        if member.compress_type == zipfile.ZIP_DEFLATED and wanted > _DEFLATE_RATIO * (packed + 1):
            raise ValueError(
                f"score: {file.name}: {name} must take {wanted} bytes, which its {packed} bytes in "
                "the archive cannot hold"
            )

    def rows(self, start: int, stop: int) -> Any:
        with self._lock:
            row = self.shape[1] * self._stored.itemsize
            if self._stream is None or start < self._at:
                try:
                    self._stream = self._archive.open(self._member)
                except _ZIP_ERRORS as error:
                    raise OSError(f"score: {self.name} is damaged: {_line(error)}") from error
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
            return native(rows, self.dtype)

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._some(count))

    def _some(self, most: int) -> bytes:
        """The next bytes of the array, at least one."""
        try:
            piece: bytes = self._stream.read(min(most, 1 << 20))
        except _ZIP_ERRORS as error:
            raise OSError(f"score: {self.name} is damaged: {_line(error)}") from error
        if not piece:
            raise OSError(f"score: {self.name} is damaged: {self._array} ends early")
        return piece

    def close(self) -> None:
        self._archive.close()
        self._handle.close()
        super().close()


class Table(_OneFile):
    """A Parquet or Arrow file: one column of lists of k numbers, or k columns of numbers."""

    def __init__(self, file: Bytes, columns: Sequence[str] | None) -> None:
        super().__init__(file)
        parquet = file.basename.lower().endswith(".parquet")
        kind = "Parquet" if parquet else "Arrow"
        self._handle = file.open()
        try:
            try:
                with _damage(file.name):
                    self._read, self._starts, schema = (_parquet if parquet else _arrow)(
                        self._handle
                    )
            except OSError as error:
                cause = _line(error.__cause__ or error)
                raise ValueError(
                    f"score: {file.name} is not {kind} or is damaged: {cause}"
                ) from error
            self._columns = _columns_of(schema, columns, file.name)
            self._array = ",".join(self._columns)
            self._kind(schema)
        except BaseException:
            self._handle.close()
            raise
        self._lock = Lock()
        self.forget()

    def rows(self, start: int, stop: int) -> Any:
        k = self.shape[1]
        pieces = []
        group = int(np.searchsorted(self._starts, start, "right")) - 1
        with self._lock:
            while start < stop:
                begin, end = int(self._starts[group]), int(self._starts[group + 1])
                until = min(stop, end)
                while start < until:
                    first, rows = self._piece_with(group, start - begin)
                    pieces.append(rows[start - begin - first : until - begin - first])
                    start += len(pieces[-1])
                group += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, k), self.dtype)

    def forget(self) -> None:
        with self._lock:
            self._stream: Iterator[Any] = iter(())
            self._next = _NOTHING  # group and row of what the stream gives next
            self._piece: tuple[int, int, NDArray[Any]] | None = None  # group, first row, rows

    def close(self) -> None:
        self.forget()
        self._handle.close()
        super().close()

    def _piece_with(self, group: int, row: int) -> tuple[int, NDArray[Any]]:
        """Some rows of a group, this one among them, and the number of the first. They stay in
        memory until the next ones are wanted, which are the neighbours if all goes well."""
        if self._piece is not None:
            of, first, rows = self._piece
            if of == group and first <= row < first + len(rows):
                return first, rows
        self._piece = None  # before the next one is there
        if self._next[0] != group or self._next[1] > row:
            self._stream, self._next = self._batches(group), (group, 0)
        in_group = int(self._starts[group + 1] - self._starts[group])
        while True:
            first, self._next = self._next[1], _NOTHING  # if it is damaged
            batch = next(self._stream, None)
            until = first + (0 if batch is None else batch.num_rows)
            if batch is None or until > in_group:
                raise OSError(
                    f"score: {self.name} is damaged: row group {group} has {until} rows, "
                    f"not {in_group}"
                )
            self._next = (group, until)
            if row < until:
                rows = self._decode(batch, group, first)
                self._piece = (group, first, rows)
                return first, rows

    def _decode(self, batch: Any, group: int, first: int) -> NDArray[Any]:
        """Its rows, NaN where the table has a null."""
        columns = self._arrays(batch)
        k = self.shape[1]
        if not self._lists:
            rows = np.empty((len(columns[0]), k), self.dtype)
            for c, column in enumerate(columns):
                rows[:, c] = column.to_numpy(zero_copy_only=False)
            return rows
        with _damage(self.name):
            other = first_of_other_length(columns[0], k)
        if other is not None:
            row = int(self._starts[group]) + first + other[0]
            raise ValueError(
                f"score: {self.name}: column {self._columns[0]} must hold {k} numbers, got "
                f"{other[1]} at row {row}"
            )
        with _damage(self.name):
            return list_rows(columns[0], k)[0]

    def _batches(self, group: int) -> Iterator[Any]:
        """A row group as record batches, checked so that nothing in them leads out of them."""
        with _damage(self.name):
            batches = self._read(group, self._columns)
            while (batch := next(batches, None)) is not None:
                # The buffers are as the file has them: offsets beyond their end would be followed.
                batch.validate(full=True)
                yield batch

    def _arrays(self, batch: Any) -> list[Any]:
        import pyarrow as pa

        # Parquet gives columns in its own order.
        columns = [batch.column(name) for name in self._columns]
        return [c.storage if isinstance(c, pa.ExtensionArray) else c for c in columns]

    def _kind(self, schema: Any) -> None:
        """Set dtype and shape."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kinds = [_stored(schema.field(name).type) for name in self._columns]
        lists = [kind for kind in kinds if _is_list(kind)]
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
        self.dtype = known[numbers.pop()]
        self._lists = bool(lists)
        if not lists:
            k = len(kinds)
        elif pa.types.is_fixed_size_list(lists[0]):
            k = lists[0].list_size
        else:
            # Lists of any length: the first that is not null says how long they all must be.
            k = None
            groups = range(len(self._starts) - 1)
            for batch in (batch for group in groups for batch in self._batches(group)):
                (column,) = self._arrays(batch)
                with _damage(self.name):
                    lengths = pc.drop_null(pc.list_value_length(column))
                if len(lengths):
                    k = lengths[0].as_py()
                    break
        if k == 0:
            raise ValueError(f"score: {self.name}: column {self._columns[0]} holds empty lists")
        self.knows_k = k is not None
        self.shape = (int(self._starts[-1]), k or 0)

    def set_k(self, k: int) -> None:
        """Say how many numbers a row has, where none of the file does."""
        self.shape, self.knows_k = (self.shape[0], k), True


class Text(Table):
    """A column of text, or of integers as text, in a Parquet or Arrow file: (N, 1) objects."""

    def _kind(self, schema: Any) -> None:
        import pyarrow as pa

        (name,) = self._columns
        kind = _stored(schema.field(name).type)
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}
        if str(value) not in texts and not pa.types.is_integer(value):
            raise ValueError(
                f"score: {self.name}: column {name} must hold text or integers, got {kind}"
            )
        self.dtype, self.shape = "object", (int(self._starts[-1]), 1)

    def _decode(self, batch: Any, group: int, first: int) -> NDArray[Any]:
        import pyarrow as pa
        import pyarrow.compute as pc

        (column,) = self._arrays(batch)
        with _damage(self.name):
            if isinstance(column, pa.DictionaryArray):
                column = column.dictionary_decode()
        try:
            text = column.cast(pa.large_string())
        except pa.ArrowInvalid as error:
            row, content = _first_not_utf8(column)
            raise ValueError(
                f"score: {self.name}: column {self._columns[0]} must hold UTF-8 text, got "
                f"{content!r} at row {int(self._starts[group]) + first + row}"
            ) from error
        with _damage(self.name):
            broken = pc.or_(
                pc.equal(pc.binary_length(text), 0), pc.match_substring_regex(text, "[\r\n]")
            )
            wrong = pc.index(pc.fill_null(broken, True), True).as_py()
            rows: NDArray[Any] = text.to_numpy(zero_copy_only=False).reshape(-1, 1)
        if wrong >= 0:
            raise ValueError(
                f"score: {self.name}: column {self._columns[0]} must hold text of one line, got "
                f"{rows[wrong, 0]!r} at row {int(self._starts[group]) + first + wrong}"
            )
        return rows


class Zarr(Source):
    """An array of a Zarr store.

    A chunk that is not in the store holds the array's fill value: that is how Zarr stores it, and
    a chunk that was lost looks the same. A fill value of NaN, or of 0, is found by validation of
    probabilities; a fill value of 0 in logits is a prediction like others.
    """

    def __init__(self, path: PathLike, array: str | None) -> None:
        try:
            import zarr
        except ImportError as error:
            raise ImportError(f"score: {path} needs the package zarr: pip install zarr") from error
        self.name = os.fspath(path)
        self._turn: Callable[[], AbstractContextManager[Any]] = nullcontext
        if _URL.match(self.name) and not self.name.startswith("file://"):
            system, _ = _file_system(self.name)
            if not _reads_together(system):
                self._turn = _zarr_turn
        self.state = _store_state(self.name)
        try:
            with self._turn():
                store: Any = zarr.open(self.name, mode="r")
                names = sorted(store.array_keys()) if isinstance(store, zarr.Group) else None
        except (FileNotFoundError, KeyError) as error:
            raise FileNotFoundError(f"score: {self.name} does not exist, or is not Zarr") from error
        except _READER_ERRORS as error:
            raise ValueError(
                f"score: {self.name} is not Zarr or is damaged: {_line(error)}"
            ) from error
        if names is not None:
            chosen = _choose(names, array, self.name)
            with self._turn():
                store = store[chosen]
        if len(store.shape) != 2 or store.dtype.name not in DTYPES:
            raise ValueError(
                f"score: {self.name} must be (N, k) of {', '.join(DTYPES)}, got {store.shape} "
                f"{store.dtype}"
            )
        self._store = store
        self.shape, self.dtype = (store.shape[0], store.shape[1]), store.dtype.name

    def rows(self, start: int, stop: int) -> Any:
        return native(self._stored_rows(start, stop), self.dtype)

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """The sample is of up to 64 pieces of rows; a store has no time of change."""
        n, k = self.shape
        row = max(1, k * _itemsize(self.dtype))
        step = max(1, SAMPLE_BYTES // row)

        def read(begin: int, _: int) -> bytes:
            first = begin // row
            return self._stored_rows(first, min(n, first + step)).tobytes()

        name = _basename(self.name)
        sample = sample_digest(n * row, read)
        return (Fingerprint(name, self.nbytes, self.shape, self.dtype, 0, sample),)

    def check_unchanged(self) -> None:
        _require_state(self.name, _store_state(self.name), self.state)

    def close(self) -> None:
        """Nothing is open."""

    def _stored_rows(self, start: int, stop: int) -> NDArray[Any]:
        try:
            with self._turn():
                return np.ascontiguousarray(self._store[start:stop])
        except _READER_ERRORS as error:
            raise OSError(f"score: {self.name} is damaged: {_line(error)}") from error


class _Shard:
    """A file of several: open while its rows are read, and afterwards as one of the last used."""

    def __init__(self, name: str, open_one: Callable[[str], Source]) -> None:
        self.name = name
        self._open_one = open_one
        self._lock = Lock()
        self._source: Source | None = None
        self._users = 0
        self._fingerprints: tuple[Fingerprint, ...] | None = None
        self.state: tuple[Any, ...] | None = None
        self.states: tuple[str, ...] = ()
        self.k: int | None = None
        with self.use() as source:
            self.state, self.states = source.state, source.states()
            self.rows, self.dtype = source.shape[0], source.dtype
            self.concurrent_reads = source.concurrent_reads()
            self.k = source.shape[1] if source.knows_k else None

    @contextmanager
    def use(self) -> Iterator[Source]:
        """The open file, which nobody closes in the meantime."""
        with self._lock:
            if self._source is None:
                self._source = self._open()
            source = self._source
            if isinstance(source, Table) and not source.knows_k and self.k is not None:
                source.set_k(self.k)
            self._users += 1
        try:
            yield source
        finally:
            with self._lock:
                self._users -= 1
            _keep_open(self)

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        if self._fingerprints is None:
            with self.use() as source:
                self._fingerprints = source.fingerprints()
        return self._fingerprints

    def check_unchanged(self) -> None:
        with self._lock:
            if self._source is not None:
                self._source.check_unchanged()
                return
        if self.state is not None:
            _require_state(self.name, _state_of(self.name), self.state)

    def close_unused(self) -> None:
        with self._lock:
            if self._source is not None and not self._users:
                self._source.close()
                self._source = None

    def _open(self) -> Source:
        source = self._open_one(self.name)
        try:
            if self.state is not None:
                _require_state(self.name, source.state, self.state)
        except BaseException:
            source.close()
            raise
        return source


_last_used: OrderedDict[_Shard, None] = OrderedDict()
_last_used_lock = Lock()


def _keep_open(shard: _Shard) -> None:
    """Close those that were used longest ago, if there are too many with this one."""
    with _last_used_lock:
        _last_used[shard] = None
        _last_used.move_to_end(shard)
        too_many = len(_last_used) - OPEN_SHARDS
        unused = [_last_used.popitem(last=False)[0] for _ in range(too_many)]
    # Not under the lock: who opens a shard holds its lock. One in use comes back here after it.
    for one in unused:
        one.close_unused()


class Shards(Source):
    """Several files as one: the rows of the first, then those of the second ...

    Each is opened to learn its shape, and again when its rows are read. The last used stay open,
    ``OPEN_SHARDS`` of all sources together, so that there may be more shards than a process may
    have open files. A shard that changed in between is an error.
    """

    def __init__(self, names: Sequence[str], name: str, open_one: Callable[[str], Source]) -> None:
        self.name = name
        self._shards: list[_Shard] = []
        with ExitStack() as stack:
            stack.callback(self.close)
            for one in names:
                try:
                    self._shards.append(_Shard(one, open_one))
                except MissingColumn as error:
                    if not self._shards:
                        raise
                    raise ValueError(str(error)) from None  # others have it
            first = next((shard for shard in self._shards if shard.k is not None), None)
            if first is None or first.k is None:
                raise _no_k(name)
            for shard in self._shards:
                # A shard without a row has nothing to say against the others.
                shard.k = first.k if shard.k is None else shard.k
                if (shard.k, shard.dtype) != (first.k, first.dtype):
                    raise ValueError(
                        f"score: {shard.name} must be like {first.name}, {first.k} columns of "
                        f"{first.dtype}, got {shard.k} of {shard.dtype}"
                    )
            self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
            self._concurrent_reads = min(shard.concurrent_reads for shard in self._shards)
            self.shape, self.dtype = (int(self._starts[-1]), first.k), first.dtype
            stack.pop_all()

    def rows(self, start: int, stop: int) -> Any:
        pieces = []
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        while start < stop:
            begin, end = int(self._starts[shard]), int(self._starts[shard + 1])
            until = min(stop, end)
            if until > start:
                with self._shards[shard].use() as source:
                    pieces.append(source.rows(start - begin, until - begin))
                    if until == end:
                        source.forget()
                start = until
            shard += 1
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:
            with self._shards[0].use() as source:
                return source.rows(0, 0)
        if self.dtype == "bfloat16":
            import torch

            return torch.cat(pieces)
        return np.concatenate(pieces)

    def concurrent_reads(self) -> int:
        return self._concurrent_reads

    def where(self, row: int) -> tuple[str, int]:
        shard = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._shards[shard].name, row - int(self._starts[shard])

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        return tuple(f for shard in self._shards for f in shard.fingerprints())

    def check_unchanged(self) -> None:
        for shard in self._shards:
            shard.check_unchanged()

    def states(self) -> tuple[str, ...]:
        return tuple(state for shard in self._shards for state in shard.states)

    def close(self) -> None:
        for shard in self._shards:
            with _last_used_lock:
                _last_used.pop(shard, None)
            shard.close_unused()


def open_source(
    path: PathLike,
    *,
    column: str | Sequence[str] | None = None,
    raw: tuple[str, int] | None = None,
) -> Source:
    """Open the predictions of one model.

    Args:
        path: a file or URL; a pattern (``p-*.npy``) or a folder, whose files in natural order
            (``p-2`` before ``p-10``) are the shards, less those whose name begins with a dot.
        column: which array, tensor or column, where the file has several; or the k columns.
        raw: dtype and k of ``.bin`` and ``.raw`` files.

    Raises:
        OSError: it cannot be read. ValueError: it is not what it should be. Both name the file.
    """
    name = os.fspath(path)
    names = _expand(name)
    if names is not None:
        return Shards(names, name, partial(_open_one, column=column, raw=raw))
    source = _open_one(name, column, raw)
    if not source.knows_k:
        source.close()
        raise _no_k(name)
    return source


def open_shards(
    paths: Sequence[PathLike],
    *,
    column: str | Sequence[str] | None = None,
    raw: tuple[str, int] | None = None,
) -> Source:
    """Several files as the predictions of one model, in this order."""
    return _shards(paths, partial(_open_one, column=column, raw=raw))


def open_text(paths: Sequence[PathLike], column: str) -> Source:
    """A column of text of the same files, (N, 1) objects.

    Raises:
        MissingColumn: the first file has no such column, or is no table.
        OSError, ValueError: as :func:`open_source`. Of the text itself, once it is read: a null, an
        empty one, one of several lines, and bytes that are not UTF-8 are refused.
    """
    return _shards(paths, partial(_open_text, column=column))


def _shards(paths: Sequence[PathLike], open_one: Callable[[str], Source]) -> Source:
    names = [os.fspath(path) for path in paths]
    shards = [one for name in names for one in (_expand(name) or [name])]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Shards(shards, names[0] + more, open_one)


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


def natural(name: str) -> tuple[list[Any], str]:
    """Key for sorting: numbers by value, so that ``p-2`` comes before ``p-10``; names that are
    equal so (``p-1`` and ``p-01``) as text."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def first_of_other_length(column: Any, k: int) -> tuple[int, int] | None:
    """Of an Arrow array of lists: the first row that does not hold k numbers, and how many it
    does; None if there is none. Null rows do not count."""
    import pyarrow.compute as pc

    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), k))
    others = np.flatnonzero(lengths != k)
    return (int(others[0]), int(lengths[others[0]])) if len(others) else None


def list_rows(column: Any, k: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(n, k) floats of an Arrow array of lists of k, NaN where it has a null, without a copy where
    that is possible; and (n,) which rows are null or have a null in them."""
    null = np.asarray(column.is_null())
    numbers = column.flatten()  # less the null rows
    rows = numbers.to_numpy(zero_copy_only=False).reshape(-1, k)
    gaps = null
    if numbers.null_count:
        gaps = null.copy()
        gaps[~null] = np.asarray(numbers.is_null()).reshape(-1, k).any(axis=1)
    if null.any():
        there, rows = rows, np.full((len(null), k), np.nan, rows.dtype)
        rows[~null] = there
    return rows, gaps


def shards_of(path: PathLike) -> list[str]:
    """The files that an input names: itself, or those of a pattern or folder, in natural order."""
    name = os.fspath(path)
    return _expand(name) or [name]


def _expand(name: str) -> list[str] | None:
    """The shards that a pattern or folder names, in natural order; None for a single file."""
    remote = _URL.match(name) and not name.startswith("file://")
    if _basename(name).endswith(".zarr"):
        return None
    if remote:
        system, path = _file_system(name)
        with _turn(system):
            if any(c in path for c in "*?["):
                listed = system.glob(path)
            elif system.isdir(path):
                listed = system.ls(path, detail=False)
            else:
                return None
        archive = "".join(name.partition("::")[1:])
        found = [system.unstrip_protocol(one) + archive for one in listed]
    else:
        local = name.removeprefix("file://")
        if Path(local).is_dir():
            found = [str(one) for one in Path(local).iterdir()]
        elif not os.path.lexists(local) and any(c in local for c in "*?["):
            found = glob.glob(local)
        else:
            return None
    # Names with a dot are half-written files, and notes of operating systems on others.
    found = [f for f in found if not _basename(f).startswith(".")]
    found = sorted((f for f in found if _basename(f).endswith(SUFFIXES)), key=natural)
    if not found:
        raise FileNotFoundError(f"score: {name} holds no file of {', '.join(SUFFIXES)}")
    return found


def _open_one(name: str, column: str | Sequence[str] | None, raw: tuple[str, int] | None) -> Source:
    suffix = os.path.splitext(_basename(name))[1].lower()
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
        if suffix in _TABLES:
            return Table(file, [column] if isinstance(column, str) else column)
        if suffix in (".bin", ".raw"):
            return _open_raw(file, raw)
        return _open_npy(file)
    except BaseException:
        file.close()
        raise


def _open_text(name: str, column: str) -> Source:
    if not _basename(name).lower().endswith(_TABLES):
        raise MissingColumn(
            f"score: {name} must be one of {', '.join(_TABLES)} to have key columns"
        )
    file = Bytes(name)
    try:
        return Text(file, [column])
    except BaseException:
        file.close()
        raise


def _open_npy(file: Bytes) -> Source:
    begin = bytes(file.read(0, min(file.size, _LARGEST_NPY_HEADER)))
    shape, column_major, dtype, offset = _npy_header(begin, file.name)
    kind = dtype.newbyteorder("=").name
    order = ">" if dtype.byteorder == ">" else "<"
    return Packed(file, offset, shape, kind, column_major=column_major, byte_order=order)


def _npy_header(begin: bytes, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, dtype, and where the numbers begin."""
    stream = io.BytesIO(begin)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, column_major, dtype = read(stream)
        if any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"shape {shape}")
    # NumPy reads the header as Python, and says what it meets there as Python does.
    except (
        ValueError, LookupError, TypeError, AttributeError, OverflowError, SyntaxError,
        tokenize.TokenError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"score: {name} is not a .npy file of numbers") from error
    if dtype.hasobject:
        raise ValueError(f"score: {name} holds pickled Python objects, which are not read")
    return shape, column_major, dtype, stream.tell()


def _npz_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str
) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """The same of an array of an archive."""
    try:
        with archive.open(member) as stream:
            begin = stream.read(_LARGEST_NPY_HEADER)
    except _ZIP_ERRORS as error:
        raise ValueError(f"score: {name} is not a .npz file: {_line(error)}") from error
    return _npy_header(begin, f"{name}: {member.filename}")


def _open_npz(file: Bytes, array: str | None) -> Source:
    handle = file.open()
    try:
        try:
            archive = zipfile.ZipFile(handle)
        except _ZIP_ERRORS as error:
            raise ValueError(f"score: {file.name} is not a .npz file: {_line(error)}") from error
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        member = members[_choose(list(members), array, file.name)]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            return Zipped(file, handle, archive, member)
        shape, column_major, dtype, header = _npz_header(archive, member, file.name)
    except BaseException:
        handle.close()
        raise
    archive.close()
    handle.close()
    if member.header_offset + 30 > file.size:
        raise ValueError(f"score: {file.name} is truncated: it has {file.size} bytes")
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
        places = {name: _place(name, about) for name, about in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, RecursionError) as error:
        raise ValueError(f"score: {file.name} is not a safetensors file: {_line(error)}") from error
    name = _choose(list(places), tensor, file.name)
    dtype, shape, begin, end = places[name]
    if not begin <= end <= file.size - 8 - length:
        raise ValueError(f"score: {file.name} is truncated: {name} ends beyond the file")
    offset = 8 + length + begin
    kind = kinds.get(dtype, dtype)
    return Packed(file, offset, shape, kind, array=name, end=8 + length + end)


def _place(name: str, about: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a tensor, as its header says."""
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name} has {numbers!r} for integers")
    begin, end = offsets
    return dtype, tuple(shape), begin, end


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


def _parquet(handle: Any) -> tuple[_Reader, NDArray[np.int64], Any]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(handle)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    if any(rows < 0 for rows in groups):
        raise ValueError("a row group with fewer than 0 rows")
    types = [file.schema.column(i) for i in range(len(file.schema))]
    widths = [_PHYSICAL_BYTES.get(one.physical_type, one.length) for one in types]

    def read(group: int, names: Sequence[str]) -> Iterator[Any]:
        # A row group may be larger than memory: it is read and decoded piece by piece.
        about = file.metadata.row_group(group)
        leaves = [about.column(i) for i in range(about.num_columns)]
        wanted = set(names)  # which may have dots, as the paths of what is in them
        size = sum(
            # Numbers that repeat take less in the file than decoded.
            max(leaf.total_uncompressed_size, leaf.num_values * widths[i])
            for i, leaf in enumerate(leaves)
            if not wanted.isdisjoint(accumulate(leaf.path_in_schema.split("."), "{}.{}".format))
        )
        rows = max(1, _PIECE_BYTES * groups[group] // max(_PIECE_BYTES, size))
        pages = max(_LEAST_BUFFER, min(1 << 20, _BUFFERS // len(names)))
        reader = pq.ParquetFile(handle, metadata=file.metadata, buffer_size=pages)
        return iter(reader.iter_batches(rows, row_groups=[group], columns=list(names)))

    return read, np.cumsum([0, *groups]), file.schema_arrow


def _arrow(handle: Any) -> tuple[_Reader, NDArray[np.int64], Any]:
    import pyarrow as pa

    file = pa.ipc.open_file(handle)
    rows = []
    for i in range(file.num_record_batches):
        batch = file.get_batch(i)
        batch.validate()
        rows.append(batch.num_rows)

    @cache  # a reader reads the dictionaries once
    def reader(names: tuple[str, ...]) -> Any:
        wanted = sorted(file.schema.get_field_index(name) for name in names)  # no other is read
        return pa.ipc.open_file(handle, options=pa.ipc.IpcReadOptions(included_fields=wanted))

    def read(group: int, names: Sequence[str]) -> Iterator[Any]:
        yield reader(tuple(names)).get_batch(group)

    return read, np.cumsum([0, *rows]), file.schema


def _first_not_utf8(column: Any) -> tuple[int, bytes]:
    """Of a binary array that Arrow cannot read as text: the first row that is none."""
    for row, content in enumerate(column.to_pylist()):
        try:
            (content or b"").decode()
        except UnicodeDecodeError:
            return row, content
    raise AssertionError("every row is text")


def _columns_of(schema: Any, columns: Sequence[str] | None, name: str) -> list[str]:
    """Those asked for; else the only column of lists, else all columns of floats."""
    import pyarrow as pa

    with _damage(name):
        fields = [(field.name, _stored(field.type)) for field in schema]
    names = [one for one, _ in fields]
    if columns is None:
        lists = [one for one, kind in fields if _is_list(kind)]
        floats = [one for one, kind in fields if pa.types.is_floating(kind)]
        columns = [_choose(lists, None, name)] if lists else floats
        if not columns:
            raise ValueError(
                f"score: {name} must have a column of lists of numbers, or columns of numbers, "
                f"got {', '.join(names)}"
            )
    else:
        for column in columns:
            if column not in names:
                raise MissingColumn(
                    f"score: {name} must have a column {column!r}, got {', '.join(names)}"
                )
    for column in columns:
        if names.count(column) > 1:
            raise ValueError(f"score: {name} has more than one column {column!r}")
        if columns.count(column) > 1:
            raise ValueError(f"score: column must name columns once, got {column!r} again")
    return list(columns)


def _stored(kind: Any) -> Any:
    """The Arrow type that an extension type (a tensor of fixed shape, say) is stored as."""
    import pyarrow as pa

    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(is_so(kind) for is_so in lists)


def _basename(name: str) -> str:
    """Of a file, without its folder; of a member (``tar://member::archive``), its own."""
    if _URL.match(name):
        name = name.partition("::")[0]
    return name.rstrip("/").rsplit("/", 1)[-1]


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


def native(rows: NDArray[Any], dtype: str) -> Any:
    """Rows in this machine's byte order, and saying so; bfloat16 as a torch tensor.

    A copy only where the bytes change: ``<f4`` and ``float32`` are one type here, but only the
    second is known to readers of buffers.
    """
    if dtype == "bfloat16":
        import torch  # NumPy has no such numbers

        return torch.from_numpy(np.ascontiguousarray(rows).view(np.int16)).view(torch.bfloat16)
    kind = np.dtype(dtype)
    return rows.view(kind) if rows.dtype == kind else rows.astype(kind)


def _identity(about: dict[str, Any]) -> tuple[str, ...]:
    """What changes when a file of fsspec does, as far as its system says."""
    found = {name: about[name] for name in _IDENTITY if about.get(name) is not None}
    if "mtime" in found:
        found.pop("created", None)  # which local files have, too: when their mode was changed
    return tuple(f"{name}={value}" for name, value in found.items())


def _archive_state(url: str) -> tuple[str, ...]:
    """The same of the archives that a member (``tar://member::archive``) lies in."""
    _, chained, rest = url.partition("::")
    if not chained:
        return ()
    system, path = _file_system(rest)
    with _turn(system):
        system.invalidate_cache(path)
        about = system.info(path)
    return (*(_identity(about) if about.get("type") == "file" else ()), *_archive_state(rest))


def _state_of(name: str) -> tuple[Any, ...]:
    """The ``state`` that a source of this file has now."""
    if _basename(name).lower().endswith(".zarr"):
        return _store_state(name)
    file = Bytes(name)
    file.close()
    return file.state


def _store_state(name: str) -> tuple[Any, ...]:
    """Digest of the names and identities of all files of a Zarr store; nothing of one behind HTTP,
    which lists no files."""
    digest = hashlib.blake2b(digest_size=16)
    if not _URL.match(name) or name.startswith("file://"):
        root = name.removeprefix("file://")
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            for one in sorted(files):
                path = os.path.join(folder, one)
                with naming(path):
                    stat = os.stat(path)
                about = (os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns)
                digest.update(f"{about}\n".encode(errors="surrogateescape"))
        return (digest.hexdigest(),)
    system, path = _file_system(name)
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    if "http" in protocols:
        return ()
    with _turn(system):
        system.invalidate_cache(path)
        try:
            listed = system.find(path, detail=True)
        except FileNotFoundError:
            listed = {}  # which opening it says
    for one in sorted(listed):
        digest.update(f"{(one, *_identity(listed[one]))}\n".encode(errors="surrogateescape"))
    return (digest.hexdigest(), *_archive_state(name))


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of fsspec that a URL names, and the path there."""
    try:
        import fsspec

        with _one_by_one:  # that of an archive reads what it holds
            system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"score: {url} cannot be read: {_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"score: {url} cannot be read: {_line(error)}") from error
    return system, path


def _reads_together(system: Any) -> bool:
    """Whether several threads may read files of a system; none but asynchronous ones say so."""
    from fsspec.asyn import AsyncFileSystem

    while system is not None:
        # By its type: a system that keeps copies of another's files says what the other is.
        if not issubclass(type(system), AsyncFileSystem):
            return False
        system = vars(system).get("sync_fs") or vars(system).get("fs")  # that it stands before
    return True


def _turn(system: Any) -> AbstractContextManager[Any]:
    """To be held while a system is read."""
    return nullcontext() if _reads_together(system) else _one_by_one


@contextmanager
def _zarr_turn() -> Iterator[None]:
    """The same for a Zarr store, which would read several chunks at a time."""
    import zarr

    with _one_by_one, zarr.config.set({"async.concurrency": 1}):
        yield


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What pyarrow raises on a file that is damaged, as ``OSError`` that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, *_READER_ERRORS) as error:
        raise OSError(f"score: {name} is damaged: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _no_k(name: str) -> ValueError:
    return ValueError(f"score: {name} has no row that says how many numbers a row holds")


def _require_state(name: str, state: tuple[Any, ...], before: tuple[Any, ...]) -> None:
    if state != before:
        raise ValueError(f"score: {name} was changed while it was read")
