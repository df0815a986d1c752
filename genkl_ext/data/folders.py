"""What people's folders hold besides files: links to themselves, names that are not UTF-8."""

from __future__ import annotations

import os
from collections.abc import Iterable


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file or a link to one; a link to itself is none."""
    try:
        return entry.is_file()
    except OSError:
        return False


def by_name(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those in UTF-8, which a table can hold, and the others."""
    named: list[str] = []
    odd: list[str] = []
    for path in paths:
        (named if is_utf8(path) else odd).append(path)
    return named, odd


def is_utf8(name: str) -> bool:
    """Whether a name that the system gave is UTF-8; others have lone surrogates in Python."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
