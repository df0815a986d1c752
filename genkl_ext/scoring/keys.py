"""Key lists: one key per line, line i for row i of the predictions; and the list of NC keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sources import require_file, sample_digest

EMPTY_SET = "empty_set"  # the only line of a list of NC keys that has none
BLOCK_ROWS = 1 << 20  # keys or table rows that are Python or Arrow objects at one time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Keys:
    """The N lines of a key file, kept as text: a million keys are not a million objects.

    Line ends may be LF or CR LF; blank lines at the end of the file do not count.

    Raises:
        OSError: the file cannot be read. ValueError: another number of keys than ``rows``, a
        blank line, or text that is not UTF-8; with the line.
    """

    def __init__(self, path: str | os.PathLike[str], rows: int) -> None:
        self.path = Path(path)
        require_file(self.path)
        content = self.path.read_bytes()
        self._size = len(content)
        self._sample = sample_digest(self._size, lambda i, n: content[i : i + n])
        content = content.removeprefix(_BYTE_ORDER_MARK).replace(b"\r\n", b"\n").rstrip(b"\r\n")
        self._text = content + b"\n" if content else b""
        ends = np.flatnonzero(np.frombuffer(self._text, np.uint8) == ord("\n")) + 1
        # Key i is text[starts[i] : starts[i + 1] - 1], and a newline follows it.
        self._starts: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), ends])
        self._check(rows)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> str:
        return self._text[self._starts[row] : self._starts[row + 1] - 1].decode()

    def slice(self, start: int, stop: int) -> list[str]:
        """Keys ``start`` to ``stop``, the last excluded."""
        if start >= stop:
            return []
        return self._text[self._starts[start] : self._starts[stop] - 1].decode().split("\n")

    def longest(self) -> int:
        """Bytes of the longest key."""
        return int(np.diff(self._starts).max(initial=1)) - 1

    def repeats(self) -> list[int]:
        """The rows whose key an earlier row has too."""
        hashes = np.empty(len(self), np.int64)
        for start in range(0, len(self), BLOCK_ROWS):
            block = self.slice(start, min(start + BLOCK_ROWS, len(self)))
            hashes[start : start + len(block)] = np.fromiter(map(hash, block), np.int64, len(block))
        ordered = np.sort(hashes)
        shared = ordered[1:][ordered[1:] == ordered[:-1]]
        rows: list[int] = []
        seen: set[str] = set()
        for row in np.flatnonzero(np.isin(hashes, shared)).tolist():  # few, or the list is no list
            key = self[row]
            if key in seen:
                rows.append(row)
            seen.add(key)
        return rows

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and sampled digest of the file, as in :class:`.sources.Fingerprint`."""
        return {"name": self.path.name, "size": self._size, "sample": self._sample}

    def _check(self, rows: int) -> None:
        lengths = np.diff(self._starts)
        blank = np.flatnonzero(lengths == 1)
        note = f", {len(blank)} of them blank (line {blank[0] + 1})" if len(blank) else ""
        if len(self) != rows:
            raise ValueError(
                f"score: {self.path} must have one key for each of {rows} rows, "
                f"got {len(self)} lines{note}"
            )
        if len(blank):
            raise ValueError(f"score: {self.path} must have a key in each line{note}")
        try:
            self._text.decode()
        except UnicodeDecodeError as error:
            line = self._text.count(b"\n", 0, error.start) + 1
            raise ValueError(f"score: {self.path} is not UTF-8 text in line {line}") from error


def write_nc_list(path: Path, keys: Keys, nc: Any) -> None:
    """The keys of the NC rows in file order, one per line; ``empty_set`` if there is none.

    The published programs write the same lines in no fixed order, and stumble over a list
    without lines.

    Args:
        nc: (N,) bool, of which slices are taken.
    """
    found = False
    with open(path, "w", encoding="utf-8", newline="\n") as file:
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
