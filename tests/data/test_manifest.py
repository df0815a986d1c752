import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import genkl_ext as gk
from genkl_ext.data import Manifest, Problem

NAMES = ("cat", "dog", "Käfer")
ROWS = [
    # key, path, label, split, verified, kind
    ("images/a b,1.jpg", "images/a b,1.jpg", 0, "train", None, "conforming"),
    ("images/ü.jpg", "images/ü.jpg", 2, "train", False, "ambiguous"),
    ("x", "/elsewhere/x.jpg", 1, "clean", True, None),
    ("images/c.jpg", "images/c.jpg", None, "train", None, None),
    ("v", "s3://bucket/v.png", 1, "val", None, None),
    ("images/a b,1.jpg", "t/1.jpg", 0, "test", True, "conforming"),
]
COLUMNS = ("key", "path", "given_label", "split", "verified", "kind")


def make(rows: list = ROWS, **others: object) -> Manifest:
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)})
    settings = {"class_names": NAMES, "dataset": "mine", "root": "/data", **others}
    return Manifest(table, **settings)


def million(rows: int = 1_000_000) -> Manifest:
    number = pa.array(np.arange(rows))
    keys = pa.compute.binary_join_element_wise("images/", number.cast(pa.string()), ".jpg", "")
    columns = {"key": keys, "path": keys, "split": pa.repeat("train", rows)}
    labels = pa.array(np.arange(rows) % 14)
    return Manifest(
        pa.table({**columns, "given_label": labels}), tuple("abcdefghijklmn"), "x", "/data"
    )


def test_columns_and_rows() -> None:
    manifest = make()
    types = {field.name: str(field.type) for field in manifest.table.schema}
    assert types == {
        "key": "string",
        "path": "string",
        "given_label": "int32",
        "split": "dictionary<values=string, indices=int8, ordered=0>",
        "verified": "bool",
        "kind": "dictionary<values=string, indices=int32, ordered=0>",
    }
    assert len(manifest) == 6 and manifest.num_classes == 3
    assert manifest.table.to_pylist() == [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    assert manifest.labels.tolist() == [0, 2, 1, -1, 1, 0] and manifest.labels.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        manifest.labels[0] = 1
    with pytest.raises(AttributeError):
        manifest.root = "/other"  # type: ignore[misc]


def test_splits() -> None:
    manifest = make()
    assert manifest.rows("train").tolist() == [0, 1, 3]
    assert manifest.rows("train").dtype == np.int64
    assert [manifest.rows(s).tolist() for s in ("clean", "val", "test")] == [[2], [4], [5]]
    train = manifest.split("train")
    assert train.keys() == ["images/a b,1.jpg", "images/ü.jpg", "images/c.jpg"]
    assert (train.class_names, train.dataset, train.root) == (NAMES, "mine", "/data")
    assert manifest.split_sizes() == {"train": 3, "clean": 1, "val": 1, "test": 1}
    assert train.split_sizes() == {"train": 3}
    assert len(train.split("val")) == 0 and train.rows("val").tolist() == []
    with pytest.raises(ValueError, match="must be one of train, clean, val, test, got 'noisy'"):
        manifest.split("noisy")


def test_select() -> None:
    manifest = make(problems=(Problem("a.txt", "odd", 1),))
    assert manifest.select([4, 0, 4]).keys() == ["v", "images/a b,1.jpg", "v"]
    assert manifest.select(manifest.labels == 0).rows("test").tolist() == [1]
    assert manifest.select([]).keys() == []
    assert manifest.select([1]).problems == ()
    with pytest.raises(IndexError, match="from 0 to 5, got 6"):
        manifest.select([0, 6])
    with pytest.raises(IndexError, match="from 0 to 5, got -1"):
        manifest.paths([-1])
    with pytest.raises(ValueError, match=r"mask of rows must have shape \(6,\), got \(2,\)"):
        manifest.select(np.array([True, False]))
    with pytest.raises(ValueError, match=r"must be \(n,\) integers, got \(1,\) float64"):
        manifest.select([0.0])


def test_paths_below_the_root_absolute_and_urls() -> None:
    manifest = make()
    assert manifest.paths() == [
        "/data/images/a b,1.jpg",
        "/data/images/ü.jpg",
        "/elsewhere/x.jpg",
        "/data/images/c.jpg",
        "s3://bucket/v.png",
        "/data/t/1.jpg",
    ]
    assert manifest.path(4) == "s3://bucket/v.png"
    assert manifest.paths(np.array([5, 2])) == ["/data/t/1.jpg", "/elsewhere/x.jpg"]
    assert make(root="s3://b/c/").path(0) == "s3://b/c/images/a b,1.jpg"
    assert make(root="/").path(0) == "/images/a b,1.jpg"
    assert make(root="").path(0) == "./images/a b,1.jpg"


def test_lookup() -> None:
    manifest = make()
    assert manifest.lookup(["v", "images/ü.jpg", "v"]).tolist() == [4, 1, 4]
    assert manifest.lookup(["images/a b,1.jpg"]).tolist() == [0]  # the first of two
    assert manifest.lookup(["images/a b,1.jpg"], split="test").tolist() == [5]
    assert manifest.lookup([]).tolist() == []
    for keys in (pa.array(["x"]), np.array(["x"]), pa.chunked_array([["x"], []])):
        assert manifest.lookup(keys).tolist() == [2] and manifest.lookup(keys).dtype == np.int64
    short = ["ü.jpg", "images/c.jpg", "x"]
    assert manifest.lookup(short, prefix="images/").tolist() == [1, 3, 2]
    assert manifest.lookup(["no", "x"], missing="null").tolist() == [-1, 2]
    assert manifest.lookup(["x", "v"], split="val", missing="null").tolist() == [-1, 4]
    with pytest.raises(KeyError, match=r"got 4 of 5 that are not: 'n0', 'n1', 'n2', \.\.\."):
        manifest.lookup(["n0", "n1", "x", "n2", "n3"])
    with pytest.raises(KeyError, match="must be in split val, got 1 of 1 that are not: 'x'"):
        manifest.lookup(["x"], split="val")


def test_class_counts_and_ratio() -> None:
    manifest = make()
    assert manifest.class_counts().tolist() == [2, 2, 1]
    assert manifest.class_counts("train").tolist() == [1, 0, 1]
    assert manifest.class_counts("train", "clean").tolist() == [1, 1, 1]
    np.testing.assert_allclose(manifest.class_ratio("train", "test", "val"), [1 / 5, 2 / 5, 2 / 5])
    with pytest.raises(ValueError, match="got no image of class 0, 2"):
        manifest.class_ratio()  # of the clean images


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("clothing1m", [2 / 3, 1 / 3]),  # clean: 1 and 2
        ("food101n", [3 / 4, 1 / 4]),  # all but test: 2 and 6
        ("webvision", [3 / 4, 1 / 4]),  # train: 1 and 3
        ("mine", [2 / 3, 1 / 3]),
    ],
)
def test_the_ratio_is_of_the_published_population(dataset: str, expected: list[float]) -> None:
    splits = ["train"] * 4 + ["clean"] * 3 + ["val"] + ["test"]
    labels = [0, 1, 1, 1, 0, 1, 1, 1, 0]
    rows = [(str(i), str(i), c, s, None, None) for i, (c, s) in enumerate(zip(labels, splits))]  # noqa: B905
    manifest = make(rows, class_names=("a", "b"), dataset=dataset)
    np.testing.assert_allclose(manifest.class_ratio(), expected)
    noisy_only = manifest.split("train")
    if dataset == "mine":
        np.testing.assert_allclose(noisy_only.class_ratio(), [3 / 4, 1 / 4])


