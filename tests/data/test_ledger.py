"""The ledger: saved whole, read back, and found again in manifests that differ from the scanned."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genkl_ext.data.decode import Limits
from genkl_ext.data.ledger import METADATA_KEY, SCHEMA, Ledger
from genkl_ext.data.manifest import Manifest

BROKEN = [1, 4, 5, 8]
REASONS = ["truncated", "corrupt", "truncated", "missing"]


def manifest(root: str = "/data/set", prefix: str = "") -> Manifest:
    """Ten images of a folder and one elsewhere."""
    paths = [f"{prefix}images/{i}.jpg" for i in range(10)] + ["/elsewhere/10.jpg"]
    table = pa.table({"key": paths, "path": paths, "split": ["train"] * 6 + ["val"] * 5})
    return Manifest(table, ("a",), "test", root)


def ledger(scanned: Manifest, broken: list[int] = BROKEN) -> Ledger:
    rows = scanned.table.take(pa.array(broken, pa.int64()))
    columns = {
        "row": broken,
        "key": rows["key"],
        "path": rows["path"],
        "reason": REASONS[: len(broken)],
        "detail": [f"detail {row}" for row in broken],
    }
    table = pa.table(columns).cast(SCHEMA)
    return Ledger(table, scanned.fingerprint, scanned.root, Limits(), len(scanned), 1234)


def test_save_and_load(tmp_path: Path) -> None:
    saved = ledger(manifest())
    saved.save(tmp_path / "l.parquet")
    loaded = Ledger.load(tmp_path / "l.parquet")
    assert loaded.table.equals(saved.table)
    for field in dataclasses.fields(Ledger)[1:]:
        assert getattr(loaded, field.name) == getattr(saved, field.name)
    loaded.save(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "l.parquet").read_bytes()


def test_counts_and_facts() -> None:
    it = ledger(manifest())
    assert len(it) == 4
    assert list(it.counts().items()) == [("truncated", 2), ("corrupt", 1), ("missing", 1)]
    facts = it.describe()
    json.dumps(facts)
    assert (facts["scanned"], facts["healthy"], facts["broken"]) == (11, 7, 4)
    assert facts["first"][0] == {
        "row": 1,
        "key": "images/1.jpg",
        "path": "images/1.jpg",
        "reason": "truncated",
        "detail": "detail 1",
    }
    assert "4 broken images of 11" in repr(it)


def test_rows_of_the_manifest_itself_and_of_a_moved_one() -> None:
    it = ledger(manifest(), [1, 4, 10])
    for root in ("/data/set", "/data/set/", "/data/settled", "s3://bucket/set", "elsewhere"):
        assert it.rows_in(manifest(root)).tolist() == [1, 4, 10]


def test_rows_of_a_part_in_another_order() -> None:
    it = ledger(manifest())
    assert it.rows_in(manifest().split("val")).tolist() == [2]
    assert it.rows_in(manifest().select([9, 5, 0, 4, 5])).tolist() == [1, 3, 4]
    assert it.rows_in(manifest().select([0, 2])).tolist() == []
    found = it.rows_in(manifest().select([]))
    assert found.dtype == np.int64 and found.shape == (0,)
    assert ledger(manifest(), []).rows_in(manifest()).tolist() == []


def test_rows_where_one_root_is_inside_the_other() -> None:
    above, below = manifest("/data", "set/"), manifest("/data/set")
    for scanned, asked in ((above, below), (below, above)):
        assert ledger(scanned, [1, 4, 10]).rows_in(asked).tolist() == [1, 4, 10]
    # The same names in a folder inside are other images.
    assert ledger(manifest("/data/set"), [1, 4]).rows_in(manifest("/data")).tolist() == []


def test_a_relative_root_is_a_folder_of_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    it = ledger(manifest("set"), [1])
    assert it.rows_in(manifest(str(tmp_path), "set/")).tolist() == [1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("no table"), "is not a Parquet file"),
        (lambda path: manifest().save(path), "is not a ledger that genkl scan wrote"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"ledger: .*x.parquet {message}"):
        Ledger.load(tmp_path / "x.parquet")


def test_other_versions_are_refused(tmp_path: Path) -> None:
    it = ledger(manifest())
    it.save(tmp_path / "good.parquet")
    table = pq.read_table(tmp_path / "good.parquet")
    about = json.loads(table.schema.metadata[METADATA_KEY])
    newer = {METADATA_KEY: json.dumps({**about, "format": 2}).encode()}
    pq.write_table(table.replace_schema_metadata(newer), tmp_path / "newer.parquet")
    pq.write_table(table.drop_columns("detail"), tmp_path / "fewer.parquet")
    for name in ("newer", "fewer"):
        with pytest.raises(ValueError, match="another version of genkl_ext; scan again"):
            Ledger.load(tmp_path / f"{name}.parquet")


def test_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Ledger.load(tmp_path / "none.parquet")
    with pytest.raises(FileNotFoundError):
        ledger(manifest()).save(tmp_path / "none" / "l.parquet")
