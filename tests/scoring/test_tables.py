from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from genkl_ext.scoring import tables
from genkl_ext.scoring.keys import Keys
from genkl_ext.scoring.tables import COLUMNS, TableWriter, read_settings

SETTINGS = {"rule": {"alpha": 1.05}, "text": "ä"}


def columns(rows: int) -> dict[str, Any]:
    stream = np.random.default_rng(0)
    kinds = {name: kind for name, kind in COLUMNS.items() if name not in ("row", "key")}
    return {name: (stream.random(rows) * 9 - 3).astype(kind) for name, kind in kinds.items()}


def key_list(folder: Path, rows: int) -> Keys:
    path = folder / "keys.txt"
    path.write_text("".join(f'images/{i},"ä".jpg\n' for i in range(rows)), encoding="utf-8")
    return Keys(path, rows)


def read(path: Path) -> dict[str, Any]:
    """Columns of a table of any format, as NumPy arrays (keys as lists)."""
    if path.suffix == ".npy":
        records = np.load(path, allow_pickle=False)
        assert records.dtype.names is not None
        table = {name: records[name] for name in records.dtype.names}
    else:
        arrow = pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
        table = {name: arrow[name].to_numpy() for name in arrow.column_names}
    if "key" in table:
        table["key"] = list(table["key"])
    return table


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
@pytest.mark.parametrize("rows", [1, 7, 8, 23])
@pytest.mark.parametrize("with_keys", [False, True])
def test_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, rows: int, with_keys: bool
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", 8)
    keys = key_list(tmp_path, rows) if with_keys else None
    written = columns(rows)
    path = tmp_path / f"t{suffix}"
    with TableWriter(path, written, keys, SETTINGS) as writer:
        writer.advance(rows)
    table = read(path)
    assert list(table) == [name for name in COLUMNS if name != "key" or with_keys]
    np.testing.assert_array_equal(table["row"], np.arange(rows))
    if keys is not None:
        assert table["key"] == keys.slice(0, rows)
    for name, column in written.items():
        # The text of a CSV file has enough digits to give back the same float32.
        np.testing.assert_array_equal(table[name].astype(column.dtype), column)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
@pytest.mark.parametrize("with_keys", [False, True])
def test_no_rows(tmp_path: Path, suffix: str, with_keys: bool) -> None:
    path = tmp_path / f"t{suffix}"
    keys = key_list(tmp_path, 0) if with_keys else None
    with TableWriter(path, columns(0), keys, SETTINGS) as writer:
        writer.advance(0)
    table = read(path)
    assert list(table) == [name for name in COLUMNS if name != "key" or with_keys]
    assert all(len(column) == 0 for column in table.values())


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_types(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    with TableWriter(path, columns(5), key_list(tmp_path, 5), SETTINGS) as writer:
        writer.advance(5)
    if suffix == ".parquet":
        schema = pq.read_schema(path)
        names = {"float": "float32"}
        kinds = {f.name: names.get(str(f.type), str(f.type)) for f in schema}
        assert kinds == COLUMNS
        assert not any(f.nullable for f in schema)
    else:
        dtype = np.load(path).dtype
        assert {name: str(dtype[name]) for name in COLUMNS} == {**COLUMNS, "key": "<U17"}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
def test_bytes_do_not_depend_on_when_rows_became_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    contents = set()
    for steps in ([18], range(19), [3, 4, 5, 17, 18]):
        # Rows that are not known yet hold something else.
        filling = {name: np.full_like(column, 1) for name, column in columns(18).items()}
        path = tmp_path / f"t{suffix}"
        with TableWriter(path, filling, None, SETTINGS) as writer:
            for known in steps:
                for name, column in columns(18).items():
                    filling[name][:known] = column[:known]
                writer.advance(known)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_settings_come_back(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with TableWriter(path, columns(3), None, SETTINGS) as writer:
        writer.advance(3)
    assert read_settings(path) == SETTINGS


def test_settings_of_another_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(ValueError, match=r"t\.parquet is not a table of genkl scores$"):
        read_settings(path)


@pytest.mark.parametrize(("name", "got"), [("t.txt", "'.txt'"), ("t", "none"), ("t.PARQUET", "'.")])
def test_unknown_suffix(tmp_path: Path, name: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"suffix of \.parquet, \.csv, \.npy, got {got}"):
        TableWriter(tmp_path / name, columns(3), None, SETTINGS)
    assert not (tmp_path / name).exists()
