"""How fast are prediction files scored, against reading them and doing nothing?

From the page cache and from disk, .npy and Parquet; how much memory that takes, what a second
processor brings, what Ray Data and Spark add, how light a worker is, and two jobs of gigabytes.

Files hold peaked rows (bench/workload.py), 64 MiB of them over and over. They are written to a
folder of their own in --folder, at most 12 GB at a time, and removed. "From disk" means that this
system's page cache was told to forget the files before each call; a host below a virtual machine
may still have them in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import record
import torch
import workload
from baselines import researcher_numpy
from clock import CPU_PAUSE, Candidate, Times, host_time, significant, take_turns
from numpy.typing import NDArray

from genkl_ext import BatchScorer, GenKL, Scores, score_files
from genkl_ext.scoring.files import CHUNK_BYTES
from genkl_ext.scoring.tables import LEFT_OUT

RULES = {14: "clothing1m", 101: "food101n-spread", 1000: "thousand"}  # k -> in workload.rules()
POOL_BYTES = 64 << 20
MEMORY_TIMES = 4  # how much larger the second job of a kind is whose memory is compared
TABLES = (".npy", ".parquet")
RESEARCHER_BYTES = 64 << 20  # as in scoring.py: of the temporary of the researcher's formula
PACKAGES = ("pyarrow", "ray", "pyspark", "cleanlab")


class Sizes(NamedTuple):
    """How large the files are, and how often they are scored."""

    pass_bytes: int  # of predictions in a timed pass
    memory_bytes: int  # in the smaller of two jobs whose memory is compared
    scaling_bytes: int
    engine_shards: int  # of as many rows as there are different ones
    cleanlab_rows: dict[int, int]  # k -> N
    large_rows: dict[int, int]
    rounds: int
    few_rounds: int  # of what takes long


FULL = Sizes(
    pass_bytes=600_000_000,
    memory_bytes=300_000_000,
    scaling_bytes=1_200_000_000,
    engine_shards=4,
    cleanlab_rows={14: 1_000_000, 101: 400_000},
    large_rows={14: 100_000_000, 101: 10_000_000},
    rounds=5,
    few_rounds=3,
)
QUICK = Sizes(
    pass_bytes=2_000_000,
    memory_bytes=1_000_000,
    scaling_bytes=2_000_000,
    engine_shards=2,
    cleanlab_rows={14: 5_000, 101: 2_000},
    large_rows={14: 100_000, 101: 10_000},
    rounds=2,
    few_rounds=2,
)


class Bench:
    """What the parts share: where to write, how large, and what they have found."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self.sizes = QUICK if quick else FULL
        self.cells: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def add(self, part: str, what: str, candidate: str, figures: Mapping[str, Any]) -> None:
        self.cells.append({"part": part, "what": what, "candidate": candidate, **figures})
        shown = (f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float) and v)
        print(f"{part:9} {what:34} {candidate:30} {'  '.join(shown)}", flush=True)

    def leave_out(self, what: str, reason: str) -> None:
        reason = reason.partition("\n")[0]
        self.left_out[what] = reason
        print(f"{what} left out: {reason}", flush=True)


# ---- files ---------------------------------------------------------------------------------------


