"""The scan: a reason for every broken file, nothing lost, and the same ledger however it ran."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import damaged, drawing, encoded, forged, jpeg, with_orientation, write_all
from PIL import Image

from genkl_ext.data.check import check, check_apart, verify
from genkl_ext.data.decode import (
    MAX_SCANS,
    BrokenImage,
    Decoder,
    Limits,
    jpeg_header,
    read,
    verify_jpeg,
)
from genkl_ext.data.ledger import Ledger
from genkl_ext.data.manifest import Manifest
from genkl_ext.data.scan import CHUNK, LONGEST_DETAIL, Scan, files_below, scan
from genkl_ext.journal import Journal

PICTURE = drawing(61, 83)
GOOD = jpeg(120, 160)
GREY = encoded(PICTURE.convert("L"))
CMYK = encoded(PICTURE.convert("CMYK"))
PROGRESSIVE = jpeg(120, 160, progressive=True)


def seen(data: bytes) -> bytes:
    """The data with damage inside that leaves a trace for a strict reader."""
    for seed in range(50):
        if verify_jpeg(damaged(data, seed)) is not None:
            return damaged(data, seed)
    raise AssertionError("no damage is seen")


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    length = (len(content) + 2).to_bytes(2, "big")
    return data[:2] + bytes([0xFF, marker]) + length + content + data[2:]


def with_scan_parameters(data: bytes) -> bytes:
    """A sequential file whose scan header says 0, 0 instead of 0, 63."""
    at = data.index(b"\xff\xda")
    end = at + 2 + data[at + 3]
    return data[: end - 3] + b"\0\0\0" + data[end:]


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive file whose last scan is there ``count`` times more."""
    at = data.rindex(b"\xff\xda")
    return data[:-2] + data[at:-2] * count + data[-2:]


