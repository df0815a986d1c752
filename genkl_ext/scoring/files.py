"""``score_files``: NC scores of predictions that lie on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..files import atomic_write, require_writable
from ..rule import GenKL, Scores, _describe_bad_row
from .keys import Keys, write_nc_list
from .npy import Fingerprint, Predictions, open_all
from .tables import COLUMNS, LEFT_OUT, TableWriter, require_suffix

PathLike = str | os.PathLike[str]

# Enough for every thread to have work for milliseconds, little enough to be no burden in memory.
CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class FileScores:
    """The scores of prediction files, and what it took to make them."""

    scores: Scores  #: NumPy columns of N rows
    inputs: tuple[Fingerprint, ...]  #: one per model
    out: Path | None  #: the table written
    nc_list: Path | None  #: the list of NC keys written
    input_bytes: int  #: bytes of predictions read
    scoring_seconds: float  #: the pass: reading, scoring, and writing rows in the meantime
    finishing_seconds: float  #: after it: the end of the table, the list, syncing to disk

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def nc_count(self) -> int:
        """How many rows are non-conforming."""
        return int(np.count_nonzero(self.scores.nc))


def score_files(
    inputs: PathLike | Sequence[PathLike],
    rule: GenKL,
    out: PathLike | None = None,
    *,
    keys: PathLike | None = None,
    nc_list: PathLike | None = None,
    logits: bool = False,
    validate: bool = True,
    leave_out: NDArray[np.bool_] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> FileScores:
    """Score prediction files in one pass and in bounded memory, and write the table of scores.

    The files are mapped into memory and scored a chunk of rows at a time, so memory is 21 bytes a
    row for the results, the key list where one is given, and a few chunks, whatever the input
    is. Everything that can be known to be wrong (files, shapes, keys, outputs) is found before
    the pass. Outputs appear complete, when all went well, or not at all.

    Args:
        inputs: one (N, k) ``.npy`` file of float16, float32 or float64, C or Fortran order, any
            byte order; or M of them, of one shape and dtype, one per model, to be averaged.
        rule: the rule to score with; its ``num_classes`` must be k.
        out: the table to write: ``.parquet``, ``.csv`` or ``.npy`` (``tables.py`` names its
            columns). An existing file is replaced.
        keys: text file with one key per row; the table gets a ``key`` column.
        nc_list: text file to write the keys of the NC rows to, in file order, one per line;
            ``empty_set`` if there is none. Needs ``keys``.
        logits: the files hold logits; their softmax is taken in the same pass.
        validate: check every row in the same pass, as ``GenKL.score`` does.
        leave_out: (N,) bool, rows that have no prediction (:func:`rows_without_prediction` finds
            them). Whatever the files hold there is not looked at; ``tables.py`` says what they get.
        chunk_bytes: how much of the predictions, of all models together, is scored at a time.
        progress: called with (rows done, N) after every chunk.

    Returns:
        FileScores: the scores as NumPy columns, fingerprints of the inputs, times.

    Raises:
        OSError: a file that cannot be read or written. ValueError: a file that is not what it
        should be, or the first bad row. Both name the file.

    Warns:
        UserWarning: a key that appears more than once.
    """
    paths = _listed(inputs)
    if chunk_bytes < 1:
        raise ValueError(f"score: chunk_bytes must be at least 1, got {chunk_bytes}")
    table = _check_output("out", out, [*paths, keys, nc_list])
    list_ = _check_output("nc_list", nc_list, [*paths, keys])
    if list_ is not None and keys is None:
        raise ValueError("score: nc_list needs keys, the text file with one key per row")

    with ExitStack() as stack:
        files = open_all(paths, stack)
        rows, classes = files[0].shape
        if classes != rule.num_classes:
            raise ValueError(
                f"score: {files[0].path} must have rule.num_classes = {rule.num_classes} columns, "
                f"got shape {files[0].shape}"
            )
        if leave_out is not None:
            _check_mask(leave_out, rows)
        key_list = None if keys is None else _read_keys(keys, rows)
        fingerprints = tuple(file.fingerprint() for file in files)
        columns = _columns(rows)

        # Left in the opposite order: the table is ended, then put in its place if all went well.
        writer = None
        if table is not None:
            temporary = stack.enter_context(atomic_write(table))
            settings = {
                "version": __version__,
                "rule": {f.name: _plain(getattr(rule, f.name)) for f in dataclasses.fields(rule)},
                "logits": logits,
                "validate": validate,
                # Not when they were modified: predictions made again give the same table.
                "inputs": [
                    {k: v for k, v in dataclasses.asdict(f).items() if k != "modified"}
                    for f in fingerprints
                ],
                "keys": None if key_list is None else key_list.fingerprint(),
                "leave_out": None if leave_out is None else _mask_fingerprint(leave_out),
            }
            writer = stack.enter_context(TableWriter(temporary, columns, key_list, settings))
        start = time.perf_counter()
        chunk_rows = max(1, chunk_bytes // (classes * files[0].dtype.itemsize * len(files)))
        _score(files, rule, logits, validate, leave_out, chunk_rows, columns, writer, progress)
        scored = time.perf_counter()
        for file in files:
            file.check_unchanged()
        if list_ is not None and key_list is not None:
            write_nc_list(stack.enter_context(atomic_write(list_)), key_list, columns["nc"])
        input_bytes = sum(file.nbytes for file in files)

    return FileScores(
        scores=Scores(
            critical_alpha=columns["critical_alpha"],
            divergence=columns["divergence"],
            votes=columns["votes"],
            nc=columns["nc"],
            top_class=columns["top_class"],
            top_prob=columns["top_prob"],
            rule=rule,
        ),
        inputs=fingerprints,
        out=table,
        nc_list=list_,
        input_bytes=input_bytes,
        scoring_seconds=scored - start,
        finishing_seconds=time.perf_counter() - scored,
    )


def rows_without_prediction(
    inputs: PathLike | Sequence[PathLike], *, chunk_bytes: int = CHUNK_BYTES
) -> NDArray[np.bool_]:
    """The rows in which a prediction file has nothing but NaN, in one pass and bounded memory.

    A row with NaN beside numbers is none of them: scoring will say that it is bad.

    Args:
        inputs: as for :func:`score_files`; a row counts where any of the files has none.
        chunk_bytes: how much of the predictions is looked at together.

    Returns:
        (N,) bool.

    Raises:
        OSError: a file cannot be read. ValueError: it is not what it should be.
    """
    paths = _listed(inputs)
    with ExitStack() as stack:
        files = open_all(paths, stack)
        missing = np.zeros(files[0].shape[0], bool)
        for file in files:
            step = max(1, chunk_bytes // max(1, file.shape[1] * file.dtype.itemsize))
            for start in range(0, len(missing), step):
                rows = file.rows(start, min(start + step, len(missing)))
                # Nearly every row is cleared by its first entry.
                begins_so = np.flatnonzero(np.isnan(rows[:, :1]).any(axis=1))
                missing[start + begins_so[np.isnan(rows[begins_so]).all(axis=1)]] = True
                del rows
                file.release(start, min(start + step, len(missing)))
    return missing


def _listed(inputs: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not paths:
        raise ValueError("score: inputs must be at least one file, got none")
    return paths


def _columns(rows: int) -> dict[str, NDArray[Any]]:
    kinds = {name: kind for name, kind in COLUMNS.items() if name not in ("row", "key")}
    return {name: np.empty(rows, kind) for name, kind in kinds.items()}


def _score(
    files: list[Predictions],
    rule: GenKL,
    logits: bool,
    validate: bool,
    leave_out: NDArray[np.bool_] | None,
    chunk_rows: int,
    columns: dict[str, NDArray[Any]],
    writer: TableWriter | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill the columns chunk by chunk. While this thread scores a chunk, a second brings the next
    one into memory and a third writes the rows of the last."""
    rows = len(columns["votes"])
    nowhere = np.empty(0, np.int64)
    with ThreadPoolExecutor(2, "genkl-score") as pool:
        written = pool.submit(lambda: None)
        for start in range(0, rows, chunk_rows):
            stop = min(start + chunk_rows, rows)
            read = pool.submit(_prefetch, files, stop, min(stop + chunk_rows, rows))
            models = [file.rows(start, stop) for file in files]
            left_out = nowhere if leave_out is None else np.flatnonzero(leave_out[start:stop])
            if len(left_out):
                models = [_with_one_hot(model, left_out) for model in models]
            chunk = rule._score(models, logits=logits, validate=validate)
            bad = int(chunk._first_bad_row)
            if bad >= 0:
                names = [str(file.path) for file in files]
                raise ValueError(_describe_bad_row(models, bad, logits, names, first_row=start))
            for name, column in columns.items():
                column[start:stop] = getattr(chunk, name)
                if len(left_out):
                    column[start + left_out] = LEFT_OUT[name]
            read.result()
            written.result()
            if writer is not None:
                written = pool.submit(writer.advance, stop)
            for file in files:
                file.release(start, stop)
            if progress is not None:
                progress(stop, rows)
        written.result()