class Predictions:
    """Predictions of M models: some rows over and over, so that any number of them can be checked.

    Attributes:
        blocks: the rows, an array for each model.
        scores: those of ``GenKL.score``. Rows do not see each other, so row i of a file has the
            scores of row i % n.
    """

    def __init__(self, bench: Bench, k: int, models: int = 1, dtype: str = "float32") -> None:
        self.classes, self.models, self.dtype = k, models, dtype
        self.rule = workload.rules()[RULES[k]]
        pool_bytes = (1 << 20) if bench.quick else POOL_BYTES
        slices = workload.Pool(k, "peaked", pool_bytes // workload.SLICES).slices(models)
        self.blocks: list[NDArray[Any]] = [
            np.concatenate([one[m].numpy() for one in slices]).astype(dtype) for m in range(models)
        ]
        self.scores = self.rule.score(self.blocks)

    @property
    def row_bytes(self) -> int:
        return sum(block[:1].nbytes for block in self.blocks)

    @property
    def about(self) -> dict[str, Any]:
        """For the record."""
        return {"classes": self.classes, "models": self.models, "dtype": self.dtype}

    def describe(self) -> str:
        models = f", {self.models} models" if self.models > 1 else ""
        return f"k = {self.classes}, {self.dtype}{models}"

    def pieces(self, rows: int) -> Iterator[list[NDArray[Any]]]:
        """So many rows of each model, a block at a time."""
        for start in range(0, rows, len(self.blocks[0])):
            yield [block[: rows - start] for block in self.blocks]

    def write_npy(self, folder: Path, rows: int) -> list[Path]:
        """A file for each model."""
        paths = [folder / f"p{m}.npy" for m in range(self.models)]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for file in files:
                header = {"descr": self.blocks[0].dtype.str, "fortran_order": False}
                np.lib.format.write_array_header_1_0(
                    file, {**header, "shape": (rows, self.classes)}
                )
            for piece in self.pieces(rows):
                for file, array in zip(files, piece, strict=True):
                    file.write(array.data)
        return paths

    def write_parquet(self, path: Path, rows: int, *, lists: bool = True, first: int = 0) -> Path:
        """The first model as pyarrow writes it by default, beside a key: a list column ``probs``,
        or columns ``p0``, ``p1``, ..."""
        with contextlib.ExitStack() as stack:
            writer = None
            for (array,) in self.pieces(rows):
                columns = {"key": pa.array(np.arange(first, first + len(array)))}
                if lists:
                    offsets = np.arange(0, array.size + 1, self.classes, dtype=np.int32)
                    values = pa.array(array.reshape(-1))
                    columns["probs"] = pa.ListArray.from_arrays(pa.array(offsets), values)
                else:
                    for name, column in zip(self.column(False), array.T, strict=True):
                        columns[name] = pa.array(np.ascontiguousarray(column))
                table = pa.table(columns)
                writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
                writer.write_table(table)
                first += len(array)
        return path

    def column(self, lists: bool) -> str | list[str]:
        """The column, or columns, of predictions in a Parquet file."""
        return "probs" if lists else [f"p{i}" for i in range(self.classes)]

    def check(self, rows: int, found: Iterable[tuple[NDArray[Any], Mapping[str, Any]]]) -> None:
        """Raise ``RuntimeError`` unless these are the scores of all rows.

        Args:
            rows: how many there are.
            found: numbers of some rows, and their columns.
        """
        seen = 0
        for numbers, columns in found:
            seen += len(numbers)
            at = numbers % len(self.blocks[0])
            for name, column in columns.items():
                expected = np.asarray(getattr(self.scores, name))[at]
                if not np.array_equal(column, expected):
                    row = int(numbers[np.flatnonzero(column != expected)[0]])
                    raise RuntimeError(
                        f"bench: {name} must equal GenKL.score's, differs at row {row} "
                        f"of {self.describe()}"
                    )
        if seen != rows:
            raise RuntimeError(f"bench: {rows} rows must be scored, got {seen}")


def table_rows(path: Path) -> Iterator[tuple[NDArray[Any], dict[str, NDArray[Any]]]]:
    """Rows of a table of scores, for :meth:`Predictions.check`: a file, or an engine's folder."""
    if path.suffix == ".npy":
        table = np.load(path)
        yield table["row"], {name: table[name] for name in LEFT_OUT}
        return
    for part in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=1 << 20):
                columns = {
                    name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names
                }
                numbers = columns["row" if "row" in columns else "key"]
                yield numbers, {name: columns[name] for name in LEFT_OUT if name in columns}


def memory_rows(scores: Scores) -> Iterator[tuple[NDArray[Any], dict[str, Any]]]:
    """The same of scores in memory."""
    yield np.arange(len(scores.nc)), {name: getattr(scores, name) for name in LEFT_OUT}


def read_alone(paths: Sequence[Path], threads: int) -> None:
    """Read files as scoring does, a chunk of all of them at a time, into one buffer per thread."""
    piece = CHUNK_BYTES // len(paths)
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            files.append(os.open(path, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        places = [
            (file, place) for place in range(0, os.fstat(files[0]).st_size, piece) for file in files
        ]

        def read(first: int) -> None:
            buffer = bytearray(piece)
            for file, place in places[first::threads]:
                os.preadv(file, [buffer], place)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))


def readers_of(paths: Sequence[Path]) -> dict[str, Candidate]:
    """Of these, the faster one is what scoring is held against: one thread, or two."""
    return {
        "reading, 1 thread": lambda _: read_alone(paths, 1),
        "reading, 2 threads": lambda _: read_alone(paths, 2),
    }


