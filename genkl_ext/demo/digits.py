"""Scikit-learn's digits as a noisy web data set: JPEG files in the folder layout of Clothing1M.

    ROOT/images/A/BB/X,Y.jpg            the images
    ROOT/images/noisy_label_kv.txt      "key label", the labels of the crawl
    ROOT/images/clean_label_kv.txt      the same, verified
    ROOT/images/noisy_train_key_list.txt, clean_train_, clean_val_, clean_test_key_list.txt
    ROOT/NC_instances.txt               which noisy images fit no class, keys without "images/"
    ROOT/true_digit_kv.txt              "key digit" of every image, 0 to 9

The last two are the truth behind the crawl, for judging only; nothing that trains reads them.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = 8  # digits 0 to 7; 8 and 9 are the non-conforming images
PIXELS = 32
SPLITS = ("noisy_train", "clean_train", "clean_val", "clean_test")
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
    keys = _keys(len(digit), rng)

    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    for c in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(digit == c)).tolist()
        for name, count in zip(SPLITS[1:], (CLEAN_TRAIN[c], CLEAN_VAL, CLEAN_TEST), strict=True):
            splits[name] += rows[:count]
            del rows[:count]
        splits["noisy_train"] += rows
    conforming = np.array(splits["noisy_train"])
    nonconforming = np.flatnonzero(digit >= CLASSES)

    given = digit.copy()
    flipped = rng.choice(conforming, round(FLIPPED * len(conforming)), replace=False)
    if flips == "lookalike":
        given[flipped] = np.array(LOOKALIKE)[digit[flipped]]
    else:
        given[flipped] = (digit[flipped] + rng.integers(1, CLASSES, len(flipped))) % CLASSES
    given[nonconforming] = rng.integers(0, CLASSES, len(nonconforming))
    splits["noisy_train"] += nonconforming.tolist()

    made = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        images = made / "images"
        for key, pixels in zip(keys, digits.images, strict=True):
            path = made / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_jpeg(pixels))
        for name, members in splits.items():
            shuffled = rng.permutation(members)
            _write_lines(images / f"{name}_key_list.txt", [keys[i] for i in shuffled])
        noisy, *verified = splits.values()
        clean = [i for members in verified for i in members]
        _write_lines(images / "noisy_label_kv.txt", [f"{keys[i]} {given[i]}" for i in noisy])
        _write_lines(images / "clean_label_kv.txt", [f"{keys[i]} {digit[i]}" for i in clean])
        listed = [keys[i].removeprefix("images/") for i in nonconforming]
        _write_lines(made / "NC_instances.txt", listed)
        pairs = [f"{k} {d}" for k, d in zip(keys, digit, strict=True)]
        _write_lines(made / "true_digit_kv.txt", pairs)
        made.chmod(0o755)  # mkdtemp makes private folders
        os.replace(made, root)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _keys(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct keys as Clothing1M writes them: images/A/BB/X,Y.jpg with Y ending in ABB."""
    x = rng.integers(10**8, 10**10, count)
    y = rng.choice(10**7, count, replace=False) + 10**9
    return [f"images/{b // 100 % 10}/{b % 100:02d}/{a},{b}.jpg" for a, b in zip(x, y, strict=True)]


def _jpeg(pixels: np.ndarray) -> bytes:
    """An 8 x 8 scan with values from 0 to 16 as a 32 x 32 grey JPEG file, ink bright."""
    small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
