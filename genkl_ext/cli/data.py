"""``genkl data``: what a data set holds; miniatures to try things on."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..data import Manifest

_SHOWN = 10  # missing files that are named


def info(
    source: str,
    *,
    root: str | None = None,
    check_files: bool = False,
    ledger: Path | None = None,
    save: Path | None = None,
    json: bool = False,
) -> int:
    """Show what a data set holds: images per split and class, class ratio, what is odd in it.

    The layout is recognised: a folder of Clothing1M, Food-101N or WebVision, a folder with a
    folder of images for each class, a CSV, TSV or Parquet table with the columns path and label
    (or its URL), or a manifest that was saved.

    Args:
        source: folder, file or URL
        root: folder or URL that holds the images of a table or manifest, if not where it says
        check_files: look whether every image is there; exit status 1 if one is not
        ledger: what genkl scan wrote; its broken images are counted
        save: Parquet file to write the manifest to
        json: print one JSON object instead of tables

    Example:
        genkl data info /data/clothing1m --check-files
        genkl data info images.csv --root /data/images --save manifest.parquet
    """
    from ..data import layouts

    manifest = layouts.read(source, root)
    facts = manifest.describe()
    try:
        facts["class_ratio"] = manifest.class_ratio().tolist()
    except ValueError:  # a class without an image; that is among the problems
        facts["class_ratio"] = None
    if check_files:
        facts["missing_files"] = manifest.paths(manifest.missing_files())
    if ledger is not None:
        facts["broken"] = _broken(manifest, ledger)
    if save is not None:
        manifest.save(save)
    print(json_format.dumps(facts, indent=2) if json else _screen(facts))
    return 1 if facts.get("missing_files") else 0


def make_example(
    layout: Literal["clothing1m", "food101n", "webvision", "folder"],
    out: Path,
    *,
    images: Path | None = None,
    count: int = 200,
    classes: int | None = None,
    seed: int = 0,
) -> None:
    """Write a miniature data set of drawings, or of given pictures, in a published layout.

    It has verified images, some wrong labels and some images that fit no class, as far as the
    layout and the pictures allow; truth.csv in it says which are which. It appears under its
    name only when it is complete.

    Args:
        layout: as it is published; folder is one folder for each split and class
        out: folder to make; new or empty
        images: folder of pictures to use instead of drawings; a folder for each class in it makes
            the labels mean something, folders beyond --classes hold what fits none
        count: noisy images; verified ones are added
        classes: number of classes; by default 14, 10, 50 and 5
        seed: of everything random

    Example:
        genkl data make-example clothing1m /tmp/clothing1m
        genkl data make-example folder /tmp/pictures --classes 3 --count 1000
    """
    from ..data import examples, layouts

    examples.make(layout, out, images=images, count=count, classes=classes, seed=seed)
    print(layouts.read(out))


def _broken(manifest: Manifest, ledger: Path) -> dict[str, Any]:
    """How many images of the manifest a ledger lists, and what it lists."""
    from ..data import Ledger

    known = Ledger.load(ledger)
    rows = known.rows_in(manifest)
    return {"images": len(rows), "scanned": known.scanned, "reasons": known.counts()}


def _screen(facts: dict[str, Any]) -> str:
    splits = facts["splits"]
    sizes = (f"{split['images']:,} {name}" for name, split in splits.items())
    lines = [
        ("data set", f"{facts['dataset']}, {len(facts['class_names'])} classes"),
        ("root", facts["root"]),
        ("images", ", ".join(sizes) or "none"),
        ("verified", f"{facts['verified_right']:,} right, {facts['verified_wrong']:,} wrong"),
    ]
    if facts["kinds"]:
        kinds = (f"{count:,} {kind}" for kind, count in facts["kinds"].items())
        lines.append(("kinds", ", ".join(kinds)))
    if "missing_files" in facts:
        missing = facts["missing_files"]
        lines.append(("missing files", f"{len(missing):,}" if missing else "none"))
        lines += [("", path) for path in missing[:_SHOWN]]
        if len(missing) > _SHOWN:
            lines.append(("", "..."))
    if "broken" in facts:
        broken = facts["broken"]
        reasons = ", ".join(f"{count:,} {name}" for name, count in broken["reasons"].items())
        lines.append(("broken", f"{broken['images']:,}"))
        lines.append(("", f"the ledger has {reasons or 'none'}, of {broken['scanned']:,} scanned"))
    problems = [f"{problem['where']}: {problem['what']}" for problem in facts["problems"]]
    lines += zip(["odd"] + [""] * len(problems), problems or ["nothing"], strict=False)
    lines.append(("fingerprint", facts["fingerprint"]))
    return "\n".join(f"{name:<15}{text}" for name, text in lines) + "\n\n" + _classes(facts)


def _classes(facts: dict[str, Any]) -> str:
    """Images of each class in each split, and the class ratio."""
    splits, names = facts["splits"], facts["class_names"]
    ratio = facts["class_ratio"] or [None] * len(names)
    rows = [["class", "", *splits, "ratio"]]
    for c, name in enumerate(names):
        counts = [f"{split['classes'][c]:,}" for split in splits.values()]
        rows.append([str(c), name, *counts, "-" if ratio[c] is None else f"{ratio[c]:.6f}"])
    bare = [split["without_label"] for split in splits.values()]
    if any(bare):
        rows.append(["", "without a label", *(f"{count:,}" for count in bare), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i == 1 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
