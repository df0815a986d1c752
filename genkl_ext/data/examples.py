"""Miniatures of the data sets: some hundred drawings, or given pictures, in a published layout.

    make("clothing1m", "example")     # Manifest.from_clothing1m("example") reads it

Each class is a shape in a colour. Of the noisy images some carry the label of another class, and
some fit no class: they show two shapes of different classes, or scribble. ``truth.csv`` says what
each image shows. ``Manifest.from_table`` reads it, for judging; nothing that trains does.
"""

from __future__ import annotations

import colorsys
import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ..files import atomic_folder
from .layouts import clothing1m, food101n, webvision
from .layouts.folder import class_folders, images_below
from .manifest import SPLITS, PathLike

Layout = Literal["clothing1m", "food101n", "webvision", "folder"]
DEFAULT_CLASSES = {"clothing1m": 14, "food101n": 10, "webvision": 50, "folder": 5}
WRONG = 0.25  # share of the noisy images that show a class, but not that of their label
NONCONFORMING = 0.15  # share of the noisy images that show no class, or two
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "stripes")
AREA = 400 * 300  # pixels of a drawing, about
ASPECTS = (4 / 3, 4 / 3, 3 / 2, 1.0, 3 / 4, 2 / 3, 16 / 9)


@dataclasses.dataclass
class Item:
    """One image of an example."""

    split: str
    label: int  #: given
    shown: int | None  #: the class it shows; None: none, or nobody knows
    kind: str  #: "right", "wrong label", "ambiguous", "out of vocabulary" or "unknown"
    data: bytes  #: of the file
    suffix: str
    key: str = ""
    path: str = ""  #: below the root


def make(
    layout: Layout,
    out: PathLike,
    *,
    images: PathLike | None = None,
    count: int = 200,
    classes: int | None = None,
    seed: int = 0,
) -> None:
    """Write a miniature data set; it appears under its name only when it is complete.

    Args:
        layout: "clothing1m", "food101n", "webvision" or "folder".
        out: the folder to make; new or empty.
        images: a folder of pictures to use instead of drawings. If it holds a folder for each
            class, the first ``classes`` of them are the classes, and pictures of further ones fit
            none; else labels mean nothing. Pictures come again where there are too few.
        count: noisy images. There are a fifth as many verified training images, and a tenth as
            many each for validation and test, but at least two and one of each class.
        classes: k; by default 14 for clothing1m, 10 for food101n, 50 for webvision, 5 for folder.
        seed: of everything random; the same seed writes the same bytes.

    Raises:
        ValueError: a number out of range, or no pictures in ``images``. OSError: ``out`` exists
            or cannot be written.
    """
    classes = DEFAULT_CLASSES[layout] if classes is None else classes
    if not 2 <= classes <= 1000:
        raise ValueError(f"make_example: classes must be from 2 to 1000, got {classes}")
    if count < classes:
        raise ValueError(
            f"make_example: count must be at least {classes}, one for each class, got {count}"
        )
    rng = np.random.default_rng(seed)
    source = Drawings(classes) if images is None else Given(images, classes)
    items = _plan(count, source, rng)
    with atomic_folder(out) as root:
        _WRITERS[layout](root, items, source.names, rng)
        _write_truth(root / "truth.csv", items)


class Drawings:
    """A shape in a colour for each class."""

    nonconforming = ("ambiguous", "out of vocabulary")
    truth = True

    def __init__(self, classes: int) -> None:
        # In the order of their characters, which numbers the classes of some layouts.
        digits = len(str(classes - 1))
        self.names = [f"{c:0{digits}}_{SHAPES[c % len(SHAPES)]}" for c in range(classes)]

    def picture(self, shown: int | None, kind: str, rng: np.random.Generator) -> tuple[bytes, str]:
        """The bytes of a JPEG file, and its suffix."""
        if kind == "ambiguous":
            chosen = rng.choice(len(self.names), 2, replace=False).tolist()
        else:
            chosen = [] if shown is None else [shown]
        return self._draw(chosen, rng), ".jpg"

    def _draw(self, shown: list[int], rng: np.random.Generator) -> bytes:
        aspect = rng.choice(ASPECTS)
        area = AREA * rng.uniform(0.6, 1.7)
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        blotches = Image.fromarray(rng.integers(90, 200, (4, 5, 3), dtype=np.uint8))
        image = blotches.resize((width, height), Image.Resampling.BICUBIC)
        brush = ImageDraw.Draw(image)
        if not shown:
            points = rng.uniform(0, 1, (30, 2)) * (width, height)
            brush.line([tuple(p) for p in points], _colour(rng.uniform()), 3)
        radius = min(width, height) * rng.uniform(0.2, 0.4) / max(len(shown), 1)
        for i, c in enumerate(shown):
            x = width * (i + rng.uniform(0.4, 0.6)) / len(shown)
            y = height * rng.uniform(0.4, 0.6)
            hue = (c * 0.618 + rng.uniform(-0.03, 0.03)) % 1  # steps of the golden ratio
            _draw_shape(brush, SHAPES[c % len(SHAPES)], x, y, radius, _colour(hue))
        if rng.uniform() < 0.05:
            image = image.convert("L")
        buffer = io.BytesIO()
        image.save(
            buffer,
            "JPEG",
            quality=int(rng.integers(70, 96)),
            subsampling=int(rng.integers(3)),
            progressive=bool(rng.uniform() < 0.1),
        )
        return buffer.getvalue()