def copy_alone(nbytes: int, device: str) -> None:
    """Copy so many bytes of pinned memory to a GPU, a chunk at a time: what PCIe allows."""
    here = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device=device)
    for _ in range(-(-nbytes // CHUNK_BYTES)):
        there.copy_(here, non_blocking=True)
    torch.cuda.synchronize(device)


def arrow_readers_of(path: Path, column: str | list[str]) -> dict[str, Candidate]:
    """The same for Parquet: the ways pyarrow has of reading columns a piece at a time."""
    columns = [column] if isinstance(column, str) else column

    def batches(_: int) -> None:
        with pq.ParquetFile(path) as file:
            for _batch in file.iter_batches(columns=columns):
                pass

    def row_groups(_: int) -> None:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group, columns=columns)

    return {"pyarrow, batches": batches, "pyarrow, row groups": row_groups}


def forget(paths: Iterable[Path]) -> None:
    """Take files out of this system's page cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def file_system(folder: Path) -> str:
    """The kind of file system a folder lies on: "ext4", "tmpfs"."""
    device = folder.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == name:
            return kind.split()[0]
    return "unknown"


def clear(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- time and memory -----------------------------------------------------------------------------


def after(*steps: Callable[[], object]) -> Callable[[Candidate, int], float]:
    """A timer of calls that follow these steps, which are not timed."""

    def timer(candidate: Candidate, turn: int) -> float:
        for step in steps:
            step()
        return host_time(candidate, turn)

    return timer


def cpu_time(candidate: Candidate, turn: int) -> float:
    """Seconds that processors spent on a call, in all threads of this process."""
    start = time.process_time()
    candidate(turn)
    return time.process_time() - start


def rates(rows: int, nbytes: int, times: Times, reading: float) -> dict[str, Any]:
    """What a pass is judged by: beside the seconds of reading alone."""
    return {
        "rows": rows,
        "bytes": nbytes,
        "mrow_s": significant(rows / times.median / 1e6, 4),
        "gb_s": significant(nbytes / times.median / 1e9, 4),
        "share_of_read": significant(reading / times.median, 4),
        **times.as_json(),
    }


class Ended(NamedTuple):
    """A Python process that has ended."""

    peak_bytes: int
    output: str


# Not ru_maxrss: that of a child begins with the memory of the process that started it.
_PEAK = """
import atexit, sys
def _peak():
    with open("/proc/self/status") as status:
        print(status.read().partition("VmHWM:")[2].split()[0], file=sys.stderr)
atexit.register(_peak)
"""
_GENKL = "from genkl_ext.cli.main import main; sys.argv[0] = 'genkl'; sys.exit(main())"


def run_python(
    code: str, *arguments: str, together: Sequence[Mapping[str, str]] = ({},)
) -> list[Ended]:
    """Run Python code in processes of its own until all have ended.

    Args:
        code: what to run.
        arguments: its ``sys.argv[1:]``.
        together: the environment, beside this process's, of each process.

    Raises:
        RuntimeError: one of them failed; the others are killed.
    """
    # Python's compiled files are kept, as they are for a user.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with contextlib.ExitStack() as stack:
        processes = []
        for environment in together:
            process = subprocess.Popen(
                [sys.executable, "-c", _PEAK + code, *arguments],
                env={**inherited, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        ended = []
        for process in processes:
            output, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"bench: {code.strip()} failed: {errors.strip()}")
            ended.append(Ended(1024 * int(errors.split()[-1]), output))
    return ended


def score_command(inputs: Sequence[Path], rule: GenKL, out: Path) -> list[str]:
    """The arguments of ``genkl`` for this."""
    settings = dataclasses.asdict(rule).items()
    options = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings)
    return ["score", *map(str, inputs), *itertools.chain(*options), "-o", str(out)]


# ---- parts ---------------------------------------------------------------------------------------


NPY = [(14, "float32", 1), (101, "float32", 1), (1000, "float32", 1), (14, "float16", 1)]
NPY += [(101, "float32", 3)]


def npy(bench: Bench, part: str) -> None:
    """.npy files, from the page cache or from disk."""
    for k, dtype, models in NPY:
        predictions = Predictions(bench, k, models, dtype)
        rows = bench.sizes.pass_bytes // predictions.row_bytes
        paths = predictions.write_npy(bench.folder, rows)
        time_passes(bench, part, predictions, paths, rows, readers_of(paths), evict=part == "disk")
        for path in paths:
            path.unlink()


def parquet(bench: Bench) -> None:
    """Parquet files, from the page cache, against pyarrow reading the same columns."""
    for k, lists in ((14, True), (14, False), (101, True)):
        predictions = Predictions(bench, k)
        rows = bench.sizes.pass_bytes // predictions.row_bytes
        path = predictions.write_parquet(bench.folder / "p.parquet", rows, lists=lists)
        column = predictions.column(lists)
        readers = arrow_readers_of(path, column)
        kind = "a list column" if lists else f"{k} columns"
        time_passes(bench, "parquet", predictions, [path], rows, readers, column=column, kind=kind)
        path.unlink()


def time_passes(
    bench: Bench,
    part: str,
    predictions: Predictions,
    paths: Sequence[Path],
    rows: int,
    readers: Mapping[str, Candidate],
    *,
    column: str | list[str] | None = None,
    kind: str = "",
    evict: bool = False,
    device: str = "cpu",
) -> None:
    """Score files to memory and to every kind of table, in turns with ``readers``: those read the
    same and do nothing, and the faster one counts. For a GPU, copying to it and the CPU take turns
    too."""
    outs = {suffix: bench.folder / f"scores{suffix}" for suffix in TABLES}

    def score(out: Path | None, on: str = device) -> Any:
        return score_files(paths, predictions.rule, out, column=column, device=on)

    predictions.check(rows, memory_rows(score(None).scores))
    for out in outs.values():
        score(out)
        predictions.check(rows, table_rows(out))
    nbytes = rows * predictions.row_bytes
    candidates: dict[str, Candidate] = {
        **readers,
        "to memory": lambda _: score(None),
        **{f"to {suffix}": lambda _, out=out: score(out) for suffix, out in outs.items()},
    }
    if device != "cpu":
        candidates["copying to the GPU"] = lambda _: copy_alone(nbytes, device)
        candidates["to memory, on the CPU"] = lambda _: score(None, "cpu")
    times = take_turns(
        candidates,
        seconds=0.0,
        rounds=(bench.sizes.rounds, bench.sizes.rounds),
        pause=CPU_PAUSE,
        timer=after(
            *(functools.partial(clear, out) for out in outs.values()),
            *([functools.partial(forget, paths)] if evict else []),
        ),
    )
    for out in outs.values():
        clear(out)
    reading = min(times[name].median for name in readers)
    what = predictions.describe() + (f", {kind}" if kind else "")
    for name, taken in times.items():
        figures = {**predictions.about, **rates(rows, nbytes, taken, reading)}
        if device != "cpu":
            copying = times["copying to the GPU"].median
            figures["share_of_copy"] = significant(copying / taken.median, 4)
        bench.add(part, what, name, figures)


_SCORE_FILES = """
import json
from genkl_ext import GenKL, score_files
inputs, rule, out, column = map(json.loads, sys.argv[1:])
score_files(inputs, GenKL(**rule), out, column=column)
"""


def memory(bench: Bench) -> None:
    """The peak of a process that does one job, and the same with more rows."""
    kinds: list[tuple[str, str | None, int]] = [
        ("npy", None, 1), ("npy", ".npy", 1), ("npy", ".parquet", 1), ("npy", ".parquet", 3),
        ("lists", ".parquet", 1), ("columns", ".parquet", 1),
    ]  # fmt: skip
    names = {"npy": ".npy", "lists": "Parquet, a list column", "columns": "Parquet, 14 columns"}
    for source, suffix, models in kinds:
        predictions = Predictions(bench, 14, models)
        rows = bench.sizes.memory_bytes // predictions.row_bytes
        peaks = []
        for count in (rows, MEMORY_TIMES * rows):
            column: str | list[str] | None = None
            if source == "npy":
                paths = predictions.write_npy(bench.folder, count)
            else:
                lists = source == "lists"
                target = bench.folder / "p.parquet"
                paths = [predictions.write_parquet(target, count, lists=lists)]
                column = predictions.column(lists)
            out = None if suffix is None else bench.folder / f"scores{suffix}"
            job = (
                [str(path) for path in paths],
                dataclasses.asdict(predictions.rule),
                out and str(out),
                column,
            )
            (ended,) = run_python(_SCORE_FILES, *map(json.dumps, job))
            peaks.append(ended.peak_bytes)
            if out is not None:
                predictions.check(count, table_rows(out))
                out.unlink()
            for path in paths:
                path.unlink()
        kind = names[source] + (f", {models} models" if models > 1 else "")
        bench.add(
            "memory",
            f"k = 14, {kind}",
            f"to {suffix or 'memory'}",
            {
                "rows": rows,
                "mib": significant(peaks[0] / 2**20, 4),
                "mib_more": significant(peaks[1] / 2**20, 4),
                "growth": significant(peaks[1] / peaks[0], 4),
            },
        )


def scaling(bench: Bench) -> None:
    """The whole command, with one and two threads, and as two processes of one thread."""
    predictions = Predictions(bench, 14)
    rows = bench.sizes.scaling_bytes // predictions.row_bytes
    paths = predictions.write_npy(bench.folder, rows)
    out = bench.folder / "scores.parquet"
    command = score_command(paths, predictions.rule, out)
    works: dict[str, list[float]] = {}

    def candidate(name: str, threads: int, processes: int) -> Candidate:
        def run(_: int) -> None:
            alike = {"OMP_NUM_THREADS": str(threads)}
            together = [{**alike, **of_rank} for of_rank in launched(processes)]
            first = run_python(_GENKL, *command, together=together)[0]
            said = r"the pass ([0-9.]+) s, completing the output ([0-9.]+) s"
            found = re.search(said, first.output)
            if not found:
                raise RuntimeError(f"bench: genkl score must say its times, said {first.output}")
            works.setdefault(name, []).append(sum(map(float, found.groups())))

        return run

    times = take_turns(
        {
            name: candidate(name, threads, processes)
            for name, threads, processes in (
                ("1 process, 1 thread", 1, 1),
                ("1 process, 2 threads", 2, 1),
                ("2 processes, 1 thread each", 1, 2),
            )
        },
        seconds=0.0,
        rounds=(bench.sizes.few_rounds, bench.sizes.few_rounds),
        timer=after(functools.partial(clear, out)),
    )
    predictions.check(rows, table_rows(out))
    clear(out)
    paths[0].unlink()
    # Without the first, as take_turns has it.
    work_s = {name: statistics.median(seconds[1:]) for name, seconds in works.items()}
    one = next(iter(times))
    for name, taken in times.items():
        figures = {
            "rows": rows,
            "work_s": significant(work_s[name], 4),
            "speedup": significant(times[one].median / taken.median, 4),
            "work_speedup": significant(work_s[one] / work_s[name], 4),
            **taken.as_json(),
        }
        bench.add("scaling", f"k = 14, {rows:,} rows to .parquet", name, figures)


def launched(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process of a job on this machine; nothing to a single one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "TORCHELASTIC_RUN_ID": "bench",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


_ARROW = (pa.Table, pa.RecordBatch)


def researcher_votes(rule: GenKL, batch: Any) -> Any:
    """The function of a job as it would be written from the paper: a batch's key and its votes.
    The batch is a dict of arrays, or one of Arrow or pandas."""
    rows = np.asarray(batch["probs"])
    if rows.ndim == 1:  # of arrays
        rows = np.stack(rows)
    chunk = max(1, RESEARCHER_BYTES // (8 * rule.num_vectors * rule.num_classes))
    parts = [researcher_numpy([rows[i : i + chunk]], rule) for i in range(0, len(rows), chunk)]
    columns = {"key": batch["key"], "votes": np.concatenate(parts)}
    if isinstance(batch, _ARROW):
        return type(batch).from_pydict(columns)
    return columns if isinstance(batch, dict) else batch[["key"]].assign(votes=columns["votes"])


def key_alone(batch: Any) -> Any:
    """The function of a job that leaves nothing but the engine's own time."""
    if isinstance(batch, _ARROW):
        return batch.select(["key"])
    return {"key": batch["key"]} if isinstance(batch, dict) else batch[["key"]]


# Runs a function on batches of a format and writes what it returns: the key, and columns that Spark
# wants to be told: ", votes long".
Job = Callable[[str, Callable[[Any], Any], str], None]


@contextlib.contextmanager
def ray_data(inputs: Path, out: Path) -> Iterator[tuple[Job, list[str]]]:
    """A Ray of two processors on this machine, and the batch formats to try."""
    import ray.cloudpickle
    import ray.data

    _send_by_value(ray.cloudpickle)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    def job(batches: str, function: Callable[[Any], Any], _: str) -> None:
        rows = ray.data.read_parquet(str(inputs))
        rows.map_batches(function, batch_format=batches).write_parquet(str(out))

    try:
        yield job, ["pyarrow", "numpy"]
    finally:
        ray.shutdown()


@contextlib.contextmanager
def spark(inputs: Path, out: Path) -> Iterator[tuple[Job, list[str]]]:
    """A Spark of two processors on this machine, and the batch formats to try."""
    import pyspark.cloudpickle
    from pyspark.sql import SparkSession

    _send_by_value(pyspark.cloudpickle)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[2]").appName("genkl_ext bench")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "2g",
        "spark.ui.showConsoleProgress": "false",
    }.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")

    def job(batches: str, function: Callable[[Any], Any], columns: str) -> None:
        frame = session.read.parquet(str(inputs))
        mapped = frame.mapInArrow if batches == "Arrow" else frame.mapInPandas
        schema = f"key long{columns}"
        if isinstance(function, BatchScorer):
            schema = function.spark_schema(frame.schema)
        mapped(lambda some: map(function, some), schema).write.parquet(str(out))

    try:
        yield job, ["Arrow", "pandas"]
    finally:
        session.stop()


