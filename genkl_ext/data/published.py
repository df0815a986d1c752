"""Side files of the published programs, read and written.

    nc_set.txt, clean_set.txt    rows of the noisy split, in the words of each data set's program
    NC_instances.txt             images seen not to conform; keys without "images/"
    argm_m.txt                   top class and probability of each row
    *reverseclassratio.txt, *vector_v.txt    class ratios, as a diagonal matrix or a vector
    *.pth, *.pth.tar, *.safetensors          weights, bare or in a checkpoint

``Manifest.class_ratio`` makes the ratios, ``score_files`` the predictions that the rest is about.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..files import atomic_write
from ..scoring.keys import EMPTY_SET, read_nc_list
from .layouts.clothing1m import KEY_PREFIX
from .layouts.food101n import RELEASE
from .manifest import Manifest, PathLike, without_prefix

if TYPE_CHECKING:
    from torch import Tensor

_FOOD_IMAGES = RELEASE + "images/"


def read_row_list(path: PathLike, manifest: Manifest) -> NDArray[np.bool_]:
    """Which noisy rows a list names: ``nc_set.txt``, ``clean_set.txt`` or ``NC_instances.txt``.

    Each line is a key; for Food-101N also a full path, under whatever folder; for mini WebVision
    also the line "path label" of the file list. "images/" before a key of Clothing1M counts no
    more than its absence. ``empty_set`` is no key. Rows that share a key are named together.

    Args:
        path: the list, of ours or of a published program.
        manifest: the data set; rows are those of its split "train".

    Returns:
        (N,) bool, one for each row of ``manifest.split("train")``.

    Raises:
        KeyError: a line is no key of the split. OSError: the file cannot be read.
    """
    keys = pa.array(read_nc_list(path), pa.string())
    known = manifest.split("train").table["key"]
    if manifest.dataset == "food101n":
        keys = pc.replace_substring_regex(keys, f"^.*{re.escape(_FOOD_IMAGES)}", "")
    elif manifest.dataset == "webvision":
        keys = pc.replace_substring_regex(keys, r"\s+[0-9]+\s*$", "")
    keys, known = without_prefix(keys, KEY_PREFIX), without_prefix(known, KEY_PREFIX)
    unknown = keys.filter(pc.invert(pc.is_in(keys, value_set=known)))
    if len(unknown):
        raise KeyError(
            f"{os.fspath(path)}: each line must be a key of the noisy images, got "
            f"{len(unknown)} that are not, first {unknown[0].as_py()!r}"
        )
    return np.asarray(pc.is_in(known, value_set=keys))


def write_row_list(
    path: PathLike, manifest: Manifest, rows: NDArray[np.bool_], data_path: str | None = None
) -> None:
    """Write noisy rows as the published program of the data set names them, in row order.

    That is the key; for Food-101N the full path; for mini WebVision "path label". A list without
    rows is the one line ``empty_set``.

    Args:
        path: ``nc_set.txt`` or ``clean_set.txt``.
        manifest: the data set; rows are those of its split "train".
        rows: (N,) bool, one for each of them.
        data_path: where the program that will read the list has Food-101N: its ``data_path``; by
            default ``manifest.root``.

    Raises:
        ValueError: ``rows`` is of another shape. OSError: the file cannot be written.
    """
    chosen = manifest.split("train").select(rows)
    lines = chosen.keys()
    if manifest.dataset == "food101n":
        folder = manifest.root if data_path is None else data_path
        lines = [f"{folder.rstrip('/')}/{_FOOD_IMAGES}{key}" for key in lines]
    elif manifest.dataset == "webvision":
        lines = [f"{key} {label}" for key, label in zip(lines, chosen.labels, strict=True)]
    _write_lines(path, lines or [EMPTY_SET], "\n")


def write_nc_instances(path: PathLike, manifest: Manifest, rows: NDArray[np.bool_]) -> None:
    """Write noisy rows as ``NC_instances.txt`` has them: keys without "images/", CR LF."""
    keys = without_prefix(manifest.split("train").select(rows).table["key"], KEY_PREFIX)
    _write_lines(path, keys.to_pylist(), "\r\n")


def read_argm(
    path: PathLike, num_rows: int, num_classes: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """``argm_m.txt``: the top class and its probability of each noisy row.

    Returns:
        (N,) int32 and (N,) float32.

    Raises:
        ValueError: not one line "class probability" for each row, or values outside their range;
            with the line. OSError: the file cannot be read.
    """
    table = _read_numbers(path)
    if table.shape != (num_rows, 2) and (num_rows or table.size):
        raise ValueError(
            f"{os.fspath(path)} must have a class and a probability for each of {num_rows} rows, "
            f"got {table.shape[0]} lines of {table.shape[1]}"
        )
    top_class, top_prob = table.reshape(-1, 2).T
    wrong = (top_class % 1 != 0) | (top_class < 0) | (top_class >= num_classes)
    wrong |= ~((top_prob >= 0) & (top_prob <= 1.001))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{os.fspath(path)} must have a class below {num_classes} and a probability, "
            f"got {top_class[row]:g} {top_prob[row]:g} in line {row + 1}"
        )
    return top_class.astype(np.int32), top_prob.astype(np.float32)


def write_argm(path: PathLike, top_class: NDArray[Any], top_prob: NDArray[Any]) -> None:
    """Write ``argm_m.txt``; each probability with the fewest digits that give it back."""
    pairs = zip(top_class.astype(str).tolist(), top_prob.astype(str).tolist(), strict=True)
    _write_lines(path, [f"{c} {p}" for c, p in pairs], "\n")


def read_class_ratio(path: PathLike) -> NDArray[np.float64]:
    """A class ratio: k x k with r on the diagonal and zeros elsewhere, or k lines of one number.

    The published reader takes a vector for a matrix: the number of line y is then added to every
    class (trap T2 of mini WebVision). Here both forms mean the same.

    Returns:
        (k,) float64.

    Raises:
        ValueError: another shape, or a number beside the diagonal. OSError: it cannot be read.
    """
    table = _read_numbers(path)
    rows, columns = table.shape
    if columns == 1:
        return table[:, 0]
    if rows != columns or not rows:
        raise ValueError(
            f"{os.fspath(path)} must be k lines of one number or of k, got {rows} of {columns}"
        )
    beside = table - np.diag(np.diag(table))
    if beside.any():
        line, column = np.argwhere(beside)[0] + 1
        raise ValueError(
            f"{os.fspath(path)} must be zero beside its diagonal, "
            f"got {beside[line - 1, column - 1]:g} in line {line}, column {column}"
        )
    return np.diag(table).copy()


def write_class_ratio(
    path: PathLike, ratio: NDArray[np.float64], form: Literal["matrix", "vector"] = "matrix"
) -> None:
    """Write a class ratio as the published programs do, byte for byte.

    Args:
        path: the text file.
        ratio: (k,) float64.
        form: "matrix" for Clothing1M and Food-101N; "vector", with 12 digits, for mini WebVision.
    """
    matrix = form == "matrix"
    with atomic_write(path) as temporary:
        np.savetxt(
            temporary,
            np.diag(ratio) if matrix else ratio,
            fmt="%.18e" if matrix else "%.12g",
            newline="\r\n",
        )


def load_weights(path: PathLike) -> dict[str, Tensor]:
    """The weights in a checkpoint: bare, or under ``state_dict``; on the CPU.

    "module.", which torch's multi-GPU wrappers put before every name, is taken away.

    Args:
        path: ``.safetensors``, or a file of ``torch.save``, of which no code is run.

    Raises:
        OSError: it cannot be read. ValueError: it holds something else than named tensors.
    """
    import torch

    path = Path(path)
    weights: Any
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        import pickle

        try:
            # A checkpoint of the published programs may hold its best accuracy as a NumPy number.
            with torch.serialization.safe_globals(_NUMPY_NUMBERS):
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} must be a checkpoint of plain tensors and numbers, and is not"
            ) from error
        if isinstance(weights, dict) and "state_dict" in weights:
            weights = weights["state_dict"]
    named = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    )
    if not named or not weights:
        raise ValueError(f"{path} must hold named tensors, or a state_dict of them")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return dict(weights)


_scalar = np.float64().__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
]


def _read_numbers(path: PathLike) -> NDArray[np.float64]:
    """The numbers in a text file, a row for each line."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        return np.empty((0, 0))
    try:
        return np.loadtxt(io.StringIO(text), np.float64, ndmin=2, comments=None)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: lines must be numbers: {error}") from error


def _write_lines(path: PathLike, lines: list[str], end: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(line + end for line in lines), encoding="utf-8", newline="")
