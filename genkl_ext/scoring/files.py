"""``score_files``: NC scores of predictions that lie on disk.

A chunk of rows is read, scored and written while the next one is being read, so memory does not
grow with the rows. What a long job has scored lies beside its table, in a file with a journal
(``unfinished.py``), until the table is complete: a job that was killed goes on from there, and the
processes of a job that ``torchrun`` or SLURM started share the chunks.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..files import atomic_write, naming, remove_leftovers_of, require_writable
from ..ranks import Ranks
from ..rule import GenKL, Scores
from ..unfinished import BeginAnew, Unfinished
from .chunks import BadRow, OnBadRow, empty_rows, score_rows
from .gpu import LANES, GpuScorer, Pending, new_scorer
from .keys import BLOCK_ROWS, MOST_REPEATS, KeyColumn, KeyList, Keys, write_nc_list
from .sources import (
    SUFFIXES,
    Fingerprint,
    MissingColumn,
    Source,
    open_models,
    open_shards,
    shards_of,
)
from .tables import COLUMNS, LEFT_OUT, TableWriter, require_suffix

PathLike = str | os.PathLike[str]
_T = TypeVar("_T")

# Enough for every thread to have work for milliseconds, little enough to be no burden in memory.
CHUNK_BYTES = 16 << 20
# Of predictions, or of scores: a job with fewer is done again sooner than its work is kept.
RESUME_BYTES = 1 << 28

_KINDS = {name: np.dtype(COLUMNS[name]) for name in LEFT_OUT}
_ROW_BYTES = sum(kind.itemsize for kind in _KINDS.values())


@dataclasses.dataclass(frozen=True)
class FileScores:
    """The scores of prediction files, and what it took to make them."""

    rule: GenKL
    rows: int  #: N
    models: int  #: M
    inputs: tuple[Fingerprint, ...]  #: of every file, model by model
    out: Path | None  #: the table written
    nc_list: Path | None  #: the list of NC keys written
    nc_count: int  #: how many rows are non-conforming
    bad_count: int  #: how many rows held no valid prediction
    resumed: int  #: rows that an earlier, killed job had scored
    input_bytes: int  #: of all predictions
    scoring_seconds: float  #: the pass: reading, scoring, and writing rows in the meantime
    finishing_seconds: float  #: after it: the end of the table, the list, syncing to disk
    _columns: Mapping[str, Any] = dataclasses.field(repr=False)
    _leave_out: NDArray[np.bool_] | None = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self.rows

    @property
    def scores(self) -> Scores:
        """NumPy columns of N rows: 21 bytes a row in memory, if it is asked for.

        Raises:
            ValueError: on another process of a job than the first.
        """
        return Scores(**{name: self.column(name)[:] for name in _KINDS}, rule=self.rule)

    @property
    def bad_rows(self) -> NDArray[np.int64]:
        """The rows that held no valid prediction, ascending.

        Raises:
            ValueError: on another process of a job than the first.
        """
        top_class = self.column("top_class")
        starts = range(0, self.rows, BLOCK_ROWS) if self.bad_count else []
        blocks = [_bad_rows(top_class, self._leave_out, i, i + BLOCK_ROWS) for i in starts]
        return np.concatenate([np.empty(0, np.int64), *blocks])

    def column(self, name: str) -> Any:
        """(N,) one column, of which slices can be had without the whole.

        Raises:
            ValueError: on another process of a job than the first.
        """
        if not self._columns:
            raise ValueError("FileScores: the first process of the job has the scores")
        return self._columns[name]


class Column:
    """A column of N rows that lies in pieces of a file: ``column[start:stop]``, ``column[row]``,
    ``np.asarray(column)``."""

    def __init__(
        self,
        rows: int,
        piece: int,
        dtype: np.dtype[Any],
        read: Callable[[int, int, int], NDArray[Any]],
    ) -> None:
        self._rows, self._piece, self._dtype, self._read = rows, piece, dtype, read

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, span: slice | int) -> Any:
        if not isinstance(span, slice):
            row = range(self._rows)[span]
            return self[row : row + 1][0]
        start, stop, step = span.indices(self._rows)
        if step < 0:
            return self[:][span]
        pieces = [np.empty(0, self._dtype)]
        for i in range(start // self._piece, -(-stop // self._piece) if stop > start else 0):
            begin = i * self._piece
            end = min(begin + self._piece, self._rows)
            pieces.append(self._read(i, max(start, begin) - begin, min(stop, end) - begin))
        whole = pieces[1] if len(pieces) == 2 else np.concatenate(pieces)
        return whole if step == 1 else whole[::step].copy()  # a view would keep the rest

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or self._dtype)


class _InMemory:
    """Where the scores of a short job are: nowhere else."""

    resumed = 0

    def __init__(self, rows: int, batch_rows: int) -> None:
        self.columns: dict[str, Any] = {n: np.empty(rows, kind) for n, kind in _KINDS.items()}
        self._batch_rows = batch_rows
        self.todo = list(range(-(-rows // batch_rows)))

    def write(self, batch: int, columns: Mapping[str, NDArray[Any]]) -> None:
        start = batch * self._batch_rows
        for name, column in columns.items():
            self.columns[name][start : start + len(column)] = column

    def gather(self) -> None:
        """Everything is here."""

    def discard(self) -> None:
        pass


class _OnDisk:
    """Where the scores of a long job are: in a file beside the table, until that is complete.

    Batch b holds its six columns one after another.
    """

    def __init__(self, file: Unfinished, rows: int, batch_rows: int) -> None:
        self._file = file
        self.todo, self.resumed = file.todo, file.resumed
        content = _Content(file.partial)
        self.columns: dict[str, Any] = {}
        before = 0
        for name, kind in _KINDS.items():
            read = _reader(content, rows, batch_rows, kind, before)
            self.columns[name] = Column(rows, batch_rows, kind, read)
            before += kind.itemsize

    def write(self, batch: int, columns: Mapping[str, NDArray[Any]]) -> None:
        self._file.write(batch, b"".join(columns[name].tobytes() for name in _KINDS))

    def gather(self) -> None:
        """Wait until every process has filled its rows."""
        self._file.gather()

    def discard(self) -> None:
        self._file.discard()


class _Content:
    """A file that can be read as long as somebody holds this, removed or not.

    Not mapped: the pages of a map count as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self, place: int, count: int) -> bytes:
        content = b""
        while len(content) < count:
            with naming(self._path):
                more = os.pread(self._file, count - len(content), place + len(content))
            if not more:
                raise OSError(f"score: {self._path} became shorter while it was read")
            content += more
        return content


