"""Files and folders that are either complete or absent.

    with atomic_write("scores.csv") as temporary:
        temporary.write_text(table)
    with atomic_folder("example") as temporary:
        (temporary / "a.txt").write_text(text)

A reader, or a job that is started again after a crash, sees the old file or the new one, never
half of one. What a killed process leaves is its temporary file, ``.NAME.*.partial.SUFFIX``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LONGEST_STEM = 64  # bytes; leaves a temporary name room for its own parts below the usual 255
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.partial(\..*)?", re.DOTALL)
_TRIES = 100  # to lock a file that others keep removing


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; put it in place of ``path`` when the block ends well.

    The temporary file lies in the same folder and has the same suffix, so writers that look at
    suffixes work. At the end it is synced to disk, renamed over ``path``, and the folder is
    synced. If the block raises, the temporary file is removed and ``path`` is left as it was.
    A symbolic link is followed, not replaced.

    Args:
        path: the file to write. An existing one is replaced.

    Yields:
        The temporary file: it exists, is empty, and has the permissions of a new file.

    Raises:
        OSError: as :func:`require_writable`, or from writing.
    """
    target = writable_target(path)
    temporary = _create_beside(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file into an ``OSError`` of this block that does not say which file it is about:
    those of an open file do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None and os.fspath(path) not in str(error):
            error.filename = os.fspath(path)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; put it in place as ``path`` when the block ends well.

    If the block raises, nothing is left. The files in it are not synced to disk.

    Args:
        path: the folder to make; it must not exist, or be empty, in a folder that exists.

    Yields:
        A new folder beside it.

    Raises:
        OSError: ``path`` exists and is not an empty folder, or it cannot be written.
    """
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"cannot make {target}: it exists and is not an empty folder")
    made = target.with_name(f".{target.name}-{os.urandom(6).hex()}")
    try:
        made.mkdir()
    except OSError as error:
        raise type(error)(f"cannot make {target}: {os.strerror(error.errno or 0)}") from error
    try:
        yield made
        os.replace(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_folder(target.parent)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` unless :func:`atomic_write` could write ``path`` now.

    For jobs that compute for hours before they write: nothing is left behind, and an existing
    file is not touched.
    """
    _create_beside(writable_target(path)).unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of :func:`atomic_write` in a folder and those below.

    Only for a folder in which nobody else is at work.
    """
    _remove(folder.rglob(".*.partial*"))


def remove_leftovers_of(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of :func:`atomic_write` to one file.

    Only for a file that nobody else is writing.
    """
    target = Path(os.path.realpath(path))
    if _stem(target) != target.stem:
        return  # shortened: other files share what is left of the name
    name = re.compile(
        rf"\.{re.escape(target.stem)}\.[0-9a-f]{{12}}\.partial{re.escape(target.suffix)}"
    )
    _remove(found for found in target.parent.iterdir() if name.fullmatch(found.name))


def _remove(found: Iterable[Path]) -> None:
    for path in list(found):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Only one process at a time is in this block; the file is there meanwhile.

    Raises:
        OSError: as :func:`open_locked`.
    """
    file = open_locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def open_locked(path: Path) -> int:
    """The open file, made if it is not there, which no other process has until it is closed.

    Raises:
        OSError: another process has it, or it cannot be opened.
    """
    for _ in range(_TRIES):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed it since it was opened: the lock would be on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except BlockingIOError:
            os.close(file)
            break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                return file  # some network file systems have no locks
            os.close(file)
            error.filename = os.fspath(path)
            raise
        os.close(file)
    raise OSError(f"{path} is in use by another process at work on it")


def writable_target(path: str | os.PathLike[str]) -> Path:
    """The file behind ``path``, once it is known to be a regular file or none in a folder."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {os.fspath(path)}: it is a folder")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {os.fspath(path)}: it is not a regular file")
    if target.exists() and not os.access(target, os.W_OK):
        # The rename would succeed, but somebody protected this file.
        raise PermissionError(f"cannot write {os.fspath(path)}: it is read-only")
    if not target.parent.is_dir():
        kind = "is not a folder" if target.parent.exists() else "does not exist"
        raise FileNotFoundError(f"cannot write {os.fspath(path)}: {target.parent} {kind}")
    return target


def _create_beside(target: Path) -> Path:
    temporary = target.with_name(f".{_stem(target)}.{os.urandom(6).hex()}.partial{target.suffix}")
    try:
        # Not tempfile: its files are readable by their owner only, and would stay so.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise type(error)(f"cannot write {target}: {os.strerror(error.errno or 0)}") from error
    return temporary


def _stem(target: Path) -> str:
    # Names need not be UTF-8, and a shortened one must not end within a letter.
    short = os.fsencode(target.stem)[:_LONGEST_STEM]
    return short.decode(errors="ignore") if len(short) == _LONGEST_STEM else target.stem


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        # Some network file systems know no fsync of a folder; the file itself is synced.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def settings_of(path: str | os.PathLike[str], key: bytes, name: str, wanted: str) -> Any:
    """What was written, as JSON, under a key of a Parquet file's metadata; no row is read.

    Args:
        path: the Parquet file.
        key: tells this kind of table from others.
        name: what an error begins with.
        wanted: the kind of table in words, as "a ledger that genkl scan wrote".

    Raises:
        OSError: it does not exist or cannot be read. ValueError: it is no Parquet file, or lacks
            the key.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = os.fspath(path)
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: {where} does not exist") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}: {where} is not a Parquet file") from error
    if key not in metadata:
        raise ValueError(f"{name}: {where} is not {wanted}")
    return json.loads(metadata[key])
