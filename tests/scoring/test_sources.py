"""Prediction files of every kind: the same numbers, however they are stored."""

import io
import itertools
import json
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import genkl_ext as gk
from genkl_ext.scoring import sources
from genkl_ext.scoring.sources import (
    Source,
    natural,
    open_models,
    open_shards,
    open_source,
)

K = 6
Write = Callable[[Path, np.ndarray], Any]


def rows(n: int = 53, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(K, 0.4), n).astype(dtype)


def write_npy(path: Path, q: np.ndarray) -> dict[str, Any]:
    np.save(path.with_suffix(".npy"), q)
    return {"path": path.with_suffix(".npy")}


def write_fortran(path: Path, q: np.ndarray) -> dict[str, Any]:
    return write_npy(path, np.asfortranarray(q))


def write_big_endian(path: Path, q: np.ndarray) -> dict[str, Any]:
    return write_npy(path, q.astype(q.dtype.newbyteorder(">")))


def write_npz(path: Path, q: np.ndarray) -> dict[str, Any]:
    np.savez(path.with_suffix(".npz"), q=q, other=np.zeros(3))
    return {"path": path.with_suffix(".npz"), "column": "q"}


def write_compressed(path: Path, q: np.ndarray) -> dict[str, Any]:
    np.savez_compressed(path.with_suffix(".npz"), q=q)
    return {"path": path.with_suffix(".npz")}


def write_safetensors(path: Path, q: np.ndarray) -> dict[str, Any]:
    save_file({"a": np.zeros(5, np.float32), "q": q}, path.with_suffix(".safetensors"))
    return {"path": path.with_suffix(".safetensors"), "column": "q"}


def write_raw(path: Path, q: np.ndarray) -> dict[str, Any]:
    path.with_suffix(".bin").write_bytes(q.tobytes())
    return {"path": path.with_suffix(".bin"), "raw": (q.dtype.name, K)}


def fixed(q: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(q.ravel(), pa.from_numpy_dtype(q.dtype)), K)


def write_parquet(path: Path, q: np.ndarray) -> dict[str, Any]:
    table = pa.table({"key": list(map(str, range(len(q)))), "probs": fixed(q)})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=10)
    return {"path": path.with_suffix(".parquet")}


def write_lists(path: Path, q: np.ndarray) -> dict[str, Any]:
    probs = pa.array(list(q), pa.list_(pa.from_numpy_dtype(q.dtype)))
    table = pa.table({"probs": probs, "embedding": probs})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=20)
    return {"path": path.with_suffix(".parquet"), "column": "probs"}


def write_columns(path: Path, q: np.ndarray) -> dict[str, Any]:
    table = pa.table({"id": np.arange(len(q)), **{f"p{c}": q[:, c] for c in range(K)}})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=25)
    return {"path": path.with_suffix(".parquet")}


def write_arrow(path: Path, q: np.ndarray) -> dict[str, Any]:
    table = pa.table({"probs": fixed(q)})
    with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return {"path": path.with_suffix(".arrow")}


def write_zarr(path: Path, q: np.ndarray) -> dict[str, Any]:
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(str(path.with_suffix(".zarr")), data=q, chunks=(8, K))
    assert array.shape == q.shape
    return {"path": path.with_suffix(".zarr")}


KINDS: list[Write] = [
    write_npy, write_fortran, write_big_endian, write_npz, write_compressed, write_safetensors,
    write_raw, write_parquet, write_lists, write_columns, write_arrow, write_zarr,
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__[6:])
def test_every_kind(tmp_path: Path, write: Write, dtype: str) -> None:
    q = rows(dtype=dtype)
    with open_source(**write(tmp_path / "p", q)) as source:
        assert (source.shape, source.dtype, source.nbytes) == (q.shape, dtype, q.nbytes)
        for start, stop in [
            (0, 53),
            (0, 1),
            (52, 53),
            (5, 5),
            (9, 31),
            (30, 40),
            (3, 12),
            (53, 53),
        ]:
            got = source.rows(start, stop)
            assert got.dtype == np.dtype(dtype) and got.shape == (stop - start, K)
            assert got.dtype.isnative
            np.testing.assert_array_equal(got, q[start:stop])
        source.check_unchanged()
        (print_,) = source.fingerprints()
        assert print_.shape == q.shape and print_.dtype == dtype
    other = tmp_path / "other"
    other.mkdir()
    with open_source(**write(other / "p", rows(dtype=dtype, seed=1))) as changed:
        assert changed.fingerprints()[0].sample != print_.sample