def test_save_and_load(tmp_path: Path) -> None:
    problems = (Problem("keys.txt", "2 keys are odd, first 'ü'", 2),)
    manifest = make(problems=problems)
    path = tmp_path / "manifest.parquet"
    manifest.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.parquet"]
    again = Manifest.load(path)
    assert again.table.equals(manifest.table)
    for name in ("class_names", "dataset", "root", "problems", "fingerprint"):
        assert getattr(again, name) == getattr(manifest, name), name
    assert Manifest.load(path, root=tmp_path).path(0) == f"{tmp_path}/images/a b,1.jpg"
    empty = make([])
    empty.save(path)
    assert len(Manifest.load(path)) == 0 and Manifest.load(path).rows("val").tolist() == []


def test_load_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        Manifest.load(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is not a manifest that genkl_ext saved"):
        Manifest.load(tmp_path / "b.parquet")
    with pytest.raises(FileNotFoundError):
        Manifest.load(tmp_path / "c.parquet")


def test_fingerprint_is_of_the_content() -> None:
    manifest = make()
    whole = manifest.fingerprint
    assert make(root="/other", problems=(Problem("a", "b", 1),)).fingerprint == whole
    chunks = pa.concat_tables([manifest.table[:2], manifest.table[2:2], manifest.table[2:]])
    chunks = chunks.replace_schema_metadata({"a": "b"})
    assert Manifest(chunks, NAMES, "mine", "").fingerprint == whole
    assert make().select(range(6)).fingerprint == whole
    assert make(ROWS[1:] + ROWS[:1]).select([5, 0, 1, 2, 3, 4]).fingerprint == whole
    part = Manifest(manifest.table.slice(2, 3), NAMES, "mine", "/data")
    assert part.fingerprint == manifest.select([2, 3, 4]).fingerprint
    other_coding = manifest.table.set_column(
        3, "split", manifest.table["split"].cast(pa.string()).dictionary_encode()
    )
    assert Manifest(other_coding, NAMES, "mine", "").fingerprint == whole

    changed = [
        make(class_names=("cat", "dog", "ant")),
        make(dataset="yours"),
        make(ROWS[:5]),
        make([ROWS[1], ROWS[0], *ROWS[2:]]),
    ]
    values = ("y", "y", None, "val", True, "other")
    for column, value in enumerate(values):
        row = list(ROWS[0])
        row[column] = value
        changed.append(make([tuple(row), *ROWS[1:]]))
    # Text that moves from one key to the next.
    changed.append(
        make([("images/a b,1.jp", *ROWS[0][1:]), ("gimages/ü.jpg", *ROWS[1][1:]), *ROWS[2:]])
    )
    prints = [m.fingerprint for m in changed]
    assert whole not in prints and len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("given_label", [0, 3], "must be from 0 to 2, or null, got 3 at row 1, key 'b'"),
        ("given_label", [-1, 0], "got -1 at row 0, key 'a'"),
        ("given_label", ["x", "y"], "column given_label must be int32, got string"),
        ("given_label", [0.5, 1.0], "column given_label must be int32, got double"),
        ("split", ["train", "Train"], "split must be one of train, .*, got 'Train' at row 1"),
        ("key", ["a", None], "column key must not be null, got null at row 1"),
        ("path", [None, "b"], "column path must not be null, got null at row 0"),
        ("verified", ["yes", "b"], "column verified must be bool, got string"),
    ],
)  # fmt: skip
def test_refuses_wrong_columns(column: str, value: list, message: str) -> None:
    good = {"key": ["a", "b"], "path": ["a", "b"], "split": ["train", "val"]}
    with pytest.raises(ValueError, match=message):
        Manifest(pa.table({**good, column: value}), NAMES, "mine", "/data")


