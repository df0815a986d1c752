"""Images for people to look at, and what they decided about them.

    candidates = find(critical_alpha, nc, top_class, labels, members)   # the worst of each kind
    write_list("review.csv", ...)                     # the list for the people
    applied = apply(manifest, "review.csv")           # their decisions, in a new manifest

nc            fits no class, or several: the largest critical alpha first
mislabelled   conforms, and its most probable class is not the given label: first those of the
              largest q_top - q_given
ambiguous     conforms, and two classes are nearly as probable: the smallest q_top - q_second first

The list is a CSV file with a column ``decision`` to fill in: the name or the number of a class,
"ok" where the given label is right, "nc" for an image that fits no class. Empty: undecided. A name
that does not tell its class is written with the number, as the list does: "crane (134)" where two
classes are called crane, and "nc (3)" for a class called nc: "ok" and "nc" are always the words.

An image that was decided to fit no class stays in the split "train", without a label and with
``verified`` false; :func:`settled` tells these from images that merely have no label, and later
lists leave them out.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .data.manifest import SPLITS, Manifest, PathLike
from .files import atomic_write
from .scoring.sources import Source, open_models

Reason = Literal["nc", "mislabelled", "ambiguous"]
Rows = NDArray[np.int64]

REASONS: tuple[Reason, ...] = ("nc", "mislabelled", "ambiguous")
COLUMNS = (
    "key", "path", "given_label", "reason", "top_classes", "probabilities", "critical_alpha",
    "decision",
)  # fmt: skip
KEEP, NONCONFORMING = "ok", "nc"
TOP = 3  # classes that are shown of a prediction

# What makes a spreadsheet take a cell for a formula; and the quote that says it is none.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_QUOTE = "'"
_CHUNK_BYTES = 64 << 20
_SHOWN = 8  # class names in a message


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows of the noisy images worth a look, the worst first, and how bad they are.

    ``need`` is the critical alpha, q_top - q_given and q_second - q_top: larger is worse.
    """

    rows: dict[Reason, Rows]
    need: dict[Reason, NDArray[np.float32]]
    found: dict[Reason, int]  #: how many there are in all; every conforming row is "ambiguous"

    def in_turn(self, most: int) -> list[tuple[int, Reason]]:
        """Each row once: the worst of each reason, then the second of each, and so on.

        Args:
            most: rows of each reason that are looked at.
        """
        chosen: dict[int, Reason] = {}
        for rank in range(most):
            for reason in REASONS:
                if rank < len(self.rows[reason]):
                    chosen.setdefault(int(self.rows[reason][rank]), reason)
        return list(chosen.items())


def find(
    critical_alpha: NDArray[np.float32],
    nc: NDArray[np.bool_],
    top_class: NDArray[np.int32],
    labels: NDArray[np.int32],
    members: Sequence[PathLike],
    most: int,
    leave_out: NDArray[np.bool_] | None = None,
) -> Candidates:
    """The images worth a look; one pass over the mapped prediction files.

    Args:
        critical_alpha: (N,), NaN for a row without a prediction.
        nc: (N,) which rows do not conform.
        top_class: (N,), -1 for a row without a prediction.
        labels: (N,) given labels, -1 for none.
        members: (N, k) files that were averaged; without any, there are no candidates but NC ones.
        most: rows of each reason.
        leave_out: (N,) rows that nobody needs to look at; see :func:`settled`.

    Raises:
        OSError, ValueError: a file cannot be read, or is of another number of rows.
    """
    scored = ~np.isnan(critical_alpha)
    if leave_out is not None:
        scored &= ~leave_out
    need: dict[Reason, NDArray[np.float32]] = {"nc": critical_alpha}
    which: dict[Reason, NDArray[np.bool_]] = {"nc": scored & nc}
    if members:
        need["mislabelled"], margin = _leads(members, labels)
        need["ambiguous"] = -margin
        conforming = scored & ~nc
        which["mislabelled"] = conforming & (labels >= 0) & (top_class != labels)
        which["ambiguous"] = conforming
    nothing = np.zeros(0, np.int64)
    rows: dict[Reason, Rows] = dict.fromkeys(REASONS, nothing)
    worst: dict[Reason, NDArray[np.float32]] = dict.fromkeys(REASONS, np.zeros(0, np.float32))
    found: dict[Reason, int] = dict.fromkeys(REASONS, 0)
    for reason, mask in which.items():
        candidates = np.flatnonzero(mask)
        order = np.argsort(-need[reason][candidates], kind="stable")[:most]
        rows[reason] = candidates[order]
        worst[reason] = need[reason][rows[reason]]
        found[reason] = len(candidates)
    return Candidates(rows, worst, found)


