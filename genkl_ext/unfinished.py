"""``Unfinished``: a file of rows that the processes of a job fill, batch by batch.

    .NAME.partial      the file as it will be; rows that are not there yet are 0
    .NAME.journal-R    what process R has filled: finished batches, the CRC-32 of each, and what
                       was noted of them

Both lie beside the target, and neither is left when it is complete. A job that is started again,
with any number of processes, takes up what is there if it would fill the same file. If not, it is
refused, or begins anew where it was told to. Batches that are not as they were written are filled
again.
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
from typing import Any

import numpy as np

from .files import naming, sync_folder, writable_target
from .journal import Journal, OtherJob
from .ranks import Ranks

MARK_SECONDS = 5.0  # of work that a killed job may lose; a sync then costs next to nothing
_VOID = None  # a part of a journal: those before it are of a file that is no more

Noted = Sequence[Any]  # of some rows: the first row, then what there is to say, as JSON knows it


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
        begin_anew: throw away what a job on another file has left.

    Attributes:
        todo: the batches that this process has to fill, ascending.
        resumed: rows that an earlier job has left.
        noted: what it has noted of them, by row; on the first process.
        partial: the file that is being filled.

    Raises:
        OSError: the target cannot be written, or another job is at work on it. ValueError: this
            process is about to fill another file than the first one; a job on another file has
            left work, and ``begin_anew`` is not given.

    Warns:
        UserWarning: what a job with other settings had left was thrown away; some of what this
            job had left is damaged.
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
        begin_anew: bool = False,
    ) -> None:
        self._target = writable_target(out)
        self.partial = self._target.with_name(f".{self._target.name}.partial")
        self._about = about
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
        self.noted: list[Noted] = []
        with ExitStack() as stack:
            finished: list[int] = []
            if ranks.first:
                path = _journal_path(self._target, 0)
                self._journal = stack.enter_context(self._open_journal(path))
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
                self._journal = stack.enter_context(Journal(path, about))
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
            self.partial.unlink()
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
            finished, noted = _sum_up(self._parts)
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

    def _open_journal(self, path: Path) -> Journal:
        """One that an earlier job may have left."""
        try:
            return Journal(path, self._about, begin_anew=self._begin_anew)
        except OtherJob as other:
            finished, _ = _sum_up(other.parts)
            if not finished:
                journal = Journal(path, self._about)
                journal.begun_anew = False  # nothing was lost
                return journal
            raise ValueError(
                f"{self._name}: an unfinished {self._target.name}, of which "
                f"{len(finished)} batches are done, is of other inputs or settings "
                f"({', '.join(_differences(other.about, self._about))}): start that job again to "
                "finish it, or give begin_anew (--begin-anew) to throw it away"
            ) from None

    def _take_up(self) -> list[int]:
        """The batches that earlier jobs have left; a new file if there are none."""
        self._parts = self._journal.parts
        thrown_away = self._gather() or self._journal.begun_anew
        finished, self.noted = _sum_up(self._parts)
        there = self.partial.is_file() and self.partial.stat().st_size == self._size
        if finished and there:
            intact = self._intact(finished)
            if len(intact) < len(finished):
                warnings.warn(
                    f"{self._name}: {len(finished) - len(intact)} batches of the unfinished "
                    f"{self._target.name} are damaged; they are made again",
                    stacklevel=4,
                )
            return sorted(intact)
        if thrown_away:
            warnings.warn(
                f"{self._name}: an unfinished {self._target.name} was of other inputs or "
                "settings; begun anew",
                stacklevel=4,
            )
        self.noted = []
        self._note(_VOID)  # before the new file is there: it is empty
        self._journal.sync()
        self._create()
        return []

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

    def _gather(self) -> bool:
        """Move the parts of the other processes' journals, which have ended, into this one's.

        Returns:
            Whether one of them was of another file.
        """
        foreign = False
        name = glob.escape(self._target.name)
        for path in sorted(self._target.parent.glob(f".{name}.journal-*")):
            if path == _journal_path(self._target, 0):
                continue
            with self._open_journal(path) as other:
                for part in other.parts:
                    self._note(part)
                foreign |= other.begun_anew
                other.remove()
        return foreign

    def _create(self) -> None:
        self.partial.unlink(missing_ok=True)
        try:
            # Not tempfile: its files are readable by their owner only, and would stay so.
            file = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
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


def _differences(theirs: Any, mine: dict[str, Any]) -> list[str]:
    """What two jobs differ in, in words: ``rule.alpha 1.0, not 1.05``."""
    if not isinstance(theirs, dict):
        return ["of another kind"]
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = theirs.get(name), mine.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{name}.{one}" for one in _differences(a, b)]
        elif a != b:
            short = all(isinstance(one, (str, int, float)) for one in (a, b))
            found.append(f"{name} {a!r}, not {b!r}" if short else name)
    return found


def _sum_up(parts: list[Any]) -> tuple[dict[int, int], list[Noted]]:
    """Finished batches with the CRC-32 of each, and what was noted, by row."""
    finished: dict[int, int] = {}
    noted: dict[int, Noted] = {}
    for part in parts:
        if part is _VOID:
            finished.clear()
            noted.clear()
            continue
        finished.update(part["batches"])
        noted.update((item[0], item) for item in part["noted"])
    return finished, [noted[row] for row in sorted(noted)]