def _with_one_hot(model: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """A copy with a prediction in rows that have none. Rows do not see each other, so it does not
    matter which."""
    model = model.copy(order="K")
    model[rows] = 0
    model[rows, 0] = 1
    return model


def _check_mask(leave_out: NDArray[np.bool_], rows: int) -> None:
    if leave_out.shape != (rows,) or leave_out.dtype != bool:
        raise ValueError(
            f"score: leave_out must be ({rows},) booleans, got {leave_out.shape} {leave_out.dtype}"
        )


def _mask_fingerprint(leave_out: NDArray[np.bool_]) -> dict[str, Any]:
    digest = hashlib.blake2b(np.packbits(leave_out).tobytes(), digest_size=16).hexdigest()
    return {"rows": int(np.count_nonzero(leave_out)), "digest": digest}


def _prefetch(files: list[Predictions], start: int, stop: int) -> None:
    for file in files:
        file.prefetch(start, stop)


def _check_output(
    name: str, path: PathLike | None, others: Sequence[PathLike | None]
) -> Path | None:
    """The output as a path, once it is known that it can be written and is none of ``others``."""
    if path is None:
        return None
    output = Path(path)
    if name == "out":
        require_suffix(output)
    for other in others:
        if other is not None and _same(output, Path(other)):
            raise ValueError(f"score: {name} must be another file than {other}")
    require_writable(output)
    return output


def _same(a: Path, b: Path) -> bool:
    if a.exists() and b.exists():
        return a.samefile(b)
    return os.path.realpath(a) == os.path.realpath(b)


def _read_keys(path: PathLike, rows: int) -> Keys:
    keys = Keys(path, rows)
    repeats = keys.repeats()
    if repeats:
        warnings.warn(
            f"{keys.path}: {len(repeats)} keys appear more than once, "
            f"first {keys[repeats[0]]!r} in line {repeats[0] + 1}",
            stacklevel=3,
        )
    return keys


def _plain(value: Any) -> Any:
    """A Python number, which JSON knows, for a NumPy one."""
    return value.item() if isinstance(value, np.generic) else value