@pytest.mark.parametrize("write", [w for w in KINDS if w is not write_lists], ids=str)
def test_no_rows(tmp_path: Path, write: Write) -> None:
    if write in (write_raw,):  # an empty file says nothing
        pytest.skip("raw numbers without a row are an empty file, which is refused")
    with open_source(**write(tmp_path / "p", rows(0))) as source:
        assert source.shape == (0, K) and source.rows(0, 0).shape == (0, K)


def test_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    q = torch.from_numpy(rows(200)).bfloat16()
    save_tensors({"q": q}, tmp_path / "q.safetensors")
    rule = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
    expected = rule.score(q)
    got = gk.score_files(tmp_path / "q.safetensors", rule, chunk_bytes=700).scores
    np.testing.assert_array_equal(got.critical_alpha, expected.critical_alpha.numpy())
    np.testing.assert_array_equal(got.nc, expected.nc.numpy())


@pytest.mark.parametrize("write", [write_npy, write_fortran, write_parquet, write_compressed])
def test_shards(tmp_path: Path, write: Write) -> None:
    q = rows(100)
    edges = [0, 7, 7, 40, 41, 100]
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        write(tmp_path / f"p-{i + 8}", q[start:stop])  # 8 ... 12: 9 comes before 10
    suffix = next(tmp_path.iterdir()).suffix
    for path in (tmp_path, tmp_path / "p-*", str(tmp_path / f"p-*{suffix}")):
        with open_source(path) as source:
            assert source.shape == (100, K)
            for start, stop in [(0, 100), (5, 8), (6, 41), (40, 41), (0, 0), (99, 100)]:
                np.testing.assert_array_equal(source.rows(start, stop), q[start:stop])
            assert len(source.fingerprints()) == 5
    rule = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
    expected = rule.score([q, q])
    got = gk.score_files([tmp_path, tmp_path], rule, chunk_bytes=999)
    assert got.models == 2 and got.rows == 100
    np.testing.assert_array_equal(got.scores.votes, expected.votes)
    listed = sorted(tmp_path.iterdir(), key=lambda p: natural(p.name))
    with open_shards(listed) as source:
        np.testing.assert_array_equal(source.rows(0, 100), q)
    got = gk.score_files(listed, rule, one_model=True)
    np.testing.assert_array_equal(got.scores.votes, rule.score(q).votes)


def test_models_need_not_be_split_alike(tmp_path: Path) -> None:
    a, b = rows(30), rows(30, seed=1)
    for name, q, cuts in (("a", a, [0, 11, 30]), ("b", b, [0, 3, 20, 30])):
        (tmp_path / name).mkdir()
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            np.save(tmp_path / name / f"{i}.npy", q[start:stop])
    rule = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
    got = gk.score_files([tmp_path / "a", tmp_path / "b"], rule, chunk_bytes=500).scores
    np.testing.assert_array_equal(got.critical_alpha, rule.score([a, b]).critical_alpha)


@pytest.mark.parametrize(
    "write", [write_npy, write_npz, write_safetensors, write_parquet, write_raw]
)
def test_urls(tmp_path: Path, write: Write) -> None:
    q = rows()
    about = write(tmp_path / "p", q)
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/{about['path'].name}"
    memory.pipe(url, about["path"].read_bytes())
    with open_source(**{**about, "path": url}) as source:
        np.testing.assert_array_equal(source.rows(3, 50), q[3:50])
        source.check_unchanged()
        with open_source(**about) as local:
            assert source.fingerprints()[0].sample == local.fingerprints()[0].sample
    folder = f"memory://{tmp_path.name}"
    with open_source(**{**about, "path": folder}) as source:
        np.testing.assert_array_equal(source.rows(0, 53), q)
    with pytest.raises(FileNotFoundError, match="none.npy does not exist"):
        open_source(folder + "/none.npy")
    with open_source(f"file://{about['path']}", **{k: about[k] for k in about if k != "path"}) as s:
        np.testing.assert_array_equal(s.rows(0, 53), q)


