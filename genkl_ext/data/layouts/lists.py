"""Text lists as data sets publish them: one entry per line, perhaps with a value after it.

Line ends may be LF or CR LF, a byte order mark and blank lines at the end do not count. Lines that
are not what they should be are left out and reported while they are few; a list with more than
``TOLERATED`` of them is another kind of file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from ..manifest import Problem

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOLERATED = 0.01  # share of odd lines; a single one always is


@dataclasses.dataclass(frozen=True)
class Lines:
    """Some lines of a list and their numbers in the file, from 1."""

    name: str  #: of the file, as messages give it
    text: pa.ChunkedArray
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.text)

    def where(self, mask: pa.ChunkedArray) -> Lines:
        """The lines whose place in ``mask`` is true."""
        return Lines(self.name, self.text.filter(mask), self.numbers[np.asarray(mask)])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Lines of two fields; the first may hold spaces."""

    lines: Lines
    first: pa.ChunkedArray
    second: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, mask: pa.ChunkedArray) -> Pairs:
        """The pairs whose place in ``mask`` is true."""
        return Pairs(self.lines.where(mask), self.first.filter(mask), self.second.filter(mask))


class Lists:
    """Reads the lists of one data set, and collects what is odd about them.

    Args:
        root: the folder of the data set; files are named below it.
        source: opens the messages of errors: "from_webvision".
    """

    def __init__(self, root: str, source: str) -> None:
        self.root = Path(root)
        self.problems: list[Problem] = []
        self._source = source

    def has(self, name: str) -> bool:
        """Whether the data set has this list; one that it lacks is reported."""
        present = (self.root / name).is_file()
        if not present:
            self.report(name, "does not exist")
        return present

    def report(self, name: str, what: str, count: int = 1) -> None:
        """Remember something odd."""
        self.problems.append(Problem(name, what, count))

    def fail(self, name: str, what: str) -> NoReturn:
        """Raise a ``ValueError`` that names the file."""
        raise ValueError(f"{self._source}: {self.root / name} {what}")

    def lines(self, name: str, header: str | None = None) -> Lines:
        """The lines of a file, without white space around them.

        Blank lines are left out, and those that begin with ``header``.

        Raises:
            OSError: it cannot be read. ValueError: it is not UTF-8 text.
        """
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{self._source}: {path} does not exist")
        text = pc.ascii_trim_whitespace(_read(self._source, path))
        lines = Lines(name, text, np.arange(1, len(text) + 1))
        entries = lines.where(pc.not_equal(text, ""))
        last = int(entries.numbers.max(initial=0))
        if last > len(entries):
            blank = lines.where(pc.equal(text, "")).numbers[0]
            what = f"blank lines between others: {last - len(entries):,}, first line {blank}"
            self.report(name, what, last - len(entries))
        if header is not None:
            entries = entries.where(pc.invert(pc.starts_with(entries.text, header)))
        return entries

    def pairs(self, name: str, header: str | None = None, what: str = "a label") -> Pairs:
        """Lines of an entry, which may hold spaces, and a value: ``what``.

        Raises:
            OSError, ValueError: as :meth:`lines`; or too many lines are not two fields.
        """
        lines = self.lines(name, header)
        fields = pc.ascii_split_whitespace(lines.text, max_splits=1, reverse=True)
        two = pc.equal(pc.list_value_length(fields), 2)
        lines = self.keep(lines, two, f"a key and {what}")
        fields = fields.filter(two)
        return Pairs(lines, pc.list_element(fields, 0), pc.list_element(fields, 1))

    def labels(self, pairs: Pairs, classes: int | None) -> tuple[Pairs, pa.ChunkedArray]:
        """The pairs whose value is a class number, and these numbers as int32.

        Args:
            pairs: with labels as text.
            classes: k; None: any number from 0.

        Raises:
            ValueError: too many are no class number.
        """
        good = pc.match_substring_regex(pairs.second, "^[0-9]{1,9}$")
        number = pc.if_else(good, pairs.second, "0").cast(pa.int32())
        wanted = "a label from 0"
        if classes is not None:
            good = pc.and_(good, pc.less(number, classes))
            wanted += f" to {classes - 1}"
        self.keep(pairs.lines, good, f"a key and {wanted}")
        return pairs.where(good), number.filter(good)

    def keep(self, lines: Lines, good: pa.ChunkedArray, wanted: str) -> Lines:
        """The good lines; the others are reported.

        Raises:
            ValueError: there are too many others for a list of this kind.
        """
        odd = lines.where(pc.invert(good))
        if not len(odd):
            return lines
        what = (
            f"lines that are not {wanted}: {len(odd):,} of {len(lines):,}, "
            f"first {odd.text[0].as_py()!r} in line {odd.numbers[0]}"
        )
        if len(odd) > max(1, TOLERATED * len(lines)):
            self.fail(lines.name, "holds " + what)
        self.report(lines.name, what, len(odd))
        return lines.where(good)


def _read(source: str, path: Path) -> pa.ChunkedArray:
    """All lines of a file as strings, blank ones included."""
    with open(path, "rb") as file:
        if file.read(4) in (b"", _BYTE_ORDER_MARK):
            return pa.chunked_array([], pa.string())
    try:
        # A table of one column: its delimiter is a character that no list holds.
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=["line"]),
            parse_options=pacsv.ParseOptions(
                delimiter="\x01", quote_char=False, ignore_empty_lines=False
            ),
            convert_options=pacsv.ConvertOptions(column_types={"line": pa.string()}),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: {path} is not a text file: {_reason(path, error)}") from error
    return table["line"]


def _reason(path: Path, error: Exception) -> str:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as undecodable:
        line = content.count(b"\n", 0, undecodable.start) + 1
        return f"line {line} is not UTF-8"
    return str(error)
