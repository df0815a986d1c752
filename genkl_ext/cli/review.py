"""``genkl review``: what people decided about single images."""

from __future__ import annotations

import os
from pathlib import Path

from . import UsageError


def apply(
    decisions: Path,
    *,
    data: str,
    out: Path,
) -> None:
    """Put what people decided about single images into a manifest, as verified labels.

    A decision is the name or the number of a class, "ok" where the given label is right, or "nc"
    for an image that fits no class; an empty one leaves the image as it is. Images with a class
    move to the split "clean", from which members and fine-tuning learn; those that fit none lose
    their label, are scored, not trained on, and left out of later lists. What the manifest has
    already is passed over, so a list that has grown can be applied again.

    Where a name does not tell the class, write the number, or both as the list does: "crane (134)"
    where two classes are called crane, and "nc (3)" for a class called nc; "ok" and "nc" alone are
    always the words.

    Args:
        decisions: CSV file with the columns key and decision, like the one of genkl report --csv
        data: the data set: a folder, a table, a manifest, or the folder of a run, whose manifest is
            taken
        out: manifest to write, .parquet

    Example:
        genkl report runs/clothing1m --csv review.csv
        genkl review apply review.csv --data runs/clothing1m -o reviewed.parquet
        genkl run clothing1m data.layout=auto --data-root reviewed.parquet --out runs/reviewed
    """
    if out.suffix.lower() != ".parquet":
        raise UsageError(f"--out must end in .parquet, got {out}")
    for given in (str(decisions), data, os.path.join(data, "manifest.parquet")):
        if os.path.realpath(out) == os.path.realpath(given):
            raise UsageError(f"--out must be another file than {given}")

    from .. import review
    from ..files import require_writable
    from ..report.findings import read_data

    require_writable(out)
    applied = review.apply(read_data(data), decisions)
    manifest = applied.manifest
    manifest.save(out)
    clean = manifest.class_counts("clean")
    lines = [
        ("confirmed", f"{applied.confirmed:,} images whose given label is right"),
        ("relabelled", f"{applied.relabelled:,} images of another class"),
        ("fit no class", f"{applied.nonconforming:,} images, without a label now"),
        ("undecided", f"{applied.undecided:,} lines"),
        ("known", f"{applied.known:,} lines whose decision was there already"),
        ("clean", f"{clean.sum():,} verified images, which members.source=clean, "),
        ("", "training.clean=joint or loader, and finetune.clean=split use"),
    ]
    without = [name for name, count in zip(manifest.class_names, clean, strict=True) if not count]
    if without and clean.any():
        some = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        lines += [
            ("", f"{len(without):,} classes have none yet ({some}): the class ratio must then"),
            ("", "be that of other images, relabel.ratio_splits=[train]"),
        ]
    lines.append(("manifest", str(out)))
    print("\n".join(f"{name:<14}{text}".rstrip() for name, text in lines))
