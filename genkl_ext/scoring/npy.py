"""Prediction files: (N, k) floating ``.npy`` arrays, checked when opened and mapped into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("float16", "float32", "float64")

SAMPLE_BLOCKS = 64
SAMPLE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a prediction file was when it was scored.

    ``sample`` is not a digest of everything: reading is limited by memory or disk, and a digest
    of every byte would take several times as long as scoring. It is the BLAKE2b-128 of up to 64
    blocks of 64 KiB, evenly spaced from the first byte (with the header) to the last; files up to
    4 MiB are digested whole. Predictions of another model, or in another order, differ in it; a
    few entries changed by hand between the blocks show in ``modified`` only.
    """

    name: str  #: file name without folder
    size: int  #: bytes
    shape: tuple[int, int]  #: (N, k)
    dtype: str
    modified: int  #: last change, nanoseconds since 1970
    sample: str  #: hexadecimal


class Predictions:
    """One (N, k) prediction file, mapped into memory.

    Mapping is the fastest way to read, and its price is that the system ends the process with
    SIGBUS if the file is truncated, or its disk fails, while rows are in use.

    Raises:
        OSError, ValueError: the file cannot be read, or is not what it should be; in one line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        require_file(self.path)
        self._file = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        try:
            self._stat = os.fstat(self._file.fileno())
            self.shape, self._column_major, self._stored = self._read_header()
            self._offset = self._file.tell()
            self._check_size()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            self._file.close()
            raise
        self._array: NDArray[Any] = np.ndarray(
            self.shape,
            self._stored,
            self._map,
            self._offset,
            order="F" if self._column_major else "C",
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16, float32 or float64, in this machine's byte order."""
        return self._stored.newbyteorder("=")

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """(stop - start, k) rows: a view of the file, or a copy if its byte order is not this
        machine's."""
        return np.require(self._array[start:stop], self.dtype, ["ALIGNED"])

    def prefetch(self, start: int, stop: int) -> None:
        """Touch every page of these rows, so that they are in memory when they are scored.

        One thread reading ahead in order keeps a disk busy; the scoring threads would wait for
        it, each at its own place in the file.
        """
        if not self._column_major:
            begin, end = self._span(start, stop)
            np.frombuffer(self._map, np.uint8)[begin : end : mmap.PAGESIZE].max(initial=0)

    def release(self, start: int, stop: int) -> None:
        """Unmap the pages of these rows: scored data shall not count as memory in use."""
        begin, end = (0, len(self._map)) if self._column_major else self._span(start, stop)
        begin -= begin % mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        row_bytes = self.shape[1] * self._stored.itemsize
        return self._offset + start * row_bytes, self._offset + stop * row_bytes

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            name=self.path.name,
            size=self._stat.st_size,
            shape=self.shape,
            dtype=str(self.dtype),
            modified=self._stat.st_mtime_ns,
            sample=sample_digest(self._map),
        )

    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if the file was written to since it was opened."""
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise ValueError(f"score: {self.path} was changed while it was read")

    def close(self) -> None:
        """Let go of the file. The memory map goes with the last view that ``rows`` gave out."""
        del self._array, self._map
        self._file.close()

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> tuple[tuple[int, int], bool, np.dtype[Any]]:
        if self._stat.st_size == 0:
            raise ValueError(f"score: {self.path} is empty")
        try:
            version = np.lib.format.read_magic(self._file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, column_major, dtype = read(self._file)
        except (ValueError, KeyError) as error:
            raise ValueError(f"score: {self.path} is not a .npy file of numbers") from error
        if dtype.hasobject:
            raise ValueError(f"score: {self.path} holds pickled Python objects, which are not read")
        if dtype.newbyteorder("=").name not in DTYPES:
            raise ValueError(f"score: {self.path} must be {', '.join(DTYPES)}, got {dtype}")
        if len(shape) != 2:
            raise ValueError(f"score: {self.path} must have shape (N, k), got {shape}")
        return (shape[0], shape[1]), column_major, dtype

    def _check_size(self) -> None:
        wanted = self._offset + math.prod(self.shape) * self._stored.itemsize
        size = self._stat.st_size
        if size != wanted:
            what = "is truncated" if size < wanted else "has more after its array"
            raise ValueError(
                f"score: {self.path} {what}: {self.shape} {self._stored.name} takes "
                f"{wanted} bytes, the file has {size}"
            )


def require_file(path: Path) -> None:
    """Raise ``OSError`` in one line unless ``path`` is a regular file."""
    if path.is_dir():
        raise IsADirectoryError(f"score: {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"score: {path} does not exist")
    if not path.is_file():
        raise OSError(f"score: {path} is not a regular file")


def open_all(paths: Sequence[str | os.PathLike[str]], stack: ExitStack) -> list[Predictions]:
    """The prediction files of M models, alike in shape and dtype; ``stack`` closes them."""
    files: list[Predictions] = []
    for path in paths:
        file = stack.enter_context(Predictions(path))
        files.append(file)
        first = files[0]
        if (file.shape, file.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"score: {file.path} must be like {first.path}, {first.shape} {first.dtype}, "
                f"got {file.shape} {file.dtype}"
            )
    return files


def sample_digest(content: bytes | mmap.mmap) -> str:
    """BLAKE2b-128 of evenly spaced blocks of ``content``, as :class:`Fingerprint` describes."""
    size = len(content)
    places: Iterable[int]
    if size <= SAMPLE_BLOCKS * SAMPLE_BYTES:
        places = range(0, size, SAMPLE_BYTES)
    else:
        last = SAMPLE_BLOCKS - 1
        places = (i * (size - SAMPLE_BYTES) // last for i in range(SAMPLE_BLOCKS))
    digest = hashlib.blake2b(digest_size=16)
    for begin in places:
        digest.update(content[begin : begin + SAMPLE_BYTES])
    return digest.hexdigest()
