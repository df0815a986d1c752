"""Prediction files of every kind: the same numbers, however they are stored."""

import io
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.tar import TarFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import genkl_ext as gk
from genkl_ext.scoring import sources
from genkl_ext.scoring.chunks import empty_rows, score_rows
from genkl_ext.scoring.keys import KeyColumn
from genkl_ext.scoring.sources import (
    natural,
    open_models,
    open_shards,
    open_source,
)

K = 6
RULE = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
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


def write_tensors(path: Path, q: np.ndarray) -> dict[str, Any]:
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(q.dtype), [K])
    table = pa.table({"probs": pa.ExtensionArray.from_storage(kind, fixed(q))})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=16)
    return {"path": path.with_suffix(".parquet")}


def write_zarr(path: Path, q: np.ndarray) -> dict[str, Any]:
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(str(path.with_suffix(".zarr")), data=q, chunks=(8, K))
    assert array.shape == q.shape
    return {"path": path.with_suffix(".zarr")}


def write_zarr_big_endian(path: Path, q: np.ndarray) -> dict[str, Any]:
    return write_zarr(path, q.astype(q.dtype.newbyteorder(">")))


KINDS: list[Write] = [
    write_npy, write_fortran, write_big_endian, write_npz, write_compressed, write_safetensors,
    write_raw, write_parquet, write_lists, write_columns, write_arrow, write_tensors, write_zarr,
    write_zarr_big_endian,
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
            # The kernel asks for "f", not "<f", which is the same to NumPy.
            assert memoryview(got).format == memoryview(np.empty(0, dtype)).format
            np.testing.assert_array_equal(got, q[start:stop])
        source.check_unchanged()
        expected = RULE.score(q).critical_alpha
        np.testing.assert_array_equal(RULE.score(source.rows(0, 53)).critical_alpha, expected)
        (print_,) = source.fingerprints()
        assert print_.shape == q.shape and print_.dtype == dtype
    other = tmp_path / "other"
    other.mkdir()
    with open_source(**write(other / "p", rows(dtype=dtype, seed=1))) as changed:
        assert changed.fingerprints()[0].sample != print_.sample


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__[6:])
def test_every_kind_is_scored(tmp_path: Path, write: Write) -> None:
    about = write(tmp_path / "p", rows())
    raw = about.pop("raw", (None,))[0]
    got = gk.score_files(about.pop("path"), RULE, raw=raw, chunk_bytes=300, **about).scores
    for name in ("critical_alpha", "votes", "nc", "top_class"):
        np.testing.assert_array_equal(getattr(got, name), getattr(RULE.score(rows()), name))


# Lists without a row do not say k, and raw numbers without one are an empty file: both are refused.
SAY_K = [write for write in KINDS if write not in (write_lists, write_raw)]


@pytest.mark.parametrize("write", SAY_K)
def test_no_rows(tmp_path: Path, write: Write) -> None:
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


def test_bfloat16_bad_rows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    q = torch.from_numpy(rows(40)).bfloat16()
    q[3] = torch.nan
    q[7, 2] = torch.inf
    q[11] *= 1.1  # beyond the tolerance of 16 bits
    q[12] *= 1.01  # within
    path = tmp_path / "q.safetensors"
    save_tensors({"q": q}, path)
    with pytest.raises(ValueError, match="got nan at row 3"):
        gk.score_files(path, RULE)
    got = gk.score_files(path, RULE, on_bad_row="nan", chunk_bytes=100)
    assert got.bad_rows.tolist() == [3, 7, 11]
    good = np.setdiff1d(np.arange(40), got.bad_rows)
    expected = RULE.score(q[torch.from_numpy(good)]).critical_alpha
    np.testing.assert_array_equal(got.scores.critical_alpha[good], expected.numpy())
    missing = np.isin(np.arange(40), [3, 7, 11])
    got = gk.score_files(path, RULE, leave_out=missing)
    assert np.flatnonzero(got.scores.top_class == -1).tolist() == [3, 7, 11]
    with open_source(path) as source:
        piece = source.rows(0, 40)
        assert np.flatnonzero(empty_rows([piece, piece])).tolist() == [3]
        score_rows([piece], RULE, on_bad_row="nan", missing=np.array([0, 3]))
        assert torch.isnan(piece[3]).all() and torch.equal(piece[0], q[0])  # not written to


