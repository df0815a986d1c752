import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import genkl_ext as gk
from genkl_ext import reference, unfinished
from genkl_ext.scoring import files as files_module
from genkl_ext.scoring import (
    read_nc_list,
    read_settings,
    rows_without_prediction,
    score_files,
    tables,
)

RULE = gk.GenKL(num_classes=10, alpha=1.05, beta=0.03, sigma=0.05)
Predict = Callable[..., NDArray[Any]]


def save(folder: Path, *arrays: NDArray[Any]) -> list[Path]:
    paths = [folder / f"p{i}.npy" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return paths


def assert_is_reference(
    scores: gk.Scores, models: list[NDArray[Any]], *, logits: bool = False
) -> None:
    rule = scores.rule
    expected = reference.nc_score(models, rule.vectors, rule.alpha, rule.tau, logits=logits)
    np.testing.assert_array_equal(scores.nc, expected.votes > 0)
    np.testing.assert_array_equal(scores.votes, expected.votes)
    np.testing.assert_array_equal(scores.top_class, expected.top_class)
    np.testing.assert_array_equal(scores.top_prob, expected.top_prob.astype(np.float32))
    np.testing.assert_allclose(
        scores.critical_alpha, expected.critical_alpha, rtol=rule.resolution, atol=1e-30
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 26])
def test_equals_the_reference(
    tmp_path: Path, predict: Predict, dtype: str, models: int, chunk_bytes: int
) -> None:
    arrays = [predict(701, seed=i, dtype=dtype) for i in range(models)]
    paths = save(tmp_path, *arrays)
    before = [path.read_bytes() for path in paths]
    result = score_files(paths, RULE, chunk_bytes=chunk_bytes)
    assert_is_reference(result.scores, arrays)
    assert 0 < result.nc_count == np.count_nonzero(result.scores.nc) < len(result) == 701
    assert result.input_bytes == sum(array.nbytes for array in arrays)
    assert [path.read_bytes() for path in paths] == before


def test_logits(tmp_path: Path, predict: Predict) -> None:
    logits = [np.log(predict(300, seed=i)) + 3 for i in range(2)]
    result = score_files(save(tmp_path, *logits), RULE, logits=True)
    assert_is_reference(result.scores, logits, logits=True)


