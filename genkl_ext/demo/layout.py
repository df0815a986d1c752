"""Reads a split of a manifest into memory: keys, labels and decoded images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import Manifest

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


def read_split(manifest: Manifest, name: str) -> Split:
    """A split of a manifest, its images decoded.

    Raises:
        OSError: a file is missing or no image.
    """
    split = manifest.split(name)
    return Split(
        keys=split.keys(),
        labels=split.labels.astype(np.int64),
        images=np.stack([_decode(path) for path in split.paths()]),
    )


def read_pairs(path: Path) -> dict[str, int]:
    """A "key label" file."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {key: int(label) for key, label in pairs}


def _decode(path: str) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("L").reduce(_SHRINK))[None]
