"""``genkl scan``: what it takes, what it says, how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from genkl_ext.cli.main import main
from genkl_ext.data.ledger import Ledger
from genkl_ext.data.scan import files_below


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photos/: four images, two of them broken; the current folder is the one above."""
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "deep/c.jpg"):
        Image.linear_gradient("L").save(photos / name)
    content = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").write_bytes(content[:-99])
    (photos / "d.png").write_text("<html>")
    monkeypatch.chdir(tmp_path)
    return photos


def lines(text: str) -> dict[str, str]:
    return dict(line.strip().split("  ", 1) for line in text.splitlines() if line[:1] != " ")


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "photos", "--layout", "files"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    said = {name: text.strip() for name, text in lines(out).items()}
    assert said["images"] == f"4, files in {folder}"
    assert said["healthy"] == "2"
    assert said["broken"] == "2 (50 %)"
    assert said["first"].startswith("b.jpg: truncated, ")
    assert "d.png: not an image, " in out
    assert "img/s" in said["speed"] and "MB/s" in said["speed"]
    assert said["ledger"] == "ledger.parquet"
    assert Ledger.load("ledger.parquet").counts() == {"truncated": 1, "not an image": 1}


def test_all_sources_are_understood(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files_below(folder).save("manifest.parquet")
    Path("table.csv").write_text("path,label\nphotos/b.jpg,0\nphotos/a.jpg,0\n")
    for source, images, broken in (
        ("photos", 1, 0),  # of the folder of a class
        ("photos/deep", 1, 0),  # no folder of a class: all files
        ("manifest.parquet", 4, 2),
        ("table.csv", 2, 1),
    ):
        assert main(["scan", source, "--ledger", "l.parquet"]) == 0
        assert capsys.readouterr().out.startswith(f"images            {images}, ")
        ledger = Ledger.load("l.parquet")
        assert (ledger.scanned, len(ledger)) == (images, broken)


def test_a_table_at_a_url(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/b/table.csv", b"path,label\na.jpg,0\nb.jpg,0\n")
    for name in ("a.jpg", "b.jpg"):
        store.pipe(f"/b/{name}", (folder / name).read_bytes())
    assert main(["scan", "memory://b/table.csv"]) == 0
    assert "2, table in memory://b\n" in capsys.readouterr().out
    assert Ledger.load("ledger.parquet").table["path"].to_pylist() == ["b.jpg"]


def test_a_folder_of_folders_without_class_images(folder: Path) -> None:
    (folder / "a.jpg").rename(folder / "deep" / "a.gif")
    (folder / "deep" / "c.jpg").unlink()
    assert main(["scan", "photos"]) == 0
    assert Ledger.load("ledger.parquet").scanned == 3  # all files


def test_damaged_lists_are_no_reason_to_take_all_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "noisy_train_key_list.txt").write_text("a.jpg\nb.jpg\n")
    (folder / "noisy_label_kv.txt").write_text("no labels here at all\n")
    assert main(["scan", "photos"]) == 1
    assert "from_clothing1m: " in capsys.readouterr().err
    assert not Path("ledger.parquet").exists()


def test_limits(folder: Path) -> None:
    words = ["scan", "photos", "--layout", "files", "--threads", "1"]
    assert main([*words, "--max-megapixels", "0.065535"]) == 0  # of 256 x 256
    assert Ledger.load("ledger.parquet").counts()["too many pixels"] == 3
    assert main([*words, "--min-side", "257"]) == 0
    assert Ledger.load("ledger.parquet").limits.min_side == 257
    assert Ledger.load("ledger.parquet").counts()["too small"] == 2


def test_fail_on_broken(folder: Path) -> None:
    assert main(["scan", "photos", "--layout", "files", "--fail-on-broken"]) == 1
    assert len(Ledger.load("ledger.parquet")) == 2
    assert main(["scan", "photos/deep", "--fail-on-broken"]) == 0


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("none", 1, "none does not exist"),
        ("none --layout files", 1, "No such file"),
        ("photos --layout clothing1m", 1, "from_clothing1m: "),
        ("photos --layout x", 2, "argument --layout: invalid choice: 'x'"),
        ("photos --threads 0", 2, "--threads must be at least 1"),
        ("photos --ledger none/l.parquet", 1, "cannot write none/l.parquet: "),
        ("m.parquet --ledger ./m.parquet", 2, "--ledger must be another file than the manifest"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, status: int, line: str
) -> None:
    files_below(folder).save("m.parquet")
    before = sorted(os.listdir())
    assert main(["scan", *words.split()]) == status
    out, err = capsys.readouterr()
    assert out == "" and line in err and err.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_decoders_are_silent_and_messages_are_not(folder: Path) -> None:
    # libpng and libjpeg print about these themselves.
    content = (folder / "a.jpg").read_bytes()
    png = folder / "d.png"
    Image.linear_gradient("L").save(png)
    png.write_bytes(png.read_bytes()[:200] + b"damage" + png.read_bytes()[206:])
    (folder / "e.jpg").write_bytes(content[:300] + content[500:])
    command = [sys.executable, "-m", "genkl_ext.cli.main", "scan", "photos", "--layout", "files"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "broken            3 " in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_scan_goes_on(folder: Path, number: signal.Signals, status: int) -> None:
    for i in range(20_000):
        os.link(folder / "a.jpg", folder / f"copy {i}.jpg")
    command = [sys.executable, "-m", "genkl_ext.cli.main", "scan", "photos", "--layout", "files"]
    journal = Path("ledger.parquet.journal")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not journal.exists() or journal.stat().st_size < 1000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == status
    assert b"Traceback" not in err
    assert not Path("ledger.parquet").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resumed" in again.stdout
    assert Ledger.load("ledger.parquet").scanned == 20_004
    assert not journal.exists()
