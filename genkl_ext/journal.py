"""``Journal``: the finished parts of a long job, kept where its death does not lose them.

A file with one line per part, each with its checksum. Opened again by the same job, it gives the
parts back up to the first line that is not whole; a journal of another job is begun anew, unless
whoever opens it decides otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from .files import naming, open_locked


class Journal:
    """An open journal; only one process at a time has it.

    Args:
        path: the file, made if it is not there.
        about: what the parts depend on, as JSON knows it.
        take_up: whether to go on with what is found, given what that is about and its parts. The
            file is as it was until then, and stays so if this raises. By default, if it is about
            the same.

    Attributes:
        parts: those that were taken up.
        begun_anew: parts were thrown away.

    Raises:
        OSError: the file cannot be opened, or another process has it.
    """

    def __init__(
        self,
        path: Path,
        about: dict[str, Any],
        *,
        take_up: Callable[[Any, list[Any]], bool] | None = None,
    ) -> None:
        self._path = path
        self._file = open_locked(path)
        try:
            with naming(path):
                found, size = _read(path)
            goes_on = bool(found) and (
                found[0] == about if take_up is None else take_up(found[0], found[1:])
            )
            self.parts: list[Any] = found[1:] if goes_on else []
            self.begun_anew = len(found) > 1 and not goes_on
            with naming(path):
                os.ftruncate(self._file, size if goes_on else 0)
            if not goes_on:
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


def parts_about(path: Path, about: Any) -> list[Any]:
    """The parts in a journal as it is now; none if it is about something else."""
    with naming(path):
        found, _ = _read(path)
    return found[1:] if found[:1] == [about] else []


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
