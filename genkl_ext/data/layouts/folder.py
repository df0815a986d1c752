"""A folder of images for each class."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

from ..folders import by_name, is_folder, is_utf8
from ..manifest import SPLITS, Manifest, PathLike, Problem
from .assemble import assemble, part

# Those of torchvision's ImageFolder; letters of either case.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SPLIT_LIKE = {*SPLITS, "valid", "validation"}


def read(root: PathLike) -> Manifest:
    """Images below ``root/CLASS/``, or below ``root/SPLIT/CLASS/``.

    The second form is meant where all folders in ``root`` are called train, clean, val or test;
    else every image is in "train". Classes are the names of the folders, of all splits together,
    in the order of their characters. The images of a class are the files at any depth with a
    suffix of ``IMAGE_SUFFIXES``, by folder, then by name: row i of a split is sample i of
    torchvision's ``ImageFolder``. Keys are the paths below ``root``. What begins with a dot is
    passed over; files whose path is not UTF-8 are left out and reported.

    Raises:
        OSError: ``root`` is no folder. ValueError: there is no image in a folder of a class, or
            some folders in ``root`` are splits, and others not.
    """
    root = os.path.abspath(root)
    found = class_folders(root)
    class_names = sorted({name for names in found.values() for name in names if is_utf8(name)})
    number = {name: c for c, name in enumerate(class_names)}
    parts, odd = [], []
    for split, names in found.items():
        paths = []
        for place in names.values():
            named, others = by_name(images_below(root, place))
            paths.append(named)
            odd += others
        # Of a folder whose name is not UTF-8, no path is.
        numbers = np.array([number.get(name, -1) for name in names], np.int32)
        keys = pa.array([path for of_class in paths for path in of_class], pa.string())
        labels = pa.array(np.repeat(numbers, [len(of_class) for of_class in paths]))
        verified = True if split == "clean" else None
        parts.append(part(split, keys, paths=keys, labels=labels, verified=verified))
    if not any(map(len, parts)):
        raise ValueError(
            f"from_folder: {root} must hold a folder of images for each class, "
            f"got no {', '.join(IMAGE_SUFFIXES)} file in {len(class_names)} folders"
        )
    return assemble("folder", root, class_names, parts, Problem.of_names(odd))


def class_folders(root: PathLike) -> dict[str, dict[str, str]]:
    """Split -> class name -> its folder below ``root``.

    Raises:
        OSError: ``root`` is no folder. ValueError: some folders in it are splits, and others not.
    """
    names = _folders(root)
    others = sorted(set(names) - set(SPLITS))
    if others and len(_SPLIT_LIKE.intersection(names)) > 1:
        raise ValueError(
            f"from_folder: {os.fspath(root)} must hold folders of classes, or of splits "
            f"({', '.join(SPLITS)}) and nothing else, got {', '.join(names)}"
        )
    if names and not others:
        splits = [split for split in SPLITS if split in names]
        return {
            split: {name: f"{split}/{name}" for name in _folders(os.path.join(root, split))}
            for split in splits
        }
    return {"train": {name: name for name in names}}


def _folders(path: PathLike) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if is_folder(e) and not e.name.startswith("."))
    except OSError as error:
        raise type(error)(f"from_folder: cannot list {path}: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise type(error)(f"from_folder: cannot list {error.filename}: {error.strerror}") from error


def images_below(root: str, place: str) -> list[str]:
    """Paths below ``root`` of the images in ``place`` and its folders."""
    found = []
    seen = set()  # folders: links may lead in circles
    top = os.path.join(root, place)
    for folder, below, names in os.walk(top, onerror=_raise, followlinks=True):
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:
            below.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        found.append((folder, names))
    return [
        f"{os.path.relpath(folder, root)}/{name}"
        for folder, names in sorted(found)
        for name in sorted(names)
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    ]