class Given:
    """The pictures in a folder."""

    def __init__(self, folder: PathLike, classes: int) -> None:
        self._root = os.path.abspath(folder)
        by_name: dict[str, list[str]] = {}
        for places in class_folders(folder).values():
            for name, place in places.items():
                by_name.setdefault(name, []).extend(images_below(self._root, place))
        self.truth = len(by_name) >= classes
        if self.truth:
            self.names = list(by_name)[:classes]
            self._of_class = [by_name[name] for name in self.names]
            self._rest = [path for name in list(by_name)[classes:] for path in by_name[name]]
        else:
            self.names = Drawings(classes).names
            self._of_class = []
            self._rest = images_below(self._root, "")
        for name, paths in zip(self.names, self._of_class, strict=False):
            if not paths:
                raise ValueError(f"make_example: {folder} must hold pictures in {name}, got none")
        if not self.truth and not self._rest:
            raise ValueError(f"make_example: {folder} must hold pictures, got none")
        self.nonconforming = ("out of vocabulary",) if self.truth and self._rest else ()

    def picture(self, shown: int | None, kind: str, rng: np.random.Generator) -> tuple[bytes, str]:
        """The bytes of a file, and its suffix."""
        paths = self._rest if shown is None else self._of_class[shown]
        path = paths[rng.integers(len(paths))]
        return Path(self._root, path).read_bytes(), os.path.splitext(path)[1].lower()


