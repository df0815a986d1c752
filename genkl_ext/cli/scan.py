"""``genkl scan``: the broken images of a data set, and why they are."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ..data import layouts
from ..data.decode import Limits
from ..data.manifest import Manifest
from ..data.scan import Scan, files_below
from ..data.scan import scan as scan_images
from . import UsageError
from .progress import Progress

_LIMITS = Limits()
_SHOWN = 5


def scan(
    source: str,
    *,
    ledger: Path = Path("ledger.parquet"),
    layout: Literal["auto", "clothing1m", "food101n", "webvision", "folder", "files"] = "auto",
    max_megapixels: float = _LIMITS.max_pixels / 1e6,
    min_side: int = _LIMITS.min_side,
    threads: int | None = None,
    fail_on_broken: bool = False,
) -> int:
    """Read every image of a data set once and list those that cannot be used, with the reason.

    Missing, unreadable and empty files, files that are no images, images that are truncated, too
    large or too small, and JPEG files with damage inside, which decoders pass over with wrong
    pixels. Training and prediction leave out what the ledger lists. A scan that was interrupted
    goes on where it was when it is started again; a finished one scans again.

    Args:
        source: a manifest, a table with the columns path and label (or its URL), the folder of a
            data set, or any folder
        ledger: Parquet file to write, one row per broken image
        layout: of the folder; "files": every image file in it; "auto": what it looks like, else
            "files"
        max_megapixels: larger images count as broken
        min_side: images with a shorter side, in pixels, count as broken
        threads: that read and check; by default one per processor
        fail_on_broken: exit with status 1 if there is a broken image

    Example:
        genkl scan manifest.parquet --ledger ledger.parquet
        genkl scan photos/ --layout files --max-megapixels 50
    """
    if threads is not None and threads < 1:
        raise UsageError("--threads must be at least 1")
    if ledger.exists() and os.path.isfile(source) and ledger.samefile(source):
        raise UsageError("--ledger must be another file than the manifest")
    manifest = _manifest(source, layout)
    limits = Limits(max_pixels=round(max_megapixels * 1e6), min_side=min_side)
    with _silent_decoders(), Progress("scanning", "images") as progress:
        done = scan_images(manifest, ledger, limits=limits, threads=threads, progress=progress)
    print(summary(manifest, done))
    return 1 if fail_on_broken and len(done.ledger) else 0


def _manifest(source: str, layout: str) -> Manifest:
    if layout == "files":
        return files_below(source)
    if layout != "auto":
        manifest: Manifest = getattr(Manifest, f"from_{layout}")(source)
        return manifest
    try:
        return layouts.read(source)
    except ValueError:
        if not _is_any_folder(source):
            raise
        return files_below(source)


def _is_any_folder(source: str) -> bool:
    """Whether it is a folder without the lists of a data set; one of mere folders looks like one
    of classes, with images in them or not."""
    try:
        return layouts.detect(source) == "folder"
    except ValueError:
        return os.path.isdir(source)


@contextmanager
def _silent_decoders() -> Iterator[None]:
    """Decoders print and log about broken pictures; that is in the ledger. Other messages of
    Python still appear."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    stderr = sys.stderr
    stderr.flush()
    with os.fdopen(os.dup(2), "w", encoding=stderr.encoding, errors="backslashreplace") as kept:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        if stderr is sys.__stderr__:
            sys.stderr = kept
        try:
            yield
        finally:
            sys.stderr = stderr
            kept.flush()
            os.dup2(kept.fileno(), 2)


def summary(manifest: Manifest, done: Scan) -> str:
    """What was found and how fast, for one screen."""
    facts = done.ledger.describe()
    scanned, broken = facts["scanned"], facts["broken"]
    share = f" ({100 * broken / scanned:.3g} %)" if scanned else ""
    images = (scanned - done.resumed) / done.seconds
    lines = [
        ("images", f"{scanned:,}, {manifest.dataset} in {manifest.root}"),
        ("healthy", f"{facts['healthy']:,}"),
        ("broken", f"{broken:,}{share}"),
        *((f"  {reason}", f"{count:,}") for reason, count in facts["reasons"].items()),
        *(
            ("first" if i == 0 else "", f"{it['path']}: {it['reason']}, {it['detail']}")
            for i, it in enumerate(facts["first"][:_SHOWN])
        ),
        *(("odd", str(problem)) for problem in manifest.problems[:_SHOWN]),
        ("speed", f"{images:,.0f} img/s, {done.bytes_read / done.seconds / 1e6:,.0f} MB/s"),
        ("time", f"{done.seconds:.2f} s"),
        ("ledger", str(done.out)),
    ]
    if done.resumed:
        lines.insert(-1, ("resumed", f"{done.resumed:,} images had been checked before"))
    return "\n".join(f"{name:<18}{text}" for name, text in lines)