def _send_by_value(cloudpickle: Any) -> None:
    """Workers cannot import what lies in this folder, and would load torch if they could."""
    for function in (researcher_votes, researcher_numpy):
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])


def engines(bench: Bench) -> None:
    """Ray Data and Spark over Parquet files, beside what they take for themselves, the usual
    function in their place, and no engine."""
    predictions = Predictions(bench, 14)
    inputs, out = bench.folder / "shards", bench.folder / "scored"
    inputs.mkdir()
    each = len(predictions.blocks[0])
    rows = bench.sizes.engine_shards * each
    for first in range(0, rows, each):
        predictions.write_parquet(inputs / f"{first:012}.parquet", each, first=first)
    for engine, start in {"Ray Data": ray_data, "Spark": spark}.items():
        with contextlib.ExitStack() as stack:
            begun = time.perf_counter()
            try:
                job, formats = stack.enter_context(start(inputs, out))
            except (ImportError, OSError, RuntimeError) as error:  # not installed, or no Java
                bench.leave_out(engine, str(error))
                continue
            start_s = significant(time.perf_counter() - begun, 4)
            some = formats[:1] if bench.quick else formats
            time_engine(bench, engine, job, some, predictions, rows, inputs, out)
            bench.add("engines", engine, "start-up, in no other time", {"start_s": start_s})
    clear(inputs)


