"""``scan``: every image of a manifest read and checked once; what is broken goes into a ledger.

done = scan(manifest, "ledger.parquet")
done.ledger.counts()

A scan that was killed goes on where it was: finished chunks of images are kept in
``ledger.parquet.journal`` until the ledger is complete, and the ledger has the same bytes as that
of a scan without a break. A finished ledger is no reason not to scan: the files may have changed.

What counts as broken is said in ``check.py`` and, for decoding, in ``decode.py``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import __version__
from ..files import require_writable
from ..journal import Journal
from ..rule import processors
from .check import check, check_apart, may_decode, verify
from .decode import BrokenImage, Decoder, Limits, read
from .folders import by_name, is_folder
from .ledger import SCHEMA, Ledger
from .manifest import SPLITS, Manifest, PathLike, Problem

# Images: some 20 milliseconds of work, to which a line of the journal is nothing.
CHUNK = 64
LONGEST_DETAIL = 500  # characters: readers may quote what they met

# In letters of either case. More than those of a folder of classes: here all files are of interest.
FILE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".ico",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scan:
    """The ledger of a scan, and what it took to make it."""

    ledger: Ledger
    out: Path  #: where it was saved
    resumed: int  #: images whose result an earlier, killed scan had left
    bytes_read: int  #: by this scan, the earlier one apart
    seconds: float  #: of this scan


def scan(
    manifest: Manifest,
    out: PathLike,
    *,
    limits: Limits = Limits(),
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Check every image of a manifest and save the ledger of the broken ones.

    Memory does not grow with the number of images, apart from the manifest and the ledger; every
    thread may need what decoding the largest image that ``limits`` allow needs.

    Args:
        manifest: the images; files, or objects of a store.
        out: the ledger to write (Parquet). An existing file is replaced when all is done.
        limits: sizes from which an image counts as broken.
        threads: that read and check; by default one per processor of this process.
        progress: called with (images done, N), now and then.

    Returns:
        Scan: the ledger, bytes and seconds.

    Raises:
        OSError: the ledger cannot be written, another scan is at work on it, or this process
        lacks files, memory or the processes it started. ValueError: ``threads`` is not positive.

    Warns:
        UserWarning: the journal of another scan (of other images or limits) was thrown away.
    """
    if threads is None:
        threads = processors()
    if threads < 1:
        raise ValueError(f"scan: threads must be at least 1, got {threads}")
    start = time.perf_counter()
    require_writable(out)
    out = Path(out)
    target = Path(os.path.realpath(out))  # what is beside a link may be another ledger's journal
    root = manifest.root if "://" in manifest.root else os.path.abspath(manifest.root)
    about = {
        "genkl_ext": __version__,
        "manifest": manifest.fingerprint,
        "root": root,
        "limits": dataclasses.asdict(limits),
        "chunk": CHUNK,
    }
    with Journal(target.with_name(target.name + ".journal"), about) as journal:
        if journal.begun_anew:
            warnings.warn(
                f"scan: {out.name}.journal is of a scan of other images or limits; begun anew",
                stacklevel=2,
            )
        found = {part["chunk"]: part for part in journal.parts if isinstance(part, dict)}
        begun = {row for row in journal.parts if isinstance(row, int)}
        suspects = {row for row in begun if row // CHUNK not in found}
        checker = _Checker(manifest, limits, journal, suspects)
        resumed = sum(len(_rows(len(manifest), chunk)) for chunk in found)
        done, read_now = resumed, 0
        with closing(_check_all(len(manifest), set(found), checker, threads)) as parts:
            for part in parts:
                journal.append(part)
                found[part["chunk"]] = part
                done += len(_rows(len(manifest), part["chunk"]))
                read_now += part["bytes"]
                if progress is not None:
                    progress(done, len(manifest))
        ledger = Ledger(
            _table(manifest, [row for chunk in sorted(found) for row in found[chunk]["broken"]]),
            manifest.fingerprint,
            root,
            limits,
            scanned=done,
            bytes_read=sum(part["bytes"] for part in found.values()),
        )
        ledger.save(out)
        journal.remove()
    return Scan(ledger, out, resumed, read_now, time.perf_counter() - start)


def files_below(root: PathLike) -> Manifest:
    """All image files in a folder and the folders in it, as a manifest without labels.

    An image file is one with a suffix of ``FILE_SUFFIXES``. Rows are ordered by path, keys are
    the paths below ``root``. Links to folders are followed, each folder is visited once. What
    begins with a dot is passed over.

    Raises:
        OSError: ``root`` or a folder in it cannot be listed.
    """
    root = os.path.abspath(root)
    paths, odd = by_name(_walk(root))
    column = pa.array(sorted(paths), pa.string())
    table = pa.table({"key": column, "path": column, "split": pa.repeat(SPLITS[0], len(column))})
    return Manifest(table, (), "files", root, Problem.of_names(odd))


def _walk(root: str) -> Iterator[str]:
    """Paths below ``root`` of the image files there."""
    root = root.rstrip("/") + "/"
    folders, seen = [root], set()
    while folders:
        folder = folders.pop()
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(FILE_SUFFIXES):
                    yield entry.path[len(root) :]
                elif is_folder(entry):
                    folders.append(entry.path)


def _rows(images: int, chunk: int) -> range:
    return range(chunk * CHUNK, min((chunk + 1) * CHUNK, images))


def _check_all(
    images: int, done: set[int], checker: _Checker, threads: int
) -> Generator[dict[str, Any]]:
    """The result of each chunk that is not done, as the threads finish them."""
    todo = (chunk for chunk in range(-(-images // CHUNK)) if chunk not in done)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, "genkl-scan") as pool:
        warnings.filterwarnings("ignore", module="PIL")  # about pictures; they are in the ledger
        pending = {pool.submit(checker, chunk) for chunk in islice(todo, 2 * threads)}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    pending |= {pool.submit(checker, chunk) for chunk in islice(todo, 1)}
                    yield future.result()
        finally:
            checker.stop = True
            pool.shutdown(wait=False, cancel_futures=True)


class _Checker:
    """Checks a chunk of images on whatever thread it is called.

    The journal is told of each image that a decoder is about to get, which may bring the process
    down. Of a scan that died so, these are ``suspects``: they are checked in processes of their
    own.
    """

    def __init__(
        self, manifest: Manifest, limits: Limits, journal: Journal, suspects: set[int]
    ) -> None:
        self.stop = False  #: leave work undone: nobody will ask for it
        self._manifest = manifest
        self._limits = limits
        self._journal = journal
        self._suspects = suspects
        self._local = threading.local()

    def __call__(self, chunk: int) -> dict[str, Any]:
        if not hasattr(self._local, "decoder"):
            self._local.decoder = Decoder(self._limits)
        rows = _rows(len(self._manifest), chunk)
        size, broken = 0, []
        for row, path in zip(rows, self._manifest.paths(rows), strict=True):
            if self.stop:
                break
            try:
                data = read(path, self._limits)
                size += len(data)
                self._check(row, path, data)
            except BrokenImage as error:
                broken.append([row, error.reason, _plain(error.detail)])
        return {"chunk": chunk, "bytes": size, "broken": broken}

    def _check(self, row: int, path: str, data: bytes) -> None:
        if row in self._suspects:
            check_apart(path, self._limits)
            return
        verified = verify(data, self._limits)
        if may_decode(data, verified):
            self._journal.append(row)
        check(data, self._local.decoder, verified)


def _plain(detail: str) -> str:
    """A detail as a ledger can hold it: of pictures, any text may come."""
    # Addresses of objects would make every ledger another one.
    detail = re.sub(r" at 0x[0-9a-f]+", "", detail)
    return detail.encode(errors="backslashreplace").decode()[:LONGEST_DETAIL]


def _table(manifest: Manifest, broken: list[list[Any]]) -> pa.Table:
    rows = np.array([row for row, _, _ in broken], np.int64)
    listed = manifest.table.select(["key", "path"]).take(pa.array(rows))
    columns = {
        "row": rows,
        "key": listed["key"],
        "path": listed["path"],
        "reason": pa.array([reason for _, reason, _ in broken], pa.string()),
        "detail": [detail for _, _, detail in broken],
    }
    return pa.table(columns).cast(SCHEMA).combine_chunks()
