"""What happens to a picture between its file and the network, said once.

    eval_ = Transforms.preset("clothing1m", "eval")     # resize 256, centre crop 224
    train = Transforms(crop="random", flip=0.5)         # resize 256, random crop 224, flip
    where = train.geometry(533, 400, draws)             # numbers for one picture: no pixels yet
    eval_.torchvision()                                 # the same as a torchvision v2 pipeline

The steps, in this order: rotate about the centre; resize so that the shorter side is ``resize``;
cut out a window; resize the window to ``size`` (random resized crops only); flip; take the mean
and divide by the standard deviation. Resizing is bilinear with antialiasing (the triangle filter
grows with the reduction), in uint8 after each pass, as torchvision does it for uint8 tensors on a
CPU. Rotation takes the nearest pixel, keeps the size and fills with black, as torchvision does by
default.

A picture's random numbers depend on seed, epoch and row alone, so neither the batch size nor the
number of workers or ranks changes what a network sees.

Source: GenKL (arXiv 2307.09810), the transforms of its three experiments.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .decode import BrokenImage

if TYPE_CHECKING:
    from torch import nn

Crop = Literal["center", "random", "random_resized"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LONGEST_SIDE = 1 << 20  # csrc/kernels/resample.h: kMaxSide
LONGEST_TURNED = 23_170  # csrc/kernels/rotate.cpp: corners stay below 32,768 at any angle
_TRIES = 10  # of a random resized crop, then a central one is taken
DRAWS = 2 + 4 * _TRIES  # uniform numbers that one picture may need


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the pixels of one output come from. Sizes are (height, width) in pixels."""

    angle: float  #: degrees, counter-clockwise; 0 keeps the picture as it is
    full: tuple[int, int]  #: of the picture
    resized: tuple[int, int]  #: of the picture after the first resize
    window: tuple[int, int, int, int]  #: top, left, height, width, in the resized picture
    size: tuple[int, int]  #: of the output; another than the window's means a second resize
    flip: bool  #: mirror the output left to right