# An orientation that is no 16-bit number: some decoders turn the picture, others do not.
ODD_EXIF = with_orientation(PICTURE, 6).replace(b"\1\x12\0\3", b"\1\x12\0\4")
ODD_EXIF = ODD_EXIF.replace(b"\x12\1\3\0", b"\x12\1\4\0")
TORN_PROFILE = with_segment(GOOD, 0xE2, b"ICC_PROFILE\0\2\3 a third of a profile")
UNKNOWN_JFIF = GOOD[:11] + b"\7" + GOOD[12:]
ALPHA = PICTURE.copy()
ALPHA.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
SIXTEEN_BITS = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
HEALTHY = {
    "jpeg": GOOD,
    "grey": GREY,
    "cmyk": CMYK,
    "progressive": PROGRESSIVE,
    "rotated": with_orientation(PICTURE, 6),
    "restart markers": encoded(PICTURE, restart_marker_blocks=1),
    "long comment": with_segment(GOOD, 0xFE, b"x" * 65533),
    "torn profile": TORN_PROFILE,
    "unknown jfif": UNKNOWN_JFIF,
    "odd exif": ODD_EXIF,
    "scan parameters": with_scan_parameters(GOOD),
    "bytes after the end": GOOD + b"and a film" * 999,
    "1 x 1": jpeg(1, 1),
    "png": encoded(PICTURE, "PNG"),
    "png 16 bits": encoded(SIXTEEN_BITS, "PNG"),
    "png palette": encoded(PICTURE.convert("P"), "PNG"),
    "webp alpha": encoded(ALPHA, "WEBP"),
    "gif": encoded(PICTURE.convert("P"), "GIF"),
    "bmp": encoded(PICTURE, "BMP"),
    "tiff": encoded(PICTURE, "TIFF"),
    "jpeg 2000": encoded(PICTURE, "JPEG2000"),
}
BROKEN = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "one byte": (b"\xff", "not an image"),
    "start only": (GOOD[:2], "truncated"),
    "half a header": (GOOD[:100], "truncated"),
    "up to the scan": (GOOD[: GOOD.index(b"\xff\xda") + 4], "truncated"),
    "half": (GOOD[: len(GOOD) // 2], "truncated"),
    "half, then an end": (GOOD[: len(GOOD) // 2] + b"\xff\xd9", "corrupt"),
    "without its end": (GOOD[:-2], "truncated"),
    "half, then zeros": (GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2), "truncated"),
    "zeros inside": (GOOD[: len(GOOD) // 2] + bytes(999) + GOOD[-2:], "corrupt"),
    "damaged": (seen(GOOD), "corrupt"),
    "damaged grey": (seen(GREY), "corrupt"),
    "damaged cmyk": (seen(CMYK), "corrupt"),
    "damaged progressive": (seen(PROGRESSIVE), "corrupt"),
    "damaged and rotated": (seen(with_orientation(PICTURE, 6)), "corrupt"),
    "damaged, torn profile": (with_segment(seen(GOOD), 0xE2, b"ICC_PROFILE\0\2\3"), "corrupt"),
    "damaged, unknown jfif": (UNKNOWN_JFIF[:40] + seen(GOOD)[40:], "corrupt"),
    "damaged, scan parameters": (with_scan_parameters(seen(GOOD)), "corrupt"),
    "junk in the header": (GOOD[:2] + b"junk" + GOOD[2:], "corrupt"),
    "many scans": (with_scans(PROGRESSIVE, MAX_SCANS), "corrupt"),
    "forged size": (forged(GOOD, 65500, 65500), "too many pixels"),
    "zero width": (forged(GOOD, 120, 0), "corrupt"),
    "half a png": (HEALTHY["png"][:3000], "truncated"),
    "damaged png": (HEALTHY["png"][:3000] + b"damage" + HEALTHY["png"][3006:], "corrupt"),
    "half a webp": (HEALTHY["webp alpha"][:-500], "corrupt"),
    "half a gif": (HEALTHY["gif"][:-500], "truncated"),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(decoder: Decoder, name: str) -> None:
    check(HEALTHY[name], decoder, verify(HEALTHY[name], Limits()))


@pytest.mark.parametrize("name", BROKEN)
def test_broken(decoder: Decoder, name: str) -> None:
    data, reason = BROKEN[name]
    if not data:
        return  # found when reading; it is in the folder below
    with pytest.raises(BrokenImage) as caught:
        check(data, decoder, verify(data, Limits()))
    assert caught.value.reason == reason
    assert caught.value.detail


def test_most_pictures_are_verified_without_decoding() -> None:
    verified = {name for name, data in HEALTHY.items() if verify(data, Limits())}
    assert verified == {name for name in list(HEALTHY)[:13] if name != "cmyk"}


def test_many_scans_are_allowed_up_to_a_limit() -> None:
    header = jpeg_header(PROGRESSIVE)
    assert header is not None
    some = MAX_SCANS - PROGRESSIVE.count(b"\xff\xda", header.scan)
    with pytest.raises(BrokenImage, match=f"{MAX_SCANS + 1} scans, more than {MAX_SCANS}"):
        verify(with_scans(PROGRESSIVE, some + 1), Limits())
    with pytest.raises(BrokenImage) as caught:  # a scan that comes again is odd anyway
        verify(with_scans(PROGRESSIVE, some), Limits())
    assert "more than" not in caught.value.detail
    at = PROGRESSIVE.index(b"\xff\xc2") + 5
    large = PROGRESSIVE[:at] + (9000).to_bytes(2, "big") * 2 + PROGRESSIVE[at + 4 :]
    with pytest.raises(BrokenImage, match="21 scans, more than 20"):
        verify(with_scans(large, some - 79), Limits())


def test_limits() -> None:
    for name, data in HEALTHY.items():
        if name == "1 x 1":
            continue
        for limits, reason in (
            (Limits(max_pixels=1000), "too many pixels"),
            (Limits(min_side=200), "too small"),
        ):
            with pytest.raises(BrokenImage) as caught:
                check(data, Decoder(limits), verify(data, limits))
            assert caught.value.reason == reason, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Files of every kind, all named .jpg, and the reason of each that is broken."""
    path = tmp_path_factory.mktemp("files")
    write_all(path, {f"{name}.jpg": data for name, data in HEALTHY.items()})
    write_all(path, {f"{name}.jpg": data for name, (data, _) in BROKEN.items()})
    write_all(path, {f"copy {i:03}.jpg": GOOD if i % 7 else GOOD[:900] for i in range(5 * CHUNK)})
    reasons = {f"{name}.jpg": reason for name, (_, reason) in BROKEN.items()}
    reasons |= {f"copy {i:03}.jpg": "truncated" for i in range(0, 5 * CHUNK, 7)}
    os.mkfifo(path / "pipe.jpg")
    (path / "folder.jpg").mkdir()
    (path / "nowhere.jpg").symlink_to("none.jpg")
    (path / "itself.jpg").symlink_to("itself.jpg")
    (path / "device.jpg").symlink_to("/dev/zero")
    with open(path / "sparse.jpg", "wb") as file:
        file.truncate(10 << 30)
    reasons |= {
        "pipe.jpg": "not an image",
        "folder.jpg": "not an image",
        "nowhere.jpg": "missing",
        "itself.jpg": "unreadable",
        "device.jpg": "not an image",
        "sparse.jpg": "too many bytes",
    }
    return path, reasons


def found(done: Scan) -> dict[str, str]:
    table = done.ledger.table
    return dict(zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True))


def test_every_broken_file_is_listed_with_its_reason(folder, tmp_path: Path) -> None:
    path, reasons = folder
    manifest = files_below(path)
    steps: list[tuple[int, int]] = []
    done = scan(manifest, tmp_path / "l.parquet", progress=lambda *step: steps.append(step))
    assert found(done) == reasons
    assert len(manifest) == done.ledger.scanned == len(os.listdir(path))
    rows = done.ledger.table["row"].to_pylist()
    assert rows == sorted(rows)
    assert manifest.keys(rows) == done.ledger.table["key"].to_pylist()
    np.testing.assert_array_equal(done.ledger.rows_in(manifest), rows)
    unread = ("pipe.jpg", "folder.jpg", "nowhere.jpg", "itself.jpg", "device.jpg", "sparse.jpg")
    sizes = [file.stat().st_size for file in path.iterdir() if file.name not in unread]
    assert done.bytes_read == done.ledger.bytes_read == sum(sizes)
    assert done.resumed == 0
    assert steps[-1] == (len(manifest), len(manifest))
    assert [n for n, _ in steps] == sorted(n for n, _ in steps)
    assert Ledger.load(tmp_path / "l.parquet").table.equals(done.ledger.table)
    assert os.listdir(tmp_path) == ["l.parquet"]


def test_all_that_is_healthy_decodes(folder, tmp_path: Path) -> None:
    path, _ = folder
    manifest = files_below(path)
    done = scan(manifest, tmp_path / "l.parquet")
    decoder = Decoder()
    for row in np.setdiff1d(np.arange(len(manifest)), done.ledger.rows_in(manifest)):
        picture = decoder.open(read(manifest.path(row)))
        pixels, _ = picture.region(0, 0, picture.height, picture.width)
        assert pixels.size


def of_paths(root: Path, *paths: str) -> Manifest:
    table = pa.table({"key": paths, "path": paths, "split": ["train"] * len(paths)})
    return Manifest(table, (), "files", str(root))


def test_a_path_with_a_nul_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    done = scan(of_paths(tmp_path, "a\0b.jpg", "a.jpg"), tmp_path / "l.parquet")
    assert found(done) == {"a\0b.jpg": "unreadable"}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_this_process_lacks_ends_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    manifest = files_below(tmp_path)

    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr("genkl_ext.data.scan.read", fail)
        scan(manifest, tmp_path / "l.parquet")
    assert caught.value.errno == number
    assert not (tmp_path / "l.parquet").exists()
    assert found(scan(manifest, tmp_path / "l.parquet")) == {}


def test_any_detail_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)

    def fail(*_: object) -> None:
        raise BrokenImage("corrupt", "<a at 0x7f00> \udcff" + "x" * 10_000)

    monkeypatch.setattr("genkl_ext.data.scan.check", fail)
    done = scan(files_below(tmp_path), tmp_path / "l.parquet")
    (detail,) = done.ledger.table["detail"].to_pylist()
    assert detail.startswith(r"<a> \udcffxxx") and len(detail) == LONGEST_DETAIL


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    (tmp_path / "a.jpg").chmod(0)
    assert found(scan(files_below(tmp_path), tmp_path / "l.parquet")) == {"a.jpg": "unreadable"}


def test_no_images(tmp_path: Path) -> None:
    done = scan(files_below(tmp_path), tmp_path / "l.parquet")
    assert (len(done.ledger), done.ledger.scanned) == (0, 0)
    assert len(Ledger.load(tmp_path / "l.parquet")) == 0


def test_the_number_of_threads_changes_nothing(folder, tmp_path: Path) -> None:
    manifest = files_below(folder[0])
    for threads in (1, 2, 7):
        scan(manifest, tmp_path / f"{threads}.parquet", threads=threads)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        scan(manifest, tmp_path / "l.parquet", threads=0)


def test_images_in_a_store(tmp_path: Path) -> None:
    import fsspec

    files = {"good.jpg": GOOD, "half.jpg": GOOD[:900]}
    fsspec.filesystem("memory").pipe({f"/scan/{name}": data for name, data in files.items()})
    paths = [*files, "none.jpg"]
    table = pa.table({"key": paths, "path": paths, "split": ["train"] * 3})
    done = scan(Manifest(table, (), "store", "memory://scan"), tmp_path / "l.parquet")
    assert found(done) == {"half.jpg": "truncated", "none.jpg": "missing"}


# Interrupted scans.


@pytest.fixture
def undisturbed(folder, tmp_path: Path) -> tuple[Manifest, bytes]:
    manifest = files_below(folder[0])
    scan(manifest, tmp_path / "whole.parquet")
    return manifest, (tmp_path / "whole.parquet").read_bytes()


def stop_at(error: BaseException):
    def progress(done: int, total: int) -> None:
        if done > 2 * CHUNK:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("disk full")])
def test_an_interrupted_scan_goes_on(undisturbed, tmp_path: Path, error) -> None:
    manifest, whole = undisturbed
    out = tmp_path / "l.parquet"
    with pytest.raises(type(error)):
        scan(manifest, out, progress=stop_at(error))
    assert not out.exists()
    assert (tmp_path / "l.parquet.journal").exists()
    done = scan(manifest, out)
    assert 2 * CHUNK < done.resumed < len(manifest)
    assert done.bytes_read < done.ledger.bytes_read
    assert out.read_bytes() == whole
    assert not (tmp_path / "l.parquet.journal").exists()


def python(program: str, *words: object, **environment: str) -> int:
    command = [sys.executable, "-c", program, *map(str, words)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, stderr=subprocess.DEVNULL, check=False).returncode


SCAN = """
import os, signal, sys
from genkl_ext.data.scan import files_below, scan
def progress(done, total):
    if done > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
scan(files_below(sys.argv[1]), sys.argv[2], threads=2, progress=progress)
"""


def test_a_killed_scan_goes_on(undisturbed, tmp_path: Path) -> None:
    manifest, whole = undisturbed
    out = tmp_path / "l.parquet"
    for images in (CHUNK, 3 * CHUNK):
        assert python(SCAN, manifest.root, out, images) == -signal.SIGKILL
    done = scan(manifest, out)
    assert done.resumed > 3 * CHUNK
    assert out.read_bytes() == whole


def cut(journal: bytes) -> bytes:
    return journal[:-7]


def garbled(journal: bytes) -> bytes:
    lines = journal.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if i > 1 and b"chunk" in line)
    return (
        b"".join(lines[:at])
        + lines[at].replace(b"truncated", b"truncateD").replace(b'"bytes":', b'"bytes":9')
        + b"".join(lines[at + 1 :])
    )


@pytest.mark.parametrize(
    "change",
    [cut, garbled, lambda journal: journal + b"\0" * 4096, lambda journal: journal + b"12345678 {"],
)
def test_a_torn_journal_is_used_up_to_the_tear(undisturbed, tmp_path: Path, change) -> None:
    manifest, whole = undisturbed
    out, journal = tmp_path / "l.parquet", tmp_path / "l.parquet.journal"
    with pytest.raises(KeyboardInterrupt):
        scan(manifest, out, progress=stop_at(KeyboardInterrupt()))
    changed = change(journal.read_bytes())
    assert changed != journal.read_bytes()
    journal.write_bytes(changed)
    # What comes after the tear is good again when this scan is interrupted too.
    with pytest.raises(KeyboardInterrupt):
        scan(manifest, out, progress=stop_at(KeyboardInterrupt()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = scan(manifest, out)
    assert done.resumed > 2 * CHUNK
    assert out.read_bytes() == whole


@pytest.mark.parametrize("changed", ["rows", "root", "limits"])
def test_another_scan_begins_anew(undisturbed, tmp_path: Path, changed: str) -> None:
    manifest, whole = undisturbed
    out = tmp_path / "l.parquet"
    other, limits = manifest, Limits()
    if changed == "rows":
        other = manifest.select(np.arange(len(manifest))[::-1])
    elif changed == "root":
        (tmp_path / "link").symlink_to(manifest.root)
        other = Manifest(manifest.table, (), manifest.dataset, str(tmp_path / "link"))
    else:
        limits = Limits(max_pixels=100)
    with pytest.raises(KeyboardInterrupt):
        scan(other, out, limits=limits, progress=stop_at(KeyboardInterrupt()))
    with pytest.warns(UserWarning, match=r"l.parquet.journal is of a scan of other images or"):
        done = scan(manifest, out)
    assert done.resumed == 0
    assert out.read_bytes() == whole


def test_a_finished_scan_scans_again(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    assert found(scan(files_below(tmp_path), tmp_path / "l.parquet")) == {}
    (tmp_path / "a.jpg").write_bytes(GOOD[:900])
    assert found(scan(files_below(tmp_path), tmp_path / "l.parquet")) == {"a.jpg": "truncated"}


def test_two_scans_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    with (
        Journal(tmp_path / "l.parquet.journal", {}),
        pytest.raises(OSError, match=r"l.parquet.journal is in use by another process"),
    ):
        scan(files_below(tmp_path), tmp_path / "l.parquet")


def test_a_journal_that_goes_while_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    first = Journal(path, {})
    lock, seen = fcntl.flock, []

    def late(file: int, how: int) -> None:
        """The lock of a process that has opened the file when another one removes it."""
        if not seen:
            first.remove()
            first.__exit__(None, None, None)
        seen.append(os.fstat(file).st_ino)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(path, {}) as journal:
        assert len(seen) == 2 and path.stat().st_ino == seen[1]
        with pytest.raises(OSError, match="in use"):
            Journal(path, {})
        journal.remove()
        journal.remove()  # somebody cleaned up
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_found_before_the_scan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scan(files_below(tmp_path), tmp_path / "none" / "l.parquet")


# Stands in for a picture that brings its decoder down.
CRASH = """
import os, signal
from genkl_ext.data.decode import Decoder
usual = Decoder.open
def open(self, data):
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return usual(self, data)
Decoder.open = open
"""


def test_a_picture_that_ends_the_process_is_listed_by_the_next_scan(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    for name in ("crash", "gif"):
        data = b"crash" if name == "crash" else HEALTHY[name]
        write_all(files, {f"{name} {i:03}.jpg": data for i in range(3)})
    out = tmp_path / "l.parquet"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ends = [python(SCAN, files, out, 10**9, PYTHONPATH=path)]
    while ends[-1] and len(ends) < 4:
        ends.append(python(SCAN, files, out, 10**9, PYTHONPATH=path))
    assert len(ends) > 1
    assert ends == [-signal.SIGSEGV] * (len(ends) - 1) + [0]
    table = Ledger.load(out).table
    assert table["path"].to_pylist() == [f"crash {i:03}.jpg" for i in range(3)]
    assert set(table["detail"].to_pylist()) == {"decoding it ends the process (SIGSEGV)"}


def test_what_may_be_decoded_is_journaled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {"plain": GOOD, "png": HEALTHY["png"], "rotated": HEALTHY["rotated"]}
    pictures |= {"odd exif": ODD_EXIF, "cmyk": CMYK}
    write_all(tmp_path, {f"{name}.jpg": data for name, data in pictures.items()})
    manifest = files_below(tmp_path)
    out = tmp_path / "l.parquet"
    opened = []

    def look(data: bytes, *_: object) -> None:
        opened.append((data, Path(f"{out}.journal").read_bytes().splitlines()[-1]))

    monkeypatch.setattr("genkl_ext.data.scan.check", look)
    scan(manifest, out, threads=1)
    last = {data: line.split()[1] for data, line in opened}
    told = {name for i, name in enumerate(sorted(pictures)) if last[pictures[name]] == b"%d" % i}
    assert told == {"png", "rotated", "cmyk"}


def child_ended_by(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nkill -{int(number)} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_decoder_that_crashes_says_the_picture_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    child_ended_by(signal.Signals[name], tmp_path, monkeypatch)
    with pytest.raises(BrokenImage, match=rf"corrupt: decoding it ends the process \({name}\)"):
        check_apart("a.jpg", Limits())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_process_stopped_from_outside_says_nothing_about_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    child_ended_by(signal.Signals[name], tmp_path, monkeypatch)
    number = int(signal.Signals[name])
    with pytest.raises(ChildProcessError, match=rf"checked a\.jpg was stopped by signal {number}"):
        check_apart("a.jpg", Limits())


# Files below a folder.


def test_files_below(tmp_path: Path) -> None:
    names = ["b/2.PNG", "b/10.jpeg", "a.jpg", "b/c/d.gif", ".hidden.jpg", ".h/x.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    elsewhere = tmp_path.with_name(tmp_path.name + " elsewhere")
    elsewhere.mkdir()
    (elsewhere / "e.webp").touch()
    (tmp_path / "b" / "up").symlink_to("..")
    (tmp_path / "b" / "away").symlink_to(elsewhere)
    (tmp_path / "b" / "itself").symlink_to("itself")
    manifest = files_below(tmp_path)
    assert manifest.keys() == ["a.jpg", "b/10.jpeg", "b/2.PNG", "b/away/e.webp", "b/c/d.gif"]
    assert manifest.paths()[0] == f"{tmp_path}/a.jpg"
    assert manifest.problems == ()
    assert (manifest.labels == -1).all()
    with pytest.raises(FileNotFoundError):
        files_below(tmp_path / "none")


def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    try:
        open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb").close()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    manifest = files_below(tmp_path)
    assert manifest.keys() == ["a.jpg"]
    assert manifest.problems[0].count == 1
    assert str(manifest.problems[0]).encode()


# Real files.


@pytest.mark.parametrize(
    ("name", "files", "broken"), [("exif", 18, 0), ("broken", 299, 270), ("../clothing", 4293, 0)]
)
def test_real_files(shared_data: Path, tmp_path: Path, name: str, files: int, broken: int) -> None:
    manifest = files_below(shared_data / "jpeg" / name)
    done = scan(manifest, tmp_path / "l.parquet")
    assert len(manifest) == done.ledger.scanned == files
    # Another libjpeg-turbo may judge a few made-up files differently.
    assert abs(len(done.ledger) - broken) <= 10 * (name == "broken")
    assert sum(done.ledger.counts().values()) == len(done.ledger)
    if name == "broken":
        decoder = Decoder()
        for row in np.setdiff1d(np.arange(files), done.ledger.rows_in(manifest)):
            picture = decoder.open(read(manifest.path(row)))
            picture.region(0, 0, picture.height, picture.width)
