"""``BatchScorer`` on the batches of Ray and Spark, against the rule on the whole."""

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import genkl_ext as gk
from genkl_ext.scoring.chunks import score_rows
from genkl_ext.scoring.tables import LEFT_OUT

K = 5
RULE = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
SCORER = gk.BatchScorer(RULE)


def rows(n: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(K, 0.3), n).astype(dtype)


def check(got: Any, q: Any, at: Any = slice(None), prefix: str = "") -> None:
    expected = RULE.score(q)
    for name in LEFT_OUT:
        column = np.asarray(got[prefix + name])
        wanted = getattr(expected, name)[at]
        np.testing.assert_array_equal(column, wanted)
        assert column.dtype == wanted.dtype


def lists(q: np.ndarray, kind: str) -> pa.Array:
    number = pa.from_numpy_dtype(q.dtype)
    flat = pa.array(q.ravel(), number)
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, K)
    offsets = np.arange(0, q.size + 1, K)
    if kind == "large":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_arrays(dtype: str, n: int) -> None:
    q = rows(n, dtype)
    for array in (q, np.asfortranarray(q), np.repeat(q, 2, axis=0)[::2]):
        array.setflags(write=False)
        batch = {"key": np.arange(n), "probs": array}
        got = SCORER(batch)
        assert list(got) == ["key", "probs", *LEFT_OUT]
        assert got["key"] is batch["key"] and got["probs"] is array
        check(got, q)


def test_arrays_of_arrays() -> None:
    q = rows(7)
    objects = np.empty(7, object)
    objects[:] = list(q)
    check(SCORER({"probs": objects}), q)
    check(SCORER({"probs": list(q)}), q)
    check(SCORER({"probs": np.empty(0, object)}), q[:0])
    check(SCORER({"probs": np.empty(0)}), q[:0])


@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrow(kind: str, dtype: str) -> None:
    q = rows(40, dtype)
    column = lists(q, kind)
    batch = pa.record_batch({"probs": column, "key": pa.array(map(str, range(40)))})
    got = SCORER(batch)
    assert isinstance(got, pa.RecordBatch) and got.schema == SCORER.schema(batch.schema)
    check(got, q)
    assert got.column("key").to_pylist() == list(map(str, range(40)))
    check(SCORER(batch.slice(3, 8)), q[3:11])  # an offset in the buffers
    check(SCORER(batch.slice(0, 0)), q[:0])
    table = pa.Table.from_batches([batch.slice(0, 9), batch.slice(9, 0), batch.slice(9)])
    got = SCORER(table)
    assert isinstance(got, pa.Table)
    check(got, q)
    assert [len(b) for b in SCORER.arrow(iter([batch, batch.slice(5)]))] == [40, 35]
    assert len(SCORER(pa.Table.from_batches([], batch.schema))) == 0


def test_pandas() -> None:
    q = rows(6)
    frame = pd.DataFrame({"probs": list(q), "key": list("abcdef")}, index=[5, 4, 3, 2, 1, 0])
    got = SCORER(frame)
    check(got, q)
    assert got.index.tolist() == frame.index.tolist() and got["key"].tolist() == list("abcdef")
    assert list(frame.columns) == ["probs", "key"]
    assert [len(f) for f in SCORER.pandas(iter([frame, frame[:0]]))] == [6, 0]


def test_models_are_averaged_and_columns_chosen() -> None:
    a, b = rows(20), rows(20, seed=1)
    scorer = gk.BatchScorer(RULE, column=["a", "b"], keep=["key"], prefix="nc_")
    got = scorer({"key": np.arange(20), "a": a, "b": b})
    assert list(got) == ["key", *("nc_" + name for name in LEFT_OUT)]
    check(got, [a, b], prefix="nc_")
    logits = np.log(np.maximum(a, 1e-30))
    got = gk.BatchScorer(RULE, column="x", logits=True)({"x": logits})
    expected = RULE.score(logits, logits=True)
    np.testing.assert_array_equal(got["critical_alpha"], expected.critical_alpha)


def spoiled(n: int = 30) -> tuple[np.ndarray, list[int]]:
    """Predictions, and the rows of them that are none, in every way."""
    q = rows(n)
    q[2, 3] = np.nan
    q[3] = np.inf
    q[7, 0] = -1e-6
    q[11] *= 1.002
    q[12] *= 0.5
    q[n - 1] = 0
    return q, [2, 3, 7, 11, 12, n - 1]