def time_engine(
    bench: Bench,
    engine: str,
    job: Job,
    formats: Sequence[str],
    predictions: Predictions,
    rows: int,
    inputs: Path,
    out: Path,
) -> None:
    """One engine's turns. All results are checked before."""
    rule = predictions.rule
    ours, theirs, neither = "BatchScorer", "researcher's NumPy, votes only", "key alone"
    functions: dict[str, tuple[Callable[[Any], Any], str]] = {
        ours: (BatchScorer(rule, column="probs", keep="key"), ""),
        theirs: (functools.partial(researcher_votes, rule), ", votes long"),
        neither: (key_alone, ""),
    }
    table = out.with_suffix(".parquet")
    tidy = [functools.partial(clear, path) for path in (out, table)]
    direct = "score_files, no engine"
    candidates: dict[str, Candidate] = {
        direct: lambda _: score_files(inputs, rule, table, column="probs")
    }
    about = {direct: (engine, direct)}
    for batches, (name, how) in itertools.product(formats, functions.items()):
        candidate = f"{batches}: {name}"
        candidates[candidate] = lambda _, batches=batches, how=how: job(batches, *how)
        about[candidate] = (f"{engine}, {batches} batches", name)

    for candidate, call in candidates.items():
        for step in tidy:
            step()
        call(0)
        if about[candidate][1] == theirs:
            check_votes(predictions, rows, out)
        else:
            predictions.check(rows, table_rows(table if candidate == direct else out))
    times = take_turns(
        candidates,
        seconds=0.0,
        rounds=(bench.sizes.few_rounds, bench.sizes.few_rounds),
        pause=CPU_PAUSE,
        timer=after(*tidy),
    )
    for step in tidy:
        step()
    for candidate, taken in times.items():
        what, name = about[candidate]
        figures: dict[str, Any] = {
            "rows": rows,
            "mrow_s": significant(rows / taken.median / 1e6, 4),
            "of_direct": significant(times[direct].median / taken.median, 4),
        }
        if name == ours:
            usual = times[candidate.replace(ours, theirs)].median
            figures["x_numpy"] = significant(usual / taken.median, 4)
        bench.add("engines", what, name, {**figures, **taken.as_json()})


