"""Scoring jobs that are killed, cut off from power, refused by the disk or started twice: at every
call of the operating system that they make, and at random moments between.

Run as a program this page is the parent of the jobs that are killed: it has imported all that they
need, and forks one for each line that it reads, in milliseconds.

GENKL_KILLS        kills of the first test; 70 by default
GENKL_KILLS_SEED   of these; 0 by default
GENKL_SOAK_ROWS    rows of the soak; 2 * 10^7 by default, which is a fifth of what it is meant for
"""

import builtins
import collections
import ctypes
import dataclasses
import errno
import fcntl
import gc
import io
import json
import os
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import genkl_ext as gk
from genkl_ext import unfinished
from genkl_ext.cli.main import main
from genkl_ext.scoring import files, score_files

RULE = gk.GenKL(num_classes=5, alpha=0.9, beta=0.1, sigma=0.1)
ROWS, CHUNK_ROWS = 1040, 400
BAD = [0, 5, 6, 7, 99, 100, 555, 1039]
OUTPUTS = ("t.parquet", "nc_set.txt", "bad.txt")
OLD = b"of an earlier job\n"

PACKAGE = os.path.dirname(gk.__file__)
CALLS = (
    "open", "close", "dup", "pread", "preadv", "pwrite", "write", "fstat", "stat", "access",
    "listdir", "scandir", "fsync", "fdatasync", "posix_fallocate", "ftruncate", "replace", "unlink",
)  # fmt: skip
WRITES = ("pwrite", "write", "posix_fallocate", "file write")
SYNCS = ("fsync", "fdatasync")
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # of Linux
MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20, 0x4000, 0x40000


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the operating system: the n-th of its kind from a place in the package."""

    name: str
    place: str
    n: int

    @property
    def site(self) -> tuple[str, str]:
        return self.name, self.place


class System:
    """What the package asks of the operating system: noted, and handed to ``act``.

    Args:
        patch: sets an attribute of a module.
        act: gives the result of a call, which it can make by its second argument; the third are
            the call's own arguments.

    Attributes:
        calls: those that were made.
    """

    def __init__(
        self,
        patch: Callable[[Any, str, Any], None],
        act: Callable[[Call, Callable[..., Any], tuple[Any, ...]], Any],
    ) -> None:
        self.calls: list[Call] = []
        self._act = act
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lock = threading.Lock()
        for name in CALLS:
            patch(os, name, self._wrapped(name, getattr(os, name)))
        patch(fcntl, "flock", self._wrapped("flock", fcntl.flock))
        opened = self._opened(io.open)
        patch(builtins, "open", opened)
        patch(io, "open", opened)  # pathlib's

    def call(self, name: str, place: str, real: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            self._counts[name, place] += 1
            call = Call(name, place, self._counts[name, place])
            self.calls.append(call)
        return self._act(call, real, arguments)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            place = _place()
            if place is None:
                return real(*arguments, **named)
            return self.call(name, place, lambda *given: real(*given, **named), *arguments)

        return wrapped

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            place = _place()
            if place is None:
                return real(path, mode, *arguments, **named)
            raw = self.call("file open", place, lambda *given: _Raw(*given), path, mode.strip("bt"))
            raw.system, raw.place = self, place
            file = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return file
            named.pop("buffering", None)
            return io.TextIOWrapper(file, *[a for a in arguments if a != -1], **named)

        return opened


class _Raw(io.FileIO):
    """A file opened by Python's ``open``, whose reading and writing is seen, too."""

    system: System
    place: str

    def readinto(self, out: Any) -> Any:
        return self.system.call("file read", self.place, super().readinto, memoryview(out))

    def readall(self) -> Any:
        return self.system.call("file read", self.place, super().readall)

    def write(self, content: Any) -> Any:
        return self.system.call("file write", self.place, super().write, memoryview(content))


