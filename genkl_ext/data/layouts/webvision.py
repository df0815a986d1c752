"""mini WebVision 1.0: the images that a search for the first 50 classes of ImageNet found."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc

from ..manifest import Manifest, PathLike
from .assemble import assemble, part
from .lists import Lists

TRAIN_LIST = "info/train_filelist_google.txt"
VAL_LIST = "info/val_filelist.txt"
NAMES = "info/synsets.txt"
VAL_FOLDER = "val_images_256/"
MINI_CLASSES = 50


def read(root: PathLike, num_classes: int | None = None) -> Manifest:
    """mini WebVision: the Google images of the first classes of WebVision 1.0.

        info/train_filelist_google.txt    "google/q0001/a.jpg 0" -> "train"
        info/val_filelist.txt             "val000001.jpg 0"      -> "test"
        info/synsets.txt                  "n01440764 tench, Tinca tinca": line c names class c

    Rows are the lines with a label below ``num_classes``, in the order of the file. Validation
    images lie in ``val_images_256``; they are the test set of the published results. Without
    ``synsets.txt``, classes are named by their number.

    Args:
        root: the folder that holds ``info``.
        num_classes: k; by default 50, which is mini WebVision, or as many as ``synsets.txt``
            names if these are fewer.

    Raises:
        OSError: the list of Google images does not exist. ValueError: a file is no such list.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"from_webvision: num_classes must be at least 1, got {num_classes}")
    root = os.path.abspath(root)
    lists = Lists(root, "from_webvision")
    class_names = _class_names(lists, num_classes)
    num_classes = len(class_names)
    parts = [_part(lists, "train", TRAIN_LIST, "", None, num_classes)]
    if lists.has(VAL_LIST):
        parts.append(_part(lists, "test", VAL_LIST, VAL_FOLDER, True, num_classes))
    return assemble("webvision", root, class_names, parts, lists.problems)


def _part(
    lists: Lists, split: str, name: str, folder: str, verified: bool | None, num_classes: int
) -> pa.Table:
    """The lines of a list whose label is below k."""
    pairs, labels = lists.labels(lists.pairs(name), None)
    below = pc.less(labels, num_classes)
    keys = pairs.first.filter(below)
    paths = pc.binary_join_element_wise(folder, keys, "")
    return part(split, keys, paths=paths, labels=labels.filter(below), verified=verified)


def _class_names(lists: Lists, num_classes: int | None) -> list[str]:
    wanted = MINI_CLASSES if num_classes is None else num_classes
    if not lists.has(NAMES):
        return [str(c) for c in range(wanted)]
    lines = lists.lines(NAMES).text.to_pylist()[:wanted]
    if num_classes is not None and len(lines) < num_classes:
        lists.fail(NAMES, f"must name {num_classes} classes, got {len(lines)} lines")
    return [line.partition(" ")[2] or line for line in lines]