@pytest.mark.parametrize("stored", ["<f4", ">f4", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_layout(tmp_path: Path, predict: Predict, stored: str, order: str) -> None:
    array = predict(300).astype(stored, order=order)
    result = score_files(save(tmp_path, array), RULE, chunk_bytes=1000)
    assert_is_reference(result.scores, [array.astype(array.dtype.newbyteorder("="))])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
def test_few_rows(tmp_path: Path, predict: Predict, rows: int, suffix: str) -> None:
    (tmp_path / "keys.txt").write_text("a\n" * rows)
    result = score_files(
        save(tmp_path, predict(rows)),
        RULE,
        tmp_path / f"t{suffix}",
        keys=tmp_path / "keys.txt",
        nc_list=tmp_path / "nc_set.txt",
    )
    assert len(result) == rows
    assert (tmp_path / f"t{suffix}").exists()
    assert len(read_nc_list(tmp_path / "nc_set.txt")) == result.nc_count


def test_one_path_is_one_model(tmp_path: Path, predict: Predict) -> None:
    (path,) = save(tmp_path, predict(20))
    one, listed = score_files(str(path), RULE), score_files([path], RULE)
    np.testing.assert_array_equal(one.scores.critical_alpha, listed.scores.critical_alpha)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
def test_bytes_do_not_depend_on_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: Predict, suffix: str
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", 64)
    paths = save(tmp_path, predict(500, seed=0), predict(500, seed=1))
    contents = set()
    for chunk_bytes in (1, 80 * 7, 80 * 64, 80 * 65, 1 << 26):
        out = tmp_path / f"t{suffix}"
        score_files(paths, RULE, out, chunk_bytes=chunk_bytes)
        contents.add(out.read_bytes())
    assert len(contents) == 1


def test_table_and_nc_list(tmp_path: Path, predict: Predict) -> None:
    paths = save(tmp_path, predict(500))
    keys = [f"images/{i * 7 % 500}.jpg" for i in range(500)]
    (tmp_path / "keys.txt").write_text("\r\n".join(keys) + "\r\n", newline="")
    result = score_files(
        paths,
        RULE,
        tmp_path / "t.parquet",
        keys=tmp_path / "keys.txt",
        nc_list=tmp_path / "nc_set.txt",
    )
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["key"].to_pylist() == keys
    for name in ("critical_alpha", "divergence", "votes", "nc", "top_class", "top_prob"):
        np.testing.assert_array_equal(table[name].to_numpy(), getattr(result.scores, name))
    expected = [key for key, nc in zip(keys, result.scores.nc, strict=True) if nc]
    assert (tmp_path / "nc_set.txt").read_text().splitlines() == expected


def test_settings_in_the_table(tmp_path: Path, predict: Predict) -> None:
    paths = save(tmp_path, predict(50, seed=0), predict(50, seed=1))
    (tmp_path / "keys.txt").write_text("".join(f"{i}\n" for i in range(50)))
    rule = gk.GenKL(np.int64(10), np.float32(1.5), beta=0.03, sigma=0.05, seed=7)
    out = tmp_path / "t.parquet"
    result = score_files(paths, rule, out, keys=tmp_path / "keys.txt")
    settings = read_settings(out)
    assert gk.GenKL(**settings["rule"]) == rule
    assert settings["version"] == gk.__version__
    assert (settings["logits"], settings["validate"]) == (False, True)
    assert [entry["name"] for entry in settings["inputs"]] == ["p0.npy", "p1.npy"]
    assert settings["inputs"][0]["shape"] == [50, 10]
    assert settings["inputs"][0]["sample"] == result.inputs[0].sample
    assert settings["inputs"][0]["sample"] != settings["inputs"][1]["sample"]
    assert settings["keys"]["name"] == "keys.txt"
    json.dumps(settings)


def test_the_same_job_gives_the_same_bytes(tmp_path: Path, predict: Predict) -> None:
    paths = save(tmp_path, predict(200))
    for name in ("a.parquet", "b.parquet"):
        score_files(paths, RULE, tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_progress(tmp_path: Path, predict: Predict) -> None:
    calls: list[tuple[int, int]] = []
    (path,) = save(tmp_path, predict(100))
    score_files(path, RULE, chunk_bytes=40 * 30, progress=lambda *call: calls.append(call))
    assert calls == [(30, 100), (60, 100), (90, 100), (100, 100)]


def test_one_block_is_written_at_a_time_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: Predict
) -> None:
    events: list[tuple[str, int]] = []
    advance = tables.TableWriter.advance

    def slow(self: tables.TableWriter, filled: int) -> None:
        events.append(("begin", filled))
        time.sleep(0.005)
        advance(self, filled)
        events.append(("end", filled))

    monkeypatch.setattr(tables.TableWriter, "advance", slow)
    (path,) = save(tmp_path, predict(100))
    score_files(path, RULE, tmp_path / "t.parquet", chunk_bytes=40 * 30)
    expected = [(what, row) for row in (30, 60, 90, 100) for what in ("begin", "end")]
    assert events[:8] == expected and set(events[8:]) <= set(expected[6:])


@pytest.mark.parametrize("one_model", [True, False])
@pytest.mark.parametrize("out", ["t.parquet", "t.csv", "t.npy"])
def test_keys_in_the_table_of_predictions(
    tmp_path: Path, predict: Predict, out: str, one_model: bool
) -> None:
    """The outputs are those of the same keys in a text file."""
    keys = [f"images/ä{i * 7 % 500}.jpg" for i in range(500)]
    (tmp_path / "keys.txt").write_text("\n".join(keys), encoding="utf-8")
    array = predict(500)
    array[3] = np.nan
    paths = [tmp_path / f"p{i}.parquet" for i in range(2)]
    for i, path in enumerate(paths):
        # Two shards of 250 rows, or two models of 500.
        rows = slice(i * 250, i * 250 + 250) if one_model else slice(0, 500)
        probs = pa.FixedSizeListArray.from_arrays(array[rows].reshape(-1), 10)
        pq.write_table(pa.table({"key": keys[rows], "probs": probs}), path, row_group_size=70)
    written = []
    for name, given in (
        ("text", {"keys": tmp_path / "keys.txt"}),
        ("column", {"key_column": "key"}),
    ):
        (tmp_path / name).mkdir()
        lists = [tmp_path / name / f for f in (out, "nc_set.txt", "bad.txt")]
        score_files(
            paths, RULE, lists[0], nc_list=lists[1], bad_rows=lists[2], on_bad_row="nan",
            one_model=one_model, **given,
        )  # fmt: skip
        written.append([path.read_bytes() for path in lists])
    if out == "t.parquet":
        assert read_settings(tmp_path / "column" / out)["keys"] == {"column": "key"}
        for name, content in zip(("text", "column"), written, strict=True):
            content[0] = str(pq.read_table(tmp_path / name / out).to_pydict()).encode()
    assert written[0] == written[1]
    assert written[1][2] == f"3\t{keys[3]}\n".encode()


def test_keys_are_of_one_place(tmp_path: Path, predict: Predict) -> None:
    (path,) = save(tmp_path, predict(4))
    with pytest.raises(ValueError, match=r"^score: keys must not be given with key_column 'key'$"):
        score_files(path, RULE, keys=tmp_path / "keys.txt", key_column="key")
    with pytest.raises(ValueError, match=r"p0\.npy must be one of .* to have key columns$"):
        score_files(path, RULE, key_column="key")


def test_key_list_that_changes_during_the_job(tmp_path: Path, predict: Predict) -> None:
    (path,) = save(tmp_path, predict(4))
    keys, out = tmp_path / "keys.txt", tmp_path / "t.csv"
    keys.write_text("a\nb\nc\nd\n")

    def change(done: int, rows: int) -> None:
        keys.write_text("b\na\nc\nd\n")
        os.utime(keys, ns=(1, 1))

    with pytest.raises(ValueError, match=r"^score: .*keys\.txt was changed while it was read$"):
        score_files(path, RULE, out, keys=keys, progress=change)
    assert not out.exists()


def test_repeated_keys_are_reported(tmp_path: Path, predict: Predict) -> None:
    (path,) = save(tmp_path, predict(4))
    (tmp_path / "keys.txt").write_text("a\nb\nb\na\n")
    message = r"keys\.txt: 2 keys appear more than once, first 'b' in line 3$"
    with pytest.warns(UserWarning, match=message) as caught:
        score_files(path, RULE, tmp_path / "t.csv", keys=tmp_path / "keys.txt")
    assert caught[0].filename == __file__
    assert (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"p1\.npy must be finite and not negative, got nan at row 613, class 4$"),
        (np.inf, r"p1\.npy must be finite and not negative, got inf at row 613, class 4$"),
        (-0.5, r"p1\.npy must be finite and not negative, got -0\.5 at row 613, class 4$"),
        (9.0, r"rows of the average of 2 models must sum to 1 within 0\.001, got .* at row 613"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 80 * 100, 1 << 26])
def test_a_bad_row_is_named_as_in_the_file(
    tmp_path: Path, predict: Predict, value: float, message: str, chunk_bytes: int
) -> None:
    bad = predict(700, seed=1)
    bad[613, 4] = bad[650, 2] = value
    paths = save(tmp_path, predict(700, seed=0), bad)
    with pytest.raises(ValueError, match=rf"^score: .*{message}"):
        score_files(paths, RULE, chunk_bytes=chunk_bytes)


def test_no_check_on_request(tmp_path: Path, predict: Predict) -> None:
    bad = predict(50)
    bad[7, 3] = np.nan
    scores = score_files(save(tmp_path, bad), RULE, validate=False).scores
    assert np.isnan(scores.critical_alpha[7]) and not scores.nc[7]
    assert np.isfinite(np.delete(scores.critical_alpha, 7)).all()


COLUMNS = ("critical_alpha", "divergence", "votes", "nc", "top_class", "top_prob")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 26])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_left_out(
    tmp_path: Path, predict: Predict, dtype: str, models: int, chunk_bytes: int, order: str
) -> None:
    arrays = [predict(301, seed=i, dtype=dtype) for i in range(models)]
    whole = score_files(save(tmp_path, *arrays), RULE).scores
    leave_out = np.zeros(301, bool)
    leave_out[[0, 7, 8, 150, 300]] = True
    for array in arrays:
        array[leave_out] = [[np.nan], [np.inf], [-1], [9], [np.nan]]
    paths = save(tmp_path, *(np.asarray(array, order=order) for array in arrays))
    before = [path.read_bytes() for path in paths]
    scores = score_files(paths, RULE, leave_out=leave_out, chunk_bytes=chunk_bytes).scores
    for name in COLUMNS:  # to the last bit
        column = getattr(scores, name)
        assert column.dtype == getattr(whole, name).dtype
        np.testing.assert_array_equal(column[~leave_out], getattr(whole, name)[~leave_out])
        expected = tables.LEFT_OUT[name]
        np.testing.assert_array_equal(column[leave_out], np.full(5, expected, column.dtype))
    assert not scores.at(0)[leave_out].any()
    assert [path.read_bytes() for path in paths] == before