@dataclasses.dataclass(frozen=True)
class Transforms:
    """How pictures become inputs of a network.

    Args:
        size: height and width of the output, in pixels.
        resize: length of the shorter side after the first resize; at least ``size`` unless the
            crop is ``random_resized``, for which None skips this resize.
        crop: ``center``, ``random`` (any position) or ``random_resized`` (any position, area and
            aspect ratio, then resized to ``size``).
        flip: probability of a horizontal flip.
        rotation: the angle is uniform within +- this many degrees.
        scale: least and largest area of a random resized crop, as a share of the picture's.
        ratio: least and largest width / height of a random resized crop.
        mean, std: per channel (red, green, blue), of values between 0 and 1.

    Raises:
        ValueError: a setting outside its range; with the setting and its value.
    """

    size: int = 224
    resize: int | None = 256
    crop: Crop = "center"
    flip: float = 0.0
    rotation: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        def require(name: str, good: bool, wanted: str) -> None:
            if not good:
                value = getattr(self, name)
                raise ValueError(f"Transforms: {name} must be {wanted}, got {value!r}")

        resized = self.crop == "random_resized"
        least = 1 if resized else self.size
        require("size", isinstance(self.size, int) and self.size >= 1, "an integer of at least 1")
        require("crop", self.crop in ("center", "random", "random_resized"),
                "'center', 'random' or 'random_resized'")  # fmt: skip
        if self.resize is None:
            require("resize", resized, f"given for crop={self.crop!r}")
        else:
            require(
                "resize",
                isinstance(self.resize, int) and self.resize >= least,
                f"an integer of at least {least}",
            )
        require("flip", 0 <= self.flip <= 1, "a probability")
        require("rotation", 0 <= self.rotation <= 180, "from 0 to 180 degrees")
        require("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "two shares in (0, 1], ascending")
        require("ratio", 0 < self.ratio[0] <= self.ratio[1], "two positive ratios, ascending")
        require("mean", len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "three numbers")
        require(
            "std",
            len(self.std) == 3 and all(0 < x < math.inf for x in self.std),
            "three positive numbers",
        )

    @classmethod
    def preset(cls, name: str, mode: Literal["train", "eval"]) -> Transforms:
        """The published transforms of ``clothing1m``, ``food101n`` or ``webvision``."""
        if name not in _PRESETS:
            raise ValueError(f"Transforms: name must be one of {', '.join(_PRESETS)}, got {name!r}")
        if mode not in ("train", "eval"):
            raise ValueError(f"Transforms: mode must be 'train' or 'eval', got {mode!r}")
        return _PRESETS[name][mode]

    @property
    def is_random(self) -> bool:
        """Whether two epochs may see different pixels of a picture."""
        return self.crop != "center" or self.flip > 0 or self.rotation > 0

    def geometry(self, height: int, width: int, draws: NDArray[np.float64]) -> Geometry:
        """The numbers of one picture.

        Args:
            height, width: of the picture as it is seen (after EXIF orientation), in pixels.
            draws: (DRAWS,) uniform numbers in [0, 1), as :func:`uniforms` makes them.

        Raises:
            BrokenImage: too many pixels in one side to be rotated (``LONGEST_TURNED``) or resized
                (``LONGEST_SIDE``), or too small: the resize would stretch it to more than that.
        """
        longest = LONGEST_TURNED if self.rotation else LONGEST_SIDE
        if max(height, width) > longest:
            raise BrokenImage("too many pixels", f"{width} x {height}, a side above {longest:,}")
        resized = self._resized(height, width)
        if max(resized) > LONGEST_SIDE:
            sides = f"{resized[1]:,} x {resized[0]:,}"
            raise BrokenImage(
                "too small",
                f"{width} x {height}, which a resize to {self.resize} would stretch to {sides}",
            )
        if self.crop == "random_resized":
            window = self._random_window(*resized, draws[2:])
        else:
            window = self._fixed_window(*resized, draws[2:])
        angle = (2 * float(draws[0]) - 1) * self.rotation
        flip = bool(draws[1] < self.flip)
        return Geometry(angle, (height, width), resized, window, (self.size, self.size), flip)

    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(3,) scale and (3,) shift: v * scale + shift normalises a value v from 0 to 255."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def torchvision(self) -> nn.Module:
        """The same steps as a ``torchvision.transforms.v2`` pipeline with its own random numbers.

        It takes what ``v2.functional.pil_to_tensor`` gives of an RGB picture that has been turned
        as its EXIF orientation says (``PIL.ImageOps.exif_transpose``); the output is float32.
        """
        import torch
        from torchvision.transforms import v2

        steps: list[nn.Module] = []
        if self.rotation:
            steps.append(v2.RandomRotation(self.rotation))
        if self.resize is not None:
            steps.append(v2.Resize(self.resize, antialias=True))
        if self.crop == "random_resized":
            steps.append(v2.RandomResizedCrop(self.size, self.scale, self.ratio, antialias=True))
        else:
            steps.append((v2.CenterCrop if self.crop == "center" else v2.RandomCrop)(self.size))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(self.mean), list(self.std)),
        ]
        return v2.Compose(steps)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        # The longer side is rounded down, as torchvision does.
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def _fixed_window(
        self, height: int, width: int, draws: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        spare = height - self.size, width - self.size
        if self.crop == "center":
            # Python's round: halves go to the even number, as in torchvision.
            return round(spare[0] / 2), round(spare[1] / 2), self.size, self.size
        top, left = (int(draws[i] * (spare[i] + 1)) for i in range(2))
        return top, left, self.size, self.size

    def _random_window(
        self, height: int, width: int, draws: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        logs = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, aspect, y, x in draws.reshape(_TRIES, 4).tolist():
            pixels = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
            ratio = math.exp(logs[0] + (logs[1] - logs[0]) * aspect)
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = min(width, max(1, round(height * ratio)))
        h = min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


_PRESETS: dict[str, dict[str, Transforms]] = {
    "clothing1m": {"train": Transforms(crop="random", flip=0.5), "eval": Transforms()},
    "food101n": {
        "train": Transforms(crop="random", flip=0.5, rotation=30.0),
        "eval": Transforms(),
    },
    "webvision": {
        "train": Transforms(size=299, resize=320, crop="random_resized", flip=0.5),
        "eval": Transforms(size=299, resize=320),
    },
}


def uniforms(seed: int, epoch: int, rows: NDArray[np.int64], count: int = DRAWS) -> Any:
    """(n, count) float64 numbers in [0, 1): a function of seed, epoch and row.

    A counter-based generator: SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014) of a
    counter that seed, epoch, row and position make unique within a run.
    """
    stream = _mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(epoch % 2**64)
    per_row = _mix(_mix(stream) ^ rows.astype(np.uint64))
    step = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(per_row[:, None] + step)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