def settled(manifest: Manifest) -> NDArray[np.bool_]:
    """(N,) which noisy images people decided to fit no class: no label, and verified as wrong."""
    noisy = manifest.rows("train")
    wrong = pc.fill_null(pc.invert(manifest.table["verified"]), False)
    mask: NDArray[np.bool_] = np.asarray(wrong)[noisy] & (manifest.labels[noisy] < 0)
    return mask


def averages(members: Sequence[PathLike], rows: Rows) -> NDArray[np.float32]:
    """(n, k) predictions of some rows, averaged over the members as scoring does."""
    if not members:
        raise ValueError("averages: members must be at least one file, got none")
    with ExitStack() as stack:
        files = open_models([Path(path) for path in members], stack)
        picked = np.empty((len(rows), files[0].shape[1]), np.float32)
        for i, row in enumerate(rows):
            picked[i] = _average(files, int(row), int(row) + 1)[0]
    return picked


def top_classes(q: NDArray[np.float32]) -> list[list[tuple[int, float]]]:
    """The most probable classes of each row, with their probabilities; ties: the lowest first."""
    order = np.argsort(-q, axis=1, kind="stable")[:, :TOP]
    return [[(int(c), float(row[c])) for c in top] for row, top in zip(q, order, strict=True)]


def write_list(
    path: PathLike,
    manifest: Manifest,
    chosen: Sequence[tuple[int, Reason]],
    critical_alpha: NDArray[np.float32],
    members: Sequence[PathLike],
) -> None:
    """Write images and an empty column for decisions as a CSV file; see ``COLUMNS``.

    No cell can be taken for a formula: one that begins like it gets a quote (') before it, and so
    does one that begins with a quote. :func:`apply` takes it away again. Classes are written as
    :func:`spellings` has them.

    Args:
        path: the file to write.
        manifest: the data set.
        chosen: rows of its split "train", with the reason, in the order wanted.
        critical_alpha: (N,) of these rows.
        members: (N, k) files that were averaged; without any, the classes are left empty.

    Raises:
        OSError: it cannot be written; as :func:`require_undecided`.
    """
    require_undecided(path)
    rows = np.array([row for row, _ in chosen], np.int64)
    noisy = manifest.rows("train")[rows]
    names = spellings(manifest.class_names)
    tops = top_classes(averages(members, rows)) if members else [[] for _ in rows]
    cells = zip(
        chosen, manifest.keys(noisy), manifest.paths(noisy), manifest.labels[noisy], tops,
        strict=True,
    )  # fmt: skip
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for (row, reason), key, where, label, top in cells:
            texts = [
                key,
                where,
                names[label] if label >= 0 else "",
                reason,
                " | ".join(names[c] for c, _ in top),
            ]
            numbers = [" | ".join(f"{p:.4f}" for _, p in top), f"{critical_alpha[row]:.6g}"]
            writer.writerow([*map(_no_formula, texts), *numbers, ""])


