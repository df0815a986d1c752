import json
import subprocess
import sys
from pathlib import Path

import pytest

from genkl_ext.cli.main import main
from genkl_ext.data import Manifest, examples
from genkl_ext.data.scan import scan


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("example") / "clothing1m"
    examples.make("clothing1m", root, count=60, classes=4)
    return root


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main(["data", *map(str, words)])
    return (status, *capsys.readouterr())


def test_info(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "info", example)
    assert status == 0 and err == ""
    manifest = Manifest.from_clothing1m(example)
    lines = out.splitlines()
    assert lines[0] == "data set       clothing1m, 4 classes"
    assert lines[1].endswith(str(example))
    assert "images         60 train, 12 clean, 6 val, 6 test" in lines
    assert "odd            nothing" in lines
    assert f"fingerprint    {manifest.fingerprint}" in lines
    assert lines[-5].split() == ["class", "train", "clean", "val", "test", "ratio"]
    for c, line in enumerate(lines[-4:]):
        number, name, *counts, ratio = line.split()
        assert int(number) == c and name == manifest.class_names[c]
        splits = ("train", "clean", "val", "test")
        assert [int(n) for n in counts] == [manifest.class_counts(s)[c] for s in splits]
        assert float(ratio) == pytest.approx(manifest.class_ratio()[c], abs=1e-6)


def test_info_as_json(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", example, "--json", "--check-files")
    facts = json.loads(out)
    manifest = Manifest.from_clothing1m(example)
    assert status == 0
    assert facts["fingerprint"] == manifest.fingerprint
    assert facts["class_ratio"] == manifest.class_ratio().tolist()
    assert facts["splits"]["clean"]["images"] == 12 and facts["missing_files"] == []


def test_info_checks_files_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a"
    examples.make("folder", root, count=30, classes=2)
    status, out, _ = run(capsys, "info", root, "--check-files", "--save", tmp_path / "m.parquet")
    assert status == 0 and "missing files  none" in out
    saved = Manifest.load(tmp_path / "m.parquet")
    assert saved.fingerprint == Manifest.from_folder(root).fingerprint

    for path in saved.paths(range(12)):
        Path(path).unlink()
    status, out, _ = run(capsys, "info", tmp_path / "m.parquet", "--check-files")
    lines = out.splitlines()
    start = lines.index("missing files  12")
    assert status == 1
    assert [line.strip() for line in lines[start + 1 : start + 12]] == [
        *saved.paths(range(10)),
        "...",
    ]
    assert run(capsys, "info", tmp_path / "m.parquet")[0] == 0  # nobody asked

    root.rename(tmp_path / "b")
    moved = run(capsys, "info", tmp_path / "m.parquet", "--root", tmp_path / "b", "--check-files")
    assert moved[0] == 1 and "missing files  12" in moved[1]


def test_info_sums_up_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a"
    examples.make("folder", root, count=30, classes=2)
    manifest = Manifest.from_folder(root)
    Path(manifest.path(3)).write_bytes(b"")
    Path(manifest.path(5)).unlink()
    ledger = tmp_path / "ledger.parquet"
    scan(manifest, ledger)
    status, out, _ = run(capsys, "info", root, "--ledger", ledger)
    assert status == 0
    # The missing file is not in the folder any more, so it is no image of this manifest.
    assert "broken         1\n" in out
    assert f"the ledger has 1 empty, 1 missing, of {len(manifest)} scanned\n" in out
    status, _, err = run(capsys, "info", root, "--ledger", root / "none")
    assert status == 1 and "none" in err


def test_info_says_what_is_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,label,split,kind\na.jpg,0,train,x\na.jpg,2,train,x\nb.jpg,,val,\n")
    status, out, _ = run(capsys, "info", table)
    lines = out.splitlines()
    assert status == 0
    assert "odd            split train: keys listed again: 1, first 'a.jpg' in row 1" in lines
    assert "               split val: images without a label: 1, first 'b.jpg' in row 0" in lines
    assert "kinds          2 x" in lines
    # No class ratio without an image of each class.
    assert [line.split() for line in lines[-4:]] == [
        ["0", "0", "1", "0", "-"],
        ["1", "1", "0", "0", "-"],
        ["2", "2", "1", "0", "-"],
        ["without", "a", "label", "0", "1"],
    ]


def test_info_takes_a_url_for_the_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.jpg,0\n")
    status, out, _ = run(capsys, "info", tmp_path / "t.csv", "--root", "s3://bucket/x")
    assert status == 0
    assert "root           s3://bucket/x\n" in out


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["info"], 2, "genkl data info: the following arguments are required: source"),
        (["info", "/none"], 1, "genkl data info: /none does not exist\n"),
        (["info", "{}"], 1, "genkl data info: {} must hold noisy_train_key_list.txt (Clothing1M)"),
        (["make-example", "imagenet", "{}/a"], 2, "genkl data make-example: "),
        (
            ["make-example", "folder", "{}/a", "--count", "1"],
            1,
            "genkl data make-example: count must be at least 5, one for each class, got 1\n",
        ),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, line: str
) -> None:
    got, out, err = run(capsys, *(word.format(tmp_path) for word in words))
    assert (got, out) == (status, "") and err.count("\n") == 1
    assert err.startswith(line.format(tmp_path))


@pytest.mark.parametrize("layout", ["clothing1m", "food101n", "webvision", "folder"])
def test_make_example(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    out = tmp_path / "example"
    status, said, err = run(
        capsys, "make-example", layout, out, "--count", 20, "--classes", 3, "--seed", 5
    )
    assert status == 0 and err == ""
    assert said.startswith(f"Manifest({layout}: 20 train, ") and "3 classes" in said
    status, said, _ = run(capsys, "info", out, "--check-files")
    assert status == 0 and said.startswith(f"data set       {layout}, 3 classes\n")


def test_data_needs_no_torch(example: Path) -> None:
    program = (
        "import sys\n"
        "from genkl_ext.cli.main import main\n"
        f"assert main(['data', 'info', {str(example)!r}]) == 0\n"
        "heavy = {'torch', 'nvidia', 'lightning', 'torchvision'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