def test_needs_its_columns() -> None:
    with pytest.raises(ValueError, match="must have a column split, got key, path"):
        Manifest(pa.table({"key": ["a"], "path": ["a"]}), NAMES, "mine", "/data")
    only = pa.table({"key": ["a"], "path": ["a"], "split": ["val"]})
    manifest = Manifest(only, NAMES, "mine", "/data")
    assert manifest.labels.tolist() == [-1]
    assert manifest.table["kind"].to_pylist() == manifest.table["verified"].to_pylist() == [None]


def test_missing_files(tmp_path: Path) -> None:
    for name in ("images/a b,1.jpg", "images/ü.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "images/c.jpg").mkdir()  # a folder is no file
    # /elsewhere/x.jpg and t/1.jpg are not there, and nobody asks for the URL.
    assert make(root=tmp_path).missing_files().tolist() == [2, 3, 5]
    (tmp_path / "t").write_text("a file where a folder should be")
    assert make(root=tmp_path).missing_files().tolist() == [2, 3, 5]
    (tmp_path / "t").unlink()
    (tmp_path / "t").mkdir()
    (tmp_path / "t/1.jpg").symlink_to(tmp_path / "images/ü.jpg")
    assert make(root=tmp_path).missing_files().tolist() == [2, 3]
    assert make([], root=tmp_path).missing_files().tolist() == []


def test_missing_files_beside_odd_names(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "itself").symlink_to("itself")
    try:
        open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb").close()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    paths = ["a.jpg", "itself", "itself/a.jpg", "nul\0/a.jpg", "n" * 300 + "/a.jpg"]
    rows = [(path, path, 0, "train", None, None) for path in paths]
    assert make(rows, root=tmp_path).missing_files().tolist() == [1, 2, 3, 4]


def test_describe() -> None:
    facts = make(problems=(Problem("a.txt", "odd", 2),)).describe()
    assert facts["splits"]["train"] == {"images": 3, "without_label": 1, "classes": [1, 0, 1]}
    assert list(facts["splits"]) == ["train", "clean", "val", "test"]
    assert (facts["images"], facts["verified_right"], facts["verified_wrong"]) == (6, 2, 1)
    assert facts["kinds"] == {"conforming": 2, "ambiguous": 1}
    assert facts["problems"] == [{"where": "a.txt", "what": "odd", "count": 2}]
    assert facts["class_names"] == list(NAMES)


def test_repr_is_one_readable_line() -> None:
    assert repr(make()) == (
        "Manifest(mine: 3 train, 1 clean, 1 val, 1 test; 3 classes; root '/data')"
    )
    assert repr(make([], problems=(Problem("a.txt", "b", 9),))) == (
        "Manifest(mine: no images; 3 classes, 1 odd; root '/data')"
    )


def test_can_be_sent_to_another_process() -> None:
    manifest = make()
    again = pickle.loads(pickle.dumps(manifest))
    assert again.fingerprint == manifest.fingerprint and again.paths() == manifest.paths()


def test_is_public_and_lazy() -> None:
    assert gk.Manifest is Manifest


def test_a_million_rows(tmp_path: Path) -> None:
    manifest = million()
    manifest.save(tmp_path / "m.parquet")
    again = Manifest.load(tmp_path / "m.parquet")
    assert again.fingerprint == manifest.fingerprint
    order = np.random.default_rng(0).permutation(len(manifest))
    keys = manifest.table["key"].take(pa.array(order))
    np.testing.assert_array_equal(again.lookup(keys, prefix="images/"), order)
    np.testing.assert_array_equal(again.select(order).labels, order % 14)
    assert again.paths([999_999]) == ["/data/images/999999.jpg"]