@pytest.mark.parametrize("name", ["with space.npy", "ünï-çødé.npy", "a[1].npy", "#%20.npy"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    q = rows()
    np.save(tmp_path / name, q)
    with open_source(tmp_path / name) as source:
        np.testing.assert_array_equal(source.rows(0, 53), q)


def tensors(header: Any, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def npy(**header: Any) -> bytes:
    text = repr({"descr": "<f4", "fortran_order": False, "shape": (2, 3), **header}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "is empty"),
        ("a.npy", b"no array", "is not a .npy file of numbers"),
        ("a.npy", npy() + bytes(23), r"is truncated: \(2, 3\) float32 takes"),
        ("a.npy", npy() + bytes(25), "has more after its array"),
        ("a.npy", npy(shape=(2**40, 2**20)) + bytes(8), "is truncated"),
        ("a.npy", npy(descr="|O") + bytes(24), "pickled Python objects, which are not read"),
        ("a.npy", npy(descr="<i4") + bytes(24), "must hold float16, .* got int32"),
        ("a.npy", npy(shape=(6,)) + bytes(24), r"must have shape \(N, k\), got \(6,\)"),
        ("a.npz", b"no archive", "is not a .npz file"),
        ("a.safetensors", b"\xff" * 8 + bytes(100), "its header would have"),
        ("a.safetensors", bytes(4), "is not a safetensors file"),
        ("a.safetensors", tensors(b"{" * 50), "is not a safetensors file"),
        ("a.safetensors", tensors([1]), "is not a safetensors file"),
        ("a.safetensors", tensors({"q": {"dtype": "F32"}}), "is not a safetensors file"),
        (
            "a.safetensors",
            tensors({"q": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(20)),
            "is truncated: q ends beyond the file",
        ),
        (
            "a.safetensors",
            tensors({"q": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, bytes(20)),
            "takes",
        ),
        (
            "a.safetensors",
            tensors({"q": {"dtype": "I32", "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24)),
            "got I32",
        ),
        ("a.safetensors", tensors({}), "holds none: column must say which"),
        ("a.parquet", b"PAR1 no table", "is not Parquet or is damaged"),
        ("a.arrow", b"no table at all", "is not Arrow or is damaged"),
        ("a.bin", bytes(10), "raw must say their dtype and k"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^score: .*{name}.*{message}"):
        open_source(tmp_path / name)


def test_which_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", a=rows(), b=rows())
    with pytest.raises(ValueError, match=r"p\.npz holds a, b: column must say which"):
        open_source(tmp_path / "p.npz")
    with pytest.raises(ValueError, match=r"p\.npz holds a, b: it must have 'c'"):
        open_source(tmp_path / "p.npz", column="c")
    about = write_columns(tmp_path / "c", rows())
    with pytest.raises(ValueError, match="must have a column 'q', got id, p0"):
        open_source(about["path"], column="q")
    with open_source(about["path"], column=["p3", "p1"]) as source:
        np.testing.assert_array_equal(source.rows(0, 53), rows()[:, [3, 1]])
    with pytest.raises(ValueError, match="rows of 6 float32 take 24 bytes, the file has 25"):
        (tmp_path / "a.raw").write_bytes(bytes(25))
        open_source(tmp_path / "a.raw", raw=("float32", 6))


def test_gaps_in_a_table(tmp_path: Path) -> None:
    def table(values: list[Any]) -> Source:
        probs = pa.array(values, pa.list_(pa.float32()))
        pq.write_table(pa.table({"probs": probs}), tmp_path / "p.parquet", row_group_size=2)
        return open_source(tmp_path / "p.parquet")

    half = [0.5, 0.5]
    for values, message in (
        ([half, half, half, None], "column probs is null at row 3"),
        ([half, half, [None, 1.0], half], "column probs is null at row 2"),
        ([half, half, half, [0.2] * 5], "must hold 2 numbers, got 5 at row 3"),
    ):
        with table(values) as source, pytest.raises(ValueError, match=message):
            source.rows(0, 4)


def test_changed_while_read(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "p", rows())["path"]
    with open_source(path) as source:
        os.utime(path, ns=(1, 1))
        with pytest.raises(ValueError, match="was changed while it was read"):
            source.check_unchanged()
    with open_source(path) as source:
        os.truncate(path, path.stat().st_size - 4)
        source.rows(0, 52)
        with pytest.raises(OSError, match=r"p\.npy became shorter while it was read"):
            source.rows(50, 53)


def test_damage_in_the_middle(tmp_path: Path) -> None:
    """Where the format has checksums, they are looked at."""
    np.savez_compressed(tmp_path / "p.npz", q=rows(3000))
    content = bytearray((tmp_path / "p.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "p.npz").write_bytes(content)
    message = r"p\.npz is damaged"
    with open_source(tmp_path / "p.npz") as source, pytest.raises(OSError, match=message):
        source.rows(0, 3000)


def test_models_must_be_alike(tmp_path: Path) -> None:
    paths = [write_npy(tmp_path / f"{i}", q)["path"] for i, q in enumerate((rows(), rows(52)))]
    with ExitStack() as stack, pytest.raises(ValueError, match=r"1\.npy must be like .*0\.npy"):
        open_models(paths, stack)
    paths.append(write_npy(tmp_path / "half", rows(dtype="float16"))["path"])
    with pytest.raises(ValueError, match=r"6 columns of float32, got 6 of float16"):
        open_shards([paths[0], paths[2]])


HEADERS = {
    "npy": lambda q: npy_of(q),
    "npz": lambda q: npz_of(q),
    "safetensors": lambda q: tensors(
        {"q": {"dtype": "F32", "shape": list(q.shape), "data_offsets": [0, q.nbytes]}}, q.tobytes()
    ),
    "parquet": lambda q: parquet_of(q),
    "arrow": lambda q: arrow_of(q),
}


def npy_of(q: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, q)
    return buffer.getvalue()


def npz_of(q: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, q=q)
    return buffer.getvalue()


def parquet_of(q: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"q": fixed(q)}), buffer)
    return buffer.getvalue()


def arrow_of(q: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"q": fixed(q)})
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", HEADERS)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path: Path, kind: str, data: Any) -> None:
    """Bytes changed or cut off anywhere: an error in one line, or rows of numbers."""
    content = bytearray(HEADERS[kind](rows(9)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / f"p.{kind}"
    path.write_bytes(content)
    try:
        with open_source(path) as source:
            assert source.shape[0] * source.shape[1] <= 1 << 20
            source.rows(0, source.shape[0])
    except (OSError, ValueError) as error:
        assert str(path) in str(error)


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros((2, 2)))
    return file.getvalue()


def saved(array: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


GOOD = saved(np.zeros((4, 3), np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p\.npy is empty$"),
        (b"1,2,3\n", r"p\.npy is not a \.npy file of numbers$"),
        (b"\x93NUMPY", r"p\.npy is not a \.npy file of numbers$"),
        (b"\x93NUMPY\x09\x00" + GOOD[8:], r"p\.npy is not a \.npy file of numbers$"),
        (GOOD[:40], r"p\.npy is not a \.npy file of numbers$"),
        (pickle.dumps(np.zeros((4, 3))), r"p\.npy is not a \.npy file of numbers$"),
        (npz_bytes(), r"p\.npy is not a \.npy file of numbers$"),
        (
            saved(np.array([[{}]], dtype=object), allow_pickle=True),
            r"p\.npy holds pickled Python objects, which are not read$",
        ),
        (saved(np.zeros((4, 3), np.int64)), r"must hold float16, .*, got int64$"),
        (saved(np.zeros((4, 3), "f4,f4")), r"must hold float16, .*, got void64"),
        (saved(np.zeros(12)), r"p\.npy must have shape \(N, k\), got \(12,\)$"),
        (saved(np.zeros((2, 2, 3))), r"p\.npy must have shape \(N, k\), got \(2, 2, 3\)$"),
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
def test_refuses_other_npy_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^score: .*{message}"):
        open_source(path)


def test_says_why_it_cannot_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"^score: .*none\.npy does not exist$"):
        open_source(tmp_path / "none.npy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder holds no file of \.npy, \.npz"):
        open_source(tmp_path / "folder")
    with pytest.raises(OSError, match=r"pipe is not a regular file$"):
        open_source(tmp_path / "pipe")


def test_models_may_differ_in_layout(tmp_path: Path) -> None:
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], np.zeros((4, 3), "<f4"))
    np.save(paths[1], np.zeros((4, 3), ">f4", order="F"))
    with ExitStack() as stack:
        assert len(open_models(paths, stack)) == 2


def test_fingerprint(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((1000, 7))
    path = tmp_path / "p.npy"
    np.save(path, array)
    with open_source(path) as predictions:
        first = predictions.fingerprints()[0]
    assert (first.name, first.size) == ("p.npy", path.stat().st_size)
    assert (first.shape, first.dtype) == ((1000, 7), "float64")
    assert first.modified == path.stat().st_mtime_ns

    array[999, 6] = 0  # a small file is digested whole
    np.save(path, array)
    with open_source(path) as predictions:
        assert predictions.fingerprints()[0].sample != first.sample


def digest(content: bytes) -> str:
    return sources.sample_digest(len(content), lambda start, n: content[start : start + n])


def test_sample_digest_reads_evenly_spaced_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SAMPLE_BLOCKS", 5)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 10)
    content = bytes(range(250))
    seen = []
    for i in range(len(content)):
        changed = content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        if digest(changed) != digest(content):
            seen.append(i)
    assert seen == [i for start in (0, 60, 120, 180, 240) for i in range(start, start + 10)]


@pytest.mark.parametrize("size", [0, 1, 49, 50])
def test_sample_digest_reads_small_content_whole(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(sources, "SAMPLE_BLOCKS", 5)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 10)
    digests = {digest(bytes(size))}
    digests |= {digest(bytes(i) + b"x" + bytes(size - i - 1)) for i in range(size)}
    assert len(digests) == size + 1
