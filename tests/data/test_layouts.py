"""Readers of the layouts, against lists written by hand and a plain reading of them."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision.datasets import ImageFolder

from genkl_ext.data import Manifest, layouts
from genkl_ext.data.layouts import clothing1m

RELEASE, FOOD101 = "Food-101N_release", "food-101"


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def problems(manifest: Manifest) -> list[str]:
    """What is odd, but for classes without an image, which small lists are full of."""
    return [str(p) for p in manifest.problems if "classes without" not in str(p)]


# Clothing1M

CLOTHING = {
    "noisy_train_key_list.txt": "images/0/99/2,1099.jpg\nimages/0/99/1,2099.jpg\n"
    "images/5/59/ü 3.jpg\n",
    "noisy_label_kv.txt": "images/5/59/ü 3.jpg 13\nimages/0/99/1,2099.jpg 0\n"
    "images/0/99/2,1099.jpg 7\nimages/9/90/not listed.jpg 1\n",
    "clean_label_kv.txt": "images/c.jpg 3\nimages/v.jpg 4\nimages/t.jpg 5\n",
    "clean_train_key_list.txt": "images/c.jpg\n",
    "clean_val_key_list.txt": "images/v.jpg\n",
    "clean_test_key_list.txt": "images/t.jpg\n",
}  # fmt: skip


def clothing(root: Path, place: str = "", **lists: str | bytes) -> Path:
    files = {**CLOTHING, **{f"{name}.txt": content for name, content in lists.items()}}
    return write(root, {place + name: content for name, content in files.items()})


@pytest.mark.parametrize(
    ("place", "pictures", "below"),
    [
        ("", True, "images/"),
        ("images/", True, "images/"),
        ("annotations/", True, "images/"),
        ("", False, ""),  # the root is the folder of images itself
    ],
)
def test_clothing1m(tmp_path: Path, place: str, pictures: bool, below: str) -> None:
    root = clothing(tmp_path, place)
    if pictures:
        (root / "images").mkdir(exist_ok=True)
    manifest = Manifest.from_clothing1m(root)
    rows = manifest.table.to_pylist()
    assert [row["key"] for row in rows] == [
        "images/0/99/2,1099.jpg",
        "images/0/99/1,2099.jpg",
        "images/5/59/ü 3.jpg",
        "images/c.jpg",
        "images/v.jpg",
        "images/t.jpg",
    ]
    assert [row["path"] for row in rows] == [below + row["key"][7:] for row in rows]
    assert [row["given_label"] for row in rows] == [7, 0, 13, 3, 4, 5]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["clean", "val", "test"]
    assert [row["verified"] for row in rows] == [None] * 3 + [True] * 3
    assert manifest.path(2) == f"{root}/{below}5/59/ü 3.jpg"
    assert manifest.class_names == clothing1m.CLASSES and manifest.num_classes == 14
    assert manifest.class_names[5] == "Hoodie" and manifest.dataset == "clothing1m"
    assert problems(manifest) == []
    assert layouts.detect(root) == "clothing1m"


@pytest.mark.parametrize("file", list(CLOTHING))
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"\r\n\n  \n",
        lambda text: text.removesuffix(b"\n"),
        lambda text: text.replace(b"images/", b""),
        lambda text: text.replace(b"\n", b" \t\n"),
    ],
    ids=["CRLF", "BOM", "blank lines", "no last line end", "no prefix", "space at line ends"],
)
def test_clothing1m_reads_the_same_from_files_of_other_habits(
    tmp_path: Path, file: str, change
) -> None:
    expected = Manifest.from_clothing1m(clothing(tmp_path / "a"))
    root = clothing(tmp_path / "b")
    (root / file).write_bytes(change((root / file).read_bytes()))
    manifest = Manifest.from_clothing1m(root)
    assert manifest.table.drop_columns("key").equals(expected.table.drop_columns("key"))
    keys, expected_keys = manifest.keys(), expected.keys()
    short = [key.removeprefix("images/") for key in keys]
    assert short == [key.removeprefix("images/") for key in expected_keys]
    assert problems(manifest) == []


def test_clothing1m_reports_what_is_odd(tmp_path: Path) -> None:
    root = clothing(
        tmp_path,
        noisy_train_key_list="a.jpg\n\nb.jpg\na.jpg\nimages/v.jpg\nd.jpg\n",
        noisy_label_kv="a.jpg 1\nb.jpg 2\na.jpg 3\nv.jpg 14\n",
    )
    (root / "clean_test_key_list.txt").unlink()
    manifest = Manifest.from_clothing1m(root)
    train = manifest.split("train")
    assert train.keys() == ["a.jpg", "b.jpg", "a.jpg", "images/v.jpg", "d.jpg"]
    assert train.labels.tolist() == [3, 2, 3, -1, -1]  # the last label of a, as a dict has it
    assert problems(manifest) == [
        "noisy_label_kv.txt: lines that are not a key and a label from 0 to 13: 1 of 4, "
        "first 'v.jpg 14' in line 4",
        "noisy_label_kv.txt: keys listed again: 1; the last label counts",
        "noisy_train_key_list.txt: blank lines between others: 1, first line 2",
        "clean_test_key_list.txt: does not exist",
        "split train: keys listed again: 1, first 'a.jpg' in row 2",
        "splits train and val: images in both: 1, first 'v.jpg'",
        "split train: images without a label: 2, first 'images/v.jpg' in row 3",
    ]
    assert [p.count for p in manifest.problems if "a label:" in p.what and "split" in p.where] == [
        2
    ]


@pytest.mark.parametrize("value", ["14", "-1", "x", "1.0", "99999999999", ""])
def test_one_odd_label_is_a_report_and_many_are_an_error(tmp_path: Path, value: str) -> None:
    keys = [f"images/{i}.jpg" for i in range(300)]

    def read(odd: int) -> Manifest:
        lines = [f"{key} {value if i < odd else i % 14}".strip() for i, key in enumerate(keys)]
        return Manifest.from_clothing1m(
            clothing(
                tmp_path,
                noisy_train_key_list="\n".join(keys),
                noisy_label_kv="\n".join(reversed(lines)),
            )
        )

    for odd in (1, 3):  # up to 1 %
        manifest = read(odd)
        assert manifest.rows("train").tolist() == list(range(300))
        assert (manifest.labels[:300] < 0).sum() == odd
        assert any(f": {odd} of 300, first" in line for line in problems(manifest))
    last = f"images/3.jpg {value}".strip()
    with pytest.raises(
        ValueError,
        match=rf"noisy_label_kv\.txt holds lines that are not a key and a label.*: "
        rf"4 of 300, first '{last}' in line 297$",
    ):
        read(4)


def test_clothing1m_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"noisy_train_key_list\.txt must be in one of"):
        Manifest.from_clothing1m(tmp_path)
    root = clothing(tmp_path, noisy_label_kv="images/other.jpg 1\n")
    with pytest.raises(
        ValueError,
        match=r"noisy_train_key_list\.txt must list images with a label in noisy_label_kv\.txt, "
        r"got none among 3, first 'images/0/99/2,1099\.jpg'",
    ):
        Manifest.from_clothing1m(root)
    (root / "noisy_label_kv.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"noisy_label_kv\.txt does not exist"):
        Manifest.from_clothing1m(root)
    clothing(tmp_path, noisy_label_kv=b"a 1\nb\xff 2\n")
    with pytest.raises(ValueError, match=r"noisy_label_kv\.txt is not a text file: line 2 is not"):
        Manifest.from_clothing1m(root)


@pytest.mark.parametrize("nothing", ["", "\n", "\r\n\r\n", "\ufeff", "\ufeff\n"])
def test_clothing1m_empty_lists(tmp_path: Path, nothing: str) -> None:
    manifest = Manifest.from_clothing1m(
        clothing(tmp_path, noisy_train_key_list=nothing, clean_val_key_list=nothing)
    )
    assert manifest.split_sizes() == {"clean": 1, "test": 1}
    assert problems(manifest) == []
    nothing_labelled = clothing(tmp_path, noisy_train_key_list=nothing, noisy_label_kv=nothing)
    assert len(Manifest.from_clothing1m(nothing_labelled)) == 3


def test_clothing1m_class_names(tmp_path: Path) -> None:
    root = clothing(tmp_path, category_names_eng="\n".join(f"c{i}" for i in range(20)))
    assert Manifest.from_clothing1m(root).class_names[19] == "c19"
    assert Manifest.from_clothing1m(root, class_names=list("abcdefghijklmn")).num_classes == 14


def test_clothing1m_of_full_size(tmp_path: Path) -> None:
    """A million keys in an order of their own, with two labels for some."""
    n = 1_000_000
    rng = np.random.default_rng(0)
    keys = [f"images/{i % 10}/{i % 100:02}/{i},{i}.jpg" for i in range(n)]
    order = rng.permutation(n).tolist()
    label = rng.integers(0, 14, n).tolist()
    root = clothing(
        tmp_path,
        noisy_train_key_list="\n".join([keys[i] for i in order]),
        noisy_label_kv="\r\n".join(
            [f"{keys[i]} 0" for i in range(1000)] + [f"{keys[i]} {label[i]}" for i in range(n)]
        ),
    )
    train = Manifest.from_clothing1m(root).split("train")
    assert train.labels.tolist() == [label[i] for i in order]
    assert train.keys(range(0, n, 1000)) == [keys[i] for i in order[::1000]]


# Food-101N

FOOD_CLASSES = ["apple_pie", "baby back ribs", "zuppa"]
FOOD = {
    f"{RELEASE}/meta/classes.txt": "class_name\nzuppa\napple_pie\nbaby back ribs\n",
    f"{RELEASE}/meta/imagelist.tsv": "class_name/key\nzuppa/b.jpg\nzuppa/a.jpg\napple_pie/ü.jpg\n"
    "apple_pie/Z.jpg\nbaby back ribs/1,2.jpg\nbaby back ribs/0.jpg\nzuppa/w.jpg\nzuppa/x.jpg\n",
    f"{RELEASE}/meta/verified_train.tsv": "class_name/key\tverification_label\n"
    "zuppa/b.jpg\t1\nzuppa/w.jpg\t0\napple_pie/Z.jpg\t1\n",
    f"{RELEASE}/meta/verified_val.tsv": "class_name/key\tverification_label\n"
    "zuppa/x.jpg\t1\nbaby back ribs/0.jpg\t1\nzuppa/a.jpg\t0\n",
    f"{FOOD101}/meta/classes.txt": "apple_pie\nbaby back ribs\nzuppa\n",
    f"{FOOD101}/meta/test.txt": "zuppa/11\napple_pie/7\n",
}  # fmt: skip


def test_food101n(tmp_path: Path) -> None:
    manifest = Manifest.from_food101n(write(tmp_path, FOOD))
    assert list(manifest.class_names) == FOOD_CLASSES and manifest.dataset == "food101n"
    rows = [
        (r["split"], r["key"], r["given_label"], r["verified"]) for r in manifest.table.to_pylist()
    ]
    assert rows == [
        ("train", "apple_pie/ü.jpg", 0, None),
        ("train", "baby back ribs/1,2.jpg", 1, None),
        ("train", "zuppa/a.jpg", 2, False),
        ("train", "zuppa/w.jpg", 2, False),
        ("clean", "apple_pie/Z.jpg", 0, True),
        ("clean", "zuppa/b.jpg", 2, True),
        ("val", "zuppa/x.jpg", 2, True),
        ("val", "baby back ribs/0.jpg", 1, True),
        ("test", "zuppa/11", 2, True),
        ("test", "apple_pie/7", 0, True),
    ]
    assert manifest.path(1) == f"{tmp_path}/{RELEASE}/images/baby back ribs/1,2.jpg"
    assert manifest.path(8) == f"{tmp_path}/{FOOD101}/images/zuppa/11.jpg"
    assert problems(manifest) == []
    assert layouts.detect(tmp_path) == "food101n"
    # All but the test images: 2 of apple_pie, 2 of ribs, 4 of zuppa.
    np.testing.assert_allclose(manifest.class_ratio(), [0.4, 0.4, 0.2])


def test_food101n_order_is_that_of_full_paths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = list("aB_-. ~é9,\u3042\U0001f355")
    keys = {
        f"{FOOD_CLASSES[rng.integers(3)]}/{''.join(rng.choice(letters, 4))}x.jpg"
        for _ in range(500)
    }
    listed = "\n".join(rng.permutation(sorted(keys)))
    write(tmp_path, {**FOOD, f"{RELEASE}/meta/imagelist.tsv": listed})
    for name in ("verified_train", "verified_val"):
        (tmp_path / f"{RELEASE}/meta/{name}.tsv").unlink()
    manifest = Manifest.from_food101n(tmp_path)
    prefix = f"{tmp_path}/{RELEASE}/images/"
    assert manifest.split("train").paths() == sorted(prefix + key for key in keys)


def test_food101n_lists_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, FOOD)
    for name in ("verified_train.tsv", "verified_val.tsv"):
        (tmp_path / RELEASE / "meta" / name).unlink()
    (tmp_path / FOOD101 / "meta/test.txt").unlink()
    manifest = Manifest.from_food101n(tmp_path)
    assert manifest.split_sizes() == {"train": 8}
    assert problems(manifest) == [
        f"{RELEASE}/meta/verified_train.tsv: does not exist",
        f"{RELEASE}/meta/verified_val.tsv: does not exist",
        f"{FOOD101}/meta/test.txt: does not exist",
    ]
    (tmp_path / RELEASE / "meta/imagelist.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"^from_food101n: .*imagelist\.tsv does not exist"):
        Manifest.from_food101n(tmp_path)


def test_food101n_reports_and_refuses(tmp_path: Path) -> None:
    name = f"{RELEASE}/meta/verified_val.tsv"
    unlisted = {**FOOD, name: FOOD[name] + "zuppa/nowhere.jpg\t1\nzuppa/y.jpg\t2\n"}
    assert problems(Manifest.from_food101n(write(tmp_path / "a", unlisted))) == [
        f"{name}: lines that are not CLASS/FILE of a class in meta/classes.txt and a flag, "
        "0 or 1: 1 of 5, first 'zuppa/y.jpg\\t2' in line 6",
        f"{RELEASE}/meta/imagelist.tsv: verified images that it lacks: 1",
    ]
    name = f"{RELEASE}/meta/imagelist.tsv"
    with pytest.raises(ValueError, match=r"not CLASS/FILE.*: 2 of 3, first 'pie/a\.jpg' in line 1"):
        Manifest.from_food101n(
            write(tmp_path / "b", {**FOOD, name: "pie/a.jpg\nzuppa\nzuppa/a.jpg"})
        )
    name = f"{FOOD101}/meta/classes.txt"
    with pytest.raises(ValueError, match=r"food-101/meta/classes\.txt must list the classes of"):
        Manifest.from_food101n(write(tmp_path / "c", {**FOOD, name: "apple_pie\nzuppa\n"}))


# mini WebVision

WEBVISION = {
    "info/train_filelist_google.txt": "google/q0001/b c.jpg 1\r\ngoogle/q0900/x.jpg 50\r\n"
    "google/q0001/a.jpg 49\r\ngoogle/q0000/é,1.jpg 0\r\n",
    "info/val_filelist.txt": "val2.jpg 7\nval1.jpg 999\nval0.jpg 49\n",
    "info/synsets.txt": "".join(f"n{c:08} name {c}, other name\n" for c in range(1000)),
}


def test_webvision(tmp_path: Path) -> None:
    manifest = Manifest.from_webvision(write(tmp_path, WEBVISION))
    rows = [
        (r["split"], r["path"], r["given_label"], r["verified"]) for r in manifest.table.to_pylist()
    ]
    assert rows == [
        ("train", "google/q0001/b c.jpg", 1, None),
        ("train", "google/q0001/a.jpg", 49, None),
        ("train", "google/q0000/é,1.jpg", 0, None),
        ("test", "val_images_256/val2.jpg", 7, True),
        ("test", "val_images_256/val0.jpg", 49, True),
    ]
    assert manifest.keys([0, 3]) == ["google/q0001/b c.jpg", "val2.jpg"]
    assert manifest.num_classes == 50 and manifest.class_names[3] == "name 3, other name"
    assert problems(manifest) == [] and layouts.detect(tmp_path) == "webvision"
    assert len(Manifest.from_webvision(tmp_path, 1000)) == 7
    assert Manifest.from_webvision(tmp_path, 2).keys() == [
        "google/q0001/b c.jpg",
        "google/q0000/é,1.jpg",
    ]


def test_webvision_without_its_optional_lists(tmp_path: Path) -> None:
    write(tmp_path, {"info/train_filelist_google.txt": WEBVISION["info/train_filelist_google.txt"]})
    manifest = Manifest.from_webvision(tmp_path)
    assert manifest.class_names == tuple(map(str, range(50)))
    assert problems(manifest) == [
        "info/synsets.txt: does not exist",
        "info/val_filelist.txt: does not exist",
    ]
    write(tmp_path, {"info/synsets.txt": "n0 tench\nn1 goldfish\n"})
    assert Manifest.from_webvision(tmp_path).class_names == ("tench", "goldfish")
    with pytest.raises(ValueError, match=r"synsets\.txt must name 3 classes, got 2 lines"):
        Manifest.from_webvision(tmp_path, 3)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        Manifest.from_webvision(tmp_path, 0)
    write(tmp_path, {"info/train_filelist_google.txt": "a.jpg\nb.jpg\n"})
    with pytest.raises(ValueError, match=r"not a key and a label: 2 of 2, first 'a\.jpg'"):
        Manifest.from_webvision(tmp_path)


# Folders

PICTURES = ["b/2.JPG", "b/1.png", "b/deep/0.jpeg", "b/deep.jpg", "a c/ü.webp", "Z/0.jpg"]


def test_folder_is_torchvisions_image_folder(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys([*PICTURES, "b/read me.txt"], b""))
    manifest = Manifest.from_folder(tmp_path)
    theirs = ImageFolder(str(tmp_path))
    assert list(manifest.class_names) == theirs.classes == ["Z", "a c", "b"]
    assert list(zip(manifest.paths(), manifest.labels.tolist(), strict=True)) == theirs.samples
    assert manifest.split_sizes() == {"train": 6}
    assert manifest.keys() == [os.path.relpath(path, tmp_path) for path, _ in theirs.samples]
    assert problems(manifest) == [] and layouts.detect(tmp_path) == "folder"


def test_folder_of_splits(tmp_path: Path) -> None:
    files = ["train/b/1.jpg", "train/a/1.jpg", "val/b/1.jpg", "clean/a/2.jpg", "test/c/3.jpg"]
    write(tmp_path, dict.fromkeys([*files, "readme.txt", ".cache/x/1.jpg"], b""))
    manifest = Manifest.from_folder(tmp_path)
    assert manifest.class_names == ("a", "b", "c")
    assert manifest.keys() == [files[i] for i in (1, 0, 3, 2, 4)]
    assert manifest.labels.tolist() == [0, 1, 0, 1, 2]
    assert manifest.split_sizes() == {"train": 2, "clean": 1, "val": 1, "test": 1}
    assert manifest.table["verified"].to_pylist() == [None, None, True, None, None]
    assert "split train: classes without an image: 1, first 'c'" in map(str, manifest.problems)


def test_folder_with_a_class_called_train(tmp_path: Path) -> None:
    write(tmp_path, {"train/1.jpg": b"", "car/1.jpg": b""})
    assert Manifest.from_folder(tmp_path).class_names == ("car", "train")


def test_folder_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^from_folder: .* got no \.jpg, .* file in 0 folders"):
        Manifest.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot list .*none: No such file"):
        Manifest.from_folder(tmp_path / "none")
    write(tmp_path, {"train/a/1.jpg": b"", "validation/a/1.jpg": b""})
    with pytest.raises(ValueError, match="nothing else, got train, validation"):
        Manifest.from_folder(tmp_path)


def test_folder_names_what_it_may_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "locked").mkdir(parents=True)
    (tmp_path / "a" / "1.jpg").touch()
    usual = os.scandir

    def scandir(path: os.PathLike[str] | str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="from_folder: cannot list .*locked: Permission"):
        Manifest.from_folder(tmp_path)


def test_folder_passes_over_links_to_themselves_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(["a/1.jpg", "b/1.jpg"], b""))
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "b" / "itself").symlink_to("itself")
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/\xff")
        for name in (b"/\xff/1.jpg", b"/\xff/2.jpg", b"/a/\xfe.jpg", b"/a/\xfe.txt"):
            open(os.fsencode(tmp_path) + name, "wb").close()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    manifest = Manifest.from_folder(tmp_path)
    assert layouts.detect(tmp_path) == "folder"
    assert manifest.class_names == ("a", "b")
    assert manifest.keys() == ["a/1.jpg", "b/1.jpg"] and manifest.labels.tolist() == [0, 1]
    (problem,) = manifest.problems
    assert problem.count == 3
    assert str(problem) == r".: 3 files whose name is not UTF-8, first 'a/\udcfe.jpg'"


# Tables

TABLE = {
    "path": ["a,1.jpg", "007.jpg", "https://x.org/NA.png"],
    "label": ["dog", "cat", None],
    "split": ["train", "validation", "train"],
    "kind": [None, "NA", "x"],
    "verified": [True, None, False],
    "size": [1, 2, 3],
}


def write_table(path: Path, columns: dict) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pa.csv.write_csv(
            table, path, pa.csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
        )
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_table(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"t{suffix}", TABLE)
    manifest = Manifest.from_table(path, splits={"validation": "val"})
    assert manifest.table.to_pylist() == [
        {"key": "a,1.jpg", "path": "a,1.jpg", "given_label": 1, "split": "train",
         "verified": True, "kind": None},
        {"key": "007.jpg", "path": "007.jpg", "given_label": 0, "split": "val",
         "verified": None, "kind": "NA"},
        {"key": "https://x.org/NA.png", "path": "https://x.org/NA.png", "given_label": None,
         "split": "train", "verified": False, "kind": "x"},
    ]  # fmt: skip
    assert manifest.class_names == ("cat", "dog") and manifest.root == str(tmp_path)
    assert layouts.detect(path) == "table"


def test_table_of_numbers_and_other_names(tmp_path: Path) -> None:
    columns = {"file": ["001", "2"], "id": [10, 11], "class": [2, 0]}
    path = write_table(tmp_path / "t.csv", columns)
    names = {"path": "file", "key": "id", "label": "class"}
    manifest = Manifest.from_table(path, columns=names, root="s3://bucket/x")
    assert manifest.class_names == ("0", "1", "2") and manifest.labels.tolist() == [2, 0]
    assert manifest.paths() == ["s3://bucket/x/001", "s3://bucket/x/2"]
    assert manifest.keys() == ["10", "11"] and manifest.split_sizes() == {"train": 2}
    named = Manifest.from_table(path, columns=names, class_names=["a", "b", "c", "d"])
    assert named.num_classes == 4


def test_table_of_numbers_as_pandas_keeps_them(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet", {"path": ["a", "b", "c"], "label": [10.0, None, 2]})
    manifest = Manifest.from_table(path)
    assert manifest.labels.tolist() == [10, -1, 2] and manifest.num_classes == 11
    write_table(path, {"path": ["a"], "label": [0.5]})
    with pytest.raises(ValueError, match=r"^from_table: .*t\.parquet: Float value 0\.5"):
        Manifest.from_table(path)


@pytest.mark.parametrize(
    "splits",
    [{"noisy": "train", "train": "clean"}, {"train": "clean", "noisy": "train"}],
    ids=["theirs first", "ours first"],
)
def test_table_of_splits_that_change_names(tmp_path: Path, splits: dict[str, str]) -> None:
    columns = {"path": ["a", "b", "c"], "label": [0, 0, 0], "split": ["noisy", "train", "val"]}
    manifest = Manifest.from_table(write_table(tmp_path / "t.csv", columns), splits=splits)
    assert manifest.table["split"].to_pylist() == ["train", "clean", "val"]


def test_table_at_a_url(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", {"path": ["a.jpg"], "label": [0]})
    manifest = Manifest.from_table(f"file://{path}")
    assert manifest.paths() == [f"file://{tmp_path}/a.jpg"]
    assert layouts.read(f"file://{path}").keys() == ["a.jpg"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"label": [1]}, {}, "must have a column path, got label"),
        ({"path": ["a"]}, {"columns": {"label": "class"}}, "must have a column class, got path"),
        ({"path": ["a", None], "label": [0, 0]}, {}, "must have a path, got none in row 1"),
        ({"path": ["a"], "label": [-1]}, {}, "given_label must be from 0 to -1, or null, got -1"),
        (
            {"path": ["a", "b"], "label": [0, 999_999_999]},
            {},
            "label must be below 1,000,000, got 999,999,999 in row 1",
        ),
        ({"path": ["a"], "label": [3]}, {"class_names": ["x"]}, "must be from 0 to 0, .*got 3"),
        (
            {"path": ["a", "b"], "label": ["x", "y"]},
            {"class_names": ["x"]},
            "label must be one of the 1 class names, got 'y' in row 1",
        ),
        ({"path": ["a"], "label": [0], "split": ["dev"]}, {}, "split must be one of .*got 'dev'"),
    ],
)  # fmt: skip
def test_table_refuses(tmp_path: Path, columns: dict, options: dict, message: str) -> None:
    path = write_table(tmp_path / "t.csv", columns)
    with pytest.raises(ValueError, match=rf"^from_table: .*t\.csv.* {message}"):
        Manifest.from_table(path, **options)


def test_table_refuses_other_files(tmp_path: Path) -> None:
    write(tmp_path, {"t.txt": "a", "t.parquet": "a", "t.csv": ""})
    for name, message in (
        ("t.txt", r"must have a suffix of \.csv, \.tsv, \.parquet"),
        ("t.parquet", "is no parquet table"),
        ("t.csv", "is no csv table"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.from_table(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Manifest.from_table(tmp_path / "none.csv")


def test_real_table(shared_data: Path) -> None:
    manifest = Manifest.from_table(
        shared_data / "clothing/images.csv",
        columns={"path": "file"},
        splits={"validation": "val", "extra": "train"},
        root=shared_data / "clothing/images",
    )
    assert manifest.split_sizes() == {"train": 3068 + 884, "val": 341}
    assert manifest.describe()["kinds"]["in_vocabulary"] == 3409
    assert manifest.missing_files().tolist() == []


# Which is which


def test_detect_and_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        layouts.detect(tmp_path / "none")
    with pytest.raises(ValueError, match="got none of them"):
        layouts.detect(tmp_path)
    manifest = Manifest.from_webvision(write(tmp_path / "w", WEBVISION))
    manifest.save(tmp_path / "m.parquet")
    assert layouts.detect(tmp_path / "m.parquet") == "manifest"
    assert layouts.read(tmp_path / "m.parquet").fingerprint == manifest.fingerprint
    assert layouts.read(tmp_path / "m.parquet", "/new").path(0) == "/new/google/q0001/b c.jpg"
    table = write_table(tmp_path / "t.parquet", {"path": ["a"], "label": [0]})
    assert layouts.detect(table) == "table" and layouts.read(table, "/new").path(0) == "/new/a"
    with pytest.raises(ValueError, match="root must be left out for the webvision folder"):
        layouts.read(tmp_path / "w", "/new")
