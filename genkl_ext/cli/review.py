"""``genkl review``: what people decided about single images."""

from __future__ import annotations

from pathlib import Path


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
    their label, are scored, and are not trained on.

    Args:
        decisions: CSV file with the columns key and decision, like the one of genkl report --csv
        data: the data set: a folder, a table or a manifest, such as that in the run's folder
        out: manifest to write, Parquet

    Example:
        genkl report runs/clothing1m --csv review.csv
        genkl review apply review.csv --data runs/clothing1m/manifest.parquet -o reviewed.parquet
        genkl run clothing1m data.layout=auto --data-root reviewed.parquet --out runs/reviewed
    """
    from .. import review
    from ..data import layouts
    from ..files import require_writable

    require_writable(out)
    applied = review.apply(layouts.read(data), decisions)
    manifest = applied.manifest
    manifest.save(out)
    clean = manifest.class_counts("clean")
    lines = [
        ("confirmed", f"{applied.confirmed:,} images whose given label is right"),
        ("relabelled", f"{applied.relabelled:,} images of another class"),
        ("fit no class", f"{applied.nonconforming:,} images, without a label now"),
        ("undecided", f"{applied.undecided:,} lines"),
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