def check_votes(predictions: Predictions, rows: int, out: Path) -> None:
    """Raise ``RuntimeError`` unless another program's votes are those of the same computation."""
    numbers, votes = zip(*((n, c["votes"]) for n, c in table_rows(out)), strict=True)
    order = np.argsort(np.concatenate(numbers))
    if len(order) != rows:
        raise RuntimeError(f"bench: {rows} rows must have votes, got {len(order)}")
    for some in np.concatenate(votes)[order].reshape(-1, len(predictions.blocks[0])):
        workload.check_close("researcher numpy", some, predictions.scores, predictions.rule)


def cleanlab(bench: Bench) -> None:
    """cleanlab's label issues of the same files: another question, but what is run today."""
    try:
        from cleanlab.experimental.label_issues_batched import find_label_issues_batched
    except ImportError as error:
        bench.leave_out("cleanlab", str(error))
        return
    for k, rows in bench.sizes.cleanlab_rows.items():
        predictions = Predictions(bench, k)
        (path,) = predictions.write_npy(bench.folder, rows)
        rng = np.random.default_rng(k)
        labels = np.resize(predictions.blocks[0].argmax(axis=1), rows)
        wrong = rng.random(rows) < 0.2
        labels[wrong] = rng.integers(0, k, int(wrong.sum()))
        given = bench.folder / "labels.npy"
        np.save(given, labels)

        def issues(batch: int, path: Path = path, given: Path = given) -> NDArray[Any]:
            found: NDArray[Any] = find_label_issues_batched(
                labels_file=str(given),
                pred_probs_file=str(path),
                batch_size=batch,
                verbose=False,
            )
            return found

        if not wrong[issues(100_000)].any():
            raise RuntimeError("bench: cleanlab must find some of the labels that were changed")
        ours = "score_files, to memory"
        times = take_turns(
            {
                ours: lambda _, p=predictions, path=path: score_files(path, p.rule),
                "cleanlab, batches of 10,000": lambda _: issues(10_000),
                "cleanlab, batches of 100,000": lambda _: issues(100_000),
            },
            seconds=0.0,
            rounds=(bench.sizes.few_rounds, bench.sizes.few_rounds),
            pause=CPU_PAUSE,
        )
        for name, taken in times.items():
            figures = {
                "rows": rows,
                "mrow_s": significant(rows / taken.median / 1e6, 4),
                "ours_over_it": significant(taken.median / times[ours].median, 4),
                **taken.as_json(),
            }
            bench.add("cleanlab", f"{predictions.describe()}, {rows:,} rows", name, figures)
        path.unlink()
        given.unlink()


