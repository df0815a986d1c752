"""Rows of the splits -> the manifest, with what is odd in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..manifest import Manifest, Problem

Column: TypeAlias = Any  # pa.Array or pa.ChunkedArray: pyarrow has no types


def part(
    split: str,
    keys: Column,
    *,
    paths: Column,
    labels: Column,
    verified: Column | bool | None,
) -> pa.Table:
    """The rows of one split; ``verified`` may be one value for all."""
    n = len(keys)
    if verified is None or isinstance(verified, bool):
        verified = pa.repeat(pa.scalar(verified, pa.bool_()), n)
    columns = {"key": keys, "path": paths, "given_label": labels, "verified": verified}
    return pa.table({**columns, "split": pa.repeat(split, n)})


def assemble(
    dataset: str,
    root: str,
    class_names: Sequence[str],
    parts: Iterable[pa.Table],
    problems: Sequence[Problem] = (),
) -> Manifest:
    """The manifest of the rows, in this order. It reports ``problems``, then what its rows show.

    That is: keys that a split lists more than once, images in two splits, images without a label,
    and classes without an image. None of it is an error: a split has a row for each line of its
    list, as a file of predictions has.
    """
    manifest = Manifest(pa.concat_tables(parts), tuple(class_names), dataset, root)
    odd = [*_repeats(manifest), *_shared(manifest), *_unlabelled(manifest), *_empty(manifest)]
    return dataclasses.replace(manifest, problems=(*problems, *odd))


def _repeats(manifest: Manifest) -> Iterable[Problem]:
    codes = _codes(manifest.table["key"])
    for split in manifest.split_sizes():
        rows = manifest.rows(split)
        first = np.empty(len(codes), np.int64)  # by code
        first[codes[rows[::-1]]] = rows[::-1]
        again = np.flatnonzero(first[codes[rows]] != rows)
        if len(again):
            (key,) = manifest.keys(rows[again[:1]])
            what = f"keys listed again: {len(again):,}, first {key!r} in row {again[0]}"
            yield Problem(f"split {split}", what, len(again))


def _shared(manifest: Manifest) -> Iterable[Problem]:
    """One problem for each pair of splits that share images."""
    paths = manifest.table["path"]
    codes = _codes(paths)
    held = {split: np.zeros(len(codes), bool) for split in manifest.split_sizes()}  # by code
    for split, holds in held.items():
        holds[codes[manifest.rows(split)]] = True
    for one, other in combinations(held, 2):
        shared = np.flatnonzero(held[one] & held[other])
        if len(shared):
            example = paths[int(np.argmax(codes == shared[0]))].as_py()
            what = f"images in both: {len(shared):,}, first {example!r}"
            yield Problem(f"splits {one} and {other}", what, len(shared))


def _unlabelled(manifest: Manifest) -> Iterable[Problem]:
    for split in manifest.split_sizes():
        rows = manifest.rows(split)
        bare = np.flatnonzero(manifest.labels[rows] < 0)
        if len(bare):
            (key,) = manifest.keys(rows[bare[:1]])
            what = f"images without a label: {len(bare):,}, first {key!r} in row {bare[0]}"
            yield Problem(f"split {split}", what, len(bare))


def _empty(manifest: Manifest) -> Iterable[Problem]:
    for split in manifest.split_sizes():
        empty = np.flatnonzero(manifest.class_counts(split) == 0)
        if len(empty):
            what = (
                f"classes without an image: {len(empty)}, first {manifest.class_names[empty[0]]!r}"
            )
            yield Problem(f"split {split}", what, len(empty))


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) integers, equal where the values are, numbered as they first appear."""
    return np.asarray(pc.dictionary_encode(column).combine_chunks().indices)
