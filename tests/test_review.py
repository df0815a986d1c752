"""The list of images to look at, and the decisions that come back in it."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import genkl_ext as gk
from genkl_ext import review
from genkl_ext.data import Manifest

NAMES = ("dress", "=hat", "skirt", "7")
KEYS = ["a", "=b", "'c", "d", "e", 'a b,"c"\n', "-f", "d"]


@pytest.fixture
def manifest() -> Manifest:
    """Eight noisy images (two of one key, one without a label), one clean and one of the test."""
    rows = len(KEYS)
    return Manifest(
        pa.table(
            {
                "key": [*KEYS, "clean", "test"],
                "path": [f"{i}.jpg" for i in range(rows + 2)],
                "given_label": pa.array([0, 1, 2, 3, None, 0, 1, 2, 0, 0], pa.int32()),
                "split": ["train"] * rows + ["clean", "test"],
                "verified": pa.array([None] * rows + [True, None], pa.bool_()),
            }
        ),
        NAMES,
        "table",
        "/images",
    )


@pytest.fixture
def members(tmp_path: Path) -> list[Path]:
    """Two (8, 4) prediction files."""
    stream = np.random.default_rng(4)
    paths = [tmp_path / "0.npy", tmp_path / "1.npy"]
    for path in paths:
        np.save(path, stream.dirichlet(np.full(4, 0.4), len(KEYS)).astype(np.float32))
    return paths


def decisions(folder: Path, *lines: str, header: str = "key,decision") -> Path:
    path = folder / "decisions.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def rows(manifest: Manifest) -> list[tuple[object, ...]]:
    table = manifest.table
    return list(
        zip(*(table[name].to_pylist() for name in ("key", "given_label", "split", "verified")),
            strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 500])
def test_the_worst_are_found(
    tmp_path: Path, size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "_CHUNK_BYTES", 1000)  # many chunks, the last one smaller
    stream = np.random.default_rng(size)
    k = 5
    files = [stream.dirichlet(np.full(k, 0.3), size).astype(dtype) for _ in range(3)]
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, file in zip(paths, files, strict=True):
        np.save(path, file)
    q = np.mean([file.astype(np.float32) for file in files], axis=0, dtype=np.float32)
    labels = stream.integers(-1, k, size).astype(np.int32)
    critical = stream.uniform(0, 2, size).astype(np.float32)
    critical[size // 2 :: 3] = np.nan
    nc = critical >= 1.3
    top = np.where(np.isnan(critical), -1, q.argmax(axis=1)).astype(np.int32)
    found = review.find(critical, nc, top, labels, paths, most=40)

    conforming = [i for i in range(size) if not np.isnan(critical[i]) and not nc[i]]
    moved = [i for i in conforming if labels[i] >= 0 and q[i].argmax() != labels[i]]
    lead = {i: q[i].max() - q[i, labels[i]] for i in moved}
    margin = {i: np.sort(q[i])[-1] - np.sort(q[i])[-2] for i in conforming}
    assert found.rows["nc"].tolist() == sorted(np.flatnonzero(nc), key=lambda i: -critical[i])[:40]
    assert found.rows["mislabelled"].tolist() == sorted(moved, key=lambda i: -lead[i])[:40]
    assert found.rows["ambiguous"].tolist() == sorted(conforming, key=lambda i: margin[i])[:40]
    assert found.found == {
        "nc": nc.sum(), "mislabelled": len(moved), "ambiguous": len(conforming)
    }  # fmt: skip
    np.testing.assert_array_equal(review.averages(paths, np.arange(size)), q)


def test_each_image_is_listed_once_the_worst_of_each_kind_first() -> None:
    found = review.Candidates(
        {"nc": np.array([5]), "mislabelled": np.array([2, 4, 9]), "ambiguous": np.array([4, 2, 1])},
        {},
        {},
    )
    expected = [
        (5, "nc"),
        (2, "mislabelled"),
        (4, "ambiguous"),
        (9, "mislabelled"),
        (1, "ambiguous"),
    ]
    assert found.in_turn(10) == expected
    assert found.in_turn(1) == expected[:3]
    assert found.in_turn(0) == []


def test_without_predictions_there_are_nonconforming_ones_only(tmp_path: Path) -> None:
    critical = np.array([0.5, np.nan, 1.5, 2.5], np.float32)
    labels = np.zeros(4, np.int32)
    found = review.find(critical, critical > 1, labels + 1, labels, [], 5)
    assert {name: list(rows) for name, rows in found.rows.items()} == {
        "nc": [3, 2], "mislabelled": [], "ambiguous": []
    }  # fmt: skip


def test_predictions_of_other_rows_are_refused(members: list[Path]) -> None:
    nothing = np.zeros(9, np.int32)
    with pytest.raises(ValueError, match="0.npy must have a row for each of 9 noisy images, got 8"):
        review.find(nothing.astype(np.float32), nothing > 0, nothing, nothing, members, 5)


def test_the_list_has_what_people_need(
    tmp_path: Path, manifest: Manifest, members: list[Path]
) -> None:
    out = tmp_path / "list.csv"
    chosen = [(4, "nc"), (0, "ambiguous"), (6, "mislabelled")]
    critical = np.arange(8, dtype=np.float32) / 8
    review.write_list(out, manifest, chosen, critical, members)
    with out.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == review.COLUMNS
    assert [line["reason"] for line in lines] == ["nc", "ambiguous", "mislabelled"]
    assert [line["path"] for line in lines] == ["/images/4.jpg", "/images/0.jpg", "/images/6.jpg"]
    assert [line["given_label"] for line in lines] == ["", "dress", "'=hat"]
    assert [line["critical_alpha"] for line in lines] == ["0.5", "0", "0.75"]
    assert {line["decision"] for line in lines} == {""}
    q = (np.load(members[0]) + np.load(members[1])) / np.float32(2)
    for line, (row, _) in zip(lines, chosen, strict=True):
        order = np.argsort(-q[row])[:3]
        names = line["top_classes"].removeprefix("'").split(" | ")
        assert names == [NAMES[c] for c in order]
        assert line["probabilities"] == " | ".join(f"{q[row, c]:.4f}" for c in order)


def test_no_cell_is_a_formula_and_every_key_comes_back(
    tmp_path: Path, manifest: Manifest, members: list[Path]
) -> None:
    out = tmp_path / "list.csv"
    chosen = [(row, "nc") for row in range(len(KEYS))]
    review.write_list(out, manifest, chosen, np.zeros(8, np.float32), members)
    with out.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert not any(cell.startswith(tuple("=+-@\t\r")) for line in lines for cell in line)
    with out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([lines[0], *([*line[:-1], "skirt"] for line in lines[1:])])
    applied = review.apply(manifest, out)
    assert applied.manifest.split("train").keys() == []
    assert applied.manifest.class_counts("clean").tolist() == [1, 0, len(KEYS), 0]


def test_decisions_become_labels(tmp_path: Path, manifest: Manifest) -> None:
    path = decisions(tmp_path, "a,ok", "'=b, skirt ", "''c,NC", "e,0", '"a b,""c""\n",', "-f,=HAT")
    applied = review.apply(manifest, path)
    assert rows(applied.manifest) == [
        ("a", 0, "clean", True),
        ("=b", 2, "clean", True),
        ("'c", None, "train", False),
        ("d", 3, "train", None),
        ("e", 0, "clean", True),
        ('a b,"c"\n', 0, "train", None),
        ("-f", 1, "clean", True),
        ("d", 2, "train", None),
        ("clean", 0, "clean", True),
        ("test", 0, "test", None),
    ]
    counts = (applied.confirmed, applied.relabelled, applied.nonconforming, applied.undecided)
    assert counts == (2, 2, 1, 1)
    assert applied.manifest.class_names == NAMES and applied.manifest.root == "/images"
    assert rows(manifest)[0] == ("a", 0, "train", None)


def test_rows_of_one_key_are_decided_together(tmp_path: Path, manifest: Manifest) -> None:
    changed = rows(review.apply(manifest, decisions(tmp_path, "d,dress")).manifest)
    assert changed[3] == changed[7] == ("d", 0, "clean", True)
    kept = rows(review.apply(manifest, decisions(tmp_path, "d,ok")).manifest)
    assert (kept[3][1], kept[7][1]) == (3, 2)


def test_a_class_name_counts_before_a_number(tmp_path: Path, manifest: Manifest) -> None:
    changed = rows(review.apply(manifest, decisions(tmp_path, "a,7", "e,2")).manifest)
    assert (changed[0][1], changed[4][1]) == (3, 2)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_spreadsheets_make_of_it(tmp_path: Path, manifest: Manifest, separator: str) -> None:
    path = tmp_path / "decisions.csv"
    lines = [["path", "decision", "key", "note"], ["x", "ok", "a", "1"], ["y", "nc", "e"], ["", ""]]
    text = "".join(separator.join(line) + "\r\n" for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    applied = review.apply(manifest, path)
    assert (applied.confirmed, applied.nonconforming, applied.undecided) == (1, 1, 0)


def test_the_same_decision_twice_is_one(tmp_path: Path, manifest: Manifest) -> None:
    applied = review.apply(manifest, decisions(tmp_path, "a,dress", "a,ok", "a,0", "a,"))
    assert (applied.confirmed, applied.undecided) == (1, 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,ok", "b,ok"], "line 3, key 'b': key must be that of a noisy image, got one that no"),
        (["test,ok"], 'line 2, key \'test\': key must be .* split "train", got one of "test"'),
        (["clean,skirt"], "line 2, key 'clean': .* \"ok\" or 'dress', .* \"clean\", got 'skirt'$"),
        (["clean,nc"], "line 2, key 'clean': .* \"ok\" or 'dress', .* \"clean\", got 'nc'$"),
        (["a,", "nobody,"], "line 3, key 'nobody': key must be that of a noisy image"),
        (["a,dres"], "line 2, key 'a': .* below 4, \"ok\" or \"nc\", got 'dres'; .* 'dress'\\?$"),
        (["a,4"], "got '4'; classes are dress, =hat, skirt, 7$"),
        (["a,-1"], "got '-1'"),
        (["a,ok", "e,ok"], "line 3, key 'e': decision \"ok\" must be of an image with a label"),
        (["a,skirt", "=b,", "a,dress"], "line 4, key 'a': .* got 'dress', and 'skirt' in line 2$"),
        (["a,ok", "a,nc"], "must agree, got 'nc', and 'ok' in line 2"),
        (["a,x", "e,y", "d,z"], r"line 2, key 'a': .* \(and 2 more lines\)$"),
        (['"a b,""c""\n",x'], "line 2, key"),
        (['"a b,""c""\n",', "d,x"], "line 4, key 'd'"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, manifest: Manifest, lines: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s)decisions.csv: .*{message}"):
        review.apply(manifest, decisions(tmp_path, *lines))


def test_a_table_without_the_columns_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="must have a column decision, got key, label"):
        review.apply(manifest, decisions(tmp_path, header="key,label"))
    with pytest.raises(ValueError, match="must have a column key, got none"):
        review.apply(manifest, decisions(tmp_path, header=""))
    (tmp_path / "decisions.csv").write_bytes(b"key,decision\n\xff\xfe,ok\n")
    with pytest.raises(ValueError, match="must be UTF-8"):
        review.apply(manifest, tmp_path / "decisions.csv")
    long = "x" * (csv.field_size_limit() + 1)
    with pytest.raises(ValueError, match=r"decisions.csv, line 2: field larger than"):
        review.apply(manifest, decisions(tmp_path, f"a,{long}"))
    with pytest.raises(FileNotFoundError):
        review.apply(manifest, tmp_path / "none.csv")


def test_verified_images_are_the_clean_set_of_a_run(tmp_path: Path, manifest: Manifest) -> None:
    """What members and fine-tuning train on, and what relabelling leaves out."""
    from genkl_ext.training.settings import Relabel
    from genkl_ext.training.stages import Job, relabel

    lines = ["a,ok", "'=b,skirt", "''c,nc", "e,0", "-f,7", "d,1"]
    changed = review.apply(manifest, decisions(tmp_path, *lines)).manifest
    job = Job(None, changed, np.zeros(len(changed), bool), None, print, print)  # type: ignore[arg-type]
    clean = job.rows("clean")
    assert changed.keys(clean) == ["a", "=b", "d", "e", "-f", "d", "clean"]
    assert changed.labels[clean].tolist() == [0, 2, 1, 0, 3, 1, 0]
    noisy = changed.split("train")
    assert noisy.keys() == ["'c", 'a b,"c"\n']
    assert changed.keys(job.rows("train")) == ['a b,"c"\n']
    stream = np.random.default_rng(0)
    np.save(tmp_path / "q.npy", stream.dirichlet(np.ones(4), 2).astype(np.float32))
    rule = gk.GenKL(num_classes=4, alpha=5.0, beta=0.1, sigma=0.05)
    gk.score_files(tmp_path / "q.npy", rule, tmp_path / "scores.parquet")
    facts = relabel(changed, tmp_path / "scores.parquet", tmp_path / "targets.parquet", Relabel())
    assert facts["left out"] == 1 and facts["double-hot"] == 1


def test_a_list_that_has_grown_is_applied_again(tmp_path: Path, manifest: Manifest) -> None:
    first = ["a,ok", "'=b,skirt", "''c,nc", "d,ok"]
    once = review.apply(manifest, decisions(tmp_path, *first))
    assert (once.known, once.nonconforming) == (0, 1)
    path = decisions(tmp_path, *first, "a,0", "a,", "'=b,ok", "clean,dress", "e,7", "''c,NC")
    again = review.apply(once.manifest, path)
    counts = (again.confirmed, again.relabelled, again.nonconforming, again.undecided, again.known)
    assert counts == (0, 1, 0, 1, 8)
    before, after = rows(once.manifest), rows(again.manifest)
    assert after.pop(4) == ("e", 3, "clean", True)
    before.pop(4)
    assert after == before


@pytest.mark.parametrize("line", ["a,skirt", "a,nc", "'=b,dress", "''c,ok", "d,nc"])
def test_what_was_decided_is_not_contradicted(
    tmp_path: Path, manifest: Manifest, line: str
) -> None:
    once = review.apply(manifest, decisions(tmp_path, "a,ok", "'=b,skirt", "''c,nc", "d,ok"))
    with pytest.raises(ValueError, match="line 2, key .* decision"):
        review.apply(once.manifest, decisions(tmp_path, line))


def test_a_clean_image_that_nobody_verified_is_not_decided(
    tmp_path: Path, manifest: Manifest
) -> None:
    table = manifest.table.drop_columns(["verified"])
    bare = Manifest(table, NAMES, "table", "/images")
    with pytest.raises(ValueError, match='got one of "clean"'):
        review.apply(bare, decisions(tmp_path, "clean,dress"))


def test_classes_of_one_name_are_told_apart(tmp_path: Path, manifest: Manifest) -> None:
    names = ("crane", "NC", "crane", "ok")
    named = Manifest(manifest.table, names, "table", "/images")
    assert review.spellings(names) == ["crane (0)", "NC (1)", "crane (2)", "ok (3)"]
    out = tmp_path / "list.csv"
    np.save(tmp_path / "q.npy", np.tile(np.float32([0.1, 0.2, 0.4, 0.3]), (8, 1)))
    chosen = [(0, "nc"), (1, "nc"), (2, "nc")]
    review.write_list(out, named, chosen, np.zeros(8, np.float32), [tmp_path / "q.npy"])
    with out.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["given_label"] for line in lines] == ["crane (0)", "NC (1)", "crane (2)"]
    assert lines[0]["top_classes"] == "crane (2) | ok (3) | NC (1)"

    for word in ("crane", "Crane"):
        with pytest.raises(ValueError, match=f"got '{word}', which classes 0, 2 are called; write"):
            review.apply(named, decisions(tmp_path, f"a,{word}"))
    path = decisions(tmp_path, "a,crane (2)", "'=b,2", "''c,nc (1)", "e,OK (3)", "-f,nc", "d,ok")
    changed = rows(review.apply(named, path).manifest)
    assert [row[1] for row in changed[:8]] == [2, 2, 1, 3, 3, 0, None, 2]


def test_a_name_like_the_spelling_of_another_is_not_guessed(
    tmp_path: Path, manifest: Manifest
) -> None:
    named = Manifest(manifest.table, ("crane", "crane", "crane (0)", "Hat"), "table", "/images")
    with pytest.raises(ValueError, match="which classes 0, 2 are called"):
        review.apply(named, decisions(tmp_path, "a,crane (0)"))
    assert rows(review.apply(named, decisions(tmp_path, "a,2")).manifest)[0][1] == 2


def test_decisions_are_not_written_over(tmp_path: Path, manifest: Manifest) -> None:
    def write(path: Path) -> None:
        review.write_list(path, manifest, [(0, "nc"), (1, "nc")], np.zeros(8, np.float32), [])

    out = tmp_path / "list.csv"
    out.touch()
    write(out)  # an empty file loses nothing
    write(out)  # nor does a list without a decision
    text = out.read_bytes().decode()
    decided = text.replace(",\r\n", ",skirt\r\n", 1)
    other = "a,b\r\n1,2\r\n"
    for kept, message in (
        (text[:-2] + "skirt\r\n", "its column decision has 1 that"),
        (text.replace(",", ";")[:-2] + "nc\r\n", "its column decision has 1 that"),
        (other, "is no list of images"),
    ):
        out.write_text(kept, newline="")
        with pytest.raises(FileExistsError, match=f"cannot write .*list.csv: .*{message}"):
            write(out)
        assert out.read_bytes() == kept.encode()
    out.write_bytes(decided.encode("utf-16"))
    with pytest.raises(FileExistsError, match="is no list of images"):
        write(out)


def test_images_decided_to_fit_no_class_are_settled(tmp_path: Path, manifest: Manifest) -> None:
    assert not review.settled(manifest).any()
    decided = review.apply(manifest, decisions(tmp_path, "''c,nc", "d,nc", "a,ok")).manifest
    settled = review.settled(decided)
    keys = decided.split("train").keys()
    assert [key for key, s in zip(keys, settled, strict=True) if s] == ["'c", "d", "d"]
    # Verified to be wrong, with the label still there: published so; nobody said that none fits.
    table = manifest.table.set_column(4, "verified", [pa.array([False] * len(manifest))])
    wrong = review.settled(Manifest(table, NAMES, "table", "/images"))
    assert np.flatnonzero(wrong).tolist() == [4]

    critical = np.linspace(1, 2, len(keys)).astype(np.float32)
    top, labels = np.zeros(len(keys), np.int32), decided.split("train").labels
    q = np.tile(np.float32([0.4, 0.3, 0.2, 0.1]), (len(keys), 1))
    np.save(tmp_path / "q.npy", q)
    for nc in (critical > 0, critical < 0):
        found = review.find(critical, nc, top, labels, [tmp_path / "q.npy"], 10, settled)
        listed = {row for row, _ in found.in_turn(10)}
        assert listed == set(np.flatnonzero(~settled).tolist())
        assert found.found["nc" if nc.all() else "ambiguous"] == len(listed)
