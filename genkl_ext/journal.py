"""``Journal``: the finished parts of a long job, kept where its death does not lose them.

A file with one line per part, each with its checksum. Opened again by the same job, it gives the
parts back up to the first line that is not whole; a journal of another job is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from .files import naming, open_locked


class OtherJob(ValueError):
    """A journal has parts of another job.

    Attributes:
        about: what they depend on.
        parts: these.
    """

    def __init__(self, path: Path, about: Any, parts: list[Any]) -> None:
        super().__init__(f"{path} is the journal of another job")
        self.about, self.parts = about, parts


class Journal:
    """An open journal; only one process at a time has it.

    Args:
        path: the file, made if it is not there.
        about: what the parts depend on, as JSON knows it.
        begin_anew: parts of another job are thrown away, not an error.

    Attributes:
        parts: those found in the file.
        begun_anew: parts of another job were thrown away.

    Raises:
        OSError: the file cannot be opened, or another process has it. OtherJob: it has parts of
            another job.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, begin_anew: bool = True) -> None:
        self._path = path
        self._file = open_locked(path)
        try:
            with naming(path):
                found, size = _read(path)
            mine = bool(found) and found[0] == about
            self.parts: list[Any] = found[1:] if mine else []
            self.begun_anew = len(found) > 1 and not mine
            if self.begun_anew and not begin_anew:
                raise OtherJob(path, found[0], found[1:])
            with naming(path):
                os.ftruncate(self._file, size if mine else 0)
            if not mine:
                self.append(about)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, part: Any) -> None:
        """Add a part, as JSON knows it. A killed process loses nothing; a machine that loses its
        power may lose the last parts."""
        line = _line(part)
        while line:
            with naming(self._path):
                line = line[os.write(self._file, line) :]

    def sync(self) -> None:
        """Have what was added survive a loss of power."""
        with naming(self._path):
            os.fdatasync(self._file)

    def remove(self) -> None:
        """Delete the file: the job is done."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)


def _line(part: Any) -> bytes:
    text = json.dumps(part, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[Any], int]:
    """The parts in the whole lines at the beginning of a file, and the bytes of these lines."""
    parts, size = [], 0
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        for line in file:
            part = json.loads(line[9:])
            if line != _line(part):
                break
            parts.append(part)
            size += len(line)
    return parts, size
