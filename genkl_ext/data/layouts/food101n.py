"""Food-101N, with the test images of Food-101: 101 classes of food."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc

from ..manifest import Manifest, PathLike
from .assemble import assemble, part
from .lists import Lines, Lists

RELEASE = "Food-101N_release/"
FOOD101 = "food-101/"
IMAGE_LIST = RELEASE + "meta/imagelist.tsv"
VERIFIED_TRAIN = RELEASE + "meta/verified_train.tsv"
VERIFIED_VAL = RELEASE + "meta/verified_val.tsv"
TEST_LIST = FOOD101 + "meta/test.txt"
CLASSES = "meta/classes.txt"
HEADER = "class_name"  # how a line begins that is no entry


def read(root: PathLike) -> Manifest:
    """Food-101N and the test images of Food-101.

        Food-101N_release/meta/classes.txt                the classes, sorted
        Food-101N_release/meta/verified_train.tsv         flag 1, sorted by key -> "clean"
        Food-101N_release/meta/verified_val.tsv           flag 1, in its order  -> "val"
        Food-101N_release/meta/imagelist.tsv              the rest, sorted by key -> "train"
        food-101/meta/test.txt, classes.txt               in its order -> "test"

    An image's label is the class in its key "CLASS/FILE.jpg". Images with flag 0 carry a wrong
    label: they stay in "train", with ``verified`` false. Sorting by key is what sorting full
    paths is in the published programs.

    Args:
        root: the folder that holds ``Food-101N_release`` and ``food-101``.

    Raises:
        OSError: the classes or the image list do not exist. ValueError: a file is no such list,
            or Food-101 has other classes.
    """
    root = os.path.abspath(root)
    lists = Lists(root, "from_food101n")
    classes = _classes(lists, RELEASE)
    images = _images(lists, lists.lines(IMAGE_LIST, HEADER), classes)
    clean = _verified(lists, VERIFIED_TRAIN, classes)
    val = _verified(lists, VERIFIED_VAL, classes)
    seen = pa.concat_tables([clean, val])
    unlisted = pc.sum(pc.invert(pc.is_in(seen["key"], value_set=images["key"]))).as_py() or 0
    if unlisted:
        lists.report(IMAGE_LIST, f"verified images that it lacks: {unlisted:,}", unlisted)

    right = pc.equal(seen["flag"], "1")
    noisy = images.filter(
        pc.invert(pc.is_in(images["key"], value_set=seen.filter(right)["key"]))
    ).sort_by("key")
    wrong = pc.is_in(noisy["key"], value_set=seen.filter(pc.invert(right))["key"])
    clean, val = (verified.filter(pc.equal(verified["flag"], "1")) for verified in (clean, val))
    parts = [
        _part("train", noisy, verified=pc.if_else(wrong, False, pa.scalar(None, pa.bool_()))),
        _part("clean", clean.sort_by("key"), verified=True),
        _part("val", val, verified=True),
    ]
    if lists.has(TEST_LIST):
        if _classes(lists, FOOD101) != classes:
            lists.fail(FOOD101 + CLASSES, f"must list the classes of {RELEASE + CLASSES}")
        test = _images(lists, lists.lines(TEST_LIST, HEADER), classes)
        parts.append(_part("test", test, FOOD101, ".jpg", verified=True))
    return assemble("food101n", root, classes, parts, lists.problems)


def _part(
    split: str,
    images: pa.Table,
    folder: str = RELEASE,
    suffix: str = "",
    *,
    verified: bool | pa.ChunkedArray,
) -> pa.Table:
    keys = images["key"]
    paths = pc.binary_join_element_wise(folder + "images/", keys, suffix, "")
    return part(split, keys, paths=paths, labels=images["label"], verified=verified)


def _classes(lists: Lists, folder: str) -> list[str]:
    """Class names in the order of their characters."""
    return sorted(lists.lines(folder + CLASSES, HEADER).text.to_pylist())


def _images(lists: Lists, lines: Lines, classes: list[str]) -> pa.Table:
    """Columns key and label of lines "CLASS/FILE"."""
    label = _labels(lines.text, classes)
    lists.keep(lines, label.is_valid(), f"CLASS/FILE of a class in {CLASSES}")
    return pa.table({"key": lines.text, "label": label}).filter(label.is_valid())


def _verified(lists: Lists, name: str, classes: list[str]) -> pa.Table:
    """Columns key, label and flag, "0" or "1"; no rows if there is no such list."""
    if not lists.has(name):
        return pa.schema(
            [("key", pa.string()), ("label", pa.int32()), ("flag", pa.string())]
        ).empty_table()
    pairs = lists.pairs(name, HEADER, "a flag")
    label = _labels(pairs.first, classes)
    good = pc.and_(label.is_valid(), pc.is_in(pairs.second, value_set=pa.array(["0", "1"])))
    lists.keep(pairs.lines, good, f"CLASS/FILE of a class in {CLASSES} and a flag, 0 or 1")
    return pa.table({"key": pairs.first, "label": label, "flag": pairs.second}).filter(good)


def _labels(keys: pa.ChunkedArray, classes: list[str]) -> pa.ChunkedArray:
    """The number of the class in each key "CLASS/FILE"; null if it is none."""
    label = pc.index_in(
        pc.replace_substring_regex(keys, "/.*", ""), value_set=pa.array(classes, pa.string())
    )
    return pc.if_else(pc.match_substring(keys, "/"), label, None)