def _place() -> str | None:
    """The innermost function of the package that is being run, if it is not of the command."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        folder, file = os.path.split(frame.f_code.co_filename)
        if folder.startswith(PACKAGE):
            return None if folder.endswith("cli") else f"{file}:{frame.f_code.co_name}"
        frame = frame.f_back
    return None


def less(call: Call, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The call for half of what it should read or write."""
    if call.name in ("pwrite", "write"):
        descriptor, content, *place = arguments
        return real(descriptor, content[: (len(content) + 1) // 2], *place)
    if call.name in ("file read", "file write") and arguments:
        return real(arguments[0][: (len(arguments[0]) + 1) // 2])
    if call.name == "preadv":
        descriptor, [out], place = arguments
        return real(descriptor, [out[: (len(out) + 1) // 2]], place)
    if call.name == "pread":
        descriptor, count, place = arguments
        return real(descriptor, (count + 1) // 2, place)
    return real(*arguments)


class Power:
    """What a disk keeps when its power is cut: of each file, what was synced.

    What was not synced may be there or not. Here it is not, and where it was there are zeros; but
    for the journal, of which any part may be there.
    """

    def __init__(self, folder: Path, journal: random.Random) -> None:
        self._folder, self._journal = folder, journal
        self._synced = {path.stat().st_ino: path.read_bytes() for path in self._files()}
        self._lock = threading.RLock()
        self._fstat = os.fstat

    def act(self, call: Call, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self._lock:  # nobody writes while the power is cut
            result = real(*arguments)
            if call.name in SYNCS:
                inode = self._fstat(arguments[0]).st_ino
                for path in self._files():
                    if path.stat().st_ino == inode:
                        self._synced[inode] = path.read_bytes()
            return result

    def cut(self) -> None:
        with self._lock:
            for path in self._files():
                now = path.read_bytes()
                synced = self._synced.get(path.stat().st_ino, b"")
                if ".journal-" in path.name:
                    kept = now[: self._journal.choice([len(synced), len(now), len(now) // 2])]
                else:
                    kept = synced + bytes(max(0, len(now) - len(synced)))
                if kept != now:
                    path.write_bytes(kept)
            os.kill(os.getpid(), signal.SIGKILL)

    def _files(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.is_file()]


def long_jobs(patch: Callable[[Any, str, Any], None]) -> None:
    """Short ones count as long, and every chunk is kept at once."""
    patch(files, "RESUME_BYTES", 0)
    patch(unfinished, "MARK_SECONDS", 0)


def job(folder: Path, out: str = OUTPUTS[0], **more: Any) -> gk.scoring.FileScores:
    given: dict[str, Any] = {
        "keys": folder / "keys.txt",
        "nc_list": folder / OUTPUTS[1],
        "bad_rows": folder / OUTPUTS[2],
        "on_bad_row": "nan",
        "chunk_bytes": 2 * 5 * 4 * CHUNK_ROWS,
        **more,
    }
    return score_files([folder / "p0.npy", folder / "p1.npy"], RULE, folder / out, **given)


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """A job that kills itself at a call, in a process of its own."""
    folder = Path(order["folder"])
    long_jobs(setattr)
    wanted = order.get("call") and Call(*order["call"])
    power = Power(folder, random.Random(order["seed"])) if order.get("how") == "power" else None

    def act(call: Call, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        make = real if power is None else lambda *given: power.act(call, real, given)
        if call != wanted:
            return make(*arguments)
        if order["how"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            less(call, real, arguments) if order["how"] == "torn" else make(*arguments)
        finally:
            if power is not None:
                power.cut()
            os.kill(os.getpid(), signal.SIGKILL)

    system = System(setattr, act)
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        done = job(folder)
    return {
        "resumed": done.resumed,
        "seconds": time.perf_counter() - begun,
        "calls": [dataclasses.astuple(call) for call in system.calls],
        "warned": [str(warning.message) for warning in warned],
    }


def obey_disk(order: dict[str, Any]) -> dict[str, Any]:
    """A job on a disk of its own that is too small, then again with more room."""
    folder = Path(order["folder"])
    long_jobs(setattr)
    library = ctypes.CDLL(None, use_errno=True)
    disk = folder / "disk"

    def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
        words = [word.encode() for word in (source, target, kind)]
        if library.mount(*words, ctypes.c_ulong(flags), options.encode()):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)

    try:
        user = os.getuid()
        if library.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if user:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        mount("none", "/", "", MS_REC | MS_PRIVATE, "")
        mount("none", str(disk), "tmpfs", 0, f"size={order['disk']}")
    except OSError as error:
        return {"refused": str(error)}
    outputs = dict(zip(("nc_list", "bad_rows"), (disk / name for name in OUTPUTS[1:]), strict=True))
    failed = None
    try:
        job(folder, f"disk/{OUTPUTS[0]}", **outputs)
    except (OSError, ValueError) as error:
        failed = str(error)
    between = sorted(path.name for path in disk.iterdir())
    mount("none", str(disk), "", MS_REMOUNT, "size=1m")
    done = job(folder, f"disk/{OUTPUTS[0]}", **outputs)
    return {
        "error": failed,
        "between": between,
        "resumed": done.resumed,
        "contents": {name: (disk / name).read_bytes().hex() for name in OUTPUTS},
        "hidden": hidden(disk),
    }


def obey_limit(order: dict[str, Any]) -> dict[str, Any]:
    """A job whose files must not have more than a share of the bytes that its table takes."""
    folder, out = Path(order["folder"]), order["out"]
    job(folder, out)
    whole = (folder / out).read_bytes()
    (folder / out).unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(order["limit"] * len(whole)), -1))
    if not order["limit"]:
        long_jobs(setattr)
    failed = None
    try:
        job(folder, out)
    except (OSError, ValueError) as error:
        failed = str(error)
    left = hidden(folder)
    there = (folder / out).exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    job(folder, out)
    return {
        "error": failed,
        "hidden": left,
        "same": (folder / out).read_bytes() == whole and not there,
    }


def serve() -> None:
    """Fork a job for each line of the input, and print how it ended and what it says."""
    import pandas  # noqa: F401 (pyarrow imports it when it first makes an array)
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    assert RULE.vectors.size
    assert len(pa.array(np.zeros(1))) == 1
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    # A child has none of them. Arrow's allocator knows that; OpenMP would wait for its own.
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1
    for line in sys.stdin:
        order = json.loads(line)
        ours, its = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                kinds = {"disk": obey_disk, "limit": obey_limit}
                how = next((kinds[name] for name in kinds if name in order), obey)
                content = json.dumps(how(order)).encode()
                while content:
                    content = content[os.write(its, content) :]
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(its)
        if not select.select([ours], [], [], order.get("seconds", 60))[0]:
            os.kill(process, signal.SIGKILL)
        with open(ours, "rb") as answer:
            said = json.loads(answer.read() or "null")
        _, status = os.waitpid(process, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), said]), flush=True)


class Jobs:
    """The parent of the jobs that are killed, and how it is told what to do."""

    def __init__(self) -> None:
        alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._parent = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **alone},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, **order: Any) -> tuple[int, Any]:
        """How a job ended, and what it says."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        print(json.dumps({"folder": str(folder), **order}), file=self._parent.stdin, flush=True)
        status, said = json.loads(self._parent.stdout.readline())
        return status, said

    def close(self) -> None:
        self._parent.communicate()


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


def make_inputs(folder: Path) -> Path:
    stream = np.random.default_rng(0)
    for i in range(2):
        q = stream.dirichlet(np.full(5, 0.4), ROWS).astype(np.float32)
        if i == 0:
            q[BAD, 2] = np.nan
        np.save(folder / f"p{i}.npy", q)
    (folder / "keys.txt").write_text("".join(f"k{i}\n" for i in range(ROWS)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_inputs(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed job leaves."""
    folder = make_inputs(tmp_path_factory.mktemp("whole"))
    done = job(folder)  # not kept meanwhile: it is short
    assert done.bad_rows.tolist() == BAD and 0 < done.nc_count < ROWS - len(BAD)
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = {name: folder / name for name in OUTPUTS}
    return {name: path.read_bytes() if path.exists() else None for name, path in paths.items()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def check_between(folder: Path, old: bytes | None, whole: dict[str, bytes]) -> None:
    """Every output is the old one or the new one, and the table is not new before the lists."""
    now = contents(folder)
    assert all(now[name] in (old, whole[name]) for name in OUTPUTS)
    assert now[OUTPUTS[0]] == old or now == whole


def set_old(folder: Path, old: bytes | None) -> None:
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
        if old is not None:
            (folder / name).write_bytes(old)


def test_kills_at_every_place_and_moment(jobs: Jobs, folder: Path, whole: dict[str, bytes]) -> None:
    """SIGKILL before, in and after a call from every place, and at any time between; then again,
    until the job gets through: the same bytes, and nothing else."""
    chance = random.Random(int(os.environ.get("GENKL_KILLS_SEED", "0")))
    wanted = int(os.environ.get("GENKL_KILLS", "70"))
    status, undisturbed = jobs.run(folder)
    assert status == 0 and contents(folder) == whole and hidden(folder) == []
    calls = [Call(*call) for call in undisturbed["calls"]]
    sites = sorted({call.site for call in calls})
    firsts = [chance.choice([call for call in calls if call.site == site]) for site in sites]
    killed: list[Call | None] = []  # None: nobody knows where
    resumed = 0
    while firsts or len(killed) < wanted:
        old = chance.choice([None, OLD])
        set_old(folder, old)
        status = -signal.SIGKILL
        while status != 0:
            order: dict[str, Any] = {}
            call: Call | None = None
            if firsts and hidden(folder) == []:
                call = firsts.pop()  # a new job gets there
            elif chance.random() < 0.6:
                call = chance.choice([None, chance.choice(calls)])
                order = {"seconds": chance.uniform(0, 1.2 * undisturbed["seconds"])}
            if call is not None:
                how = chance.choice(["before", "after", "torn"])
                order = {"call": dataclasses.astuple(call), "how": how}
            status, said = jobs.run(folder, **order)
            if status != 0:
                assert status == -signal.SIGKILL and order
                killed.append(call)
                check_between(folder, old, whole)
        resumed += said["resumed"]
        assert contents(folder) == whole
        assert hidden(folder) == []
    assert {call.site for call in killed if call is not None} == set(sites)
    assert None in killed and resumed > 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_row_is_lost_at_the_end(
    jobs: Jobs, folder: Path, whole: dict[str, bytes], n: int
) -> None:
    """What was scored stays until all outputs are in place."""
    for how in ("before", "after"):
        status, _ = jobs.run(folder, call=("replace", "files.py:atomic_write", n), how=how)
        assert status == -signal.SIGKILL
        status, said = jobs.run(folder)
        assert status == 0 and said["resumed"] == ROWS
        assert contents(folder) == whole and hidden(folder) == []
        set_old(folder, OLD)


def test_a_torn_line_costs_only_itself(jobs: Jobs, folder: Path, whole: dict[str, bytes]) -> None:
    """A journal is gone on with after its last whole line."""
    # The first two lines of a new one say what the job is, and that no row is there.
    for n, how in ((4, "torn"), (2, "before")):
        call = ("write", "journal.py:append", n)
        assert jobs.run(folder, call=call, how=how)[0] == -signal.SIGKILL
    status, said = jobs.run(folder)
    assert status == 0 and said["resumed"] == 2 * CHUNK_ROWS
    assert contents(folder) == whole and hidden(folder) == []


def test_power_cuts(jobs: Jobs, folder: Path, whole: dict[str, bytes]) -> None:
    """At every call that changes the disk, in the first start or in one after it, all that was not
    synced is lost."""
    changes = {"pwrite", "write", "ftruncate", "posix_fallocate", "replace", "unlink", *SYNCS}
    chance = random.Random(0)
    _, undisturbed = jobs.run(folder)
    calls = [Call(*call) for call in undisturbed["calls"] if call[0] in changes]
    cuts = 0
    for call in calls:
        old = chance.choice([None, OLD])
        set_old(folder, old)
        for one in [call, chance.choice(calls)][: chance.choice([1, 1, 2])]:
            order = {"call": dataclasses.astuple(one), "how": "power", "seed": cuts}
            status, _ = jobs.run(folder, **order)
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            cuts += 1
            check_between(folder, old, whole)
        status, said = jobs.run(folder)
        assert status == 0 and said["warned"] == []  # no row was believed to be there
        assert contents(folder) == whole and hidden(folder) == []
    assert cuts >= len(calls)


def test_power_cut_when_the_rows_are_gone(
    jobs: Jobs, folder: Path, whole: dict[str, bytes]
) -> None:
    """A job killed between the removal of its rows and that of its journal; the next one has power
    for a moment only. The third must not believe the journal of the first."""
    (last,) = (
        Call(n, p, i) for n, p, i in jobs.run(folder)[1]["calls"] if p == "journal.py:remove"
    )
    for end in ("posix_fallocate", "pwrite"):
        for seed in range(3):
            set_old(folder, None)
            jobs.run(folder, call=dataclasses.astuple(last), how="before")
            assert hidden(folder) == [".t.parquet.journal-0"]
            set_old(folder, None)
            call = (end, "unfinished.py:_create", 1)
            assert jobs.run(folder, call=call, how="power", seed=seed)[0] == -signal.SIGKILL
            assert jobs.run(folder)[0] == 0
            assert contents(folder) == whole and hidden(folder) == []


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    long_jobs(monkeypatch.setattr)


def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The job as words of the command line; the chunks are as small."""
    monkeypatch.setitem(score_files.__kwdefaults__, "chunk_bytes", 2 * 5 * 4 * CHUNK_ROWS)  # type: ignore[index]
    words = ["score", *(str(folder / f"p{i}.npy") for i in (0, 1))]
    words += ["--alpha", "0.9", "--beta", "0.1", "--sigma", "0.1", "--on-bad-row", "nan"]
    names = ("-o", "--nc-list", "--bad-rows", "--keys")
    for name, file in zip(names, (*OUTPUTS, "keys.txt"), strict=True):
        words += [name, str(folder / file)]
    return words


def plainly(call: Call, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return real(*arguments)


class Refusal:
    """Refuses one call as the operating system does: the error has the path, if the call has one.

    Attributes:
        path: the file that the call is about.
    """

    def __init__(self, call: Call, code: int) -> None:
        self._call, self._code = call, code
        self.path = ""

    def __call__(self, call: Call, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if call != self._call:
            return real(*arguments)
        file = getattr(real, "__self__", None)  # one of Python's
        about = file.name if isinstance(file, _Raw) else arguments[0]
        named = isinstance(about, (str, os.PathLike))
        path = os.fspath(about) if named else os.readlink(f"/proc/self/fd/{about}")
        self.path = path.removesuffix(" (deleted)")
        if call.name == "close":
            real(*arguments)
        if named and file is None:
            raise OSError(self._code, os.strerror(self._code), self.path)
        raise OSError(self._code, os.strerror(self._code))

    def named_in(self, text: str) -> bool:
        """Whether a message is one line, and names the file or the output that it becomes."""
        name = os.path.basename(self.path)
        temporary = re.fullmatch(
            r"\.(.+?)(?:\.journal-0|\.partial|\.[0-9a-f]{12}\.partial(\..+))", name
        )
        names = [name] if temporary is None else [name, temporary[1] + (temporary[2] or "")]
        return "\n" not in text and any(name in text for name in names)


def refusals(calls: Sequence[Call]) -> list[tuple[Call, int]]:
    """What can go wrong, and how. What is to last was synced before its file is closed."""
    faults = [(call, errno.EIO) for call in calls if call.name != "close"]
    return faults + [(call, errno.ENOSPC) for call in calls if call.name in WRITES]


def test_errors_of_every_call(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kept: None
) -> None:
    """The i-th call fails, for every i: an error that names the file, outputs old or new, and the
    next start ends as if nothing had been."""
    two_chunks = {"chunk_bytes": 2 * 5 * 4 * (ROWS // 2)}
    with monkeypatch.context() as patch:
        system = System(patch.setattr, plainly)
        job(folder, **two_chunks)
    assert contents(folder) == whole and hidden(folder) == []
    descriptors = len(os.listdir("/proc/self/fd"))
    wrong = []
    for call, code in refusals(system.calls):
        set_old(folder, OLD)
        refusal = Refusal(call, code)
        said = "ended well"
        with monkeypatch.context() as patch:
            System(patch.setattr, refusal)
            try:
                job(folder, **two_chunks)
            except (OSError, ValueError) as error:
                said = str(error)
        assert refusal.path
        check_between(folder, OLD, whole)
        if os.strerror(code) not in said or not refusal.named_in(said):
            wrong.append((*call.site, call.n, said))
        if hidden(folder):
            job(folder, **two_chunks)
            assert contents(folder) == whole and hidden(folder) == []
    assert not wrong, "\n".join(map(str, wrong))
    gc.collect()  # of exceptions, and what they saw
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_errors_of_the_command(
    folder: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept: None,
) -> None:
    """One line, exit status 1."""
    words = command(folder, monkeypatch)
    with monkeypatch.context() as patch:
        system = System(patch.setattr, plainly)
        assert main(words) == 0
    assert contents(folder) == whole and hidden(folder) == []
    capsys.readouterr()
    wrong = []
    for call, code in refusals(list({call.site: call for call in system.calls}.values())):
        set_old(folder, OLD)
        refusal = Refusal(call, code)
        with monkeypatch.context() as patch:
            System(patch.setattr, refusal)
            status = main(words)
        said = capsys.readouterr().err
        check_between(folder, OLD, whole)
        for name in hidden(folder):
            (folder / name).unlink()
        begins_well = said.startswith("genkl score: ") and said.endswith("\n")
        if not (status == 1 and begins_well and refusal.named_in(said[:-1])) or "--debug" in said:
            wrong.append((*call.site, call.n, status, said))
    assert not wrong, "\n".join(map(str, wrong))
    assert main(words) == 0 and contents(folder) == whole and hidden(folder) == []


def save(folder: Path, kind: str, models: Sequence[np.ndarray]) -> list[Path]:
    """Prediction files of a kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = []
    for i, q in enumerate(models):
        path = folder / f"p{i}.{kind}"
        lists = pa.FixedSizeListArray.from_arrays(pa.array(q.reshape(-1)), q.shape[1])
        table = pa.table({"probs": lists})
        if kind == "npz":
            np.savez_compressed(path, probs=q)
        elif kind == "parquet":
            pq.write_table(table, path, row_group_size=CHUNK_ROWS)
        elif kind == "arrow":
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table, max_chunksize=CHUNK_ROWS)
        elif kind == "npy":
            path.mkdir()
            for start in range(0, len(q), CHUNK_ROWS):
                np.save(path / f"{start}.npy", q[start : start + CHUNK_ROWS])
        paths.append(path)
    return paths


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet", "arrow"])
@pytest.mark.parametrize("suffix", [".npy"])
def test_errors_of_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, suffix: str
) -> None:
    """Shards, and files that other libraries read through ours."""
    stream = np.random.default_rng(0)
    models = [stream.dirichlet(np.full(5, 0.4), ROWS).astype(np.float32) for _ in range(2)]
    inputs = save(tmp_path, kind, models)
    expected = RULE.score(models)

    def run() -> gk.scoring.FileScores:
        out = tmp_path / f"t{suffix}"
        return score_files(inputs, RULE, out, chunk_bytes=2 * 5 * 4 * CHUNK_ROWS)

    with monkeypatch.context() as patch:
        system = System(patch.setattr, plainly)
        run()
    whole = (tmp_path / f"t{suffix}").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy")["divergence"], expected.divergence)
    with monkeypatch.context() as patch:
        System(patch.setattr, less)
        run()
    assert (tmp_path / f"t{suffix}").read_bytes() == whole
    wrong = []
    for call in system.calls:
        if call.name not in ("preadv", "file read", "dup", "fstat", "file write", "file open"):
            continue
        (tmp_path / f"t{suffix}").write_bytes(OLD)
        refusal = Refusal(call, errno.EIO)
        with monkeypatch.context() as patch:
            System(patch.setattr, refusal)
            try:
                run()
                wrong.append((*call.site, call.n, "ended well"))
            except (OSError, ValueError) as error:
                if not refusal.named_in(str(error)):
                    wrong.append((*call.site, call.n, str(error)))
        assert (tmp_path / f"t{suffix}").read_bytes() == OLD and hidden(tmp_path) == []
    assert not wrong, "\n".join(map(str, wrong))


def test_calls_that_do_half_of_it(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kept: None
) -> None:
    """Reads and writes that stop early, as they may, are gone on with."""
    with monkeypatch.context() as patch:
        System(patch.setattr, less)
        job(folder)
    assert contents(folder) == whole and hidden(folder) == []


def test_a_full_disk(jobs: Jobs, folder: Path, whole: dict[str, bytes]) -> None:
    """A disk of every size, from one that has no room for the journal to one that has it for all:
    the job says so, and goes on when there is more."""
    (folder / "disk").mkdir()
    seen = set()
    page = os.sysconf("SC_PAGESIZE")
    for pages in range(1, 40):
        status, said = jobs.run(folder, disk=pages * page)
        assert status == 0
        if "refused" in said:
            pytest.skip(f"this user cannot mount a disk: {said['refused']}")
        assert said["contents"] == {name: content.hex() for name, content in whole.items()}
        assert said["hidden"] == []
        if said["error"] is None:
            break
        assert "No space left on device" in said["error"] and "\n" not in said["error"]
        assert f"{folder}/disk/" in said["error"]
        assert set(said["between"]) <= {".t.parquet.journal-0", ".t.parquet.partial", *OUTPUTS}
        seen.add(said["resumed"])
    assert said["error"] is None and len(seen) > 1


@pytest.mark.parametrize("out", ["t.parquet", "t.csv", "t.npy"])
def test_a_table_that_must_not_be_so_long(jobs: Jobs, folder: Path, out: str) -> None:
    """Limits of a file's size, up to that of the table: every one ends in an error."""
    for share in (0.0, 0.3, 0.7, 0.99):
        status, said = jobs.run(folder, out=out, limit=share)
        assert status == 0
        name, _, suffix = out.partition(".")
        assert "File too large" in said["error"], said["error"]
        assert re.search(rf"{name}\.([0-9a-f]{{12}}\.partial\.)?{suffix}", said["error"])
        assert "\n" not in said["error"]
        assert said["hidden"] == ([] if share else [f".{out}.journal-0"])
        assert said["same"]


@pytest.fixture(scope="module")
def long_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """272 MB of logits, nearly all of them 0 and so not on the disk: a job that is kept."""
    folder = tmp_path_factory.mktemp("long")
    q = np.lib.format.open_memmap(
        folder / "logits.npy", mode="w+", dtype=np.float64, shape=(34_000, 1000)
    )
    q[::97] = np.random.default_rng(0).normal(0, 4, q[::97].shape)
    (folder / "keys.txt").write_text("".join(f"k{i}\n" for i in range(len(q))))
    return folder


def start(folder: Path, out: str = OUTPUTS[0]) -> subprocess.Popen[str]:
    words = ["score", "logits.npy", "--logits", "--alpha", "0.9", "--beta", "0.0005"]
    words += ["--sigma", "0.0005", "--keys", "keys.txt", "-o", out, "--nc-list", OUTPUTS[1]]
    return subprocess.Popen(
        [sys.executable, "-m", "genkl_ext.cli.main", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def at_work(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until a job has begun to fill its rows."""
    limit = time.monotonic() + 60
    while not (folder / f".{OUTPUTS[0]}.partial").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.001)


def test_the_command_killed_and_started_twice(long_input: Path) -> None:
    """As it is installed, with the settings that it has: a second start beside the first one is
    refused, and kills change nothing."""
    begun = time.monotonic()
    process = start(long_input)
    at_work(process, long_input)
    kept_after = time.monotonic() - begun
    _, said = process.communicate()
    assert process.returncode == 0 and said == ""
    seconds = time.monotonic() - begun - kept_after
    names = OUTPUTS[:2]
    whole = {name: (long_input / name).read_bytes() for name in names}
    assert 0 < len(whole["nc_set.txt"].splitlines()) < 34_000 and hidden(long_input) == []

    def unchanged() -> bool:
        return all((long_input / name).read_bytes() in (OLD, whole[name]) for name in names)

    for name in names:
        (long_input / name).write_bytes(OLD)
    first = start(long_input)
    at_work(first, long_input)
    first.send_signal(signal.SIGSTOP)
    second = start(long_input)
    _, said = second.communicate()
    assert second.returncode == 1 and unchanged()
    assert re.fullmatch(
        r"genkl score: \S*/\.t\.parquet\.journal-0 is in use by another process at work on it\n",
        said,
    )
    first.send_signal(signal.SIGCONT)
    for share in (0.1, 0.7):
        time.sleep(share * seconds)
        if first.poll() is None:
            first.kill()
        first.communicate()
        assert unchanged()
        first = start(long_input)
        at_work(first, long_input)
    first.communicate()
    assert first.returncode == 0 and hidden(long_input) == []
    assert {name: (long_input / name).read_bytes() for name in names} == whole


RANKS = """
import sys, time
import genkl_ext as gk
from genkl_ext import unfinished
from genkl_ext.ranks import join
from genkl_ext.scoring.sources import Packed

unfinished.MARK_SECONDS = 0
rows = Packed.rows
def slow(self, start, stop):
    time.sleep(0.05)
    return rows(self, start, stop)
Packed.rows = slow
rule = gk.GenKL(num_classes=5, alpha=0.9, beta=0.1, sigma=0.1)
try:
    gk.score_files(["p0.npy", "p1.npy"], rule, "t.parquet", keys="keys.txt", nc_list="nc_set.txt",
                   bad_rows="bad.txt", on_bad_row="nan", chunk_bytes=1600, ranks=join("cpu"))
except ConnectionError as error:
    sys.exit(str(error))
"""


def test_a_rank_that_dies(folder: Path, whole: dict[str, bytes], kept: None) -> None:
    """One of two processes is killed, the other one ends; one process finishes what they left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    (folder / "program.py").write_text(RANKS)
    processes = []
    for rank in ("0", "1"):
        launched = {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank}
        sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        process = subprocess.Popen(
            [sys.executable, "program.py"],
            cwd=folder,
            env={**os.environ, **address, **launched, **sizes, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    journal = folder / ".t.parquet.journal-1"
    limit = time.monotonic() + 100
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert processes[1].poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    processes[1].kill()
    (_, first), _ = (process.communicate() for process in processes)
    assert processes[0].returncode == 1 and "process 0 of 2 has lost the others" in first
    assert not any((folder / name).exists() for name in OUTPUTS)
    assert hidden(folder) == [
        f".t.parquet.{what}" for what in ("journal-0", "journal-1", "partial")
    ]
    done = job(folder, chunk_bytes=1600)
    assert ROWS // 2 + 3 * 40 <= done.resumed < ROWS
    assert contents(folder) == whole and hidden(folder) == []


@pytest.mark.parametrize("name", ["time", "monotonic"])
@pytest.mark.parametrize("days", [-1, 1])
def test_clocks_that_jump(
    folder: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    days: int,
) -> None:
    """By a day at every look at them, in turns; and inputs, and outputs, of tomorrow."""
    monkeypatch.setattr(files, "RESUME_BYTES", 0)
    words = command(folder, monkeypatch)
    clock, looks = getattr(time, name), [0]

    def jumping() -> float:
        looks[0] += 1
        return float(clock() + (days * 86400 if looks[0] % 2 else 0))

    tomorrow = time.time() + 86400
    set_old(folder, OLD)
    for path in folder.iterdir():
        os.utime(path, (tomorrow, tomorrow))
    with monkeypatch.context() as patch:
        patch.setattr(time, name, jumping)
        assert main(words) == 0
        assert contents(folder) == whole
        stopped = Refusal(Call("fsync", "files.py:_sync", 5), errno.EIO)  # the table itself
        System(patch.setattr, stopped)
        assert main(words) == 1
    assert contents(folder) == whole and hidden(folder) != []
    assert main(words) == 0
    assert contents(folder) == whole and hidden(folder) == []
    assert looks[0] > 2 or name == "time"
    capsys.readouterr()


NAMES = [
    "with space", "\u00fc\u00df \u65e5\u672c", "e\u0301", "new\nline", "-o", "--out", "'\"$(x)`;&|",
    "*[a]?", "#%20{0}", ".hidden", "con:..",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names(
    folder: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept: None,
    name: str,
) -> None:
    """Of a folder with everything in it, and of the outputs; stopped, and gone on with."""
    within = folder / name
    within.mkdir()
    for path in list(folder.iterdir()):
        if path != within:
            path.rename(within / path.name)
    monkeypatch.chdir(within)
    more = {"nc_list": within / f"{name}.nc", "bad_rows": within / f"{name}.bad"}
    outputs = [within / f"{name}.parquet", *more.values()]
    stop = Refusal(Call("pwrite", "unfinished.py:write", 3), errno.EIO)

    def check() -> None:
        for path, content in zip(outputs, whole.values(), strict=True):
            assert path.read_bytes() == content
            path.unlink()
        left = {path.name for path in within.iterdir()}
        assert left == {"p0.npy", "p1.npy", "keys.txt"}

    with monkeypatch.context() as patch:
        System(patch.setattr, stop)
        with pytest.raises(OSError, match="Input/output error"):
            job(within, f"{name}.parquet", **more)
    assert job(within, f"{name}.parquet", **more).resumed > 0
    check()
    words = command(Path(), monkeypatch)[:11]
    words += ["--keys", "keys.txt", f"--out={name}.parquet"]
    words += [f"--nc-list={name}.nc", f"--bad-rows={name}.bad"]
    with monkeypatch.context() as patch:
        System(patch.setattr, stop)
        assert main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(words) == 0
    assert "scored before" in capsys.readouterr().out
    check()


def test_outputs_that_are_links(folder: Path, whole: dict[str, bytes], kept: None) -> None:
    """Followed: to a file elsewhere, to one that is not there yet. What is hidden lies there."""
    (folder / "there").mkdir()
    (folder / "there/lists").mkdir()
    (folder / "there/was.parquet").write_bytes(OLD)
    links = {"t.parquet": "was.parquet", "nc_set.txt": "lists/new.txt", "bad.txt": "lists/bad.txt"}
    for link, target in links.items():
        (folder / link).symlink_to(folder / "there" / target)
    job(folder)
    for link, target in links.items():
        assert (folder / link).is_symlink() and not (folder / "there" / target).is_symlink()
        assert (folder / "there" / target).read_bytes() == whole[link]
    assert list(folder.rglob(".*")) == []


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a folder", "cannot write {path}: it is a folder"),
        ("read-only", "cannot write {path}: it is read-only"),
        ("a pipe", "cannot write {path}: it is not a regular file"),
        ("in a file", "cannot write {path}: {path.parent} is not a folder"),
        ("in no folder", "cannot write {path}: {path.parent} does not exist"),
        ("a link to no folder", "cannot write {path}: "),
        ("in a folder that takes none", "cannot write {path}: No such file or directory"),
    ],
)
def test_outputs_that_cannot_be(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    kind: str,
    message: str,
) -> None:
    """Known before a row is read: one line, and nothing is changed."""
    path = folder / output
    if kind == "a folder":
        path.mkdir()
    elif kind == "read-only":
        path.write_bytes(OLD)
        path.chmod(0o444)
        allowed = os.access  # everything, to root
        monkeypatch.setattr(
            os, "access", lambda of, mode: allowed(of, mode) and os.stat(of).st_mode & mode << 6
        )
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "in a file":
        path = folder / "keys.txt" / output
    elif kind == "in no folder":
        path = folder / "none" / output
    elif kind == "a link to no folder":
        path.symlink_to(folder / "none" / output)
    else:
        path = Path("/proc") / output
    words = command(folder, monkeypatch)
    words[words.index(str(folder / output))] = str(path)
    before = sorted((path.name, path.lstat().st_mtime_ns) for path in folder.iterdir())
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"genkl score: {message.format(path=path)}") and said.count("\n") == 1
    assert before == sorted((path.name, path.lstat().st_mtime_ns) for path in folder.iterdir())


SOAK = """
import sys
import genkl_ext as gk
from genkl_ext.scoring import files

files.RESUME_BYTES = 0
rule = gk.GenKL(num_classes=3, alpha=0.9, beta=0.1, sigma=0.1)
done = gk.score_files(sys.argv[1], rule, sys.argv[2])
# Not getrusage: its peak begins with that of the process which started this one.
peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
print(done.rows, done.nc_count, int(peak) << 10)
"""


def test_soak(tmp_path: Path) -> None:
    """More rows than 10^7 take the same memory, and the last are scored as the first."""
    import pyarrow.parquet as pq

    rows = int(os.environ.get("GENKL_SOAK_ROWS", "20_000_000"))
    shard = 1_000_000
    stream = np.random.default_rng(0)
    q = stream.dirichlet(np.full(3, 0.5), shard).astype(np.float16)
    rule = gk.GenKL(num_classes=3, alpha=0.9, beta=0.1, sigma=0.1)
    expected = rule.score(q)
    nc = int(np.count_nonzero(expected.nc))
    assert 0 < nc < shard
    memory = []
    for count in (10_000_000, rows):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count // shard):
            if i == 0:
                np.save(folder / "p0.npy", q)
            else:
                os.link(folder / "p0.npy", folder / f"p{i}.npy")
        table = folder / "t.parquet"
        words = [sys.executable, "-c", SOAK, str(folder / "p*.npy"), str(table)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        *counts, peak = map(int, done.stdout.split())
        assert counts == [count, count // shard * nc]
        memory.append(peak)
        groups = pq.ParquetFile(table)
        assert groups.metadata.num_rows == count
        last = groups.read_row_group(groups.num_row_groups - 1)
        at = last["row"].to_numpy()
        assert at[-1] == count - 1
        for name in ("critical_alpha", "nc", "top_class", "top_prob"):
            np.testing.assert_array_equal(
                last[name].to_numpy(), getattr(expected, name)[at % shard]
            )
        table.unlink()
        assert hidden(folder) == []
    print(f"{rows:,} rows: {memory[0] >> 20} and {memory[1] >> 20} MB")
    assert memory[1] - memory[0] < 50 << 20 and memory[1] < 1 << 30


if __name__ == "__main__":
    serve()
