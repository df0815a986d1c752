"""Folders and tables as people publish and keep them -> :class:`genkl_ext.Manifest`.

    clothing1m.py, food101n.py, webvision.py, folder.py, table.py    one each, with read(root)
    lists.py       text lists, and what is odd in them
    assemble.py    rows of the splits -> the manifest, and what is odd in it

``detect`` says which of them fits a folder or file, ``read`` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..manifest import Manifest, PathLike, is_manifest
from . import clothing1m, folder, food101n, table, webvision

_FOLDERS: dict[str, Callable[[PathLike], Manifest]] = {
    "clothing1m": clothing1m.read,
    "food101n": food101n.read,
    "webvision": webvision.read,
    "folder": folder.read,
}


def detect(path: PathLike) -> str:
    """The name of what a folder or file is, of those that :func:`read` reads.

    A folder is "clothing1m", "food101n", "webvision" or "folder"; a file is "manifest" or
    "table", and a URL "table".

    Raises:
        OSError: there is nothing. ValueError: it is none of these.
    """
    path = os.fspath(path)
    if "://" in path:
        return "table"
    if os.path.isdir(path):
        if clothing1m.find_lists(path) is not None:
            return "clothing1m"
        if os.path.isfile(os.path.join(path, food101n.IMAGE_LIST)):
            return "food101n"
        if os.path.isfile(os.path.join(path, webvision.TRAIN_LIST)):
            return "webvision"
        if any(folder.class_folders(path).values()):
            return "folder"
        raise ValueError(
            f"{path} must hold {clothing1m.KEY_LISTS[0]} (Clothing1M), "
            f"{food101n.IMAGE_LIST} (Food-101N), {webvision.TRAIN_LIST} (WebVision), or a folder "
            f"of images for each class; got none of them"
        )
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    return "manifest" if is_manifest(path) else "table"


def read(path: PathLike, root: PathLike | None = None) -> Manifest:
    """The manifest of a folder or file that :func:`detect` recognises.

    Args:
        path: the folder, file or URL.
        root: where the images of a table or a manifest are, if not where it says.

    Raises:
        OSError, ValueError: as :func:`detect` and the reader of the layout.
    """
    layout = detect(path)
    if layout == "manifest":
        return Manifest.load(path, root)
    if layout == "table":
        return table.read(path, root=root)
    if root is not None:
        raise ValueError(f"root must be left out for the {layout} folder {os.fspath(path)}")
    return _FOLDERS[layout](path)
