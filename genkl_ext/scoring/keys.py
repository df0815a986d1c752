"""Key lists: key i for row i of the predictions; and the list of NC keys.

    Keys       a text file, one key per line
    KeyColumn  a column of the Parquet or Arrow files that hold the predictions

They are read a piece at a time, so memory does not grow with the rows.
"""

from __future__ import annotations

import codecs
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import naming
from .sources import Bytes, open_text

EMPTY_SET = "empty_set"  # the only line of a list of NC keys that has none
BLOCK_ROWS = 1 << 20  # keys or table rows that are Python or Arrow objects at one time
MOST_REPEATS = 1 << 18  # rows that repeats() gives; a list with more of them is no list of keys
_MARK_ROWS = 1 << 13  # keys that are read together for the sake of one
_PIECE_BYTES = 1 << 20
# Of the hashes of keys, 8 bytes each: what is computed, and what is compared, at a time; and how
# many bytes are in memory before all of them lie on disk.
_HASHED_ROWS = 1 << 17
_COMPARED_HASHES = 1 << 22
_HASH_BYTES = 1 << 26
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

PathLike = str | os.PathLike[str]


class KeyList(ABC):
    """N keys in a file, read a piece at a time, by any threads.

    Attributes:
        name: path or URL, for messages.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def _read(self, start: int, stop: int) -> list[str]:
        """``slice`` of rows that there are."""

    @abstractmethod
    def longest(self) -> int:
        """Bytes of the longest key, in UTF-8."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells the list from another."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if the file was written to since it was opened."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> KeyList:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def slice(self, start: int, stop: int) -> list[str]:
        """Keys ``start`` to ``stop``, the last excluded.

        Raises:
            OSError: they cannot be read. ValueError: the file was written to since it was opened.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"score: {self.name} has {len(self)} keys, not {start} to {stop}")
        return self._read(start, stop)

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        return self.slice(row, row + 1)[0]

    def repeats(self, folder: PathLike | None = None) -> list[int]:
        """The rows whose key an earlier row has too, in order.

        Keys are compared by their hashes, and those of equal hashes as they are. Where there are
        more than ``MOST_REPEATS`` such rows, these are so many of them, and the first need not be
        among them. It takes one pass over the list, and up to a second one where keys are repeated.

        Args:
            folder: where the hashes of a list of millions lie in the meantime, 8 bytes a key, in a
                file without a name; by default where the system has its temporary files.
        """
        shared = self._shared_hashes(folder)
        rows: list[int] = []
        if not len(shared):
            return rows
        seen: set[str] = set()
        for start, keys, hashes in self._hashed():
            for i in np.flatnonzero(np.isin(hashes, shared)).tolist():
                if keys[i] in seen:
                    rows.append(start + i)
                    if len(rows) == MOST_REPEATS:
                        return rows
                seen.add(keys[i])
        return rows

    def _pieces(self) -> Iterator[tuple[int, list[str]]]:
        """The list piece by piece: the first row, keys."""
        for start in range(0, len(self), _HASHED_ROWS):
            yield start, self.slice(start, min(start + _HASHED_ROWS, len(self)))

    def _hashed(self) -> Iterator[tuple[int, list[str], NDArray[np.int64]]]:
        """The first row, keys, and their hashes."""
        for start, keys in self._pieces():
            yield start, keys, np.fromiter(map(hash, keys), np.int64, len(keys))

    def _shared_hashes(self, folder: PathLike | None) -> NDArray[np.int64]:
        """The hashes that more than one row has: sorted, and at most ``MOST_REPEATS``.

        The hashes of a piece are kept in their order. Then all that lie in a range of values are
        compared, range by range.
        """
        ranges = -(-len(self) // _COMPARED_HASHES)
        borders = [i * 2**64 // ranges - 2**63 for i in range(1, ranges)]
        shared = np.empty(0, np.int64)
        where = None if folder is None else os.fspath(folder)
        with tempfile.SpooledTemporaryFile(_HASH_BYTES, dir=where) as file:
            places = []  # of the borders, piece by piece, in hashes from the first on
            written = 0
            for _, _, hashes in self._hashed():
                distinct, more = _distinct(hashes)
                shared = np.union1d(shared, more)[:MOST_REPEATS]
                try:
                    file.write(distinct.data)
                    file.flush()
                except OSError as error:
                    place = where or "the folder of temporary files"
                    reason = os.strerror(error.errno or 0)
                    raise OSError(
                        error.errno,
                        f"score: {place} cannot take the hashes of {self.name}: {reason}",
                    ) from None
                inner = np.searchsorted(distinct, np.array(borders, np.int64))
                places.append(written + np.concatenate([[0], inner, [len(distinct)]]))
                written += len(distinct)
            for i in range(ranges):
                spans = [(int(place[i]), int(place[i + 1])) for place in places]
                hashes = np.empty(sum(end - begin for begin, end in spans), np.int64)
                filled = 0
                for begin, end in spans:
                    file.seek(8 * begin)
                    piece = np.frombuffer(file.read(8 * (end - begin)), np.int64)
                    hashes[filled : filled + len(piece)] = piece
                    filled += len(piece)
                shared = np.union1d(shared, _distinct(hashes)[1])[:MOST_REPEATS]
        return shared


def _distinct(hashes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The hashes, and those that are there more than once; both sorted. Sorts its argument."""
    hashes.sort()
    again = hashes[1:] == hashes[:-1]
    return np.delete(hashes, np.flatnonzero(again)), np.unique(hashes[1:][again])