def test_bad_rows() -> None:
    q, bad = spoiled()
    with pytest.raises(ValueError, match="column probs must be finite.*got nan at row 2, class 3"):
        SCORER({"probs": q})
    good = np.setdiff1d(np.arange(len(q)), bad)
    got = gk.BatchScorer(RULE, on_bad_row="nan")({"probs": q, "key": np.arange(len(q))})
    for name, value in LEFT_OUT.items():
        assert [str(x) for x in got[name][bad]] == [str(got[name].dtype.type(value))] * len(bad)
        np.testing.assert_array_equal(got[name][good], getattr(RULE.score(q[good]), name))
    for batch in (
        {"probs": q, "key": np.arange(len(q))},
        pa.table({"probs": lists(q, "fixed"), "key": np.arange(len(q))}),
        pd.DataFrame({"probs": list(q), "key": np.arange(len(q))}),
    ):
        got = gk.BatchScorer(RULE, on_bad_row="skip")(batch)
        assert np.asarray(got["key"]).tolist() == good.tolist()
        check(got, q[good])
    none = gk.BatchScorer(RULE, on_bad_row="skip")({"probs": q[bad]})
    assert all(len(column) == 0 for column in none.values())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("models", [1, 3])
def test_the_bad_rows_are_those_of_the_kernel(dtype: str, models: int) -> None:
    """Also at the very edge of the tolerance: each row shown to the kernel alone."""
    rng = np.random.default_rng(models)
    q = [rng.dirichlet(np.ones(K), 400).astype(dtype) for _ in range(models)]
    tolerance = 2e-2 if dtype == "float16" else 1e-3
    nudge = 1 + rng.choice([-1, 1], (400, 1)) * tolerance * rng.choice(
        [0.9, 0.99, 0.9999, 1, 1.0001, 1.01, 1.1], (400, 1)
    )
    q = [(m * nudge).astype(dtype) for m in q]
    q[0][17, 2] = np.nan
    alone = []
    for row in range(400):
        try:
            RULE.score([m[row : row + 1] for m in q])
        except ValueError:
            alone.append(row)
    assert 50 < len(alone) < 350
    columns, bad = score_rows(q, RULE, on_bad_row="nan")
    assert bad.tolist() == alone
    good = np.setdiff1d(np.arange(400), bad)
    expected = RULE.score([m[good] for m in q])
    np.testing.assert_array_equal(columns["critical_alpha"][good], expected.critical_alpha)
    assert np.isnan(columns["critical_alpha"][bad]).all()


def test_null_rows() -> None:
    q = rows(6)
    column = pa.array([list(map(float, row)) for row in q], pa.list_(pa.float32()))
    values = column.to_pylist()
    values[1] = None
    values[4][2] = None
    fixed = pa.array(values, pa.list_(pa.float32(), K))
    free = pa.array(values, pa.list_(pa.float32()))
    good = [0, 2, 3, 5]
    objects = np.empty(6, object)
    objects[:] = [None if v is None else np.array(v) for v in values]
    for data in (fixed, free):
        batch = pa.record_batch({"probs": data, "key": np.arange(6)})
        with pytest.raises(ValueError, match="column probs is null at row 1 of a batch"):
            SCORER(batch)
        got = gk.BatchScorer(RULE, on_bad_row="skip")(batch)
        assert got.column("key").to_pylist() == good
        check(got, q[good])
    got = gk.BatchScorer(RULE, on_bad_row="nan")({"probs": objects})
    assert np.isnan(got["critical_alpha"][[1, 4]]).all() and got["top_class"][1] == -1
    wide = [None if v is None or None in v else np.array(v) for v in values]
    assert np.flatnonzero(~np.isnan(got["critical_alpha"])).tolist() == good
    check({n: got[n][good] for n in got}, np.array([wide[i] for i in good]))


def test_tensors_with_nulls() -> None:
    q = rows(6)
    values = [list(map(float, row)) for row in q]
    storage = pa.array(
        [None if i in (0, 3) else v for i, v in enumerate(values)], pa.list_(pa.float32(), K)
    )
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [K]), storage)
    scorer = gk.BatchScorer(RULE, on_bad_row="skip", keep="key")
    table = pa.table({"probs": column, "key": np.arange(6)})
    for batch, good in ((table, [1, 2, 4, 5]), (table.slice(2), [2, 4, 5])):
        got = scorer(batch)
        assert got.column_names == ["key", *LEFT_OUT]
        assert got["key"].to_pylist() == good
        check(got, q[good])
    square = pa.fixed_shape_tensor(pa.float32(), [1, K])
    with pytest.raises(ValueError, match=r"5 numbers in each row, got shape \(1, 5\)"):
        SCORER(pa.table({"probs": pa.ExtensionArray.from_storage(square, lists(q, "fixed"))}))


def test_null_values() -> None:
    """None, NaN or NA for a row, or None within one; rows of Python numbers."""
    q = rows(7, "float64")
    values = [list(map(float, row)) for row in q]
    values[1], values[2], values[3] = None, np.nan, pd.NA
    values[5] = [None, *values[5][1:]]
    good = [0, 4, 6]
    scorer = gk.BatchScorer(RULE, on_bad_row="skip")
    frame = pd.DataFrame({"probs": pd.Series(values, dtype=object), "key": np.arange(7)})
    for batch in (frame, {"probs": values, "key": np.arange(7)}):
        got = scorer(batch)
        assert np.asarray(got["key"]).tolist() == good
        check(got, q[good])
    objects = q.astype(object)
    objects[2, 1] = None
    check(scorer({"probs": objects}), q[[0, 1, 3, 4, 5, 6]])


