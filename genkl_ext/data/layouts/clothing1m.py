"""Clothing1M: 14 classes of clothes; a million noisy images, verified ones in three splits."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..manifest import SPLITS, Manifest, PathLike, without_prefix
from .assemble import assemble, part
from .lists import Lines, Lists

CLASSES = (
    "T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket",
    "Downcoat", "Suit", "Shawl", "Dress", "Vest", "Underwear",
)  # fmt: skip
NAMES = "category_names_eng.txt"
KEY_LISTS = tuple(
    f"{name}_key_list.txt" for name in ("noisy_train", "clean_train", "clean_val", "clean_test")
)  # of SPLITS
KEY_PREFIX = "images/"
_PLACES = ("", "images/", "annotations/")


def read(root: PathLike, class_names: Sequence[str] | None = None) -> Manifest:
    """Clothing1M.

        noisy_train_key_list.txt with noisy_label_kv.txt    -> "train"
        clean_train_, clean_val_, clean_test_key_list.txt
            with clean_label_kv.txt                         -> "clean", "val", "test"

    The lists lie in ``root``, ``root/images`` or ``root/annotations``. Keys look like
    "images/0/99/a,b.jpg", and the files lie below ``root/images`` or, where there is no such
    folder, below ``root``; a key without "images/" is the same key. Rows are in the order of the
    key lists. An image with two labels has the last one, as in the published programs.

    Args:
        root: the folder of the data set, or its folder of images.
        class_names: by default the lines of category_names_eng.txt beside the lists, else the
            14 classes.

    Raises:
        OSError: a list of the noisy images, or the labels of a list, do not exist. ValueError: a
            file is no such list, or no image of a list has a label.
    """
    root = os.path.abspath(root)
    place = find_lists(root)
    if place is None:
        tried = ", ".join(os.path.join(root, place) for place in _PLACES)
        raise FileNotFoundError(f"from_clothing1m: {KEY_LISTS[0]} must be in one of {tried}")
    lists = Lists(root, "from_clothing1m")
    if class_names is None and os.path.isfile(os.path.join(root, place + NAMES)):
        class_names = lists.lines(place + NAMES).text.to_pylist()
    class_names = class_names or CLASSES
    images = KEY_PREFIX if os.path.isdir(os.path.join(root, KEY_PREFIX)) else ""

    labelled: dict[str, _Labels] = {}
    parts = []
    for split, name in zip(SPLITS, KEY_LISTS, strict=True):
        if not lists.has(place + name):
            continue
        source = f"{place}{name.split('_')[0]}_label_kv.txt"
        if source not in labelled:
            labelled[source] = _Labels(lists, source, len(class_names))
        listed = lists.lines(place + name)
        keys = without_prefix(listed.text, KEY_PREFIX)
        parts.append(
            part(
                split,
                listed.text,
                paths=pc.binary_join_element_wise(images, keys, ""),
                labels=labelled[source].of(lists, listed, keys),
                verified=None if split == "train" else True,
            )
        )
    return assemble("clothing1m", root, class_names, parts, lists.problems)


def find_lists(root: PathLike) -> str | None:
    """Where below ``root`` the lists lie, "" or with a "/" at the end; None: nowhere."""
    for place in _PLACES:
        if os.path.isfile(os.path.join(root, place + KEY_LISTS[0])):
            return place
    return None


class _Labels:
    """A file of lines "key label"."""

    def __init__(self, lists: Lists, name: str, classes: int) -> None:
        pairs, labels = lists.labels(lists.pairs(name), classes)
        # From the end, so that the last label of a key is the first one found.
        backwards = pa.array(np.arange(len(pairs))[::-1])
        self._name = name
        self._keys = without_prefix(pairs.first, KEY_PREFIX).take(backwards)
        self._labels = labels.take(backwards)
        again = len(pairs) - pc.count_distinct(self._keys).as_py()
        if again:
            lists.report(name, f"keys listed again: {again:,}; the last label counts", again)

    def of(self, lists: Lists, listed: Lines, keys: pa.ChunkedArray) -> pa.ChunkedArray:
        """The label of each key, null where it has none; ``listed`` are the lines of the keys."""
        found = pc.index_in(keys, value_set=self._keys)
        if len(keys) and found.null_count == len(keys):
            lists.fail(
                listed.name,
                f"must list images with a label in {self._name}, got none among {len(keys):,}, "
                f"first {listed.text[0].as_py()!r}",
            )
        return self._labels.take(found)