def require_undecided(path: PathLike) -> None:
    """Raise ``FileExistsError`` if a new list at ``path`` would lose what people decided.

    That is: a file is there, and it is a list with decisions, or no list at all.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        made = sum(bool(line.decision) for line in _read(path))
    except ValueError as error:
        raise FileExistsError(
            f"cannot write {path}: it exists and is no list of images to review; give another name"
        ) from error
    if made:
        raise FileExistsError(
            f"cannot write {path}: its column decision has {made} that a new list would lose; "
            "give another name"
        )


def spellings(names: Sequence[str]) -> list[str]:
    """Names of classes that can be told apart: with the number where the name alone cannot be."""
    often = Counter(names)
    return [
        f"{name} ({c})" if often[name] > 1 or name.casefold() in (KEEP, NONCONFORMING) else name
        for c, name in enumerate(names)
    ]


@dataclasses.dataclass(frozen=True)
class Applied:
    """A manifest with decisions in it, and how many rows each kind changed."""

    manifest: Manifest
    confirmed: int  #: the given label is right
    relabelled: int  #: another class is
    nonconforming: int  #: none is
    undecided: int  #: lines without a decision
    known: int  #: lines whose decision the manifest has already


def apply(manifest: Manifest, decisions: PathLike) -> Applied:
    """Put what people decided into a manifest.

    An image whose class is decided moves from the split "train" to "clean", with that label and
    ``verified``: the images that members and fine-tuning learn from. One that fits no class stays
    in "train", has no label any more, and is ``verified`` (false: the label was wrong): it is
    scored, and not trained on. The other rows are as they were. A decision that the manifest has
    already is passed over, so a list that has grown can be applied again.

    Args:
        manifest: the data set; keys are looked up in its split "train", and all rows of a key
            are meant; then among its verified images in the split "clean", whose label a decision
            may repeat, and not change.
        decisions: CSV file with the columns ``key`` and ``decision``, whatever else it has;
            separated by commas, semicolons or tabs.

    Raises:
        OSError: the file cannot be read. ValueError: it lacks a column; a key that no such image
            has; a decision that is no class, "ok" or "nc", or a name that several classes have;
            two decisions about one image; "ok" for an image without a label. With the line, the
            key, and how many more there are.
    """
    path = Path(decisions)
    lines = _read(path)
    noisy = manifest.rows("train")
    keys = manifest.table["key"].take(pa.array(noisy))
    labels = manifest.labels[noisy]
    decided: dict[str, tuple[_Line, int]] = {}  # the class, or _NONE
    kept: set[str] = set()
    wrong: list[str] = []
    undecided = known = 0
    meaning = _Meaning(manifest.class_names)
    found = _found(lines, keys)
    without = settled(manifest)
    checked = _checked(
        manifest, [line for line, (_, row) in zip(lines, found, strict=True) if row < 0]
    )
    for line, (key, row) in zip(lines, found, strict=True):
        try:
            if row < 0 and line.key not in checked:
                raise ValueError(_no_such_key(manifest, key))
            if not line.decision:
                undecided += 1
                continue
            keep = line.decision.casefold() == KEEP
            if row < 0:
                if not keep:
                    meaning.require_among(checked[line.key], line.decision)
                known += 1
                continue
            label = int(labels[row]) if keep else meaning.of(line.decision)
            if keep and label < 0:
                raise ValueError(f'decision "{KEEP}" must be of an image with a label, it has none')
            first, before = decided.setdefault(key, (line, label))
            if before != label:
                raise ValueError(
                    f"decisions about one image must agree, got {line.decision!r}, and "
                    f"{first.decision!r} in line {first.number}"
                )
            if keep:
                kept.add(key)
            known += bool(label == _NONE and without[row])
        except ValueError as error:
            wrong.append(f"line {line.number}, key {line.key!r}: {error}")
    if wrong:
        more = f" (and {len(wrong) - 1} more lines)" if len(wrong) > 1 else ""
        raise ValueError(f"apply: {path}: {wrong[0]}{more}")

    # Rows that share a key are decided together.
    place = pc.index_in(keys, value_set=pa.array(list(decided), pa.string()))
    number = np.asarray(pc.fill_null(place, -1))
    rows = np.flatnonzero(number >= 0)
    new = np.array([label for _, label in decided.values()], np.int32)[number[rows]]
    keep_label = np.array([key in kept for key in decided], bool)[number[rows]]
    new = np.where(keep_label & (labels[rows] >= 0), labels[rows], new)
    fits = new != _NONE
    return Applied(
        _changed(manifest, noisy[rows], new, fits),
        confirmed=int((fits & (new == labels[rows])).sum()),
        relabelled=int((fits & (new != labels[rows])).sum()),
        nonconforming=int((~fits & ~without[rows]).sum()),
        undecided=undecided,
        known=known,
    )


@dataclasses.dataclass(frozen=True)
class _Line:
    number: int
    key: str
    decision: str


_NONE = -1  # no class


class _Meaning:
    """The class that a decision names."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.spelt = spellings(names)
        self._exact: dict[str, set[int]] = {}
        self._folded: dict[str, set[int]] = {}
        for words in (names, self.spelt):
            for c, word in enumerate(words):
                self._exact.setdefault(word, set()).add(c)
                self._folded.setdefault(word.casefold(), set()).add(c)

    def of(self, word: str) -> int:
        """The class, or ``_NONE``; ``ValueError`` for a word that is neither, or several."""
        if word.casefold() == NONCONFORMING:
            return _NONE
        for text in (word, word.removeprefix(_QUOTE)):
            classes = self._exact.get(text) or self._folded.get(text.casefold())
            if classes:
                first, *others = sorted(classes)
                if others:
                    raise ValueError(
                        f"decision must name one class, got {word!r}, which classes "
                        f"{', '.join(map(str, (first, *others)))} are called; write the number, "
                        f"or {self.spelt[first]!r}"
                    )
                return first
        if word.isascii() and word.isdigit() and int(word) < len(self._names):
            return int(word)
        near = difflib.get_close_matches(word, self.spelt, n=1)
        some = ", ".join(self.spelt[:_SHOWN]) + (", ..." if len(self._names) > _SHOWN else "")
        hint = f"did you mean {near[0]!r}?" if near else f"classes are {some}"
        raise ValueError(
            f'decision must be a class name, a number below {len(self._names)}, "{KEEP}" or '
            f'"{NONCONFORMING}", got {word!r}; {hint}'
        )

    def require_among(self, labels: set[int], word: str) -> None:
        """Raise ``ValueError`` unless a word means one of these verified labels of an image."""
        if self.of(word) not in labels:
            there = " or ".join(repr(self.spelt[c]) for c in sorted(labels))
            raise ValueError(
                f'decision must be "{KEEP}" or {there}, the verified label that the image has in '
                f'the split "clean", got {word!r}'
            )