def _plan(count: int, source: Drawings | Given, rng: np.random.Generator) -> list[Item]:
    """The images of all splits, those of a split together."""
    k = len(source.names)
    sizes = {"train": count, "clean": max(2 * k, count // 5)}
    sizes |= {"val": max(k, count // 10), "test": max(k, count // 10)}
    weights = 1.0 + np.arange(k) % 3  # classes of different sizes: class ratios have a say
    items = []
    for split, size in sizes.items():
        rest = rng.choice(k, size - k, p=weights / weights.sum())
        for i, label in enumerate([*range(k), *rest.tolist()]):
            shown, kind = label, "right"
            if not source.truth:
                shown, kind = None, "unknown"
            elif split == "train":
                # The first of each class keeps its place: no class without a rightful image.
                chance = rng.uniform() if i >= k else 1.0
                if source.nonconforming and chance < NONCONFORMING:
                    shown, kind = None, str(rng.choice(source.nonconforming))
                elif chance < NONCONFORMING + WRONG:
                    shown, kind = (label + int(rng.integers(1, k))) % k, "wrong label"
            data, suffix = source.picture(shown, kind, rng)
            items.append(Item(split, label, shown, kind, data, suffix))
    return items


def write_clothing1m(
    root: Path,
    images: Mapping[str, bytes],
    lists: Mapping[str, Sequence[str]],
    noisy_labels: Mapping[str, int],
    clean_labels: Mapping[str, int],
    class_names: Sequence[str],
    nonconforming: Iterable[str],
) -> None:
    """Write the layout of Clothing1M into a folder, its lists inside ``images``.

    Args:
        root: the folder.
        images: key -> bytes of the file.
        lists: split -> its keys, in order.
        noisy_labels, clean_labels: key -> label, of the noisy and of the verified images.
        class_names: of classes 0, 1, ...
        nonconforming: keys of the noisy images that fit no class, for ``NC_instances.txt``.
    """
    for key, data in images.items():
        _write(root / key, data)
    folder = root / "images"
    for split, name in zip(SPLITS, clothing1m.KEY_LISTS, strict=True):
        _write_lines(folder / name, lists[split])
    for name, labels in (("noisy", noisy_labels), ("clean", clean_labels)):
        _write_lines(folder / f"{name}_label_kv.txt", [f"{k} {c}" for k, c in labels.items()])
    _write_lines(folder / clothing1m.NAMES, class_names)
    listed = [key.removeprefix(clothing1m.KEY_PREFIX) for key in nonconforming]
    _write_lines(root / "NC_instances.txt", listed, "\r\n")


def clothing1m_keys(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct keys as Clothing1M has them: images/A/BB/X,Y.jpg with Y ending in ABB."""
    x = rng.integers(10**8, 10**10, count)
    y = rng.choice(10**7, count, replace=False) + 10**9
    return [f"images/{b // 100 % 10}/{b % 100:02d}/{a},{b}.jpg" for a, b in zip(x, y, strict=True)]


def _clothing1m(
    root: Path, items: list[Item], names: Sequence[str], rng: np.random.Generator
) -> None:
    for item, key in zip(items, clothing1m_keys(len(items), rng), strict=True):
        item.key = item.path = key.removesuffix(".jpg") + item.suffix
    noisy = [item for item in items if item.split == "train"]
    clean = [item for item in items if item.split != "train"]
    write_clothing1m(
        root,
        {item.key: item.data for item in items},
        {split: [item.key for item in _shuffled(items, split, rng)] for split in SPLITS},
        {item.key: item.label for item in noisy},
        {item.key: item.label for item in clean},
        names,
        [item.key for item in noisy if item.kind in Drawings.nonconforming],
    )


def _food101n(
    root: Path, items: list[Item], names: Sequence[str], rng: np.random.Generator
) -> None:
    for item in items:
        name = f"{names[item.label]}/{rng.bytes(8).hex()}"
        test = item.split == "test"
        item.key = name if test else name + item.suffix
        item.path = (food101n.FOOD101 if test else food101n.RELEASE) + f"images/{item.key}"
        item.path += ".jpg" if test else ""  # Food-101 lists its images without a suffix
        _write(root / item.path, item.data)
    splits = {split: _shuffled(items, split, rng) for split in SPLITS}
    wrong = [item for item in splits["train"] if item.kind not in ("right", "unknown")]
    seen = {
        food101n.VERIFIED_TRAIN: splits["clean"] + wrong[: len(wrong) // 4],
        food101n.VERIFIED_VAL: splits["val"] + wrong[len(wrong) // 4 : len(wrong) // 3],
    }
    for name, verified in seen.items():
        flags = [f"{i.key}\t{int(i.kind in ('right', 'unknown'))}" for i in verified]
        _write_lines(root / name, ["class_name/key\tverification_label", *flags])
    listed = [item.key for item in items if item.split != "test"]
    _write_lines(root / food101n.IMAGE_LIST, ["class_name/key", *rng.permutation(listed)])
    _write_lines(root / food101n.RELEASE / food101n.CLASSES, ["class_name", *names])
    _write_lines(root / food101n.FOOD101 / food101n.CLASSES, names)
    _write_lines(root / food101n.TEST_LIST, [item.key for item in splits["test"]])


def _webvision(
    root: Path, items: list[Item], names: Sequence[str], rng: np.random.Generator
) -> None:
    # It has no verified training images; what would be those are images of classes beyond k.
    items[:] = [item for item in items if item.split != "val"]
    for number, item in enumerate(items):
        if item.split == "test":
            item.key = f"val{number:08}{item.suffix}"
            item.path = webvision.VAL_FOLDER + item.key
        else:
            item.label += len(names) if item.split == "clean" else 0
            item.key = item.path = f"google/q{item.label:04}/{rng.bytes(8).hex()}{item.suffix}"
        _write(root / item.path, item.data)
    crawled = [item for item in items if item.split != "test"]
    for name, members in (
        (webvision.TRAIN_LIST, [crawled[i] for i in rng.permutation(len(crawled))]),
        (webvision.VAL_LIST, _shuffled(items, "test", rng)),
    ):
        _write_lines(root / name, [f"{item.key} {item.label}" for item in members])
    _write_lines(root / webvision.NAMES, [f"n{c:08} {name}" for c, name in enumerate(names)])
    items[:] = [item for item in items if item.split != "clean"]


def _folder(root: Path, items: list[Item], names: Sequence[str], rng: np.random.Generator) -> None:
    for item in items:
        item.path = f"{item.split}/{names[item.label]}/{rng.bytes(8).hex()}{item.suffix}"
        item.key = item.path
        _write(root / item.path, item.data)


_WRITERS = {
    "clothing1m": _clothing1m,
    "food101n": _food101n,
    "webvision": _webvision,
    "folder": _folder,
}


def _shuffled(items: list[Item], split: str, rng: np.random.Generator) -> list[Item]:
    """The items of a split in an order that gives nothing away."""
    members = [item for item in items if item.split == split]
    return [members[i] for i in rng.permutation(len(members))]


def _write_truth(path: Path, items: Iterable[Item]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["key", "path", "split", "label", "shown", "kind"])
        for item in items:
            table.writerow([item.key, item.path, item.split, item.label, item.shown, item.kind])


def _colour(hue: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_shape(
    brush: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...]
) -> None:
    """A shape of radius r around (x, y)."""
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        brush.ellipse(box, colour)
    elif shape == "ring":
        brush.ellipse(box, None, colour, round(r / 3))
    elif shape == "square":
        brush.rectangle(box, colour)
    elif shape == "stripes":
        for i in range(3):
            brush.rectangle((x - r, y + r * (0.8 * i - 1), x + r, y + r * (0.8 * i - 0.6)), colour)
    elif shape == "cross":
        brush.rectangle((x - r, y - r / 3, x + r, y + r / 3), colour)
        brush.rectangle((x - r / 3, y - r, x + r / 3, y + r), colour)
    else:
        points = 3 if shape == "triangle" else 10
        corners = []
        for i in range(points):
            radius = r * 0.4 if points == 10 and i % 2 else r
            angle = 2 * math.pi * i / points - math.pi / 2
            corners.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
        brush.polygon(corners, colour)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_lines(path: Path, lines: Iterable[str], end: str = "\n") -> None:
    _write(path, "".join(line + end for line in lines).encode())
