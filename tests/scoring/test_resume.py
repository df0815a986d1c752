"""A long scoring job that was cut short: it goes on, and nothing is different.

Kills, full disks and a second start are in ``test_faults.py``.
"""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import genkl_ext as gk
from genkl_ext import unfinished
from genkl_ext.files import atomic_write
from genkl_ext.journal import Journal
from genkl_ext.ranks import Ranks
from genkl_ext.scoring import files, read_settings, score_files
from genkl_ext.scoring.sources import Packed

RULE = gk.GenKL(num_classes=5, alpha=0.9, beta=0.1, sigma=0.1)
CHUNK = 5 * 4 * 100  # bytes of 100 rows
Arrays = Callable[..., Path]


@pytest.fixture(autouse=True)
def long_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones count as long, and every chunk is kept at once."""
    monkeypatch.setattr(files, "RESUME_BYTES", 0)
    monkeypatch.setattr(unfinished, "MARK_SECONDS", 0)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(2):
        q = rng.dirichlet(np.full(5, 0.4), 1040).astype(np.float32)
        np.save(tmp_path / f"p{i}.npy", q)
    (tmp_path / "keys.txt").write_text("".join(f"k{i}\n" for i in range(1040)))
    return tmp_path


def job(folder: Path, out: str, **more: Any) -> gk.scoring.FileScores:
    inputs = [folder / "p0.npy", folder / "p1.npy"]
    given = {"keys": folder / "keys.txt", "chunk_bytes": 2 * CHUNK, **more}
    return score_files(inputs, RULE, folder / out, **given)


def stopped(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch, after: int, **more: Any
) -> None:
    """A job that cannot read on after so many chunks."""
    rows, calls = Packed.rows, []

    def broken(self: Packed, start: int, stop: int) -> Any:
        calls.append(start)
        if len(calls) > 2 * after:
            raise OSError(errno.EIO, "score: p0.npy cannot be read: Input/output error")
        return rows(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Packed, "rows", broken)
        with pytest.raises(OSError, match="cannot be read"):
            job(folder, out, **more)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_goes_on_after_an_error(
    arrays: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, after: int
) -> None:
    whole = job(arrays, f"whole{suffix}")
    assert whole.resumed == 0 and hidden(arrays) == []
    stopped(arrays, f"t{suffix}", monkeypatch, after)
    assert not (arrays / f"t{suffix}").exists()
    assert hidden(arrays) == [f".t{suffix}.journal-0", f".t{suffix}.partial"]
    again = job(arrays, f"t{suffix}", nc_list=arrays / "nc_set.txt")
    # The chunk after the last may have been scored too late to be kept.
    assert max(0, after - 1) * 100 <= again.resumed <= after * 100 and again.resumed % 100 == 0
    assert after == 0 or again.resumed > 0 or after == 1
    assert (arrays / f"t{suffix}").read_bytes() == (arrays / f"whole{suffix}").read_bytes()
    assert hidden(arrays) == []
    assert again.nc_count == whole.nc_count == np.count_nonzero(again.scores.nc)
    for name in ("critical_alpha", "votes", "top_prob"):
        np.testing.assert_array_equal(getattr(again.scores, name), getattr(whole.scores, name))
        np.testing.assert_array_equal(
            again.column(name)[90:310], getattr(whole.scores, name)[90:310]
        )


@pytest.mark.parametrize(
    ("what", "differs"),
    [
        ("rule", r"rule\.alpha 0\.9, not 1\.0"),
        ("input", r"inputs: p1\.npy in sample, state"),
        ("inputs", r"batch_rows 100, not 200, inputs: 2, not 1, models 2, not 1"),
        ("order", r"inputs: p0\.npy, not p1\.npy"),
        ("rows", r"inputs: p0\.npy in sample, shape, size, state"),
        ("no rows", r"batch_rows 100, not 1, inputs: p0\.npy in sample, shape, size, state"),
        ("chunks", "batch_rows 100, not 150"),
    ],
)
def test_other_work_is_refused(
    arrays: Path, monkeypatch: pytest.MonkeyPatch, what: str, differs: str
) -> None:
    """What is left stays as it is, for the job that it is of; or is thrown away on demand."""
    stopped(arrays, "t.parquet", monkeypatch, 5)
    left = {name: (arrays / name).read_bytes() for name in hidden(arrays)}
    more: dict[str, Any] = {}
    rule = RULE
    if what == "rule":
        rule = gk.GenKL(num_classes=5, alpha=1.0, beta=0.1, sigma=0.1)
    elif what == "input":
        np.save(arrays / "p1.npy", np.load(arrays / "p1.npy")[::-1])
    elif what in ("rows", "no rows"):
        rows = 900 if what == "rows" else 0
        for i in range(2):
            np.save(arrays / f"p{i}.npy", np.load(arrays / f"p{i}.npy")[:rows])
        (arrays / "keys.txt").write_text("".join(f"k{i}\n" for i in range(rows)))
    elif what == "chunks":
        more["chunk_bytes"] = 3 * CHUNK
    inputs = [arrays / "p0.npy", arrays / "p1.npy"]
    if what == "inputs":
        inputs.pop()
    elif what == "order":
        inputs.reverse()
    given = {"keys": arrays / "keys.txt", "chunk_bytes": 2 * CHUNK, **more}
    message = (
        r"^score: an unfinished t\.parquet, of which \d batches are done, is of other inputs or "
        rf"settings \({differs}\): start that job again to finish it, or give begin_anew "
        r"\(--begin-anew\) to throw it away$"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            score_files(inputs, rule, arrays / "t.parquet", **given)
        assert left == {name: (arrays / name).read_bytes() for name in hidden(arrays)}
        assert not (arrays / "t.parquet").exists()
    if what in ("rule", "inputs", "order", "chunks"):
        assert job(arrays, "t.parquet").resumed > 0
        stopped(arrays, "t.parquet", monkeypatch, 5)
    message = r"^score: an unfinished t\.parquet was of other inputs or settings; begun anew$"
    with pytest.warns(UserWarning, match=message):
        result = score_files(inputs, rule, arrays / "t.parquet", begin_anew=True, **given)
    assert result.resumed == 0
    table = pq.read_table(arrays / "t.parquet")
    assert len(table) == len(np.load(inputs[0]))
    if len(table):
        expected = rule.score([np.load(path) for path in inputs])
        np.testing.assert_array_equal(table["critical_alpha"], expected.critical_alpha)
    assert hidden(arrays) == []


@pytest.mark.parametrize(("begin_anew", "warned"), [("if other", False), (True, True)])
def test_the_same_job_begins_anew_on_demand(
    arrays: Path, monkeypatch: pytest.MonkeyPatch, begin_anew: Any, warned: bool
) -> None:
    job(arrays, "whole.parquet")
    stopped(arrays, "t.parquet", monkeypatch, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = job(arrays, "t.parquet", begin_anew=begin_anew)
        assert (result.resumed == 0) == warned
        job(arrays, "t.parquet", begin_anew=begin_anew)  # there is nothing to throw away
    message = "score: an unfinished t.parquet was thrown away; begun anew"
    assert [str(one.message) for one in caught] == [message] * warned
    assert (arrays / "t.parquet").read_bytes() == (arrays / "whole.parquet").read_bytes()
    assert hidden(arrays) == []


def test_other_keys_go_with_the_scores_there_are(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(arrays, "t.parquet", monkeypatch, 5)
    (arrays / "keys.txt").write_text("".join(f"m{i}\n" for i in range(1040)))
    whole = job(arrays, "whole.parquet")
    assert job(arrays, "t.parquet").resumed > 0 == whole.resumed
    assert (arrays / "t.parquet").read_bytes() == (arrays / "whole.parquet").read_bytes()


@pytest.mark.parametrize("first", ["nan", "skip"])
def test_another_policy_goes_with_the_scores_there_are(
    arrays: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """And "raise" finds the bad row among them."""
    q = np.load(arrays / "p0.npy")
    q[205, 2] = np.nan
    np.save(arrays / "p0.npy", q)
    stopped(arrays, "t.parquet", monkeypatch, 5, on_bad_row=first)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"p0\.npy must be finite .* at row 205, class 2$"):
            job(arrays, "t.parquet")
    other = {"nan": "skip", "skip": "nan"}[first]
    whole = job(arrays, "whole.parquet", on_bad_row=other)
    again = job(arrays, "t.parquet", on_bad_row=other)
    assert again.resumed > 205 and again.bad_rows.tolist() == whole.bad_rows.tolist() == [205]
    assert (arrays / "t.parquet").read_bytes() == (arrays / "whole.parquet").read_bytes()


def test_a_complete_table_is_no_reason_to_refuse(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job that ended between the removal of its rows and that of its journal."""

    def killed(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            job(arrays, "t.parquet")
    assert (arrays / "t.parquet").exists() and hidden(arrays) == [".t.parquet.journal-0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert job(arrays, "t.parquet", chunk_bytes=3 * CHUNK).resumed == 0
    assert hidden(arrays) == []


def test_the_stage_of_a_run_goes_on_or_begins_anew(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe may have been changed, and nobody is there to say what shall become of the rows."""
    from genkl_ext.training import stages

    members = [arrays / "p0.npy", arrays / "p1.npy"]

    def score(rule: gk.GenKL) -> list[int]:
        calls: list[int] = []
        stages.score(
            members, rule, arrays / "keys.txt", arrays / "t.parquet", arrays / "nc.txt",
            lambda done, _: calls.append(done),
        )  # fmt: skip
        return calls

    given = dict(score_files.__kwdefaults__ or {})
    monkeypatch.setattr(score_files, "__kwdefaults__", {**given, "chunk_bytes": 2 * CHUNK})
    stopped(arrays, "t.parquet", monkeypatch, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(RULE)[0] >= 400
    stopped(arrays, "t.parquet", monkeypatch, 5)
    with pytest.warns(UserWarning, match="of other inputs or settings; begun anew$"):
        assert score(gk.GenKL(num_classes=5, alpha=1.0, beta=0.1, sigma=0.1))[0] == 100


def test_a_truncated_input_is_refused_and_the_work_kept(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(arrays, "whole.parquet")
    stopped(arrays, "t.parquet", monkeypatch, 5)
    content, was = (arrays / "p1.npy").read_bytes(), (arrays / "p1.npy").stat().st_mtime_ns
    (arrays / "p1.npy").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"p1\.npy is truncated"):
        job(arrays, "t.parquet")
    (arrays / "p1.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"p1\.npy does not exist"):
        job(arrays, "t.parquet")
    (arrays / "p1.npy").write_bytes(content)
    os.utime(arrays / "p1.npy", ns=(was, was))
    again = job(arrays, "t.parquet")
    assert again.resumed > 0 and again.nc_count == whole.nc_count
    assert (arrays / "t.parquet").read_bytes() == (arrays / "whole.parquet").read_bytes()


@pytest.mark.parametrize("policy", ["nan", "skip"])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
def test_bad_rows(arrays: Path, monkeypatch: pytest.MonkeyPatch, policy: Any, suffix: str) -> None:
    q = np.load(arrays / "p0.npy")
    bad = [0, 5, 6, 7, 99, 100, 555, 1039]
    q[bad, 2] = np.nan
    np.save(arrays / "p0.npy", q)
    with pytest.raises(ValueError, match=r"p0\.npy must be finite .* got nan at row 0, class 2$"):
        job(arrays, f"t{suffix}")
    whole = job(arrays, f"whole{suffix}", on_bad_row=policy)
    assert whole.bad_rows.tolist() == bad and whole.rows == 1040
    stopped(arrays, f"t{suffix}", monkeypatch, 5, on_bad_row=policy)  # nothing was done
    again = job(arrays, f"t{suffix}", on_bad_row=policy)
    assert again.bad_rows.tolist() == bad and again.resumed > 0
    assert (arrays / f"t{suffix}").read_bytes() == (arrays / f"whole{suffix}").read_bytes()
    good = np.setdiff1d(np.arange(1040), bad)
    expected = RULE.score([m[good] for m in (q, np.load(arrays / "p1.npy"))])
    if suffix == ".npy":
        table = np.load(arrays / "t.npy")
        rows, critical, keys = table["row"], table["critical_alpha"], table["key"].tolist()
    elif suffix == ".parquet":
        read = pq.read_table(arrays / "t.parquet")
        rows, critical, keys = (read[n].to_numpy() for n in ("row", "critical_alpha", "key"))
        assert read_settings(arrays / "t.parquet")["on_bad_row"] == policy
    else:
        lines = [line.split(",") for line in (arrays / "t.csv").read_text().splitlines()[1:]]
        rows = np.array([int(line[0]) for line in lines])
        critical = np.array([float(line[2]) for line in lines], np.float32)
        keys = [line[1].strip('"') for line in lines]
    kept = np.arange(1040) if policy == "nan" else good
    np.testing.assert_array_equal(rows, kept)
    assert list(keys) == [f"k{i}" for i in kept]
    at = np.isin(rows, good)
    np.testing.assert_array_equal(np.asarray(critical)[at], expected.critical_alpha)
    assert np.isnan(np.asarray(critical)[~at]).all()


RANKS = """
import sys
import genkl_ext as gk
from genkl_ext.ranks import join

rule = gk.GenKL(num_classes=5, alpha=0.9, beta=0.1, sigma=0.1)
done = gk.score_files(["p0.npy", "p1.npy"], rule, sys.argv[1], keys="keys.txt",
                      nc_list=sys.argv[1] + ".txt", chunk_bytes=4000, ranks=join("cpu"))
print(done.rows, done.nc_count, done.resumed > 0)
"""


def test_two_processes_give_the_bytes_of_one(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And take up what one has left."""
    whole = job(arrays, "whole.parquet", chunk_bytes=4000, nc_list=arrays / "whole.txt")
    stopped(arrays, "t.parquet", monkeypatch, 3, chunk_bytes=4000)  # alone
    (arrays / "program.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "program.py", "t.parquet"]
    done = subprocess.run(command, cwd=arrays, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"1040 {whole.nc_count} True"] * 2
    assert (arrays / "t.parquet").read_bytes() == (arrays / "whole.parquet").read_bytes()
    assert (arrays / "t.parquet.txt").read_bytes() == (arrays / "whole.txt").read_bytes()
    assert hidden(arrays) == []
    assert json.dumps(read_settings(arrays / "t.parquet"))


def test_a_file_that_was_touched_is_another(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change between the sampled blocks does not show in them."""
    monkeypatch.setattr("genkl_ext.scoring.sources.sample_digest", lambda *_: "the same")
    stopped(arrays, "t.parquet", monkeypatch, 5)
    q = np.load(arrays / "p0.npy")
    np.save(arrays / "p0.npy", q[::-1])
    os.utime(arrays / "p0.npy", ns=(1, 1))
    with pytest.raises(ValueError, match=r"settings \(inputs: p0\.npy in state\): start that job"):
        job(arrays, "t.parquet")
    with pytest.warns(UserWarning, match="begun anew"):
        result = job(arrays, "t.parquet", begin_anew=True)
    expected = RULE.score([q[::-1], np.load(arrays / "p1.npy")])
    np.testing.assert_array_equal(result.scores.critical_alpha, expected.critical_alpha)


def test_a_short_job_takes_up_what_a_long_one_left(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(arrays, "t.parquet", monkeypatch, 5)
    monkeypatch.setattr(files, "RESUME_BYTES", 1 << 30)
    assert job(arrays, "t.parquet").resumed > 0
    assert hidden(arrays) == []
    assert job(arrays, "t.parquet").resumed == 0


def test_what_others_are_writing_is_left_alone(arrays: Path) -> None:
    long = "x" * 64
    for mine, other in (("t.parquet", "t.v2.parquet"), (f"{long}a.npy", f"{long}b.npy")):
        with atomic_write(arrays / other) as temporary:
            temporary.write_text("other")
            job(arrays, mine)
        assert (arrays / other).read_text() == "other"


def test_slices_of_a_column_on_disk(arrays: Path) -> None:
    result = job(arrays, "t.parquet")
    column, whole = result.column("votes"), result.scores.votes
    for span in (
        slice(None), slice(None, None, 7), slice(10, 5), slice(1040, 1040), slice(0, 0),
        slice(-30, None), slice(99, 401, 3), slice(None, None, -1), slice(5000, 6000),
    ):  # fmt: skip
        np.testing.assert_array_equal(column[span], whole[span])
        assert column[span].dtype == whole.dtype
        kept = column[span].base  # which the slice keeps in memory
        assert kept is None or memoryview(kept).nbytes <= column[span].nbytes
    assert (column[3], column[-1]) == (whole[3], whole[-1]) and len(column) == 1040
    with pytest.raises(IndexError):
        column[1040]
    np.testing.assert_array_equal(np.asarray(column), whole)


@pytest.mark.parametrize("name", ["out", "nc_list", "bad_rows"])
def test_an_output_is_no_input(arrays: Path, name: str) -> None:
    (arrays / "shards").mkdir()
    for i in (0, 1):
        os.rename(arrays / f"p{i}.npy", arrays / f"shards/p{i}.npy")
    (arrays / "keys.txt").write_text("".join(f"k{i}\n" for i in range(2080)))
    before = {path: path.read_bytes() for path in arrays.rglob("*") if path.is_file()}
    for inputs in ("shards", "shards/*.npy", f"file://{arrays}/shards/p0.npy"):
        path = inputs if "://" in inputs else arrays / inputs
        given: dict[str, Any] = {
            "out": arrays / "t.npy", "nc_list": arrays / "nc.txt", "bad_rows": arrays / "bad.txt",
            "keys": arrays / "keys.txt",
        }  # fmt: skip
        given[name] = arrays / "shards/p0.npy"
        with pytest.raises(ValueError, match=rf"{name} must be another file than .*p0\.npy"):
            score_files(path, RULE, **given)
    given["bad_rows"] = given["nc_list"]
    if name == "out":
        with pytest.raises(ValueError, match="would be one of the shards"):
            score_files(arrays / "shards", RULE, arrays / "shards/new.npy")
        with pytest.raises(ValueError, match="would be one of the shards"):
            score_files(arrays / "shards/*.npy", RULE, arrays / "shards/new.npy")
    assert before == {path: path.read_bytes() for path in arrays.rglob("*") if path.is_file()}


def test_wrong_settings(arrays: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_row must be raise, nan or skip, got 'skpi'"):
        job(arrays, "t.parquet", on_bad_row="skpi")
    with pytest.raises(ValueError, match="out must be given for several processes"):
        score_files(arrays / "p0.npy", RULE, ranks=Ranks(0, 2, 0, 2))