WORKERS = {
    "numpy": "import numpy",
    "numpy, genkl_ext: scores a batch": """
import numpy
from genkl_ext import BatchScorer, GenKL
rows = numpy.full((1000, 14), 1 / 14, numpy.float32)
BatchScorer(GenKL.preset("clothing1m"))({"probs": rows})
assert "torch" not in sys.modules
""",
    "torch": "import torch",
    "torch, genkl_ext: scores a batch": """
import torch
from genkl_ext import GenKL
GenKL.preset("clothing1m").score(torch.full((1000, 14), 1 / 14))
""",
}


def workers(bench: Bench) -> None:
    """A worker from start to end, with and without torch."""
    peaks: dict[str, list[int]] = {name: [] for name in WORKERS}

    def candidate(name: str) -> Candidate:
        def run(_: int) -> None:
            (ended,) = run_python(WORKERS[name])
            peaks[name].append(ended.peak_bytes)

        return run

    times = take_turns(
        {name: candidate(name) for name in WORKERS},
        seconds=0.0,
        rounds=(bench.sizes.rounds, bench.sizes.rounds),
    )
    for name, taken in times.items():
        mib = significant(statistics.median(peaks[name]) / 2**20, 4)
        bench.add("workers", "process", name, {"mib": mib, **taken.as_json()})


