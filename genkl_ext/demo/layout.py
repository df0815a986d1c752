"""Reads the Clothing1M folder layout into memory: keys, labels and decoded images of a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SHRINK = 2  # 32 x 32 files are trained on at 16 x 16


@dataclass(frozen=True)
class Split:
    """One split; row i of each field is line i of its key list."""

    keys: list[str]
    labels: NDArray[np.int64]  #: (N,) given labels of a noisy split, verified ones of a clean one
    images: NDArray[np.uint8]  #: (N, 1, H, W) grey

    def __len__(self) -> int:
        return len(self.keys)

    def __add__(self, other: Split) -> Split:
        """The images of both, these first."""
        return Split(
            self.keys + other.keys,
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.images, other.images]),
        )


def read_split(root: Path, name: str) -> Split:
    """The split ``noisy_train``, ``clean_train``, ``clean_val`` or ``clean_test``.

    Args:
        root: the folder that holds ``images/``, with the list files inside it.
        name: the split.

    Raises:
        KeyError: a listed key has no label. OSError: a file is missing or no image.
    """
    lists = root / "images"
    keys = (lists / f"{name}_key_list.txt").read_text().split()
    label_of = read_pairs(lists / f"{name.split('_')[0]}_label_kv.txt")
    return Split(
        keys=keys,
        labels=np.array([label_of[key] for key in keys], dtype=np.int64),
        images=np.stack([_decode(root / key) for key in keys]),
    )


def read_pairs(path: Path) -> dict[str, int]:
    """A "key label" file."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {key: int(label) for key, label in pairs}


def _decode(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("L").reduce(_SHRINK))[None]
