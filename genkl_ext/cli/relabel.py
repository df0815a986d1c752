"""``genkl relabel``: scores in, targets of the next training out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def relabel(
    source: str,
    *,
    scores: Path,
    out: Path,
    ratio: list[Literal["train", "clean", "val"]] = [],  # noqa: B006 (never changed)
    ratio_file: Path | None = None,
    nc_list: Path | None = None,
    num_classes: int | None = None,
) -> None:
    """Write the target of each noisy image: uniform, or double-hot.

    An image that does not conform gets the uniform vector. Any other one gets max(q) at the model's
    most probable class plus the class ratio r_y at its given label y. Images without prediction or
    without label are marked "left out".

    Args:
        source: the data set: a folder, table or manifest
        scores: what genkl score wrote for its noisy images, as Parquet
        out: table to write, Parquet
        ratio: splits whose labels make the class ratio; by default as published for the data set
        ratio_file: a published ratio file instead
        nc_list: keys of the NC images, instead of those of the scores
        num_classes: WebVision: keep labels below it

    Example:
        genkl relabel /data/clothing1m --scores scores.parquet -o targets.parquet
    """
    from ..training import stages
    from ..training.loop import read_manifest
    from ..training.settings import Data, Relabel

    manifest = read_manifest(Data(root=source, num_classes=num_classes))
    settings = Relabel(ratio_splits=list(ratio), ratio_file=str(ratio_file) if ratio_file else None)
    facts = stages.relabel(manifest, scores, out, settings, nc_list=nc_list)
    changed = facts.pop("top_class_not_given")
    for name, count in facts.items():
        print(f"{name:<18}{count:,}")
    print(f"{'not given':<18}{changed:,} double-hot ones whose top class is not the given label")
    print(f"{'targets':<18}{out}")
