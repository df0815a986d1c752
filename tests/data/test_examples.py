"""Miniatures of the data sets: complete, readable, varied, the same for the same seed."""

import collections
import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkl_ext.data import Manifest, examples, layouts

LAYOUTS = ("clothing1m", "food101n", "webvision", "folder")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("examples")
    for layout in LAYOUTS:
        examples.make(layout, root / layout, count=160, classes=6, seed=1)
    return {layout: root / layout for layout in LAYOUTS}


def truth(root: Path) -> dict[str, dict[str, str]]:
    with open(root / "truth.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_and_read(made: dict[str, Path], layout: str) -> None:
    root = made[layout]
    assert layouts.detect(root) == layout
    manifest = layouts.read(root)
    assert manifest.problems == () and manifest.num_classes == 6
    expected = {"train": 160, "clean": 32, "val": 16, "test": 16}
    if layout == "webvision":
        expected = {"train": 160, "test": 16}
    assert manifest.split_sizes() == expected
    assert manifest.missing_files().tolist() == []

    true = truth(root)
    for row in manifest.table.to_pylist():
        told = true.pop(row["path"])
        assert told["split"] == row["split"] and int(told["label"]) == row["given_label"]
        assert told["key"] == row["key"]
        if row["split"] != "train":
            assert told["kind"] == "right"
        if row["verified"] is not None:
            assert row["verified"] == (told["kind"] == "right")
    assert true == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truth_is_a_table_for_judging(made: dict[str, Path], layout: str) -> None:
    manifest = Manifest.from_table(made[layout] / "truth.csv")
    assert manifest.missing_files().tolist() == []
    kinds = manifest.split("train").describe()["kinds"]
    assert sum(kinds.values()) == 160
    nonconforming = kinds["ambiguous"] + kinds["out of vocabulary"]
    assert 0.08 < nonconforming / 160 < 0.22 and 0.12 < kinds["wrong label"] / 160 < 0.38
    for row in truth(made[layout]).values():
        shown, right = row["shown"], row["kind"] == "right"
        assert (shown == "") == (row["kind"] in ("ambiguous", "out of vocabulary"))
        assert (shown == row["label"]) == right


def test_each_class_has_a_rightful_noisy_image(tmp_path: Path) -> None:
    examples.make("folder", tmp_path / "a", count=20, classes=20)
    assert {row["kind"] for row in truth(tmp_path / "a").values()} == {"right"}


def test_the_order_gives_nothing_away(made: dict[str, Path]) -> None:
    for layout in ("clothing1m", "webvision"):
        train = layouts.read(made[layout]).split("train")
        true = truth(made[layout])
        odd = np.array([true[key]["kind"] != "right" for key in train.table["path"].to_pylist()])
        assert 0.5 < odd[:80].mean() / odd[80:].mean() < 2
        assert train.labels[:6].tolist() != list(range(6))


def test_webvision_holds_classes_beyond_its_own(made: dict[str, Path]) -> None:
    lines = (made["webvision"] / "info/train_filelist_google.txt").read_text().splitlines()
    labels = [int(line.split()[-1]) for line in lines]
    beyond = [label for label in labels if label >= 6]
    assert len(labels) == 192 and len(beyond) == 32
    assert max(labels[:96]) >= 6  # not only at the end: trap R5


def test_food101n_verifies_some_wrong_labels(made: dict[str, Path]) -> None:
    manifest = layouts.read(made["food101n"])
    assert manifest.describe()["verified_wrong"] >= 5
    meta = made["food101n"] / "Food-101N_release/meta"
    flags = [line.split("\t")[1] for line in (meta / "verified_val.tsv").read_text().splitlines()]
    assert flags[0] == "verification_label" and {"0", "1"} == set(flags[1:])


def test_clothing1m_names_what_does_not_conform(made: dict[str, Path]) -> None:
    listed = (made["clothing1m"] / "NC_instances.txt").read_bytes().decode().split("\r\n")
    true = truth(made["clothing1m"])
    odd = {key for key, row in true.items() if row["shown"] == ""}
    assert {f"images/{key}" for key in listed if key} == odd


def test_pictures_are_varied(made: dict[str, Path]) -> None:
    kinds = collections.Counter()
    sizes = set()
    areas = []
    for path in made["folder"].rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            kinds[image.format, image.mode] += 1
            kinds["progressive"] += "progressive" in image.info
            sizes.add(image.size)
            areas.append(image.width * image.height)
    assert kinds["JPEG", "RGB"] > 150 and kinds["JPEG", "L"] > 0 and kinds["progressive"] > 0
    assert len(sizes) > 100
    assert 0.5 < np.median(areas) / (400 * 300) < 2
    assert any(w > h for w, h in sizes) and any(h > w for w, h in sizes)


def test_pictures_show_their_class() -> None:
    """Colours tell the classes apart, in the middle of a picture."""
    drawings = examples.Drawings(5)
    rng = np.random.default_rng(0)

    def colour(c: int) -> np.ndarray:
        data, _ = drawings.picture(c, "right", rng)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        w, h = image.size
        return np.asarray(image.crop((w // 4, h // 4, 3 * w // 4, 3 * h // 4))).mean((0, 1))

    means = np.array([[colour(c) for _ in range(30)] for c in range(5)])
    centres = means[:, :15].mean(1)
    nearest = np.linalg.norm(means[:, 15:, None] - centres, axis=-1).argmin(-1)
    assert (nearest == np.arange(5)[:, None]).mean() > 0.6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_same_bytes(tmp_path: Path, layout: str) -> None:
    def contents(name: str, seed: int) -> dict[Path, bytes]:
        root = tmp_path / name
        examples.make(layout, root, count=12, classes=3, seed=seed)
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    first = contents("a", 0)
    assert contents("b", 0) == first
    assert contents("c", 1).keys() != first.keys()


def test_default_numbers_of_classes(tmp_path: Path) -> None:
    for layout, classes in (("clothing1m", 14), ("food101n", 10), ("webvision", 50), ("folder", 5)):
        examples.make(layout, tmp_path / layout, count=50)
        assert layouts.read(tmp_path / layout).num_classes == classes
        assert layouts.read(tmp_path / layout).problems == ()


@pytest.mark.parametrize("classes", [2, 101])
def test_class_folders_sort_as_numbers(tmp_path: Path, classes: int) -> None:
    examples.make("food101n", tmp_path / "a", count=classes, classes=classes)
    names = Manifest.from_food101n(tmp_path / "a").class_names
    assert [int(name.partition("_")[0]) for name in names] == list(range(classes))


def pictures(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 20), (i, 0, 0)).save(path, "PNG" if "png" in name else "JPEG")


def test_given_pictures_in_class_folders(tmp_path: Path) -> None:
    pictures(tmp_path / "p", ["ant/1.jpg", "ant/2.png", "bee/1.jpg", "cat/1.jpg", "dog/1.jpg"])
    examples.make("folder", tmp_path / "out", images=tmp_path / "p", count=60, classes=2)
    manifest = Manifest.from_folder(tmp_path / "out")
    assert manifest.class_names == ("ant", "bee")
    widths = {"0": {20, 21}, "1": {22}, "": {23, 24}}  # of ant, bee; cat and dog fit none
    kinds = set()
    for path, row in truth(tmp_path / "out").items():
        with Image.open(tmp_path / "out" / path) as image:
            assert image.width in widths[row["shown"]]
            assert (image.format == "PNG") == path.endswith(".png")
        kinds.add(row["kind"])
    assert kinds == {"right", "wrong label", "out of vocabulary"}


def test_given_pictures_without_classes(tmp_path: Path) -> None:
    pictures(tmp_path / "p", ["1.jpg", "2.jpg"])
    examples.make("clothing1m", tmp_path / "out", images=tmp_path / "p", count=20, classes=3)
    assert Manifest.from_clothing1m(tmp_path / "out").split_sizes()["train"] == 20
    assert {row["kind"] for row in truth(tmp_path / "out").values()} == {"unknown"}


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    (tmp_path / "p").mkdir()
    for options, message in (
        ({"classes": 1}, "classes must be from 2 to 1000, got 1"),
        ({"count": 4}, "count must be at least 5, one for each class, got 4"),
        ({"images": tmp_path / "p"}, "must hold pictures, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            examples.make("folder", tmp_path / "out", **options)
    with pytest.raises(FileExistsError, match="cannot make .*full: it exists and is not an empty"):
        examples.make("folder", tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="cannot make"):
        examples.make("folder", tmp_path / "no/out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "p"]


def test_an_interrupted_writer_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(examples, "_write_truth", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examples.make("folder", tmp_path / "out", count=10)
    assert list(tmp_path.iterdir()) == []
