"""The queries of ``docs/engines.md`` on a table of scores, against NumPy; and that row groups which
cannot answer are not read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import genkl_ext as gk
from genkl_ext.data import Manifest
from genkl_ext.scoring import tables

duckdb = pytest.importorskip("duckdb")

DOCUMENT = Path(__file__).parents[2] / "docs" / "engines.md"
QUERIES = dict(re.findall(r"(?ms)^```sql\n-- ([^\n]+)\n(.+?)^```$", DOCUMENT.read_text()))
K = 5
GROUP = 500
GROUPS = 6
DULL = (1, 4)  # row groups of predictions that are certain
WITHOUT = (7, GROUP + 3)  # rows without a prediction, the second in a dull row group
RULE = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)


@pytest.fixture
def table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, dict[str, NDArray[Any]]]]:
    """A table of scores in the working folder, and its columns by the rule itself."""
    stream = np.random.default_rng(0)
    models = stream.dirichlet(np.full(K, 0.5), GROUP * GROUPS).astype(np.float32)
    for group in DULL:
        models[group * GROUP : (group + 1) * GROUP] = np.eye(K)[stream.integers(0, K, GROUP)]
    scores = RULE.score(models)
    columns = {name: np.asarray(getattr(scores, name)).copy() for name in tables.LEFT_OUT}
    for name, value in tables.LEFT_OUT.items():
        columns[name][list(WITHOUT)] = value
    models[list(WITHOUT)] = np.nan
    np.save(tmp_path / "predictions.npy", models)
    monkeypatch.setattr(tables, "BLOCK_ROWS", GROUP)
    path = tmp_path / "scores.parquet"
    gk.score_files([tmp_path / "predictions.npy"], RULE, out=path, on_bad_row="nan")
    monkeypatch.chdir(tmp_path)
    yield path, columns


def ask(query: str) -> dict[str, NDArray[Any]]:
    """What a query of the document finds, by another connection: nothing is kept in between."""
    with duckdb.connect() as connection:
        found: dict[str, NDArray[Any]] = connection.execute(QUERIES[query]).fetchnumpy()
        return found


def test_statistics_of_each_row_group(table: Any) -> None:
    path, columns = table
    file = pq.ParquetFile(path)
    assert file.num_row_groups == GROUPS
    for i in range(GROUPS):
        group = file.metadata.row_group(i)
        rows = slice(i * GROUP, (i + 1) * GROUP)
        by_name = {
            group.column(c).path_in_schema: group.column(c).statistics
            for c in range(group.num_columns)
        }
        assert (by_name["row"].min, by_name["row"].max) == (rows.start, rows.stop - 1)
        for name in tables.LEFT_OUT:
            values = columns[name][rows]
            expected = (np.nanmin(values), np.nanmax(values))
            assert (by_name[name].min, by_name[name].max) == expected, name
            assert by_name[name].null_count == 0


def test_rows_above(table: Any) -> None:
    _, columns = table
    rows = np.flatnonzero(columns["critical_alpha"].astype(np.float64) >= 1.2)
    found = ask("all rows that are non-conforming at alpha = 1.2")
    assert 0 < len(rows) < GROUP * GROUPS
    np.testing.assert_array_equal(found["row"], rows)
    np.testing.assert_array_equal(found["critical_alpha"], columns["critical_alpha"][rows])


def test_row_groups_that_cannot_answer_are_not_read(table: Any) -> None:
    path, columns = table
    damaged = bytearray(path.read_bytes())
    for i in DULL:
        group = pq.read_metadata(path).row_group(i)
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            damaged[start : start + column.total_compressed_size] = (
                b"\xff" * column.total_compressed_size
            )
    path.write_bytes(damaged)
    test_rows_above((path, columns))
    for query in ("the three least conforming rows of each class", "rows without a prediction"):
        with pytest.raises(duckdb.Error):
            ask(query)


def test_rows_without_a_prediction(table: Any) -> None:
    assert ask("rows without a prediction")["row"].tolist() == list(WITHOUT)


def test_first_of_each_class(table: Any) -> None:
    _, columns = table
    expected = []
    for c in range(K):
        rows = np.flatnonzero(columns["top_class"] == c)
        order = np.argsort(-columns["critical_alpha"][rows], kind="stable")
        expected += rows[order[:3]].tolist()
    found = ask("the three least conforming rows of each class")
    assert found["row"].tolist() == expected
    np.testing.assert_array_equal(found["critical_alpha"], columns["critical_alpha"][expected])


def test_share_at_several_alphas(table: Any) -> None:
    _, columns = table
    found = ask("share of non-conforming rows at several alphas")
    assert found["alpha"].tolist() == [0.8, 1.0, 1.2]
    critical = np.delete(columns["critical_alpha"], WITHOUT).astype(np.float64)
    expected = [(critical >= alpha).mean() for alpha in (0.8, 1.0, 1.2)]
    np.testing.assert_allclose(found["share"], expected, rtol=1e-12)


def test_join_with_the_manifest_by_row(table: Any) -> None:
    _, columns = table
    rows = GROUP * GROUPS
    splits = np.random.default_rng(1).permutation(rows * ["train"] + rows * ["test"])
    keys = [f"images/{i}.jpg" for i in range(2 * rows)]
    images = {"key": keys, "path": keys, "given_label": np.arange(2 * rows) % K, "split": splits}
    manifest = Manifest(pa.table(images), tuple("abcde"), "mine", "/data")
    manifest.save("manifest.parquet")
    found = ask("the images that are non-conforming, with their given labels")
    nc = np.flatnonzero(columns["nc"])
    train = manifest.split("train")
    assert found["key"].tolist() == [train.table["key"][i].as_py() for i in nc]
    np.testing.assert_array_equal(found["given_label"], train.labels[nc])
    np.testing.assert_array_equal(found["top_class"], columns["top_class"][nc])


def test_copy_in_order(table: Any) -> None:
    _, columns = table
    with duckdb.connect() as connection:
        connection.execute(QUERIES["a copy whose first row groups hold the least conforming rows"])
    copy = pq.read_table("by_critical_alpha.parquet")
    order = np.argsort(-columns["critical_alpha"], kind="stable")[: -len(WITHOUT)]
    np.testing.assert_array_equal(copy["row"].to_numpy(), order)


def test_every_query_of_the_document_is_here() -> None:
    assert len(QUERIES) == DOCUMENT.read_text().count("```sql") == 6
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in QUERIES)