def test_rows_left_out_of_logits(tmp_path: Path, predict: Predict) -> None:
    logits = np.log(predict(100)) + 3
    whole = score_files(save(tmp_path, logits), RULE, logits=True).scores
    logits[40] = np.nan
    leave_out = np.arange(100) == 40
    scores = score_files(save(tmp_path, logits), RULE, logits=True, leave_out=leave_out).scores
    np.testing.assert_array_equal(
        np.delete(scores.critical_alpha, 40), np.delete(whole.critical_alpha, 40)
    )
    assert np.isnan(scores.critical_alpha[40]) and scores.top_class[40] == -1


def test_a_bad_row_beside_those_left_out(tmp_path: Path, predict: Predict) -> None:
    array = predict(100)
    array[[20, 30]] = np.nan
    array[25, 3] = np.nan
    paths = save(tmp_path, array)
    leave_out = rows_without_prediction(paths)
    np.testing.assert_array_equal(np.flatnonzero(leave_out), [20, 30])
    with pytest.raises(ValueError, match=r"got nan at row 25, class 3$"):
        score_files(paths, RULE, leave_out=leave_out)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
def test_rows_left_out_in_the_table_and_the_list(
    tmp_path: Path, predict: Predict, suffix: str
) -> None:
    array = predict(50)
    leave_out = np.arange(50) % 7 == 3
    (tmp_path / "keys.txt").write_text("".join(f"{i}\n" for i in range(50)))
    arguments = {
        "rule": dataclasses.replace(RULE, alpha=0.0),  # every row is NC
        "out": tmp_path / f"t{suffix}",
        "keys": tmp_path / "keys.txt",
        "nc_list": tmp_path / "nc_set.txt",
        "leave_out": leave_out,
    }
    array[leave_out] = np.nan
    result = score_files(save(tmp_path, array), **arguments)
    assert result.nc_count == 50 - leave_out.sum()
    assert read_nc_list(tmp_path / "nc_set.txt") == list(map(str, np.flatnonzero(~leave_out)))
    if suffix == ".parquet":
        table = pq.read_table(tmp_path / "t.parquet")
        assert table["row"].to_pylist() == list(range(50))
        np.testing.assert_array_equal(np.isnan(table["critical_alpha"]), leave_out)
        np.testing.assert_array_equal(table["top_class"].to_numpy() == -1, leave_out)