def _reader(
    content: _Content, rows: int, batch_rows: int, kind: np.dtype[Any], before: int
) -> Callable[[int, int, int], NDArray[Any]]:
    """Reads rows of a batch from the column that so many bytes of a row lie before."""

    def read(batch: int, start: int, stop: int) -> NDArray[Any]:
        first = batch * batch_rows
        filled = min(batch_rows, rows - first)
        place = first * _ROW_BYTES + filled * before + start * kind.itemsize
        return np.frombuffer(content.read(place, (stop - start) * kind.itemsize), kind)

    return read


def score_files(
    inputs: PathLike | Sequence[PathLike],
    rule: GenKL,
    out: PathLike | None = None,
    *,
    keys: PathLike | None = None,
    key_column: str | None = None,
    nc_list: PathLike | None = None,
    logits: bool = False,
    validate: bool = True,
    on_bad_row: OnBadRow = "raise",
    leave_out: NDArray[np.bool_] | None = None,
    one_model: bool = False,
    column: str | Sequence[str] | None = None,
    raw: str | None = None,
    bad_rows: PathLike | None = None,
    begin_anew: BeginAnew = False,
    device: str = "cpu",
    chunk_bytes: int = CHUNK_BYTES,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FileScores:
    """Score prediction files in one pass and in bounded memory, and write the table of scores.

    Everything that can be known to be wrong (files, shapes, keys, outputs) is found before the
    pass. Outputs appear complete, when all went well, or not at all. A job of more than 256 MiB of
    predictions that was killed, or met an error, goes on where it was when it is started again
    with the same inputs and settings, and ends with the same bytes.

    Memory is a few chunks and one block of the table, whatever the input is. On top come the
    scores, 21 bytes a row, in a short job and in one without ``out``; and the largest record batch
    of Arrow files.

    Args:
        inputs: the predictions of one model, or of M models, to be averaged: each a file of
            ``sources.py`` (``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``,
            ``.zarr``, ``.bin``), a pattern or a folder of shards, or a URL.
        rule: the rule to score with; its ``num_classes`` must be k.
        out: the table to write: ``.parquet``, ``.csv`` or ``.npy`` (``tables.py`` names its
            columns). An existing file is replaced.
        keys: text file with one key per row; the table gets a ``key`` column.
        key_column: in place of ``keys``: the column of the first model's Parquet or Arrow files
            that holds them, as text or integers. Where other models' files have it too, it must be
            the same there.
        nc_list: text file to write the keys of the NC rows to, in file order, one per line;
            ``empty_set`` if there is none. Needs ``keys`` or ``key_column``.
        logits: the files hold logits; their softmax is taken in the same pass.
        validate: check every row in the same pass, as ``GenKL.score`` does.
        on_bad_row: what a row that is no valid prediction does: "raise"; "nan": it is in the table
            without a score (``tables.py`` says what it gets); "skip": it is not in the table.
        leave_out: (N,) bool, rows that have no prediction (:func:`rows_without_prediction` finds
            them). Whatever the files hold there is not looked at; they are treated as by "nan".
        one_model: the inputs are shards of one model, in this order.
        column: which array, tensor or column, where the files have several; or the k columns.
        raw: dtype of ``.bin`` and ``.raw`` files.
        bad_rows: text file to write the rows to that held no valid prediction: one line for each,
            its number, and its key after a tab where there are keys.
        begin_anew: what to do with what an unfinished job on the same table has left. False: go
            on if it was this job, refuse if it had other inputs or settings. True: throw it away.
            "if other": go on, or throw it away.
        device: what scores: "cpu"; "cuda", the GPU of this process's number among those on its
            machine; "cuda:1". The results are the same; reading, and writing the table, are the
            processors' in any case.
        chunk_bytes: how much of the predictions, of all models together, is scored at a time.
        ranks: the processes of a job that share the rows and call this alike (``ranks.join``);
            by default this process scores all of them.
        progress: called with (rows done, N) after every chunk.

    Returns:
        FileScores: counts, the scores, fingerprints of the inputs, times.

    Raises:
        OSError: a file that cannot be read or written, or another job at work on the same table.
        ValueError: a file that is not what it should be, or the first bad row, with its file;
            an unfinished job of other inputs or settings, with what differs.

    Warns:
        UserWarning: a key that appears more than once; unfinished work was thrown away.
    """
    paths = _listed(inputs)
    if chunk_bytes < 1:
        raise ValueError(f"score: chunk_bytes must be at least 1, got {chunk_bytes}")
    if on_bad_row not in ("raise", "nan", "skip"):
        raise ValueError(f"score: on_bad_row must be raise, nan or skip, got {on_bad_row!r}")
    files_in = [Path(name) for path in paths for name in _local_files(path)]
    table = _check_output("out", out, [*files_in, keys, nc_list, bad_rows])
    if table is not None:
        _check_not_among(table, paths)
    list_ = _check_output("nc_list", nc_list, [*files_in, keys, bad_rows])
    bad_list = _check_output("bad_rows", bad_rows, [*files_in, keys])
    if keys is not None and key_column is not None:
        raise ValueError(f"score: keys must not be given with key_column {key_column!r}")
    if list_ is not None and keys is None and key_column is None:
        raise ValueError("score: nc_list needs keys, or the key_column of the inputs")
    ranks = ranks or Ranks()
    if ranks.size > 1 and table is None:
        raise ValueError("score: out must be given for several processes: there they meet")
    gpu = new_scorer(rule, device, logits, validate, ranks.local_rank)

    with ExitStack() as stack:
        files = _open(paths, rule, stack, one_model, column, raw)
        rows = files[0].shape[0]
        if leave_out is not None:
            _check_mask(leave_out, rows)
        key_list: KeyList | None = None
        if keys is not None:
            key_list = stack.enter_context(Keys(keys, rows))
        elif key_column is not None:
            models = [paths] if one_model else [[path] for path in paths]
            in_first = KeyColumn(models[0], key_column, rows)
            key_list = stack.enter_context(in_first)
            if ranks.first:
                _require_same_keys(in_first, models[1:], key_column)
        if key_list is not None and ranks.first:
            _warn_of_repeats(key_list, None if table is None else table.parent)
        fingerprints = tuple(f for file in files for f in file.fingerprints())
        settings = {
            "version": __version__,
            "rule": {f.name: _plain(getattr(rule, f.name)) for f in dataclasses.fields(rule)},
            "logits": logits,
            "validate": validate,
            "on_bad_row": on_bad_row,
            "models": len(files),
            # Not when they were modified: predictions made again give the same table.
            "inputs": [
                {**dataclasses.asdict(f), "shape": list(f.shape), "modified": None}
                for f in fingerprints
            ],
            "keys": None if key_list is None else key_list.fingerprint(),
            "leave_out": None if leave_out is None else _mask_fingerprint(leave_out),
        }
        input_bytes = sum(file.nbytes for file in files)
        batch_rows = _batch_rows(files, chunk_bytes)
        kept: _InMemory | _OnDisk
        # A short job takes up what a long one has left.
        lasting = ranks.size > 1 or _is_long(rows, input_bytes)
        if table is None or not (lasting or Unfinished.left(table)):
            kept = _InMemory(rows, batch_rows)
            if not ranks.first:
                kept.todo = []
        else:
            unfinished = stack.enter_context(
                Unfinished(
                    table,
                    _kept_of(settings, files, batch_rows),
                    rows=rows,
                    row_bytes=_ROW_BYTES,
                    batch_size=batch_rows,
                    ranks=ranks,
                    name="score",
                    begin_anew=begin_anew,
                )
            )
            kept = _OnDisk(unfinished, rows, batch_rows)
            if ranks.first:
                for path in filter(None, (table, list_, bad_list)):
                    remove_leftovers_of(path)

        bad_between = functools.partial(_bad_rows, kept.columns["top_class"], leave_out)
        start = time.perf_counter()
        # Left in the opposite order: the lists are put in place, then the table, once all of them
        # are written.
        with ExitStack() as outputs:
            writer = None
            writing = ExitStack()
            if table is not None and ranks.first:
                temporary = outputs.enter_context(atomic_write(table))
                outputs.enter_context(writing)
                writer = writing.enter_context(
                    TableWriter(
                        temporary,
                        kept.columns,
                        key_list,
                        settings,
                        bad_between if on_bad_row == "skip" else None,
                    )
                )
            job = _Pass(files, rule, logits, validate, on_bad_row, leave_out, batch_rows, gpu)
            if on_bad_row == "raise" and kept.resumed and ranks.first:
                _raise_bad_rows(job, bad_between)
            # Others fill rows of the table, too, and nobody knows when.
            meanwhile = writer if ranks.size == 1 else None
            job.run(kept, meanwhile, ranks, progress)
            for file in files:
                file.check_unchanged()
            if key_list is not None:
                key_list.check_unchanged()
            kept.gather()
            scored = time.perf_counter()
            counts = [0, 0]
            if ranks.first:
                if writer is not None:
                    writer.advance(rows)
                writing.close()
                nc = kept.columns["nc"]
                for i in range(0, rows, BLOCK_ROWS):
                    counts[0] += int(np.count_nonzero(nc[i : i + BLOCK_ROWS]))
                    counts[1] += len(bad_between(i, i + BLOCK_ROWS))
                if list_ is not None and key_list is not None:
                    write_nc_list(outputs.enter_context(atomic_write(list_)), key_list, nc)
                if bad_list is not None:
                    bad_path = outputs.enter_context(atomic_write(bad_list))
                    _write_bad_rows(bad_path, bad_between, rows, key_list)
        kept.discard()
        nc_count, bad_count = ranks.broadcast(counts)

    return FileScores(
        rule=rule,
        rows=rows,
        models=len(files),
        inputs=fingerprints,
        out=table,
        nc_list=list_,
        nc_count=nc_count,
        bad_count=bad_count,
        resumed=kept.resumed,
        input_bytes=input_bytes,
        scoring_seconds=scored - start,
        finishing_seconds=time.perf_counter() - scored,
        _columns=kept.columns if ranks.first else {},
        _leave_out=leave_out,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job would do, and what it would take here."""

    rows: int  #: N
    num_classes: int  #: k
    models: int  #: M
    files: int  #: shards of all models
    dtype: str
    input_bytes: int
    chunk_rows: int
    chunks: int
    processes: int
    device: str
    resumable: bool  #: whether a killed job goes on
    memory_bytes: int  #: about so much beside the program
    output_bytes: int  #: of the scores before they are encoded
    seconds: float  #: of reading and scoring, from the first chunk; writing may be slower


def plan(
    inputs: PathLike | Sequence[PathLike],
    rule: GenKL,
    *,
    logits: bool = False,
    one_model: bool = False,
    column: str | Sequence[str] | None = None,
    raw: str | None = None,
    device: str = "cpu",
    chunk_bytes: int = CHUNK_BYTES,
    ranks: Ranks | None = None,
) -> Plan:
    """What ``score_files`` would do with these arguments; one chunk is read and scored to tell.

    Raises:
        OSError, ValueError: as ``score_files``, of the inputs and the device.
    """
    ranks = ranks or Ranks()
    gpu = new_scorer(rule, device, logits, False, ranks.local_rank)
    with ExitStack() as stack:
        files = _open(_listed(inputs), rule, stack, one_model, column, raw)
        rows = files[0].shape[0]
        step = _batch_rows(files, chunk_bytes)
        job = _Pass(files, rule, logits, False, "nan", None, step, gpu)
        for _ in range(1 if gpu is None else 2):  # a GPU has to be started
            start = time.perf_counter()
            list(job.scored([(0, job.read_staged(0))]))
            seconds = (time.perf_counter() - start) * rows / max(1, min(step, rows)) / ranks.size
        input_bytes = sum(file.nbytes for file in files)
        resumable = ranks.size > 1 or _is_long(rows, input_bytes)
        block = min(rows, BLOCK_ROWS) * _ROW_BYTES
        return Plan(
            rows=rows,
            num_classes=rule.num_classes,
            models=len(files),
            files=sum(len(file.fingerprints()) for file in files),
            dtype=files[0].dtype,
            input_bytes=input_bytes,
            chunk_rows=min(step, rows),
            chunks=-(-rows // step),
            processes=ranks.size,
            device=device,
            resumable=resumable,
            # Chunks being read, one being scored; a block of the table, and Arrow's copy of it.
            # A GPU has copies in pinned memory, and more of them under way.
            memory_bytes=min(
                input_bytes,
                (job.ahead + 1 if gpu is None else 2 * (job.ahead + LANES)) * chunk_bytes,
            )
            + 3 * block
            + (0 if resumable else rows * _ROW_BYTES),
            output_bytes=rows * (_ROW_BYTES + 8),
            seconds=seconds,
        )


def _open(
    paths: Sequence[PathLike],
    rule: GenKL,
    stack: ExitStack,
    one_model: bool,
    column: str | Sequence[str] | None,
    raw: str | None,
) -> list[Source]:
    """The predictions of each model, of the rule's classes."""
    named = None if raw is None else (raw, rule.num_classes)
    if one_model:
        files = [stack.enter_context(open_shards(paths, column=column, raw=named))]
    else:
        files = open_models(paths, stack, column=column, raw=named)
    if files[0].shape[1] != rule.num_classes:
        raise ValueError(
            f"score: {files[0].name} must have rule.num_classes = {rule.num_classes} columns, "
            f"got shape {files[0].shape}"
        )
    return files


def _batch_rows(files: Sequence[Source], chunk_bytes: int) -> int:
    rows = files[0].shape[0]
    return max(1, chunk_bytes * rows // max(1, sum(file.nbytes for file in files)))


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
        files = open_models(paths, stack)
        missing = np.zeros(files[0].shape[0], bool)
        for file in files:
            step = max(1, chunk_bytes * len(missing) // max(1, file.nbytes))
            for start in range(0, len(missing), step):
                rows = file.rows(start, min(start + step, len(missing)))
                missing[start : start + len(rows)] |= empty_rows([rows])
    return missing


def _listed(inputs: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not paths:
        raise ValueError("score: inputs must be at least one file, got none")
    return paths


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One pass over the predictions."""

    files: list[Source]
    rule: GenKL
    logits: bool
    validate: bool
    on_bad_row: OnBadRow
    leave_out: NDArray[np.bool_] | None
    batch_rows: int
    gpu: GpuScorer | None = None

    @property
    def ahead(self) -> int:
        """How many batches are read at a time."""
        return min(file.concurrent_reads() for file in self.files)

    def run(
        self,
        kept: _InMemory | _OnDisk,
        writer: TableWriter | None,
        ranks: Ranks,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Score the batches to do. While this thread scores one, others read the next, and one
        keeps the last and writes its rows."""
        rows = self.files[0].shape[0]
        done = kept.resumed
        if progress is not None and done:
            progress(done, rows)

        def keep(batch: int, columns: Mapping[str, NDArray[Any]]) -> None:
            kept.write(batch, columns)
            if writer is not None:
                writer.advance(min((batch + 1) * self.batch_rows, rows))

        with (
            ThreadPoolExecutor(self.ahead, "genkl-read") as readers,
            ThreadPoolExecutor(1, "genkl-keep") as keeper,
        ):
            written: Future[None] = keeper.submit(lambda: None)
            batches = _read_ahead(readers, self.ahead, kept.todo, self.read_staged)
            for batch, columns in self.scored(batches):
                written.result()
                written = keeper.submit(keep, batch, columns)
                done += len(columns["votes"]) * ranks.size  # the others are as far, more or less
                if progress is not None:
                    progress(min(done, rows), rows)
            written.result()

    def score(self, batch: int, models: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """The columns of a batch, by the CPU."""
        first = batch * self.batch_rows
        missing = None
        if self.leave_out is not None:
            missing = np.flatnonzero(self.leave_out[first : first + len(models[0])])
        try:
            columns, _ = score_rows(
                models,
                self.rule,
                logits=self.logits,
                validate=self.validate,
                missing=missing,
                on_bad_row=self.on_bad_row,
                names=[file.name for file in self.files],
                first_row=first,
            )
        except BadRow as error:
            places = [(file.name, *file.where(error.row)) for file in self.files]
            shards = ", ".join(f"row {row} of {shard}" for of, shard, row in places if shard != of)
            raise ValueError(f"{error} ({shards})" if shards else str(error)) from None
        return columns

    def scored(
        self, batches: Iterable[tuple[int, tuple[list[Any], list[Any]]]]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The columns of batches, in order."""
        under_way: deque[tuple[int, list[Any], Pending | None]] = deque()
        lanes = 0 if self.gpu is None else LANES - 1
        for batch, (models, staged) in batches:
            begun = self.gpu.begin(staged) if self.gpu is not None and staged else None
            under_way.append((batch, models, begun))
            if len(under_way) > lanes:
                yield self._ended(*under_way.popleft())
        while under_way:
            yield self._ended(*under_way.popleft())

    def _ended(
        self, batch: int, models: list[Any], pending: Pending | None
    ) -> tuple[int, dict[str, NDArray[Any]]]:
        columns = None if pending is None else pending.result()
        return batch, self.score(batch, models) if columns is None else columns

    def read_staged(self, batch: int) -> tuple[list[Any], list[Any]]:
        """The rows of a batch, and where a GPU finds them if it is to score them."""
        models = self.read(batch)
        first = batch * self.batch_rows
        gaps = self.leave_out is not None and self.leave_out[first:][: len(models[0])].any()
        return models, [] if self.gpu is None or gaps else self.gpu.stage(models)

    def read(self, batch: int) -> list[Any]:
        """The rows of a batch, of every model."""
        start = batch * self.batch_rows
        stop = min(start + self.batch_rows, self.files[0].shape[0])
        return [file.rows(start, stop) for file in self.files]


def _read_ahead(
    pool: ThreadPoolExecutor, ahead: int, batches: Sequence[int], read: Callable[[int], _T]
) -> Iterator[tuple[int, _T]]:
    """The batches in order, so many being read while one is in use."""
    coming: deque[Future[_T]] = deque()
    todo = iter(batches)
    try:
        for batch in batches:
            coming.extend(pool.submit(read, one) for one in islice(todo, ahead + 1 - len(coming)))
            yield batch, coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def _bad_rows(
    top_class: Any, leave_out: NDArray[np.bool_] | None, start: int, stop: int
) -> NDArray[np.int64]:
    """The rows from ``start`` to ``stop`` that held no valid prediction, though they should."""
    bad = top_class[start:stop] == LEFT_OUT["top_class"]
    if leave_out is not None:
        bad &= ~leave_out[start:stop]
    return start + np.flatnonzero(bad)


def _raise_bad_rows(job: _Pass, bad_between: Callable[[int, int], NDArray[np.int64]]) -> None:
    """Raise for the first bad row of what an earlier job has scored, which set them apart."""
    rows = job.files[0].shape[0]
    for start in range(0, rows, BLOCK_ROWS):
        bad = bad_between(start, start + BLOCK_ROWS)
        if len(bad):
            batch = int(bad[0]) // job.batch_rows
            job.score(batch, job.read(batch))


def _write_bad_rows(
    path: Path,
    bad_between: Callable[[int, int], NDArray[np.int64]],
    rows: int,
    keys: KeyList | None,
) -> None:
    with naming(path), path.open("w", encoding="utf-8", newline="\n") as file:
        for start in range(0, rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, rows)
            bad = bad_between(start, stop).tolist()
            if keys is None:
                file.writelines(f"{row}\n" for row in bad)
            elif bad:
                block = keys.slice(start, stop)
                file.writelines(f"{row}\t{block[row - start]}\n" for row in bad)


def _is_long(rows: int, input_bytes: int) -> bool:
    return max(input_bytes, rows * _ROW_BYTES) >= RESUME_BYTES


def _check_mask(leave_out: NDArray[np.bool_], rows: int) -> None:
    if leave_out.shape != (rows,) or leave_out.dtype != bool:
        raise ValueError(
            f"score: leave_out must be ({rows},) booleans, got {leave_out.shape} {leave_out.dtype}"
        )


def _mask_fingerprint(leave_out: NDArray[np.bool_]) -> dict[str, Any]:
    digest = hashlib.blake2b(np.packbits(leave_out).tobytes(), digest_size=16).hexdigest()
    return {"rows": int(np.count_nonzero(leave_out)), "digest": digest}


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


def _local_files(path: PathLike) -> list[str]:
    """The files of this machine that an input names."""
    names = shards_of(path)
    return [name.removeprefix("file://") for name in names if "://" not in name[6:]]


def _check_not_among(output: Path, paths: Sequence[PathLike]) -> None:
    """Raise ``ValueError`` if an input names all files of a kind, and the output would be one."""
    place = Path(os.path.realpath(output))
    for path in [os.fspath(path) for path in paths]:
        folder = Path(os.path.realpath(path.removeprefix("file://")))
        within = folder.is_dir() and place.parent == folder and place.suffix in SUFFIXES
        if within or fnmatch.fnmatch(str(place), os.path.abspath(path)):
            raise ValueError(
                f"score: {output} would be one of the shards of {path} when this is started again; "
                "write it elsewhere"
            )


def _same(a: Path, b: Path) -> bool:
    if a.exists() and b.exists():
        return a.samefile(b)
    return os.path.realpath(a) == os.path.realpath(b)


def _kept_of(
    settings: Mapping[str, Any], files: Sequence[Source], batch_rows: int
) -> dict[str, Any]:
    """What the kept scores depend on: not the keys, nor what becomes of bad rows. But a file that
    was touched may have been changed where no sample was taken."""
    about = {name: settings[name] for name in settings if name not in ("keys", "on_bad_row")}
    states = [state for file in files for state in file.states()]
    inputs = zip(settings["inputs"], states, strict=True)
    return {
        **about,
        "inputs": [{**one, "state": state} for one, state in inputs],
        "batch_rows": batch_rows,
    }


def _require_same_keys(keys: KeyColumn, others: Sequence[Sequence[PathLike]], column: str) -> None:
    """Raise ``ValueError`` if other models' files have other keys in this column."""
    for paths in others:
        try:
            other = KeyColumn(paths, column, len(keys))
        except MissingColumn:
            continue
        with other:
            keys.require_same(other)


def _warn_of_repeats(keys: KeyList, folder: Path | None) -> None:
    repeats = keys.repeats(folder)
    if repeats:
        # Of very many, these are some, and not the first ones.
        some = len(repeats) == MOST_REPEATS
        count = f"{'at least ' if some else ''}{len(repeats)} keys"
        row = repeats[0]
        where = f"line {row + 1}" if isinstance(keys, Keys) else f"row {row}"
        warnings.warn(
            f"{keys.name}: {count} appear more than once, {'as' if some else 'first'} "
            f"{keys[row]!r} in {where}",
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    """A Python number, which JSON knows, for a NumPy one."""
    return value.item() if isinstance(value, np.generic) else value
