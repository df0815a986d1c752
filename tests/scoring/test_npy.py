import io
import os
import pickle
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from genkl_ext.scoring import npy
from genkl_ext.scoring.npy import Predictions, open_all


@pytest.mark.parametrize("stored", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_rows(tmp_path: Path, stored: str, order: str) -> None:
    array = np.arange(60).reshape(12, 5).astype(stored, order=order)
    np.save(tmp_path / "p.npy", array)
    with Predictions(tmp_path / "p.npy") as predictions:
        assert predictions.shape == (12, 5)
        assert predictions.dtype == np.dtype(stored).newbyteorder("=")
        assert predictions.nbytes == array.nbytes
        rows = predictions.rows(3, 8)
        assert rows.dtype.isnative and rows.flags.aligned
        np.testing.assert_array_equal(rows, array[3:8])


def test_rows_are_a_view_of_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.zeros((4, 3), np.float32))
    with Predictions(tmp_path / "p.npy") as predictions:
        rows = predictions.rows(1, 3)
        assert not rows.flags.owndata and not rows.flags.writeable


def test_rows_outlive_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.ones((4, 3), np.float32))
    with Predictions(tmp_path / "p.npy") as predictions:
        rows = predictions.rows(0, 4)
    assert rows.sum() == 12


@pytest.mark.parametrize("order", ["C", "F"])
def test_prefetch_and_release_change_nothing(tmp_path: Path, order: str) -> None:
    array = np.random.default_rng(0).random((5000, 7)).astype(np.float32, order=order)
    np.save(tmp_path / "p.npy", array)
    with Predictions(tmp_path / "p.npy") as predictions:
        for start, stop in [(0, 0), (0, 1), (1, 2500), (2500, 5000), (5000, 5000)]:
            predictions.prefetch(start, stop)
            predictions.release(start, stop)
        np.testing.assert_array_equal(predictions.rows(0, 5000), array)


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros((2, 2)))
    return file.getvalue()


def _saved(array: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


GOOD = _saved(np.zeros((4, 3), np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p\.npy is empty$"),
        (b"1,2,3\n", r"p\.npy is not a \.npy file of numbers$"),
        (b"\x93NUMPY", r"p\.npy is not a \.npy file of numbers$"),
        (b"\x93NUMPY\x09\x00" + GOOD[8:], r"p\.npy is not a \.npy file of numbers$"),
        (GOOD[:40], r"p\.npy is not a \.npy file of numbers$"),
        (pickle.dumps(np.zeros((4, 3))), r"p\.npy is not a \.npy file of numbers$"),
        (_npz(), r"p\.npy is not a \.npy file of numbers$"),
        (
            _saved(np.array([[{}]], dtype=object), allow_pickle=True),
            r"p\.npy holds pickled Python objects, which are not read$",
        ),
        (_saved(np.zeros((4, 3), np.int64)), r"must be float16, float32, float64, got int64$"),
        (_saved(np.zeros((4, 3), "f4,f4")), r"must be float16, float32, float64, got \["),
        (_saved(np.zeros(12)), r"p\.npy must have shape \(N, k\), got \(12,\)$"),
        (_saved(np.zeros((2, 2, 3))), r"p\.npy must have shape \(N, k\), got \(2, 2, 3\)$"),
        (
            GOOD[:-1],
            r"p\.npy is truncated: \(4, 3\) float32 takes 176 bytes, the file has 175$",
        ),
        (
            GOOD + GOOD,
            r"p\.npy has more after its array: \(4, 3\) float32 takes 176 bytes, "
            r"the file has 352$",
        ),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^score: .*{message}"):
        Predictions(path)


def test_says_why_it_cannot_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"^score: .*none\.npy does not exist$"):
        Predictions(tmp_path / "none.npy")
    with pytest.raises(IsADirectoryError, match=r"is a folder$"):
        Predictions(tmp_path)
    with pytest.raises(OSError, match=r"pipe is not a regular file$"):
        Predictions(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("second", "came"),
    [
        (np.zeros((4, 4), np.float32), r"\(4, 4\) float32"),
        (np.zeros((5, 3), np.float32), r"\(5, 3\) float32"),
        (np.zeros((4, 3), np.float16), r"\(4, 3\) float16"),
    ],
)
def test_models_must_be_alike(tmp_path: Path, second: np.ndarray, came: str) -> None:
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], np.zeros((4, 3), np.float32))
    np.save(paths[1], second)
    message = rf"b\.npy must be like .*a\.npy, \(4, 3\) float32, got {came}$"
    with ExitStack() as stack, pytest.raises(ValueError, match=message):
        open_all(paths, stack)


def test_models_may_differ_in_layout(tmp_path: Path) -> None:
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], np.zeros((4, 3), "<f4"))
    np.save(paths[1], np.zeros((4, 3), ">f4", order="F"))
    with ExitStack() as stack:
        assert len(open_all(paths, stack)) == 2


def test_fingerprint(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((1000, 7))
    path = tmp_path / "p.npy"
    np.save(path, array)
    with Predictions(path) as predictions:
        first = predictions.fingerprint()
    assert (first.name, first.size) == ("p.npy", path.stat().st_size)
    assert (first.shape, first.dtype) == ((1000, 7), "float64")
    assert first.modified == path.stat().st_mtime_ns

    array[999, 6] = 0  # a small file is digested whole
    np.save(path, array)
    with Predictions(path) as predictions:
        assert predictions.fingerprint().sample != first.sample


def test_sample_digest_reads_evenly_spaced_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "SAMPLE_BLOCKS", 5)
    monkeypatch.setattr(npy, "SAMPLE_BYTES", 10)
    content = bytes(range(250))
    seen = []
    for i in range(len(content)):
        changed = content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        if npy.sample_digest(changed) != npy.sample_digest(content):
            seen.append(i)
    assert seen == [i for start in (0, 60, 120, 180, 240) for i in range(start, start + 10)]


@pytest.mark.parametrize("size", [0, 1, 49, 50])
def test_sample_digest_reads_small_content_whole(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(npy, "SAMPLE_BLOCKS", 5)
    monkeypatch.setattr(npy, "SAMPLE_BYTES", 10)
    digests = {npy.sample_digest(bytes(size))}
    digests |= {npy.sample_digest(bytes(i) + b"x" + bytes(size - i - 1)) for i in range(size)}
    assert len(digests) == size + 1


def test_notices_a_change_while_open(tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    np.save(path, np.zeros((4, 3), np.float32))
    with Predictions(path) as predictions:
        predictions.check_unchanged()
        os.utime(path, ns=(0, 0))
        with pytest.raises(ValueError, match=r"p\.npy was changed while it was read$"):
            predictions.check_unchanged()