@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_order(order: str) -> None:
    check(SCORER({"probs": rows(9).astype(f"{order}f4")}), rows(9))


def test_columns_of_several_models() -> None:
    scorer = gk.BatchScorer(RULE, column=("a", "b"), on_bad_row="nan")
    with pytest.raises(TypeError, match="column b must hold float32 like a, got float64"):
        scorer({"a": rows(3), "b": rows(3, "float64")})
    with pytest.raises(ValueError, match="column b must have as many rows as a, 3, got 2"):
        scorer({"a": rows(3), "b": rows(2)})
    # A column of nulls only has no dtype of its own.
    got = scorer({"a": np.array([None, None]), "b": rows(2, "float64")})
    assert np.isnan(got["critical_alpha"]).all()


@pytest.mark.parametrize(
    "value",
    [
        "text",
        5,
        1.5,
        b"x",
        [1, 0, 0, 0, 0],
        ["a"] * K,
        [[0.2], [1.0, 2.0]],
        np.array([1, 0, 0, 0, 0]),
        [True] * K,
        {"a": 1},
    ],
)
def test_values_that_are_no_numbers_are_not_null(value: Any) -> None:
    objects = np.empty(3, object)
    objects[:] = [np.full(K, 1 / K), None, value]
    scorer = gk.BatchScorer(RULE, on_bad_row="skip")
    for batch in ({"probs": objects}, pd.DataFrame({"probs": objects})):
        with pytest.raises(TypeError, match="column probs must hold rows of float16.* at row 2 of"):
            scorer(batch)


@pytest.mark.parametrize("values", [[[1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0], [None] * 5]])
def test_lists_of_integers(values: list[Any]) -> None:
    table = pa.table({"probs": pa.array(values, pa.list_(pa.int64()))})
    with pytest.raises(TypeError, match="must hold float16, float32, float64, got int64"):
        gk.BatchScorer(RULE, on_bad_row="nan")(table)


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ({"other": rows(2)}, ValueError, "column probs must be in the batch, which has other"),
        ({"probs": rows(2)[:, :4]}, ValueError, r"5 numbers in each row, got shape \(2, 4\)"),
        ({"probs": np.zeros((2, 5), int)}, TypeError, "float16, float32, float64, got int64"),
        ({"probs": [[1.0], [0.5] * 5]}, ValueError, r"shape \(1,\) at row 0"),
        ({"probs": rows(2), "nc": [1, 2]}, ValueError, "has nc already; give a prefix"),
        (pa.table({"probs": [[1.0], [0.5] * 5]}), ValueError, "got 1 at row 0 of a batch"),
        (pa.table({"probs": [1.0]}), TypeError, "must be lists of 5 numbers, got double"),
        ([rows(2)], TypeError, "a dict of arrays, .* got list"),
    ],
)
def test_wrong_batches(batch: Any, kind: type[Exception], message: str) -> None:
    if isinstance(batch, dict) and isinstance(batch.get("probs"), list):
        ragged = np.empty(2, object)
        ragged[:] = [np.array(row) for row in batch["probs"]]
        batch = {"probs": ragged}
    with pytest.raises(kind, match=f"^BatchScorer: .*{message}"):
        SCORER(batch)


def test_wrong_settings() -> None:
    with pytest.raises(TypeError, match="rule must be a GenKL, got str"):
        gk.BatchScorer("clothing1m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_bad_row must be raise, nan or skip, got 'no'"):
        gk.BatchScorer(RULE, on_bad_row="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one column"):
        gk.BatchScorer(RULE, column=())
    for keep in ("key", ("key",)):
        with pytest.raises(ValueError, match="column key must be in the batch"):
            gk.BatchScorer(RULE, keep=keep)({"probs": rows(1), "k": [1], "e": [1], "y": [1]})
    for name in ("column", "keep"):
        for value in (5, ("a", 5), {"a"}):
            with pytest.raises(TypeError, match=f"{name} must be the name of a column, or names"):
                gk.BatchScorer(RULE, **{name: value})
    with pytest.raises(TypeError, match="column must be the name of a column, or names, got None"):
        gk.BatchScorer(RULE, column=None)  # type: ignore[arg-type]


def test_a_worker_needs_numpy_only() -> None:
    """Unpickled and called in a fresh process: no torch, no engine, no table library."""
    program = """
import pickle, sys
import numpy as np
scorer, q, expected = pickle.load(sys.stdin.buffer)
got = scorer({"probs": q})["critical_alpha"]
assert (got == expected).all()
for name in ("torch", "pyarrow", "pandas", "ray", "pyspark", "sklearn", "matplotlib"):
    assert name not in sys.modules, name
"""
    q = rows(50)
    sent = pickle.dumps((SCORER, q, RULE.score(q).critical_alpha))
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert pickle.loads(pickle.dumps(SCORER)) == SCORER