def test_the_mask_goes_with_the_table(tmp_path: Path, predict: Predict) -> None:
    paths, out = save(tmp_path, predict(50)), tmp_path / "t.parquet"
    score_files(paths, RULE, out)
    assert read_settings(out)["leave_out"] is None
    found = []
    for rows in ([3], [4], [3, 4], []):
        leave_out = np.isin(np.arange(50), rows)
        score_files(paths, RULE, out, leave_out=leave_out)
        found.append(read_settings(out)["leave_out"])
    assert [entry["rows"] for entry in found] == [1, 1, 2, 0]
    assert len({entry["digest"] for entry in found}) == 4


@pytest.mark.parametrize(
    ("leave_out", "got"),
    [
        (np.zeros(3, bool), r"\(3,\) bool"),
        (np.zeros((20, 1), bool), r"\(20, 1\) bool"),
        (np.zeros(20, int), r"\(20,\) int64"),
    ],
)
def test_a_mask_that_does_not_fit(
    tmp_path: Path, predict: Predict, leave_out: NDArray[Any], got: str
) -> None:
    paths = save(tmp_path, predict(20))
    message = rf"^score: leave_out must be \(20,\) booleans, got {got}$"
    with pytest.raises(ValueError, match=message):
        score_files(paths, RULE, tmp_path / "t.csv", leave_out=leave_out)
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 26])
@pytest.mark.parametrize("stored", ["<f4", ">f4", "<f2"])
def test_rows_without_prediction(
    tmp_path: Path, predict: Predict, chunk_bytes: int, stored: str
) -> None:
    a, b = predict(200, seed=0).astype(stored), predict(200, seed=1).astype(stored)
    a[[0, 5]] = np.nan
    a[7, :9] = np.nan  # in part
    a[8, 0] = b[9, 9] = np.nan
    a[10] = np.inf
    b[[5, 6, 199]] = np.nan
    paths = save(tmp_path, a, b)
    for given, rows in ((paths, [0, 5, 6, 199]), (paths[0], [0, 5]), (str(paths[1]), [5, 6, 199])):
        found = rows_without_prediction(given, chunk_bytes=chunk_bytes)
        assert found.dtype == bool and found.shape == (200,)
        np.testing.assert_array_equal(np.flatnonzero(found), rows)