class Keys(KeyList):
    """The N lines of a text file.

    Line ends may be LF or CR LF; blank lines at the end of the file do not count. One pass over the
    file checks them, and remembers where every 8192th begins; lines are read again from there.

    Args:
        path: a file, or a URL that fsspec knows.
        rows: N.

    Raises:
        OSError: the file cannot be read. ValueError: another number of keys than ``rows``, a
        blank line, or text that is not UTF-8; with the line.
    """

    def __init__(self, path: PathLike, rows: int) -> None:
        self._file = Bytes(path)
        self._close = weakref.finalize(self, self._file.close)
        self.name = self._file.name
        try:
            self._sample = self._file.sample()
            self._lines = _Lines(self._file)
            self._lines.check(rows)
        except BaseException:
            self.close()
            raise
        self._last: tuple[int, list[str]] = (-1, [])

    def __len__(self) -> int:
        return self._lines.count

    def _read(self, start: int, stop: int) -> list[str]:
        keys: list[str] = []
        for block in range(start // _MARK_ROWS, -(-stop // _MARK_ROWS)):
            first = block * _MARK_ROWS
            keys += self._block(block)[max(start - first, 0) : stop - first]
        return keys

    def longest(self) -> int:
        return self._lines.longest

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and sampled digest of the file, as in :class:`.sources.Fingerprint`."""
        return {"name": self._file.basename, "size": self._file.size, "sample": self._sample}

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._close()

    def _block(self, block: int) -> list[str]:
        """The lines from a mark to the next; the last ones stay in memory."""
        last = self._last
        if last[0] != block:
            lines = self._lines.read(block)
            if lines is None:
                raise ValueError(f"score: {self.name} was changed while it was read")
            last = self._last = (block, lines)
        return last[1]


class KeyColumn(KeyList):
    """A column of text, or of integers as text, in the files that hold the predictions.

    Args:
        paths: the files, patterns or folders of one model.
        column: its name.
        rows: N.

    Raises:
        OSError: a file cannot be read.
        MissingColumn: the first file has no such column, or is no table. It is a ``ValueError``.
        ValueError: another has no such column, or one of another type. Of the keys themselves, once
        they are read: a null, an empty one, one of several lines, or bytes that are not UTF-8.
    """

    def __init__(self, paths: Sequence[PathLike], column: str, rows: int) -> None:
        self._source = open_text(paths, column)
        self._close = weakref.finalize(self, self._source.close)
        self._column = column
        self.name = f"{self._source.name}: {column}"
        if len(self) != rows:
            self.close()
            raise ValueError(
                f"score: {self.name} must have one key for each of {rows} rows, got {len(self)}"
            )

    def __len__(self) -> int:
        return self._source.shape[0]

    def _read(self, start: int, stop: int) -> list[str]:
        keys: list[str] = self._source.rows(start, stop)[:, 0].tolist()
        return keys

    def require_same(self, other: KeyColumn) -> None:
        """Raise ``ValueError`` at the first row whose key is another than in ``other``.

        The scores of several models are averaged row by row, so that row i of all of them must be
        of one image.
        """
        if len(other) != len(self):
            raise ValueError(
                f"score: {other.name} must have one key for each of {len(self)} rows, "
                f"got {len(other)}"
            )
        for start, ours in self._pieces():
            theirs = other.slice(start, start + len(ours))
            if ours != theirs:
                i = next(i for i, key in enumerate(ours) if key != theirs[i])
                (name, row), (other_name, other_row) = (
                    keys._source.where(start + i) for keys in (self, other)
                )
                raise ValueError(
                    f"score: the rows of all models must be in the same order: {self._column} is "
                    f"{ours[i]!r} in row {row} of {name}, and {theirs[i]!r} in row {other_row} of "
                    f"{other_name}"
                )

    def longest(self) -> int:
        return max((len(key.encode()) for _, keys in self._pieces() for key in keys), default=0)

    def fingerprint(self) -> dict[str, Any]:
        """The name of the column; the files are fingerprinted as the predictions that they are."""
        return {"column": self._column}

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._close()


class _Lines:
    """Where the lines of a text file are, as one pass over it finds.

    Attributes:
        count: of the lines.
        longest: bytes of the longest, without its end.
    """

    def __init__(self, file: Bytes) -> None:
        self._file = file
        mark = file.read(0, min(len(_BYTE_ORDER_MARK), file.size))
        begin = len(mark) if mark == _BYTE_ORDER_MARK else 0
        self._end = max(begin, _content_end(file))
        self.count = self.longest = 0
        self._blank = self._first_blank = 0
        self._crlf = False
        self._not_utf8: int | None = None  # the first line that is not
        self._marks: list[int] = [begin]
        self._scan(begin)

    def read(self, block: int) -> list[str] | None:
        """The lines from a mark to the next; None if the file is another than it was."""
        begin, end = [*self._marks[block : block + 2], self._end][:2]
        try:
            text = self._file.read(begin, end - begin).decode()
        except UnicodeDecodeError:
            return None
        if self._crlf:
            text = text.replace("\r\n", "\n")
        lines = text.removesuffix("\n").split("\n")
        return lines if len(lines) == min(_MARK_ROWS, self.count - block * _MARK_ROWS) else None

    def check(self, rows: int) -> None:
        """Raise ``ValueError`` unless there are so many lines, none is blank, and all are text."""
        name = self._file.name
        note = f", {self._blank} of them blank (line {self._first_blank})" if self._blank else ""
        if self.count != rows:
            raise ValueError(
                f"score: {name} must have one key for each of {rows} rows, "
                f"got {self.count} lines{note}"
            )
        if self._blank:
            raise ValueError(f"score: {name} must have a key in each line{note}")
        if self._not_utf8 is not None:
            raise ValueError(f"score: {name} is not UTF-8 text in line {self._not_utf8}")

    def _scan(self, begin: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        start = begin  # of the line that the piece before has left open
        before = 0  # the last byte of that piece
        for place in range(begin, self._end, _PIECE_BYTES):
            piece = self._file.read(place, min(_PIECE_BYTES, self._end - place))
            self._decode(decoder, piece, place + len(piece) == self._end)
            codes = np.frombuffer(piece, np.uint8)
            ends = np.flatnonzero(codes == ord("\n"))
            if len(ends):
                lengths = np.diff(ends, prepend=start - place - 1) - 1
                if before == ord("\r") or b"\r" in piece:
                    returns = codes[ends - 1] == ord("\r")
                    if ends[0] == 0:
                        returns[0] = before == ord("\r")
                    lengths -= returns
                    self._crlf |= bool(returns.any())
                blank = np.flatnonzero(lengths == 0)
                if len(blank) and not self._blank:
                    self._first_blank = self.count + int(blank[0]) + 1
                self._blank += len(blank)
                self.longest = max(self.longest, int(lengths.max()))
                # Line self.count + i + 1, counted from 0, begins after ends[i].
                marked = ends[-(self.count + 1) % _MARK_ROWS :: _MARK_ROWS]
                self._marks += (place + marked + 1).tolist()
                self.count += len(ends)
                start = place + int(ends[-1]) + 1
            before = piece[-1]
        if self._end > begin:  # the last line, whose end does not count
            self.longest = max(self.longest, self._end - start)
            self.count += 1

    def _decode(self, decoder: Any, piece: bytearray, final: bool) -> None:
        """Note the line of what is not UTF-8; a character may have begun in the piece before."""
        if self._not_utf8 is not None or (piece.isascii() and not decoder.getstate()[0]):
            return
        try:
            decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            self._not_utf8 = self.count + error.object.count(b"\n", 0, error.start) + 1


def _content_end(file: Bytes) -> int:
    """The place after the last byte that is neither CR nor LF."""
    end = file.size
    while end:
        begin = max(0, end - _PIECE_BYTES)
        content = file.read(begin, end - begin).rstrip(b"\r\n")
        if content:
            return begin + len(content)
        end = begin
    return 0


def write_nc_list(path: Path, keys: KeyList, nc: Any) -> None:
    """The keys of the NC rows in file order, one per line; ``empty_set`` if there is none.

    The published programs write the same lines in no fixed order, and stumble over a list
    without lines.

    Args:
        nc: (N,) bool, of which slices are taken.
    """
    found = False
    with naming(path), open(path, "w", encoding="utf-8", newline="\n") as file:
        for start in range(0, len(nc), BLOCK_ROWS):
            block = nc[start : start + BLOCK_ROWS]
            lines = keys.slice(start, start + len(block))
            rows = np.flatnonzero(block)
            file.writelines(lines[i] + "\n" for i in rows)
            found |= len(rows) > 0
        if not found:
            file.write(EMPTY_SET + "\n")


def read_nc_list(path: str | os.PathLike[str]) -> list[str]:
    """The keys of a list of NC instances (``nc_set.txt``), of ours or of the published programs.

    An empty file and the line ``empty_set`` both mean no keys. That line is ignored beside keys
    too: the published programs append to the list of an earlier run. Line ends may be LF or CR LF.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    keys = (line.removesuffix("\r") for line in lines)
    return [key for key in keys if key and key != EMPTY_SET]
