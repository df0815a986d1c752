"""``genkl report``: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path

from . import UsageError


def report(
    run: Path,
    *,
    out: Path | None = None,
    root: str | None = None,
    pictures: int = 24,
    csv: Path | None = None,
    csv_rows: int = 1000,
) -> None:
    """Write one HTML page about a run: what was found, how much, and what it did for the accuracy.

    The page stands alone and can be sent around: pictures and figures are in it, and it loads
    nothing. It shows the most non-conforming, the most likely mislabelled and the most ambiguous
    images, every iteration, the broken files and the settings. A run that is not finished gets a
    page of what is there so far.

    Args:
        run: folder of the run
        out: page to write, .html; by default report.html in the run's folder
        root: folder or URL that holds the images, if they have moved since the run
        pictures: images of each kind to show
        csv: also write a list of images to look at, with an empty column for decisions; genkl
            review apply puts them into a manifest; a list with decisions in it is not written over
        csv_rows: images of each kind in the list

    Example:
        genkl report runs/clothing1m
        genkl report runs/clothing1m -o page.html --csv review.csv
    """
    for name, value in (("--pictures", pictures), ("--csv-rows", csv_rows)):
        if value < 0:
            raise UsageError(f"{name} must not be negative, got {value}")

    from ..report.html import build

    page = build(run, out, root=root, pictures=pictures, csv=csv, csv_rows=csv_rows)
    print(f"{'page':<10}{page} ({page.stat().st_size / 1e6:.1f} MB)")
    if csv is not None:
        print(f"{'to review':<10}{csv}")
