"""Scikit-learn's digits as a noisy web data set: JPEG files in the folder layout of Clothing1M.

    ROOT/images/A/BB/X,Y.jpg            the images
    ROOT/images/noisy_label_kv.txt      "key label", the labels of the crawl
    ROOT/images/clean_label_kv.txt      the same, verified
    ROOT/images/noisy_train_key_list.txt, clean_train_, clean_val_, clean_test_key_list.txt
    ROOT/images/category_names_eng.txt  the classes, "0" to "7"
    ROOT/NC_instances.txt               which noisy images fit no class, keys without "images/"
    ROOT/true_digit_kv.txt              "key digit" of every image, 0 to 9

The last two are the truth behind the crawl, for judging only; nothing that trains reads them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ..data.examples import clothing1m_keys, write_clothing1m
from ..data.manifest import SPLITS
from ..files import atomic_folder

CLASSES = 8  # digits 0 to 7; 8 and 9 are the non-conforming images
PIXELS = 32
FLIPPED = 0.25  # share of the conforming noisy images that get another class as label
LOOKALIKE = (6, 4, 7, 5, 1, 3, 0, 2)  # 0 and 6, 1 and 4, 2 and 7, 3 and 5
Flips = Literal["lookalike", "random"]
# Verified images per class. The training sizes differ from class to class, so that the
# normalized class ratio has something to say.
CLEAN_TRAIN = tuple(range(6, 6 + CLASSES))
CLEAN_VAL = 20
CLEAN_TEST = 50


def write(root: Path, seed: int, flips: Flips = "lookalike") -> None:
    """Write the data set into the folder ``root``, which must not exist yet.

    The folder appears under its name only when it is complete.

    Args:
        root: the folder to make; its parent exists.
        seed: of the split, the crawl's labels, the keys and the order of the noisy list.
        flips: what a flipped label is: the class that looks most alike, as a search confuses
            classes that resemble each other, or any other class.
    """
    rng = np.random.default_rng(seed)
    digits = load_digits()
    digit = digits.target.astype(int)
    keys = clothing1m_keys(len(digit), rng)

    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    for c in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(digit == c)).tolist()
        for name, count in zip(SPLITS[1:], (CLEAN_TRAIN[c], CLEAN_VAL, CLEAN_TEST), strict=True):
            splits[name] += rows[:count]
            del rows[:count]
        splits["train"] += rows
    conforming = np.array(splits["train"])
    nonconforming = np.flatnonzero(digit >= CLASSES)

    given = digit.copy()
    flipped = rng.choice(conforming, round(FLIPPED * len(conforming)), replace=False)
    if flips == "lookalike":
        given[flipped] = np.array(LOOKALIKE)[digit[flipped]]
    else:
        given[flipped] = (digit[flipped] + rng.integers(1, CLASSES, len(flipped))) % CLASSES
    given[nonconforming] = rng.integers(0, CLASSES, len(nonconforming))
    splits["train"] += nonconforming.tolist()

    lists = {name: [keys[i] for i in rng.permutation(rows)] for name, rows in splits.items()}
    noisy, *verified = splits.values()
    with atomic_folder(root) as made:
        write_clothing1m(
            made,
            {key: _jpeg(pixels) for key, pixels in zip(keys, digits.images, strict=True)},
            lists,
            noisy_labels={keys[i]: given[i] for i in noisy},
            clean_labels={keys[i]: digit[i] for rows in verified for i in rows},
            class_names=[str(c) for c in range(CLASSES)],
            nonconforming=[keys[i] for i in nonconforming],
        )
        pairs = [f"{key} {d}\n" for key, d in zip(keys, digit, strict=True)]
        (made / "true_digit_kv.txt").write_text("".join(pairs))


def _jpeg(pixels: np.ndarray) -> bytes:
    """An 8 x 8 scan with values from 0 to 16 as a 32 x 32 grey JPEG file, ink bright."""
    small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
