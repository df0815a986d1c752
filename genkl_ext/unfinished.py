"""``Unfinished``: a file of rows that the processes of a job fill, batch by batch.

    .NAME.partial      the file as it will be; rows that are not there yet are 0
    .NAME.journal-R    what process R has filled: finished batches, the CRC-32 of each, and what
                       was noted of them

Both lie beside the target, and neither is left when it is complete. A job that is started again,
with any number of processes, takes up what is there if it would fill the same file. If not, it is
refused, or begins anew where it was told to. Batches that are not as they were written are filled
again.

A journal begins with ``{"format": 2, "about": ...}``. Its parts are ``{"new": BYTES}``, a new file
of so many bytes was begun, and ``{"batches": [[BATCH, CRC-32], ...], "noted": [...]}``. What the
first process's journal is about tells whose the file is, and a file that is not there, or has
another size, holds nothing.
"""

from __future__ import annotations

import glob
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .files import naming, sync_folder, writable_target
from .journal import Journal, parts_about
from .ranks import Ranks

MARK_SECONDS = 5.0  # of work that a killed job may lose; a sync then costs next to nothing
_FORMAT = 2  # of the journals

Noted = Sequence[Any]  # of some rows: the first row, then what there is to say, as JSON knows it

# What to do with the rows that an earlier job has left. False: those of the same job are kept, and
# those of another job are a reason to refuse; "if other": these are thrown away; True: all are.
BeginAnew = bool | Literal["if other"]