def test_rows_without_prediction_of_odd_files(tmp_path: Path, predict: Predict) -> None:
    for shape in ((0, 10), (3, 0)):
        found = rows_without_prediction(save(tmp_path, np.empty(shape, np.float32)))
        np.testing.assert_array_equal(found, np.zeros(shape[0], bool))
    with pytest.raises(ValueError, match=r"inputs must be at least one file, got none$"):
        rows_without_prediction([])
    with pytest.raises(ValueError, match=r"p1\.npy must be like .*p0\.npy"):
        rows_without_prediction(save(tmp_path, predict(20), predict(21)))


def test_wrong_number_of_classes(tmp_path: Path, predict: Predict) -> None:
    paths = save(tmp_path, predict(20, 14))
    message = r"p0\.npy must have rule\.num_classes = 10 columns, got shape \(20, 14\)$"
    with pytest.raises(ValueError, match=message):
        score_files(paths, RULE)


def test_arguments(tmp_path: Path, predict: Predict) -> None:
    paths = save(tmp_path, predict(20))
    with pytest.raises(ValueError, match=r"inputs must be at least one file, got none$"):
        score_files([], RULE)
    with pytest.raises(ValueError, match=r"chunk_bytes must be at least 1, got 0$"):
        score_files(paths, RULE, chunk_bytes=0)
    with pytest.raises(ValueError, match=r"nc_list needs keys"):
        score_files(paths, RULE, nc_list=tmp_path / "nc_set.txt")


def test_outputs_must_not_be_inputs(tmp_path: Path, predict: Predict) -> None:
    paths = save(tmp_path, predict(2))
    keys = tmp_path / "keys.txt"
    keys.write_text("a\nb\n")
    os.link(paths[0], tmp_path / "hard.npy")
    (tmp_path / "soft.npy").symlink_to(paths[0])
    (tmp_path / "new.csv").symlink_to(tmp_path / "target.csv")
    content = paths[0].read_bytes()
    for out in (paths[0], tmp_path / "hard.npy", tmp_path / "soft.npy"):
        with pytest.raises(ValueError, match=r"out must be another file than .*p0\.npy$"):
            score_files(paths, RULE, out)
    for nc_list in (keys, paths[0]):
        with pytest.raises(ValueError, match=r"nc_list must be another file than "):
            score_files(paths, RULE, keys=keys, nc_list=nc_list)
    with pytest.raises(ValueError, match=r"out must be another file than .*target\.csv$"):
        score_files(paths, RULE, tmp_path / "new.csv", keys=keys, nc_list=tmp_path / "target.csv")
    assert paths[0].read_bytes() == content and keys.read_text() == "a\nb\n"