def where(bench: Bench) -> None:
    """What the processors do in a job: their seconds in jobs that do more and more of it.

    One thread scores, so that none spins while it waits for another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    predictions = Predictions(bench, 14)
    rows = bench.sizes.pass_bytes // predictions.row_bytes
    (path,) = predictions.write_npy(bench.folder, rows)
    array = np.load(path)
    step = CHUNK_BYTES // predictions.row_bytes

    def score(_: int) -> None:
        for start in range(0, rows, step):
            predictions.rule.score(array[start : start + step])

    outs = {suffix: bench.folder / f"scores{suffix}" for suffix in TABLES}
    times = take_turns(
        {
            "read": lambda _: read_alone([path], 1),
            "score": score,
            "to memory": lambda _: score_files(path, predictions.rule),
            **{
                f"to {suffix}": lambda _, out=out: score_files(path, predictions.rule, out)
                for suffix, out in outs.items()
            },
        },
        seconds=0.0,
        rounds=(bench.sizes.few_rounds, bench.sizes.few_rounds),
        timer=cpu_time,
    )
    torch.set_num_threads(threads)
    for used in (path, *outs.values()):
        used.unlink()
    spent = {name: taken.median for name, taken in times.items()}
    alone = spent["read"] + spent["score"]
    for name, seconds in {
        "reading": spent["read"],
        "scoring": spent["score"],
        "the rest, to memory": spent["to memory"] - alone,
        **{f"the rest, to {s}": spent[f"to {s}"] - alone for s in TABLES},
    }.items():
        figures = {"rows": rows, "cpu_ns_row": significant(1e9 * seconds / rows, 4)}
        bench.add("where", predictions.describe(), name, figures)


def large(bench: Bench) -> None:
    """Two jobs of gigabytes from disk, by the command; and reading the same files."""
    for k, rows in bench.sizes.large_rows.items():
        predictions = Predictions(bench, k)
        nbytes = rows * predictions.row_bytes
        needed = 2 * nbytes + (1 << 30)
        if shutil.disk_usage(bench.folder).free < needed:
            bench.leave_out(f"large, k = {k}", f"{needed / 1e9:.0f} GB of disk must be free")
            continue
        paths = predictions.write_npy(bench.folder, rows)
        out = bench.folder / "scores.parquet"
        command = score_command(paths, predictions.rule, out)
        peaks: list[int] = []

        def score(_: int, command: list[str] = command, peaks: list[int] = peaks) -> None:
            (ended,) = run_python(_GENKL, *command)
            peaks.append(ended.peak_bytes)

        readers = readers_of(paths)
        ours = "genkl score, to .parquet"
        times = take_turns(
            {**readers, ours: score},
            seconds=0.0,
            rounds=(2, 2),
            timer=after(functools.partial(clear, out), functools.partial(forget, paths)),
        )
        predictions.check(rows, table_rows(out))
        reading = min(times[name].median for name in readers)
        for name, taken in times.items():
            figures = {**predictions.about, **rates(rows, nbytes, taken, reading)}
            if name == ours:
                figures |= {
                    "mib": significant(max(peaks) / 2**20, 4),
                    "out_bytes": out.stat().st_size,
                }
            bench.add("large", f"{predictions.describe()}, {rows:,} rows", name, figures)
        for used in (*paths, out):
            used.unlink()


def gpu(bench: Bench) -> None:
    """From page cache and disk, over PCIe, to scores."""
    if not torch.cuda.is_available():
        bench.leave_out("gpu", "no GPU here")
        return
    for k in RULES:
        predictions = Predictions(bench, k)
        rows = bench.sizes.pass_bytes // predictions.row_bytes
        paths = predictions.write_npy(bench.folder, rows)
        readers = readers_of(paths)
        for kind, evict in (("page cache", False), ("disk", True)):
            time_passes(
                bench, "gpu", predictions, paths, rows, readers,
                kind=kind, evict=evict, device="cuda",
            )  # fmt: skip
        paths[0].unlink()


PARTS: dict[str, Callable[[Bench], None]] = {
    "cache": functools.partial(npy, part="cache"),
    "disk": functools.partial(npy, part="disk"),
    "parquet": parquet,
    "memory": memory,
    "scaling": scaling,
    "engines": engines,
    "cleanlab": cleanlab,
    "workers": workers,
    "where": where,
    "large": large,
    "gpu": gpu,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        metavar="PART",
        help=f"some of the parts, not written without --out: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the files are, while they are: on the disk in question, with 12 GB free; by "
        "default the system's folder of temporary files",
    )
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.gettempdir())
    kind = file_system(folder)
    bench = Bench(folder, options.quick)
    failed = []
    for name in options.only or PARTS:
        if name in ("disk", "large") and kind in ("tmpfs", "ramfs"):
            bench.leave_out(name, f"{folder} is no disk but {kind}; name another --folder")
            continue
        with tempfile.TemporaryDirectory(prefix="genkl-bench-", dir=folder) as own:
            bench.folder = Path(own)
            try:
                PARTS[name](bench)
            except Exception as error:  # the others are worth having after so long a run
                traceback.print_exc()
                bench.leave_out(name, f"failed: {error}")
                failed.append(name)
    settings = {
        "quick": options.quick,
        "threads": torch.get_num_threads(),
        "file_system": kind,
        "sizes": bench.sizes._asdict(),
        "chunk_bytes": CHUNK_BYTES,
        "memory_times": MEMORY_TIMES,
        "left_out": bench.left_out,
        "versions": {name: _version(name) for name in PACKAGES},
    }
    some = options.quick or options.only
    record.write(
        "scoring_files", settings, bench.cells, options.out or (None if some else record.RESULTS)
    )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