class Unfinished:
    """The file in the making. Every process of the job opens it and writes batches of its own.

    Args:
        out: the target. A file that is there stays until the new one is complete.
        about: what the content depends on, as JSON knows it; the same on all processes.
        rows: N.
        row_bytes: of each.
        batch_size: batch b is rows b * batch_size and following.
        ranks: of the job.
        header: bytes before the first row.
        name: of the work, for messages.
        begin_anew: throw away what an earlier job has left: True, in any case; "if other", of a job
            on another file; False, never.

    Attributes:
        todo: the batches that this process has to fill, ascending.
        resumed: rows that an earlier job has left.
        noted: what it has noted of them, by row; on the first process.
        partial: the file that is being filled.

    Raises:
        OSError: the target cannot be written, or another job is at work on it. ValueError: this
            process is about to fill another file than the first one; a job on another file, or
            another version of this module, has left work, and ``begin_anew`` is False.

    Warns:
        UserWarning: what an earlier job had left was thrown away; some of what this job had left
            is damaged.
    """

    def __init__(
        self,
        out: Path,
        about: dict[str, Any],
        *,
        rows: int,
        row_bytes: int,
        batch_size: int,
        ranks: Ranks,
        header: bytes = b"",
        name: str = "predict",
        begin_anew: BeginAnew = False,
    ) -> None:
        if begin_anew not in (False, True, "if other"):
            raise ValueError(
                f"{name}: begin_anew must be False, True or 'if other', got {begin_anew!r}"
            )
        self._target = writable_target(out)
        self.partial = self._target.with_name(f".{self._target.name}.partial")
        self._head = {"format": _FORMAT, "about": about}
        self._ranks = ranks
        self._name = name
        self._begin_anew = begin_anew
        self._header = header
        self._batch_bytes = batch_size * row_bytes
        self._size = len(header) + rows * row_bytes
        self._batches = -(-rows // batch_size)
        self._parts: list[Any] = []  # of the journal
        self._filled: list[tuple[int, int]] = []  # since the last part: batch, its CRC-32
        self._fresh: list[Noted] = []  # noted since the last part
        self._marked = time.monotonic()
        self._thrown_away = ""  # why, if anything was
        self.noted: list[Noted] = []
        with ExitStack() as stack:
            finished: list[int] = []
            if ranks.first:
                path = _journal_path(self._target, 0)
                journal = Journal(path, self._head, take_up=self._is_taken_up)
                self._journal = stack.enter_context(journal)
                finished = self._take_up()
            finished, first_about = ranks.broadcast([finished, about])
            if first_about != about:
                differ = [name for name in about if about[name] != first_about.get(name)]
                raise ValueError(
                    f"{name}: {', '.join(differ)} must be the same on all processes, "
                    f"process {ranks.rank} has another than the first"
                )
            if not ranks.first:
                path = _journal_path(self._target, ranks.rank)
                self._journal = stack.enter_context(Journal(path, self._head))
            try:
                self._file = os.open(self.partial, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"cannot write {self._target}: its folder must be the same for all processes, "
                    f"and process {ranks.rank} does not find {self.partial} there"
                ) from error
            stack.callback(os.close, self._file)
            self._open = stack.pop_all()
        self.resumed = sum(min(batch_size, rows - b * batch_size) for b in finished)
        left = np.setdiff1d(np.arange(self._batches), finished, assume_unique=True)
        # Neighbours to the same process: a row group, or a shard, is then read by one or two.
        self.todo: list[int] = np.array_split(left, ranks.size)[ranks.rank].tolist()

    @staticmethod
    def left(out: Path) -> bool:
        """Whether an earlier job has left work on this file."""
        return _journal_path(Path(os.path.realpath(out)), 0).exists()

    def write(self, batch: int, content: Any, noted: Sequence[Noted] = ()) -> None:
        """Fill a batch.

        Args:
            batch: its number.
            content: its rows, a C-contiguous array or bytes.
            noted: what there is to say of some of them.
        """
        view = memoryview(content).cast("B") if memoryview(content).nbytes else memoryview(b"")
        crc = zlib.crc32(view)
        offset = len(self._header) + batch * self._batch_bytes
        while view:
            with naming(self.partial):
                written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
        self._filled.append((batch, crc))
        self._fresh += noted
        if time.monotonic() - self._marked >= MARK_SECONDS:
            self._mark()

    def complete(self) -> list[Noted]:
        """Put the file in place, once every process has come here.

        Returns:
            All that was noted, by this job and those that it took up; by row.

        Raises:
            OSError: what another process has written does not show here.
        """
        noted = self.gather()
        if self._ranks.first:
            os.replace(self.partial, self._target)
            sync_folder(self._target.parent)
            self._journal.remove()
        return self._ranks.broadcast(noted)

    def discard(self) -> None:
        """Remove the file: what was to be made from it is made."""
        if self._ranks.first:
            self.partial.unlink(missing_ok=True)
            self._journal.remove()

    def gather(self) -> list[Noted]:
        """Wait until every process has come here, and see that all is filled.

        Returns:
            All that was noted, on the first process; the others know nothing.

        Raises:
            OSError: what another process has written does not show here.
        """
        self._mark()
        if not self._ranks.first:
            self._open.close()
        self._ranks.barrier()
        noted: list[Noted] = []
        if self._ranks.first:
            self._gather()
            _, finished, noted = _sum_up(self._parts)
            if self._ranks.size > 1:  # and perhaps on several machines
                finished = self._intact(finished)
            if len(finished) != self._batches:
                raise OSError(
                    f"cannot write {self._target}: only {len(finished)} of {self._batches} batches "
                    "of all processes show on its disk; start the job again to fill in the others"
                )
        return noted

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _is_taken_up(self, head: Any, parts: list[Any]) -> bool:
        """Whether to go on with what the first process of an earlier job has left in its journal.

        Raises:
            ValueError: rows of another job would be lost.
        """
        for path in self._journals_of_others():
            parts = parts + parts_about(path, head)
        mine = self._head["about"]
        try:
            theirs, left = _about_in(head), _sum_up(parts)
        except _OtherFormat:
            lost = bool(parts) and self.partial.exists()  # in what size, that version knows
            was = "was begun by another version of genkl_ext"
            refusal = f" {was}: finish it with that version"
        else:
            if theirs == mine and self._begin_anew is not True:
                return True
            lost = bool(left.finished) and self._is_there(left.size)
            was = "was thrown away" if theirs == mine else "was of other inputs or settings"
            refusal = (
                f", of which {len(left.finished)} batches are done, is of other inputs or settings "
                f"({', '.join(_differences(theirs, mine))}): start that job again to finish it"
            )
        if lost and not self._begin_anew:
            raise ValueError(
                f"{self._name}: an unfinished {self._target.name}{refusal}, or give begin_anew "
                "(--begin-anew) to throw it away"
            )
        self._thrown_away = was if lost else ""
        return False

    def _take_up(self) -> list[int]:
        """The batches that earlier jobs have left; a new file if there are none."""
        self._parts = self._journal.parts
        self._gather()
        _, finished, self.noted = _sum_up(self._parts)
        if finished and self._is_there(self._size):
            intact = self._intact(finished)
            if len(intact) < len(finished):
                warnings.warn(
                    f"{self._name}: {len(finished) - len(intact)} batches of the unfinished "
                    f"{self._target.name} are damaged; they are made again",
                    stacklevel=4,
                )
            return sorted(intact)
        if self._thrown_away:
            warnings.warn(
                f"{self._name}: an unfinished {self._target.name} {self._thrown_away}; begun anew",
                stacklevel=4,
            )
        self.noted = []
        self._note({"new": self._size})  # before the new file is there: it is empty
        self._journal.sync()
        self._create()
        return []

    def _is_there(self, size: int | None) -> bool:
        """Whether the partial file is, in its size."""
        return self.partial.is_file() and self.partial.stat().st_size == size

    def _intact(self, finished: dict[int, int]) -> dict[int, int]:
        """Those of finished batches that are in the file as they were written."""
        intact = {}
        with naming(self.partial), self.partial.open("rb") as file:
            for batch, crc in sorted(finished.items()):
                file.seek(len(self._header) + batch * self._batch_bytes)
                content = file.read(min(self._batch_bytes, self._size - file.tell()))
                if zlib.crc32(content) == crc:
                    intact[batch] = crc
        return intact

    def _gather(self) -> None:
        """Move the parts of the other processes' journals, which have ended, into this one's."""
        for path in self._journals_of_others():
            with Journal(path, self._head) as other:
                # Before a file was begun here, they are of one that was thrown away.
                for part in other.parts if self._parts else []:
                    self._note(part)
                other.remove()

    def _journals_of_others(self) -> list[Path]:
        name = glob.escape(self._target.name)
        found = sorted(self._target.parent.glob(f".{name}.journal-*"))
        return [path for path in found if path != _journal_path(self._target, 0)]

    def _create(self) -> None:
        self.partial.unlink(missing_ok=True)
        try:
            # Not tempfile: its files are readable by their owner only, and would stay so.
            file = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if self._size:  # which must not be 0 there
                    os.posix_fallocate(file, 0, self._size)  # a full disk shows now, not in hours
                os.pwrite(file, self._header, 0)
            finally:
                os.close(file)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            reason = os.strerror(error.errno or 0)
            raise type(error)(f"cannot write {self._target}: {reason}") from error

    def _mark(self) -> None:
        """Keep what was filled: first the rows, then the word that they are there."""
        with naming(self.partial):
            os.fdatasync(self._file)
        self._note({"batches": self._filled, "noted": self._fresh})
        self._filled, self._fresh = [], []
        self._marked = time.monotonic()

    def _note(self, part: Any) -> None:
        self._journal.append(part)
        self._parts.append(part)


def _journal_path(target: Path, rank: int) -> Path:
    return target.with_name(f".{target.name}.journal-{rank}")


def _differences(theirs: Any, mine: Any) -> list[str]:
    """What two jobs differ in, in words: ``rule.alpha 1.0, not 1.05``."""
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return ["of another kind"]
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = theirs.get(name), mine.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{name}.{one}" for one in _differences(a, b)]
        elif isinstance(a, list) and isinstance(b, list) and a != b:
            found.append(f"{name}: {_difference_of_lists(a, b)}")
        elif a != b:
            short = all(isinstance(one, (str, int, float)) for one in (a, b))
            found.append(f"{name} {a!r}, not {b!r}" if short else name)
    return found


def _difference_of_lists(theirs: list[Any], mine: list[Any]) -> str:
    """The first one: ``p1.npy in sample, state``; or the lengths: ``3, not 2``."""
    if len(theirs) != len(mine):
        return f"{len(theirs)}, not {len(mine)}"
    i = next(i for i, a in enumerate(theirs) if a != mine[i])
    a, b = theirs[i], mine[i]
    if not isinstance(a, dict) or not isinstance(b, dict):
        return f"number {i + 1}"
    if a.get("name") != b.get("name"):
        return f"{a.get('name')}, not {b.get('name')}"
    fields = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return f"{a.get('name', f'number {i + 1}')} in {', '.join(fields)}"


class _OtherFormat(ValueError):
    """A journal says something that this version does not understand."""


class _Left(NamedTuple):
    """What earlier jobs have left."""

    size: int | None  #: of the file, if one was begun
    finished: dict[int, int]  #: the CRC-32 of each finished batch
    noted: list[Noted]  #: by row


def _about_in(head: Any) -> Any:
    """What a journal with this first line is about."""
    if not isinstance(head, dict) or head.get("format") != _FORMAT or "about" not in head:
        raise _OtherFormat(head)
    return head["about"]


def _sum_up(parts: list[Any]) -> _Left:
    """What these parts say.

    Raises:
        _OtherFormat: one of them is of no kind that this version writes.
    """
    size: int | None = None
    finished: dict[int, int] = {}
    noted: dict[int, Noted] = {}
    for part in parts:
        match part:
            case {"new": int(size)}:
                finished.clear()
                noted.clear()
            case {"batches": [*batches], "noted": [*rows]}:
                for batch in batches:
                    match batch:
                        case [int(number), int(crc)] if number >= 0:
                            finished[number] = crc
                        case _:
                            raise _OtherFormat(batch)
                for row in rows:
                    match row:
                        case [int(number), *_]:
                            noted[number] = row
                        case _:
                            raise _OtherFormat(row)
            case _:
                raise _OtherFormat(part)
    return _Left(size, finished, [noted[row] for row in sorted(noted)])
