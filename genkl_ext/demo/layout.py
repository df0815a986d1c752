"""Reads a split of a manifest into memory: keys, labels and decoded images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import Manifest, Transforms, make_loader

_TRANSFORMS = Transforms(size=16, resize=16)  # half the size of the files


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
        ImageError: a file is missing or no image.
    """
    split = manifest.split(name)
    loader = make_loader(split, None, _TRANSFORMS, 256, device="cpu", dtype=torch.uint8)
    images = torch.cat([batch["image"][:, :1] for batch in loader])  # grey: channels are equal
    loader.close()
    return Split(split.keys(), split.labels.astype(np.int64), images.numpy())


def read_pairs(path: Path) -> dict[str, int]:
    """A "key label" file."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {key: int(label) for key, label in pairs}