@pytest.mark.parametrize(
    "wrong",
    [
        {"out": "none/t.parquet"},
        {"out": "/proc/t.parquet"},
        {"out": "t.xlsx"},
        {"nc_list": "none/nc_set.txt"},
        {"keys": "none.txt"},
        {"keys": "short.txt"},
    ],
)
def test_what_is_wrong_is_found_before_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: Predict, wrong: dict[str, str]
) -> None:
    paths = save(tmp_path, predict(3))
    (tmp_path / "keys.txt").write_text("a\nb\nc\n")
    (tmp_path / "short.txt").write_text("a\nb\n")
    names = {"out": "t.parquet", "keys": "keys.txt", "nc_list": "nc_set.txt"} | wrong
    monkeypatch.setattr(gk.GenKL, "_score", lambda *_, **__: pytest.fail("it was scored"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((OSError, ValueError)):
        score_files(paths, RULE, **{name: tmp_path / file for name, file in names.items()})
    assert sorted(os.listdir(tmp_path)) == before


def _bad_row(folder: Path, predict: Predict) -> dict[str, Any]:
    bad = predict(400)
    bad[399] = np.nan
    return {"inputs": save(folder, bad)}


def _changed(folder: Path, predict: Predict) -> dict[str, Any]:
    paths = save(folder, predict(400))
    return {"inputs": paths, "progress": lambda *_: os.utime(paths[0], ns=(0, 0))}


def _interrupted(folder: Path, predict: Predict) -> dict[str, Any]:
    def interrupt(done: int, _: int) -> None:
        if done > 200:
            raise KeyboardInterrupt

    return {"inputs": save(folder, predict(400)), "progress": interrupt}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
@pytest.mark.parametrize(
    ("job", "error"),
    [(_bad_row, ValueError), (_changed, ValueError), (_interrupted, KeyboardInterrupt)],
)
def test_a_failing_job_leaves_the_old_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    predict: Predict,
    suffix: str,
    job: Callable[[Path, Predict], dict[str, Any]],
    error: type[BaseException],
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", 50)  # most of the table is written before it fails
    arguments = job(tmp_path, predict)
    (tmp_path / "keys.txt").write_text("".join(f"{i}\n" for i in range(400)))
    (tmp_path / f"t{suffix}").write_text("old table")
    (tmp_path / "nc_set.txt").write_text("old list")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error):
        score_files(
            **arguments,
            rule=RULE,
            out=tmp_path / f"t{suffix}",
            keys=tmp_path / "keys.txt",
            nc_list=tmp_path / "nc_set.txt",
            chunk_bytes=40 * 30,
        )
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / f"t{suffix}").read_text() == "old table"
    assert (tmp_path / "nc_set.txt").read_text() == "old list"


@pytest.mark.parametrize("what", ["advance", "write_nc_list"])
def test_a_failing_write_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: Predict, what: str
) -> None:
    paths = save(tmp_path, predict(400))
    (tmp_path / "keys.txt").write_text("".join(f"{i}\n" for i in range(400)))
    (tmp_path / "t.parquet").write_text("old table")
    (tmp_path / "nc_set.txt").write_text("old list")
    before = sorted(os.listdir(tmp_path))

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tables.TableWriter if what == "advance" else files_module, what, fail)
    with pytest.raises(OSError, match="no space left"):
        score_files(
            paths,
            RULE,
            tmp_path / "t.parquet",
            keys=tmp_path / "keys.txt",
            nc_list=tmp_path / "nc_set.txt",
        )
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "t.parquet").read_text() == "old table"
    assert (tmp_path / "nc_set.txt").read_text() == "old list"