def _read(path: Path) -> list[_Line]:
    """The lines of a table of decisions."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"apply: {path} must be UTF-8 text: {error}") from error
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return _lines(path, reader)
    except csv.Error as error:
        raise ValueError(f"apply: {path}, line {reader.line_num}: {error}") from error


def _lines(path: Path, reader: Any) -> list[_Line]:
    names = [name.strip() for name in next(reader, [])]
    for name in ("key", "decision"):
        if name not in names:
            raise ValueError(
                f"apply: {path} must have a column {name}, got {', '.join(names) or 'none'}"
            )
    key, decision = names.index("key"), names.index("decision")
    lines = []
    begin = reader.line_num + 1
    for cells in reader:
        if any(cells):
            # A spreadsheet leaves out empty cells at the end.
            cells += [""] * (len(names) - len(cells))
            lines.append(_Line(begin, cells[key], cells[decision].strip()))
        begin = reader.line_num + 1
    return lines


def _found(lines: Sequence[_Line], keys: pa.ChunkedArray) -> list[tuple[str, int]]:
    """The key that each line means, without the quote of :func:`write_list`, and its first row."""
    given = pa.array([line.key for line in lines], pa.string())
    bare = pc.if_else(pc.starts_with(given, _QUOTE), pc.utf8_slice_codeunits(given, 1), given)
    meant = pc.if_else(pc.is_in(bare, value_set=keys), bare, given)
    rows = pc.fill_null(pc.index_in(meant, value_set=keys), -1)
    return list(zip(meant.to_pylist(), rows.to_pylist(), strict=True))


def _checked(manifest: Manifest, lines: Sequence[_Line]) -> dict[str, set[int]]:
    """Labels of the verified images that lines mean in the split "clean", by the key as written."""
    rows = manifest.rows("clean")
    right = np.asarray(pc.fill_null(manifest.table["verified"], False))
    rows = rows[right[rows] & (manifest.labels[rows] >= 0)]
    keys = manifest.table["key"].take(pa.array(rows))
    meant = {line.key: key for line, (key, row) in zip(lines, _found(lines, keys), strict=True)
             if row >= 0}  # fmt: skip
    named = pc.is_in(keys, value_set=pa.array(meant.values(), pa.string()))
    labels: dict[str, set[int]] = {}
    of_named = manifest.labels[rows[np.asarray(named)]].tolist()
    for key, label in zip(keys.filter(named).to_pylist(), of_named, strict=True):
        labels.setdefault(key, set()).add(label)
    return {written: labels[key] for written, key in meant.items()}


def _no_such_key(manifest: Manifest, key: str) -> str:
    row = int(manifest.lookup([key], missing="null")[0])
    if row < 0:
        return "key must be that of a noisy image, got one that no image has"
    split = manifest.table["split"][row].as_py()
    return f'key must be that of an image of the split "train", got one of "{split}"'


def _changed(
    manifest: Manifest, rows: Rows, labels: NDArray[np.int32], fits: NDArray[np.bool_]
) -> Manifest:
    """The manifest with these rows decided."""
    label = manifest.labels.copy()
    label[rows] = labels
    split = np.asarray(manifest.table["split"].combine_chunks().indices).copy()
    split[rows[fits]] = SPLITS.index("clean")
    known = np.asarray(manifest.table["verified"].is_valid()).copy()
    right = np.asarray(pc.fill_null(manifest.table["verified"], False)).copy()
    known[rows] = True
    right[rows] = fits
    columns = {
        "given_label": pa.array(label, mask=label < 0),
        "split": pa.DictionaryArray.from_arrays(pa.array(split), pa.array(SPLITS)),
        "verified": pa.array(right, mask=~known),
    }
    table = manifest.table
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), column)
    return dataclasses.replace(manifest, table=table)


def _leads(
    members: Sequence[PathLike], labels: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N,) q_top - q_given, NaN without a label, and (N,) q_top - q_second."""
    lead = np.full(len(labels), np.nan, np.float32)
    margin = np.empty(len(labels), np.float32)
    with ExitStack() as stack:
        files = open_models([Path(path) for path in members], stack)
        n, k = files[0].shape
        if n != len(labels):
            raise ValueError(
                f"find: {files[0].name} must have a row for each of {len(labels)} noisy images, "
                f"got {n}"
            )
        step = max(1, _CHUNK_BYTES // (k * 4 * (len(files) + 2)))
        for start in range(0, n, step):
            stop = min(start + step, n)
            q = _average(files, start, stop)
            label = labels[start:stop]
            labelled = np.flatnonzero(label >= 0)
            given = q[labelled, label[labelled]]
            second, top = np.partition(q, k - 2, axis=1)[:, -2:].T
            margin[start:stop] = top - second
            lead[start + labelled] = top[labelled] - given
    return lead, margin


def _average(files: Sequence[Source], start: int, stop: int) -> NDArray[np.float32]:
    """(stop - start, k) mean in float32, in the members' order."""
    total = files[0].rows(start, stop).astype(np.float32)
    for file in files[1:]:
        total += file.rows(start, stop).astype(np.float32, copy=False)
    total /= np.float32(len(files))
    return total


def _no_formula(text: str) -> str:
    return _QUOTE + text if text.startswith((*_FORMULA, _QUOTE)) else text