def test_empty_rows() -> None:
    a, b = rows(30), rows(30, "float16")
    a[4] = a[9, 0] = b[20] = np.nan
    a[5, :-1] = np.nan
    assert np.flatnonzero(empty_rows([a])).tolist() == [4]
    assert np.flatnonzero(empty_rows([a, b])).tolist() == [4, 20]


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


def test_an_archive_that_says_more_than_it_can_hold(tmp_path: Path) -> None:
    """A row of gigabytes is not allocated to see whether it is there; the best packed is read."""
    size = 0xFFFFFFF0
    start = npy(descr="<f4", fortran_order=False, shape=(1, (size - 76) // 4))
    assert len(start) == 76
    content = npz(a=start + bytes(400))
    stated = (len(start) + 400).to_bytes(4, "little")
    assert content.count(stated) == 2
    path = tmp_path / "p.npz"
    path.write_bytes(content.replace(stated, size.to_bytes(4, "little")))
    message = r"p\.npz: a must take 4294967280 bytes, which its .* cannot hold"
    with pytest.raises(ValueError, match=message):
        open_source(path)
    np.savez_compressed(path, a=np.zeros((1 << 22, 4)))
    with open_source(path) as source:
        assert source.rows(5, 7).tolist() == [[0] * 4] * 2


def test_the_shard_of_a_bad_row(tmp_path: Path) -> None:
    for i in range(3):
        q = rows(20, seed=i)
        q[4:] = np.nan if i == 1 else q[4:]
        np.save(tmp_path / f"p-{i}.npy", q)
    message = rf"{tmp_path.name} must be .* got nan at row 24, class 0 \(row 4 of .*p-1\.npy\)$"
    with pytest.raises(ValueError, match=message):
        gk.score_files(tmp_path, RULE, chunk_bytes=200)


@pytest.mark.parametrize("reads", [2, 7])
def test_pieces_that_come_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """Several are read at a time, and the first of them last."""
    q = rows(600)
    np.save(tmp_path / "p.npy", q)
    read, lock, under_way, most = sources.Packed.rows, threading.Lock(), [0], [0]

    def slow(self: sources.Packed, start: int, stop: int) -> Any:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.004 if start // 20 % 2 == 0 else 0)
        with lock:
            under_way[0] -= 1
        return read(self, start, stop)

    monkeypatch.setattr(sources.Packed, "rows", slow)
    monkeypatch.setattr(sources.Packed, "concurrent_reads", lambda _: reads)
    got = gk.score_files(tmp_path / "p.npy", RULE, tmp_path / "t.npy", chunk_bytes=20 * 4 * K)
    np.testing.assert_array_equal(got.scores.critical_alpha, RULE.score(q).critical_alpha)
    assert 1 < most[0] <= reads


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """In another process, which may have 100 files open: npy, Parquet (two each), compressed."""
    q = rows(600)
    for write in (write_npy, write_parquet, write_compressed):
        folder = tmp_path / write.__name__
        folder.mkdir()
        for i in range(200):
            write(folder / f"p-{i}", q[3 * i : 3 * i + 3])
    np.save(tmp_path / "expected.npy", RULE.score([q, q, q]).critical_alpha)
    program = """
import resource, sys
import numpy as np
import genkl_ext as gk
from genkl_ext.scoring import sources
sources.OPEN_SHARDS = 16
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
rule = gk.GenKL(num_classes=6, alpha=0.9, beta=0.1, sigma=0.1)
folders = [sys.argv[1] + "/write_" + name for name in ("npy", "parquet", "compressed")]
got = gk.score_files(folders, rule, chunk_bytes=2000)
assert len(got.inputs) == 600 and not sources._last_used
assert (got.scores.critical_alpha == np.load(sys.argv[1] + "/expected.npy")).all()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("write", [write_npy, write_parquet, write_compressed])
def test_shards_read_by_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """With fewer open shards than threads: none is closed while it is read."""
    monkeypatch.setattr(sources, "OPEN_SHARDS", 2)
    q = rows(200)
    for i in range(20):
        write(tmp_path / f"p-{i}", q[10 * i : 10 * i + 10])

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            start, stop = np.sort(rng.integers(0, 200, 2))
            np.testing.assert_array_equal(source.rows(start, stop), q[start:stop])

    with open_source(tmp_path) as source, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read, seed) for seed in range(16)]:
            done.result()
        assert sum(shard._source is not None for shard in source._shards) <= 2  # type: ignore[attr-defined]


def test_shards_that_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "OPEN_SHARDS", 1)
    for i in range(3):
        write_npy(tmp_path / f"p-{i}", rows(5))
    with open_source(tmp_path) as source:
        source.rows(0, 15)
        source.check_unchanged()
        first = source.fingerprints()
        os.utime(tmp_path / "p-0.npy", ns=(1, 1))
        with pytest.raises(ValueError, match=r"p-0\.npy was changed while it was read"):
            source.check_unchanged()
        with pytest.raises(ValueError, match=r"p-0\.npy was changed while it was read"):
            source.rows(0, 5)
        assert source.fingerprints() == first
        np.testing.assert_array_equal(source.rows(5, 15), np.tile(rows(5), (2, 1)))


def test_rows_of_many_tables_are_not_kept(tmp_path: Path) -> None:
    for i in range(5):
        write_parquet(tmp_path / f"p-{i}", rows(10))
    with open_source(tmp_path) as source:
        source.rows(0, 50)
        assert all(shard._source._piece is None for shard in source._shards)  # type: ignore[attr-defined]


@pytest.mark.parametrize("write", [write_parquet, write_lists, write_columns, write_tensors])
def test_a_row_group_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """A group of any size takes little memory; any rows can be had, in any order."""
    monkeypatch.setattr(sources, "_PIECE_BYTES", 4096)
    q = rows(5000)
    given = write(tmp_path / "p", q)
    (path,) = tmp_path.iterdir()
    if path.suffix == ".parquet":
        # All of it as two groups, the second of which begins in the middle of the pieces.
        table = pq.read_table(path)
        pq.write_table(table, path, row_group_size=3001)
    rng = np.random.default_rng(0)
    spans = [(i, min(i + 700, 5000)) for i in range(0, 5000, 700)]
    spans += [tuple(sorted(rng.integers(0, 5001, 2))) for _ in range(40)]
    sizes = []
    with open_source(**given) as source:
        assert isinstance(source, sources.Table)
        for start, stop in spans:
            np.testing.assert_array_equal(source.rows(start, stop), q[start:stop])
            sizes.append(0 if source._piece is None else len(source._piece[2]))
    if path.suffix == ".parquet":
        assert 0 < max(sizes) <= 4096 // (K * 4)


@pytest.mark.parametrize("name", ["p", "p.q"])
@pytest.mark.parametrize("lists", [True, False])
def test_rows_that_repeat_are_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lists: bool
) -> None:
    """One-hot rows take next to nothing in the file, and as much as others in memory."""
    monkeypatch.setattr(sources, "_PIECE_BYTES", 4096)
    q = np.zeros((5000, K), np.float32)
    q[:, 2] = 1
    columns = {f"{name}.{c}": q[:, c] for c in range(K)}
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({name: fixed(q)} if lists else columns), path)
    assert pq.read_metadata(path).row_group(0).total_byte_size < q.nbytes / 10
    with open_source(path) as source:
        assert isinstance(source, sources.Table)
        np.testing.assert_array_equal(source.rows(2000, 2010), q[2000:2010])
        assert source._piece is not None and 100 < len(source._piece[2]) <= 4096 // (4 * K)


def test_an_arrow_file_is_not_opened_for_each_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_file = pa.ipc.open_file
    monkeypatch.setattr(pa.ipc, "open_file", lambda *a, **b: opened.append(a) or open_file(*a, **b))
    with open_source(**write_arrow(tmp_path / "p", rows(500))) as source:
        for start in range(0, 500, 9):
            stop = min(start + 9, 500)
            np.testing.assert_array_equal(source.rows(start, stop), rows(500)[start:stop])
    assert len(opened) == 2


def test_a_piece_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error whenever it is read, and the others are not."""
    monkeypatch.setattr(sources, "_PIECE_BYTES", 4096)
    q = rows(5000)
    write_parquet(tmp_path / "p", q)
    (path,) = tmp_path.iterdir()
    pq.write_table(pq.read_table(path), path, data_page_size=2000, use_dictionary=False,
                   compression="zstd")  # fmt: skip
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    path.write_bytes(content)
    with open_source(path) as source:
        for _ in range(2):
            with pytest.raises(OSError, match=r"p\.parquet is damaged: "):
                source.rows(0, 5000)
            np.testing.assert_array_equal(source.rows(100, 200), q[100:200])


def test_shards_without_a_row(tmp_path: Path) -> None:
    """Lists of any length: which, the other shards say."""
    q = rows(20)
    for i, values in enumerate(([], q[:5], [None, None], [], q[5:])):
        probs = pa.array([None if v is None else list(v) for v in values], pa.list_(pa.float32()))
        pq.write_table(pa.table({"probs": probs}), tmp_path / f"p-{i}.parquet")
    with open_source(tmp_path) as source:
        assert source.shape == (22, K)
        wanted = np.concatenate([q[:5], np.full((2, K), np.nan), q[5:]])
        np.testing.assert_array_equal(source.rows(0, 22), wanted)
        np.testing.assert_array_equal(source.rows(6, 8), wanted[6:8])
        assert source.fingerprints()[0].shape == (0, K)
    assert gk.score_files(tmp_path, RULE, on_bad_row="nan").bad_rows.tolist() == [5, 6]
    for one in (tmp_path / "p-0.parquet", tmp_path / "p-[023].parquet"):
        with pytest.raises(ValueError, match=r"has no row that says how many numbers"):
            open_source(one)


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    write_npy(tmp_path / "p-0", rows())
    for name in (".p-1.abc.partial.npy", "._p-0.npy"):
        (tmp_path / name).write_bytes(b"half")
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"memory://{tmp_path.name}/{path.name}", path.read_bytes())
    for name in (tmp_path, tmp_path / "*.npy", f"memory://{tmp_path.name}"):
        with open_source(name) as source:
            assert source.shape == (53, K)


def test_natural_order() -> None:
    wanted = ["1²2", "12", "p", "p-01", "p-1", "p-1-b", "p-2", "p-10", "p²", "٣"]
    for seed in range(20):
        names = np.random.default_rng(seed).permutation(wanted).tolist()
        assert sorted(names, key=natural) == wanted


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


def archive_of(folder: Path, kind: str) -> str:
    """What comes after the name of a member in the URLs of an archive of all that a folder has."""
    path = folder.parent / f"{folder.name}.{kind}"
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for one in files:
                packed.write(one, one.relative_to(folder))
    else:
        with tarfile.open(path, "w") as archive:
            for one in files:
                archive.add(one, str(one.relative_to(folder)))
    return f"::file://{path}"


class SlowFile:
    """Gives other threads the time to move its place before it is read."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def seek(self, *place: int) -> Any:
        self._file.seek(*place)
        time.sleep(0.0002)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def shared_archives(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """All who open members of a tar get one file system, as some versions of fsspec do it. It is
    made slow by being called with the URL of a member."""

    def slow_down(url: str) -> None:
        system, _ = fsspec.core.url_to_fs(url)
        system.tar.fileobj = SlowFile(system.tar.fileobj)

    monkeypatch.setattr(TarFileSystem, "cachable", True)
    yield slow_down
    TarFileSystem.clear_instance_cache()


def read_together(sources_: list[Any], wanted: list[np.ndarray], step: int) -> None:
    """Several threads read each source, all of them at the same time."""
    start = threading.Barrier(2 * len(sources_))

    def read(i: int, begin: int) -> None:
        start.wait()
        for _ in range(3):
            for row in range(begin, len(wanted[i]), step):
                got = sources_[i].rows(row, min(row + step, len(wanted[i])))
                np.testing.assert_array_equal(got, wanted[i][row : row + step])

    with ThreadPoolExecutor(2 * len(sources_)) as pool:
        for done in [pool.submit(read, i, j) for i in range(len(sources_)) for j in (0, 7)]:
            done.result()


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("write", [write_npy, write_parquet, write_arrow, write_compressed])
def test_members_of_an_archive_are_read_together(
    tmp_path: Path, shared_archives: Callable[[str], None], kind: str, write: Write
) -> None:
    """The system of a tar has one file object for all: its place is not moved by others."""
    folder = tmp_path / "folder"
    folder.mkdir()
    wanted = [rows(2000, seed=i) for i in range(2)]
    names = [write(folder / f"p-{i}", q)["path"].name for i, q in enumerate(wanted)]
    end = archive_of(folder, kind)
    if kind == "tar":
        shared_archives(f"tar://{names[0]}{end}")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_source(f"{kind}://{name}{end}")) for name in names]
        opened += [stack.enter_context(open_source(f"{kind}://{names[0]}{end}"))]
        read_together(opened, [*wanted, wanted[0]], 101 if write is not write_compressed else 701)
        for source in opened:
            source.check_unchanged()


def test_an_archive_in_an_archive(tmp_path: Path, shared_archives: Callable[[str], None]) -> None:
    """Two inner ones have a file object each, and the outer one has one for both."""
    outer = tmp_path / "outer"
    outer.mkdir()
    wanted = [rows(2000, seed=i) for i in range(2)]
    for i, q in enumerate(wanted):
        inner = outer / f"in-{i}"
        inner.mkdir()
        np.save(inner / "p.npy", q)
        archive_of(inner, "tar")
    end = archive_of(outer, "tar")
    shared_archives(f"tar://in-0.tar{end}")
    with ExitStack() as stack:
        opened = [
            stack.enter_context(open_source(f"tar://p.npy::tar://in-{i}.tar{end}"))
            for i in range(2)
        ]
        read_together(opened, wanted, 101)


@pytest.mark.usefixtures("shared_archives")
def test_zarr_in_an_archive(tmp_path: Path) -> None:
    """Zarr itself reads several chunks at a time."""
    folder = tmp_path / "folder"
    folder.mkdir()
    wanted = [rows(1000, seed=i) for i in range(2)]
    for i, q in enumerate(wanted):
        write_zarr(folder / f"p-{i}", q)
    end = archive_of(folder, "tar")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_source(f"tar://p-{i}.zarr{end}")) for i in range(2)]
        read_together(opened, wanted, 500)
        for source in opened:
            source.check_unchanged()


def test_models_of_an_archive_are_scored(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    wanted = [rows(3000, seed=i) for i in range(2)]
    for i, q in enumerate(wanted):
        np.save(folder / f"p-{i}.npy", q)
    end = archive_of(folder, "tar")
    got = gk.score_files([f"tar://p-{i}.npy{end}" for i in range(2)], RULE, chunk_bytes=2000)
    np.testing.assert_array_equal(got.scores.critical_alpha, RULE.score(wanted).critical_alpha)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_shards_in_an_archive(tmp_path: Path, kind: str) -> None:
    """Members are what their own names say, not that of the archive."""
    folder = tmp_path / "p.npy"  # p.npy.tar
    (folder / "sub").mkdir(parents=True)
    q = rows(30)
    for i in range(3):
        write_parquet(folder / "sub" / f"p-{i + 8}", q[10 * i : 10 * i + 10])
    (folder / "sub" / ".p-8.parquet").write_bytes(b"half")
    end = archive_of(folder, kind)
    for name in ("sub", "sub/p-*.parquet"):
        with open_source(f"{kind}://{name}{end}") as source:
            np.testing.assert_array_equal(source.rows(0, 30), q)
            assert [f.name for f in source.fingerprints()] == [
                f"p-{i}.parquet:probs" for i in (8, 9, 10)
            ]
            source.check_unchanged()
    with KeyColumn([f"{kind}://sub{end}"], "key", 30) as keys:
        assert keys.slice(8, 12) == ["8", "9", "0", "1"]


class FarFileSystem(AsyncFileSystem):
    """Files in memory that any threads may read, as those of a server."""

    protocol = "far"
    files: ClassVar[dict[str, bytes]] = {}

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        content = self.files[self._strip_protocol(path)]
        return {"name": path, "type": "file", "size": len(content), "ETag": hash(content)}

    async def _cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        return self.files[self._strip_protocol(path)][start:end]


def test_which_systems_are_read_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("far", FarFileSystem, clobber=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "p.npy", rows(300))
    monkeypatch.setitem(FarFileSystem.files, "p.npy", (folder / "p.npy").read_bytes())
    with open_source("far://p.npy") as source:
        assert source.concurrent_reads() > 1
        read_together([source], [rows(300)], 7)
    with open_source(f"tar://p.npy{archive_of(folder, 'tar')}") as source:
        assert source.concurrent_reads() == 1
    far = fsspec.filesystem("far")
    archive = fsspec.filesystem("tar", fo=str(tmp_path / "folder.tar"))
    for system in (
        archive,
        fsspec.filesystem("memory"),
        fsspec.filesystem("dir", fs=archive, path="/"),
    ):
        assert not sources._reads_together(system)
    assert sources._reads_together(fsspec.filesystem("dir", fs=far, path="/"))
    # It writes its copies without a thought of other threads.
    assert not sources._reads_together(fsspec.filesystem("blockcache", fs=far))


def test_file_objects_have_places_of_their_own(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    content = bytes(range(256)) * 300
    memory.pipe(f"/{tmp_path.name}/file", content)
    file = sources.Bytes(f"memory://{tmp_path.name}/file")
    with file.open() as a, file.open() as b:
        assert a.read(10) == content[:10] and b.read(5) == content[:5]
        assert b.seek(-7, os.SEEK_END) == len(content) - 7 == b.tell()
        assert a.read(70_000) == content[10:70_010] and b.read() == content[-7:]
        assert a.seek(-10, os.SEEK_CUR) == 70_000 and a.read(3) == content[70_000:70_003]
        assert b.read(1) == b"" and a.seek(10**9) == 10**9 and a.read(1) == b""
        with pytest.raises(ValueError, match="must be 0 or more, got -1"):
            a.seek(-len(content) - 1, os.SEEK_END)


def rewrite(path: Path, content: bytes) -> None:
    """The same size, and a time that tells, whatever the clock shows."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_states_of_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "OPEN_SHARDS", 1)
    for i in range(3):
        np.save(tmp_path / f"p-{i}.npy", rows(seed=i))

    def states(path: Path) -> tuple[str, ...]:
        with open_source(path) as source:
            assert len(source.states()) == len(source.fingerprints())
            return source.states()

    before = states(tmp_path)
    assert states(tmp_path) == before and len(before) == 3
    assert states(tmp_path / "p-1.npy") == before[1:2]
    rewrite(tmp_path / "p-1.npy", (tmp_path / "p-2.npy").read_bytes())
    after = states(tmp_path)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_states_of_far_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/p.npy"
    memory.pipe(url, npy_of(rows()))
    with open_source(url) as source:
        before = source.states()
    with open_source(url) as source:
        assert source.states() == before
        memory.pipe(url, npy_of(rows(seed=1)))
        with pytest.raises(ValueError, match=r"p\.npy was changed while it was read$"):
            source.check_unchanged()
    with open_source(url) as source:
        assert source.states() != before


def test_states_of_members_of_an_archive(tmp_path: Path) -> None:
    """Archives that are made to be equal say one time for all members: their own counts, too."""

    def pack(seed: int) -> None:
        content = npy_of(rows(seed=seed))
        member = tarfile.TarInfo("p.npy")
        member.size = len(content)
        with tarfile.open(tmp_path / "p.tar", "w") as archive:
            archive.addfile(member, io.BytesIO(content))
        os.utime(tmp_path / "p.tar", ns=(seed, seed))

    pack(0)
    with open_source(f"tar://p.npy::file://{tmp_path}/p.tar") as source:
        before = source.states()
        source.check_unchanged()
        pack(1)
        with pytest.raises(ValueError, match=r"p\.tar was changed while it was read$"):
            source.check_unchanged()
    with open_source(f"tar://p.npy::{tmp_path}/p.tar") as source:
        assert source.states() != before


@pytest.mark.parametrize("far", [False, True])
def test_states_of_zarr(tmp_path: Path, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file of the store counts; also of one that several stores were opened after."""
    monkeypatch.setattr(sources, "OPEN_SHARDS", 1)
    for i in range(3):
        write_zarr(tmp_path / f"p-{i}", rows())
    memory = fsspec.filesystem("memory")
    folder = f"memory://{tmp_path.name}" if far else str(tmp_path)
    if far:
        memory.put(f"{tmp_path}/", f"/{tmp_path.name}/", recursive=True)

    def change() -> None:
        chunk = tmp_path / "p-0.zarr" / "c" / "2" / "0"
        if far:
            memory.pipe(f"/{tmp_path.name}/p-0.zarr/c/2/0", chunk.read_bytes())
        else:
            rewrite(chunk, chunk.read_bytes())

    with open_source(folder) as source, open_source(f"{folder}/p-0.zarr") as first:
        assert source.states()[0] == first.states()[0] != source.states()[1]
        for one in (source, first):
            one.check_unchanged()
        change()
        for one in (source, first):
            with pytest.raises(ValueError, match=r"p-0\.zarr was changed while it was read$"):
                one.check_unchanged()
        with open_source(folder) as now:
            same = [a == b for a, b in zip(now.states(), source.states(), strict=True)]
        assert same == [False, True, True]


def test_a_zarr_store_behind_http_says_nothing() -> None:
    pytest.importorskip("aiohttp")
    assert sources._store_state("http://localhost:1/p.zarr") == ()


@pytest.mark.parametrize("name", ["with space.npy", "ünï-çødé.npy", "a[1].npy", "#%20.npy"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    q = rows()
    np.save(tmp_path / name, q)
    with open_source(tmp_path / name) as source:
        np.testing.assert_array_equal(source.rows(0, 53), q)


def tensors(header: Any, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npy(**about: Any) -> bytes:
    return header(repr({"descr": "<f4", "fortran_order": False, "shape": (2, 3), **about}))


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


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
        ("a.npy", npy(shape=(True, 6)) + bytes(24), "is not a .npy file of numbers"),
        ("a.npy", npy(shape=(-2, -3)) + bytes(24), "is not a .npy file of numbers"),
        ("a.npy", header("-" * 9000 + "1"), "is not a .npy file of numbers"),
        ("a.npy", header("(" * 5000), "is not a .npy file of numbers"),
        ("a.npy", header("1" + "+1" * 4000), "is not a .npy file of numbers"),
        ("a.npz", b"no archive", "is not a .npz file"),
        ("a.npz", npz(a=b"no array"), "a.npy is not a .npy file of numbers"),
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
        *(
            ("a.safetensors", tensors(text.encode(), bytes(24)), "is not a safetensors file: ")
            for text in (
                '{"q": {"dtype": "F32", "shape": [Infinity, 3], "data_offsets": [0, 24]}}',
                '{"q": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 1e400]}}',
                '{"q": {"dtype": "F32", "shape": [1.5, 4], "data_offsets": [0, 24]}}',
                '{"q": {"dtype": "F32", "shape": "23", "data_offsets": [0, 24]}}',
                '{"q": {"dtype": "F32", "shape": [true, 6], "data_offsets": [0, 24]}}',
                '{"q": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24, 3]}}',
                '{"q": {"dtype": [], "shape": [2, 3], "data_offsets": [0, 24]}}',
                '{"q": 5}',
            )
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
    with pytest.raises(ValueError, match=r"^score: \S*p\.npz holds a, b: column must say which"):
        open_source(tmp_path / "p.npz")
    with pytest.raises(ValueError, match=r"p\.npz holds a, b: it must have 'c'"):
        open_source(tmp_path / "p.npz", column="c")
    about = write_columns(tmp_path / "c", rows())
    with pytest.raises(ValueError, match="must have a column 'q', got id, p0"):
        open_source(about["path"], column="q")
    with open_source(about["path"], column=["p3", "p1"]) as source:
        np.testing.assert_array_equal(source.rows(0, 53), rows()[:, [3, 1]])
    with pytest.raises(ValueError, match="column must name columns once, got 'p3' again"):
        open_source(about["path"], column=["p3", "p1", "p3"])
    twice = pa.table([rows()[:, 0], rows()[:, 1]], names=["p", "p"])
    pq.write_table(twice, tmp_path / "t.parquet")
    for column in (None, "p"):
        with pytest.raises(ValueError, match=r"t\.parquet has more than one column 'p'"):
            open_source(tmp_path / "t.parquet", column=column)
    inner = pa.table({"p": pa.array([{"q": 1.0}]), "p.q": pa.array([0.5])})
    pq.write_table(inner, tmp_path / "i.parquet")
    with open_source(tmp_path / "i.parquet", column=["p.q"]) as source:
        np.testing.assert_array_equal(source.rows(0, 1), [[0.5]])
    with pytest.raises(ValueError, match="rows of 6 float32 take 24 bytes, the file has 25"):
        (tmp_path / "a.raw").write_bytes(bytes(25))
        open_source(tmp_path / "a.raw", raw=("float32", 6))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nulls_are_nan(tmp_path: Path, kind: str, dtype: str) -> None:
    """Of rows and of numbers, in lists of either sort and in columns; the first row, too."""
    number = pa.from_numpy_dtype(np.dtype(dtype))
    path = tmp_path / f"p.{kind}"
    values: list[Any] = [list(row) for row in rows(9, dtype)]
    values[0] = values[5] = None
    values[3] = [None, *values[3][1:]]
    wanted = np.array([v or [None] * K for v in values], dtype)
    assert np.isnan(wanted).any(axis=1).sum() == 3
    columns = {f"p{c}": pa.array(wanted[:, c], number, from_pandas=True) for c in range(K)}
    assert columns["p0"].null_count == 3
    for table in (
        pa.table({"q": pa.array(values, pa.list_(number))}),
        pa.table({"q": pa.array(values, pa.list_(number, K))}),
        pa.table({"q": pa.array(values, pa.large_list(number))}),
        pa.table(columns),
    ):
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=1)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
        with open_source(path) as source:
            assert source.shape == (9, K)
            got = source.rows(0, 9)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, wanted)
        with pytest.raises(ValueError, match=r"must be finite and not negative, got nan at row 0"):
            gk.score_files(path, RULE)
        for on_bad_row in ("nan", "skip"):
            got = gk.score_files(path, RULE, on_bad_row=on_bad_row, chunk_bytes=100)
            assert got.bad_rows.tolist() == [0, 3, 5]


def test_lists_of_another_length(tmp_path: Path) -> None:
    half = [0.5, 0.5]
    probs = pa.array([half, None, half, half, [0.2] * 5], pa.list_(pa.float32()))
    pq.write_table(pa.table({"probs": probs}), tmp_path / "p.parquet", row_group_size=3)
    message = r"p\.parquet: column probs must hold 2 numbers, got 5 at row 4"
    with open_source(tmp_path / "p.parquet") as source:
        assert source.rows(0, 3).shape == (3, 2)
        with pytest.raises(ValueError, match=message):
            source.rows(3, 5)
    pq.write_table(pa.table({"probs": pa.array([[]], probs.type)}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="column probs holds empty lists"):
        open_source(tmp_path / "p.parquet")


@pytest.mark.parametrize("bad", [-(2**31), -1, 10**6, 2**31 - 1])
def test_offsets_out_of_an_arrow_file(tmp_path: Path, bad: int) -> None:
    """Where a list begins is a place in memory. Nobody goes there who has not checked it."""
    q = rows(9)
    buffer = io.BytesIO()
    table = pa.table({"q": pa.array([list(row) for row in q], pa.list_(pa.float32()))})
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    content = buffer.getvalue()
    offsets = struct.pack("<10i", *range(0, 10 * K, K))
    at = content.index(offsets)
    for i in range(10):
        broken = bytearray(content)
        struct.pack_into("<i", broken, at + 4 * i, bad)
        (tmp_path / "p.arrow").write_bytes(broken)
        message = r"p\.arrow (is damaged|is not Arrow or is damaged): "
        with (
            pytest.raises((OSError, ValueError), match=message),
            open_source(tmp_path / "p.arrow") as source,
        ):
            source.rows(0, 9)


def test_damaged_zarr(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "p", rows())["path"]
    (chunk,) = (path / "c" / "2").iterdir()
    chunk.write_bytes(b"xx")
    with open_source(path) as source:
        np.testing.assert_array_equal(source.rows(0, 16), rows()[:16])
        with pytest.raises(OSError, match=r"^score: .*p\.zarr is damaged: "):
            source.rows(16, 18)
    (path / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"^score: .*p\.zarr is not Zarr or is damaged: "):
        open_source(path)
    with pytest.raises(FileNotFoundError, match=r"^score: .*none\.zarr does not exist"):
        open_source(tmp_path / "none.zarr")


def test_urls_of_no_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("foo://x/p.npy", "foo://x/p.zarr", "foo://x/*.npy"):
        with pytest.raises(ValueError, match=r"^score: foo://x/.* cannot be read: .*foo"):
            open_source(name)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # not installed
    with pytest.raises(ImportError, match=r"^score: s3://x/p\.npy cannot be read: .*s3fs"):
        open_source("s3://x/p.npy")


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
    "lists.arrow": lambda q: arrow_of(q, lists=True),
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


def arrow_of(q: np.ndarray, lists: bool = False) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"q": pa.array(list(q), pa.list_(pa.float32())) if lists else fixed(q)})
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