def test_a_killed_job_leaves_the_old_output_and_can_be_repeated(
    tmp_path: Path, predict: Predict
) -> None:
    (path,) = save(tmp_path, predict(400))
    out = tmp_path / "t.parquet"
    out.write_text("old table")
    program = (
        "import os, signal, sys\n"
        "import genkl_ext as gk\n"
        "kill = lambda done, _: done > 200 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "rule = gk.GenKL(10, 1.05, 0.03, 0.05)\n"
        "gk.score_files(sys.argv[1], rule, sys.argv[2], chunk_bytes=1200, progress=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.read_text() == "old table"
    score_files(path, RULE, out)
    assert pq.read_table(out).num_rows == 400


def test_scored_rows_do_not_stay_in_memory(tmp_path: Path) -> None:
    """The peak grows with the chunk, not with the file; and nothing here needs torch."""
    size = 1 << 30
    with open(tmp_path / "p.npy", "wb") as file:  # zeros that take no room on disk
        header = {"descr": "<f4", "fortran_order": False, "shape": (size // 4000, 1000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + size // 4000 * 4000)
    program = (
        "import re, sys\n"
        "import numpy as np\n"
        "import pyarrow.parquet\n"
        "import genkl_ext as gk\n"
        "rule = gk.GenKL(1000, 1.05, 0.0005, 0.0)\n"
        "rule.score(np.full((1, 1000), 0.001))\n"
        # Not ru_maxrss: that of a child begins with its parent's.
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', status()).group(1))\n"
        "before = peak()\n"
        "gk.score_files(sys.argv[1], rule, sys.argv[2], validate=False, chunk_bytes=4 << 20)\n"
        "assert 'torch' not in sys.modules\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "p.npy"), str(tmp_path / "t.parquet")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kibibytes = int(done.stdout)
    assert kibibytes < (128 << 10)  # of 1 GiB; the libraries take some 75 MiB


def test_real_softmax_outputs(shared_data: Path, tmp_path: Path) -> None:
    paths = sorted((shared_data / "softmax").glob("*_probs.npy"))
    assert len(paths) == 3
    models = [np.load(path) for path in paths]
    assert models[0].dtype == np.float16
    rule = dataclasses.replace(RULE, alpha=0.8)
    for count in (1, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = score_files(paths[:count], rule, tmp_path / "t.parquet", chunk_bytes=100_000)
        assert_is_reference(result.scores, models[:count])
        assert 0 < result.nc_count < len(result) == 50_000
        assert pq.read_table(tmp_path / "t.parquet")["nc"].to_numpy().sum() == result.nc_count


class Stop(Exception):
    """What ends a job in these tests."""


@pytest.fixture
def long_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short jobs count as long, and every chunk is kept at once."""
    monkeypatch.setattr(files_module, "RESUME_BYTES", 0)
    monkeypatch.setattr(unfinished, "MARK_SECONDS", 0)


def stop_at(row: int) -> Callable[[int, int], None]:
    def progress(done: int, _: int) -> None:
        if done >= row:
            raise Stop

    return progress


def test_the_policy_for_bad_rows_may_change(
    tmp_path: Path, predict: Predict, long_jobs: None
) -> None:
    """A job that a bad row has ended goes on with another policy, and the other way round."""
    array = predict(900)
    array[555, 3] = np.nan
    (path,) = save(tmp_path, array)
    given: dict[str, Any] = {"chunk_bytes": 100 * 40}
    whole = score_files(path, RULE, tmp_path / "whole.parquet", on_bad_row="nan", **given)
    with pytest.raises(ValueError, match="got nan at row 555, class 3") as said:
        score_files(path, RULE, tmp_path / "t.parquet", **given)
    with pytest.raises(Stop):
        score_files(
            path, RULE, tmp_path / "t.parquet", on_bad_row="nan", progress=stop_at(800), **given
        )
    with pytest.raises(ValueError, match="got nan at row 555, class 3") as again:
        score_files(path, RULE, tmp_path / "t.parquet", **given)
    assert str(again.value) == str(said.value)
    done = score_files(path, RULE, tmp_path / "t.parquet", on_bad_row="nan", **given)
    assert done.resumed >= 600 and done.bad_rows.tolist() == [555]
    assert (tmp_path / "t.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert whole.bad_count == 1


def test_keys_may_come_later(tmp_path: Path, predict: Predict, long_jobs: None) -> None:
    (path,) = save(tmp_path, predict(900))
    (tmp_path / "keys.txt").write_text("".join(f"k{i}\n" for i in range(900)))
    given: dict[str, Any] = {"chunk_bytes": 100 * 40}
    with pytest.raises(Stop):
        score_files(path, RULE, tmp_path / "t.csv", progress=stop_at(500), **given)
    done = score_files(path, RULE, tmp_path / "t.csv", keys=tmp_path / "keys.txt", **given)
    score_files(path, RULE, tmp_path / "whole.csv", keys=tmp_path / "keys.txt", **given)
    assert done.resumed >= 300
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("kind", ["url", "zarr", "shards"])
def test_an_input_changed_while_nobody_was_at_work(
    tmp_path: Path, predict: Predict, long_jobs: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Even where no sample of it is taken."""
    monkeypatch.setattr("genkl_ext.scoring.sources.sample_digest", lambda *_: "the same")
    memory = fsspec.filesystem("memory")

    def write(array: NDArray[Any]) -> str:
        if kind == "url":
            with memory.open("/changed/p.npy", "wb") as file:
                np.save(file, array)
            return "memory://changed/p.npy"
        if kind == "zarr":
            zarr = pytest.importorskip("zarr", reason="needs zarr")
            store = tmp_path / "p.zarr"
            if store.exists():
                zarr.open_array(str(store), mode="r+")[:] = array
            else:
                zarr.save_array(str(store), array)
            return str(store)
        (tmp_path / "p").mkdir(exist_ok=True)
        for i in range(2):
            np.save(tmp_path / f"p/{i}.npy", array[450 * i : 450 * (i + 1)])
        return str(tmp_path / "p")

    given: dict[str, Any] = {"chunk_bytes": 100 * 40}
    path = write(predict(900))
    with pytest.raises(Stop):
        score_files(path, RULE, tmp_path / "t.csv", progress=stop_at(500), **given)
    time.sleep(0.02)
    other = predict(900, seed=1)
    assert write(other) == path
    with pytest.raises(
        ValueError, match=r"unfinished t\.csv.* is of other inputs or settings .*sta"
    ):
        score_files(path, RULE, tmp_path / "t.csv", **given)
    with pytest.warns(UserWarning, match="begun anew"):
        done = score_files(path, RULE, tmp_path / "t.csv", begin_anew=True, **given)
    np.testing.assert_array_equal(done.scores.critical_alpha, RULE.score(other).critical_alpha)


def test_keys_of_two_models_must_be_the_same(tmp_path: Path, predict: Predict) -> None:
    names = [f"k{i}" for i in range(50)]
    for i, keys in enumerate((names, [*names[:30], "other", *names[31:]], None)):
        probs = pa.FixedSizeListArray.from_arrays(predict(50, seed=i).reshape(-1), 10)
        columns = {"probs": probs} if keys is None else {"key": keys, "probs": probs}
        pq.write_table(pa.table(columns), tmp_path / f"p{i}.parquet")
    paths = [tmp_path / f"p{i}.parquet" for i in range(3)]
    with pytest.raises(ValueError, match=r"(?=.*p0\.parquet)(?=.*p1\.parquet).*'other'.*") as said:
        score_files(paths[:2], RULE, tmp_path / "t.csv", key_column="key")
    assert "row 30" in str(said.value) and "'k30'" in str(said.value)
    score_files(paths[::2], RULE, tmp_path / "t.csv", key_column="key")  # the other has none
    assert (tmp_path / "t.csv").read_text().splitlines()[31].startswith('30,"k30",')


@pytest.mark.parametrize("out", ["t.parquet", "t.csv", "t.npy"])
def test_no_rows_take_up_and_leave_nothing(
    tmp_path: Path, predict: Predict, long_jobs: None, out: str
) -> None:
    (path,) = save(tmp_path, predict(0))
    assert score_files(path, RULE, tmp_path / out).rows == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["p0.npy", out])
