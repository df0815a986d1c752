import errno
import gc
import os
import re
import tempfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genkl_ext.scoring import keys as keys_module
from genkl_ext.scoring import sources
from genkl_ext.scoring.keys import KeyColumn, Keys, read_nc_list, write_nc_list

BYTE_ORDER_MARK = "\ufeff".encode()
# What a file of lines can be awkward by: ends of lines, text that looks like one, characters of
# every length, and bytes that are none.
AWKWARD = (
    b"\n", b"\r\n", b"\r", b"a", b" ", b"\x00", b"\x85", "\u2028".encode(), "ä".encode(),
    "漢".encode(), "😀".encode(), BYTE_ORDER_MARK, b"\xff", b"\xc3", b"key", b"\n" * 9,
)  # fmt: skip


def key_file(folder: Path, content: bytes) -> Path:
    path = folder / "keys.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"images/a b,1.jpg\nZ\xc3\xbcrich\n x \n",
        b"images/a b,1.jpg\nZ\xc3\xbcrich\n x ",
        b"images/a b,1.jpg\r\nZ\xc3\xbcrich\r\n x \r\n",
        b"images/a b,1.jpg\r\nZ\xc3\xbcrich\n x \r\n\r\n\n",
        b"\xef\xbb\xbfimages/a b,1.jpg\nZ\xc3\xbcrich\n x \n",
    ],
)
def test_reads_one_key_per_line(tmp_path: Path, content: bytes) -> None:
    keys = Keys(key_file(tmp_path, content), 3)
    expected = ["images/a b,1.jpg", "Zürich", " x "]
    assert len(keys) == 3
    assert [keys[i] for i in range(3)] == expected
    for start in range(4):
        for stop in range(start, 4):
            assert keys.slice(start, stop) == expected[start:stop]
    assert keys.longest() == 16


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n\r\n"])
def test_no_keys_for_no_rows(tmp_path: Path, content: bytes) -> None:
    keys = Keys(key_file(tmp_path, content), 0)
    assert len(keys) == 0 and keys.slice(0, 0) == [] and keys.longest() == 0
    assert keys.repeats() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", r"must have one key for each of 3 rows, got 2 lines$"),
        (b"a\nb\nc\nd\n", r"must have one key for each of 3 rows, got 4 lines$"),
        (
            b"a\n\nb\n\r\nc\n",
            r"must have one key for each of 3 rows, got 5 lines, 2 of them blank \(line 2\)$",
        ),
        (b"a\n\nc\n", r"must have a key in each line, 1 of them blank \(line 2\)$"),
        (b"\nb\nc\n", r"must have a key in each line, 1 of them blank \(line 1\)$"),
        (b"", r"must have one key for each of 3 rows, got 0 lines$"),
        (b"a\nb\xff\nc\n", r"is not UTF-8 text in line 2$"),
    ],
)
def test_refuses_other_lists(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^score: .*keys\.txt {message}"):
        Keys(key_file(tmp_path, content), 3)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^score: .*none\.txt does not exist$"):
        Keys(tmp_path / "none.txt", 3)


@given(
    content=st.lists(st.sampled_from(AWKWARD), max_size=40).map(b"".join),
    piece=st.integers(1, 9),
    mark=st.integers(1, 5),
)
@settings(deadline=None, max_examples=200)
def test_any_file(content: bytes, piece: int, mark: int) -> None:
    """However the pieces cut it, a file is what Python makes of its text as a whole."""
    body = content.removeprefix(BYTE_ORDER_MARK).replace(b"\r\n", b"\n").rstrip(b"\r\n")
    lines = body.split(b"\n") if body else []
    blank = [i + 1 for i, line in enumerate(lines) if not line]
    wrong = [i + 1 for i, line in enumerate(lines) if line.decode(errors="ignore").encode() != line]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(keys_module, _PIECE_BYTES=piece, _MARK_ROWS=mark),
    ):
        path = key_file(Path(folder), content)
        with pytest.raises(
            ValueError, match=f"for each of {len(lines) + 1} rows, got {len(lines)} "
        ):
            Keys(path, len(lines) + 1)
        if blank or wrong:
            reason = (
                rf"{len(blank)} of them blank \(line {blank[0]}\)$"
                if blank
                else f"is not UTF-8 text in line {wrong[0]}$"
            )
            with pytest.raises(ValueError, match=reason):
                Keys(path, len(lines))
            return
        expected = [line.decode() for line in lines]
        with Keys(path, len(lines)) as keys:
            assert len(keys) == len(expected)
            assert [keys[i] for i in range(len(lines))] == expected
            assert keys.longest() == max(map(len, lines), default=0)
            for start in range(len(lines) + 1):
                for stop in range(start, len(lines) + 1):
                    assert keys.slice(start, stop) == expected[start:stop]


def test_fingerprint_is_of_the_file_as_it_is(tmp_path: Path) -> None:
    """Tables that were written with this list know it by these values."""
    content = BYTE_ORDER_MARK + b"".join(b"images/%d.jpg\r\n" % i for i in range(400_000))
    keys = Keys(key_file(tmp_path, content), 400_000)
    assert keys.fingerprint() == {
        "name": "keys.txt",
        "size": 7_488_893,
        "sample": "049a6fb195773f132b3ba4633b919337",
    }


def test_rows_outside(tmp_path: Path) -> None:
    keys = Keys(key_file(tmp_path, b"a\nb\n"), 2)
    assert keys[-1] == "b"
    for row in (2, -3):
        with pytest.raises(IndexError):
            keys[row]
    with pytest.raises(IndexError):
        keys.slice(1, 3)


def test_reads_from_other_file_systems() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/lists/keys.txt", b"a\nb\n")
    try:
        with Keys("memory://lists/keys.txt", 2) as keys:
            assert keys.slice(0, 2) == ["a", "b"]
            assert keys.fingerprint()["name"] == "keys.txt"
            keys.check_unchanged()
            system.pipe("/lists/keys.txt", b"a\nbc\n")
            with pytest.raises(ValueError, match=r"memory://lists/keys\.txt was changed while"):
                keys.check_unchanged()
    finally:
        system.rm("/lists", recursive=True)


def test_threads_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_MARK_ROWS", 8)
    expected = [f"images/{i}.jpg" for i in range(2_000)]
    keys = Keys(key_file(tmp_path, "\n".join(expected).encode()), 2_000)

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, 2_000, 500).tolist():
            stop = min(start + 1 + start % 20, 2_000)
            assert keys.slice(start, stop) == expected[start:stop]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path: os.truncate(path, 20), OSError, "became shorter"),
        # Of the same length, and with other lines.
        (lambda path: path.write_bytes(b"key-key" * 64), ValueError, "was changed"),
        (lambda path: path.write_bytes(b"\xff" * 448), ValueError, "was changed"),
    ],
)
def test_a_file_that_changes_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(keys_module, "_MARK_ROWS", 8)
    path = key_file(tmp_path, b"".join(b"key-%02d\n" % i for i in range(64)))
    with Keys(path, 64) as keys:
        keys.slice(0, 8)
        keys.check_unchanged()
        os.utime(path, ns=(1, 1))  # what follows may take no time that the clock shows
        change(path)
        with pytest.raises(error, match=rf"^score: .*keys\.txt {message} while it was read$"):
            keys.slice(8, 64)
        with pytest.raises(ValueError, match=r"^score: .*keys\.txt was changed while it was read$"):
            keys.check_unchanged()


def test_a_file_that_was_written_again_is_found(tmp_path: Path) -> None:
    """Other keys of the same length, which no line tells."""
    path = key_file(tmp_path, b"a\nb\n")
    with Keys(path, 2) as keys:
        path.write_bytes(b"b\na\n")
        os.utime(path, ns=(1, 1))
        with pytest.raises(ValueError, match=r"^score: .*keys\.txt was changed while it was read$"):
            keys.check_unchanged()


def test_leaves_no_file_open(tmp_path: Path) -> None:
    path = key_file(tmp_path, b"a\nb\n")
    gc.collect()  # what others have left
    before = len(os.listdir("/dev/fd"))
    with Keys(path, 2) as keys:
        assert len(os.listdir("/dev/fd")) == before + 1
    assert len(os.listdir("/dev/fd")) == before
    keys.close()
    kept = Keys(path, 2)
    del kept
    with pytest.raises(ValueError, match="one key for each of 3 rows"):
        Keys(path, 3)
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("kinds", [1, 1 << 18])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: int
) -> None:
    rows = 1 << 18
    path = key_file(tmp_path, b"".join(b"%063d\n" % (i % kinds) for i in range(rows)))  # 16 MiB
    monkeypatch.setattr(keys_module, "_HASHED_ROWS", 1 << 12)
    monkeypatch.setattr(keys_module, "_COMPARED_HASHES", 1 << 14)
    monkeypatch.setattr(keys_module, "_HASH_BYTES", 1 << 16)
    monkeypatch.setattr(keys_module, "MOST_REPEATS", 100)
    tracemalloc.start()
    try:
        keys = Keys(path, rows)
        assert keys.slice(rows - 5, rows)[-1] == f"{(rows - 1) % kinds:063d}"
        assert len(keys.repeats(tmp_path)) == (100 if kinds == 1 else 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.fixture(params=["memory", "disk"])
def few_hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that make several pieces and ranges of a list of some keys."""
    monkeypatch.setattr(keys_module, "_HASHED_ROWS", 3)
    monkeypatch.setattr(keys_module, "_COMPARED_HASHES", 4)
    if request.param == "disk":
        monkeypatch.setattr(keys_module, "_HASH_BYTES", 1)


@pytest.mark.usefixtures("few_hashes")
def test_repeats(tmp_path: Path) -> None:
    keys = Keys(key_file(tmp_path, b"a\nb\na\nc\nb\na\n"), 6)
    assert keys.repeats() == [2, 4, 5]


@pytest.mark.usefixtures("few_hashes")
@pytest.mark.parametrize("kinds", [1, 14, 150, 100_000])
@pytest.mark.parametrize("neighbours", [True, False])
def test_repeats_of_any_list(tmp_path: Path, kinds: int, neighbours: bool) -> None:
    listed = np.random.default_rng(kinds).integers(0, kinds, 300)
    listed = np.sort(listed).tolist() if neighbours else listed.tolist()
    expected = [i for i, key in enumerate(listed) if key in listed[:i]]
    keys = Keys(key_file(tmp_path, "\n".join(map(str, listed)).encode()), 300)
    assert keys.repeats(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["keys.txt"]


@pytest.mark.usefixtures("few_hashes")
def test_equal_hashes_are_not_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "hash", len, raising=False)
    assert Keys(key_file(tmp_path, b"a\nb\naa\nc\nb\n"), 5).repeats() == [4]


@pytest.mark.usefixtures("few_hashes")
def test_repeats_are_so_many_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "MOST_REPEATS", 5)
    path = key_file(tmp_path, b"a\n" * 40)
    assert Keys(path, 40).repeats() == [1, 2, 3, 4, 5]
    listed = [i // 2 for i in range(40)]  # each key twice: some five of them
    found = Keys(key_file(tmp_path, "\n".join(map(str, listed)).encode()), 40).repeats()
    assert len(found) == 5 and all(row % 2 for row in found) and found == sorted(set(found))


def test_no_room_for_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_HASH_BYTES", 1)
    keys = Keys(key_file(tmp_path, b"a\nb\n"), 2)
    with pytest.raises(
        OSError, match=r"^\[Errno 2\] score: .*none cannot take .*keys\.txt: No such"
    ):
        keys.repeats(tmp_path / "none")

    class Full(tempfile.SpooledTemporaryFile):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(keys_module.tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(
        OSError, match=r"score: the folder of temporary files cannot take .*: No sp"
    ):
        keys.repeats()


def key_table(path: Path, keys: pa.Array | pa.ChunkedArray, group: int = 7) -> Path:
    """A table of predictions with a column of keys."""
    probs = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 2 * len(keys), pa.float32()), 2)
    table = pa.table({"key": keys, "probs": probs})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=group)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, group)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.int64(),
        pa.uint64(),
        pa.int8(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
    ],
    ids=str,
)
def test_keys_of_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: pa.DataType
) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", 16)
    values = list(range(-20, 20)) if pa.types.is_signed_integer(kind) else list(range(40))
    if pa.types.is_integer(kind):
        expected = [str(value) for value in values]
        column = pa.array(values, kind)
    else:
        expected = [f"Zürich/{value}.jpg" for value in values]
        column = pa.array(expected, kind)
    shards = [
        key_table(tmp_path / f"p-{i}{suffix}", column[first : first + 20])
        for i, first in enumerate((0, 20))
    ]
    for paths in ([tmp_path], [tmp_path / f"p-*{suffix}"], shards):
        with KeyColumn(paths, "key", 40) as keys:
            assert len(keys) == 40
            assert keys.slice(0, 40) == expected and keys.slice(3, 3) == []
            for start in range(0, 40, 3):
                assert keys.slice(start, min(start + 9, 40)) == expected[start : start + 9]
            assert [keys[row] for row in (0, 39, 6, 7, 19, 20, -1)] == [
                expected[row] for row in (0, 39, 6, 7, 19, 20, -1)
            ]
            assert keys.longest() == max(len(key.encode()) for key in expected)
            assert keys.repeats(tmp_path) == []
            assert keys.fingerprint() == {"column": "key"}
            keys.check_unchanged()


@pytest.mark.parametrize("key", [None, "", "a\nb", "a\r", "\n"])
def test_column_with_what_is_no_key(tmp_path: Path, key: str | None) -> None:
    column = pa.array([*map(str, range(10)), key, "a", None], pa.string())
    path = key_table(tmp_path / "p.parquet", column)
    keys = KeyColumn([path], "key", 13)
    assert keys[6] == "6"
    message = f"p.parquet: column key must hold text of one line, got {key!r} at row 10"
    with pytest.raises(ValueError, match=rf"^score: .*{re.escape(message)}$"):
        keys.repeats()


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = key_table(tmp_path / "p.parquet", pa.array(["a", "b"]))
    with pytest.raises(
        ValueError, match=r"parquet: key must have one key for each of 3 rows, got 2"
    ):
        KeyColumn([path], "key", 3)
    with pytest.raises(ValueError, match=r"must have a column 'name', got key, probs$"):
        KeyColumn([path], "name", 2)
    with pytest.raises(ValueError, match=r"column probs must hold text or integers, got fixed"):
        KeyColumn([path], "probs", 2)
    with pytest.raises(ValueError, match=r"p\.npy must be one of \.parquet, \.arrow, \.feather to"):
        KeyColumn([tmp_path / "p.npy"], "key", 2)
    with pytest.raises(FileNotFoundError, match=r"none\.parquet does not exist"):
        KeyColumn([tmp_path / "none.parquet"], "key", 2)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    """That the predictions have no keys can be told from keys that are wrong."""
    path = key_table(tmp_path / "p-0.parquet", pa.array(["a", "b"]))
    with pytest.raises(sources.MissingColumn, match=r"must have a column 'name', got key, probs$"):
        KeyColumn([path], "name", 2)
    with pytest.raises(sources.MissingColumn, match=r"p\.npy must be one of"):
        KeyColumn([tmp_path / "p.npy"], "key", 2)
    for column, rows in (("key", 3), ("probs", 2)):
        with pytest.raises(ValueError) as caught:
            KeyColumn([path], column, rows)
        assert not isinstance(caught.value, sources.MissingColumn)
    other = pq.read_table(path).rename_columns(["name", "probs"])
    pq.write_table(other, tmp_path / "p-1.parquet")
    with pytest.raises(ValueError, match=r"p-1\.parquet must have a column 'key'") as caught:
        KeyColumn([tmp_path], "key", 4)
    assert not isinstance(caught.value, sources.MissingColumn)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())],
    ids=str,
)
def test_bytes_that_are_no_text(tmp_path: Path, suffix: str, kind: pa.DataType) -> None:
    values = [*(f"Zürich/{i}".encode() for i in range(10)), b"a\xffb", b"\xff"]
    column = pa.array(values, kind)
    with KeyColumn([key_table(tmp_path / f"p{suffix}", column)], "key", 12) as keys:
        assert keys.slice(3, 5) == ["Zürich/3", "Zürich/4"]
        message = (
            rf"^score: .*p\{suffix}: column key must hold UTF-8 text, got b'a\\xffb' at row 10$"
        )
        with pytest.raises(ValueError, match=message):
            keys.longest()


def test_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the models are split, and whatever type the keys have."""
    monkeypatch.setattr(keys_module, "_HASHED_ROWS", 7)
    one = key_table(tmp_path / "one.parquet", pa.array(range(40)))
    parts = [
        key_table(tmp_path / f"p-{i}.arrow", pa.array(list(map(str, range(*span)))))
        for i, span in enumerate([(0, 11), (11, 30), (30, 40)])
    ]
    with KeyColumn([one], "key", 40) as a, KeyColumn(parts, "key", 40) as b:
        a.require_same(b)
        b.require_same(a)


@pytest.mark.parametrize("row", [0, 6, 7, 29, 39])
def test_keys_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    monkeypatch.setattr(keys_module, "_HASHED_ROWS", 7)
    names = [f"k{i}" for i in range(40)]
    one = key_table(tmp_path / "one.parquet", pa.array(names))
    listed = [*names[:row], *names[row:][::-1]] if row < 39 else [*names[:39], "other"]
    parts = [
        key_table(tmp_path / f"p-{i}.arrow", pa.array(listed[20 * i : 20 * i + 20]))
        for i in range(2)
    ]
    with KeyColumn([one], "key", 40) as a, KeyColumn(parts, "key", 40) as b:
        message = (
            rf"^score: the rows of all models must be in the same order: key is 'k{row}' in row "
            rf"{row} of .*one\.parquet, and '{listed[row]}' in row {row % 20} of "
            rf".*p-{row // 20}\.arrow$"
        )
        with pytest.raises(ValueError, match=message):
            a.require_same(b)
        with pytest.raises(ValueError, match=rf"'{listed[row]}' in row {row % 20} of .*p-.*, and"):
            b.require_same(a)
    with (
        KeyColumn([one], "key", 40) as a,
        KeyColumn(parts[:1], "key", 20) as b,
        pytest.raises(ValueError, match="one key for each of 40 rows, got 20$"),
    ):
        a.require_same(b)


def test_column_of_a_file_that_changes(tmp_path: Path) -> None:
    path = key_table(tmp_path / "p.parquet", pa.array(["a", "b", "a"]))
    with KeyColumn([path], "key", 3) as keys:
        assert keys.repeats() == [2]
        os.utime(path, ns=(1, 1))
        with pytest.raises(ValueError, match=r"p\.parquet was changed while it was read$"):
            keys.check_unchanged()


@pytest.mark.parametrize("block", [2, 1 << 20])
def test_nc_list_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(keys_module, "BLOCK_ROWS", block)
    keys = Keys(key_file(tmp_path, "c c\nä\na\nd\nb".encode()), 5)
    path = tmp_path / "nc_set.txt"
    write_nc_list(path, keys, np.array([True, True, False, False, True]))
    assert path.read_bytes() == "c c\nä\nb\n".encode()
    assert read_nc_list(path) == ["c c", "ä", "b"]

    write_nc_list(path, keys, np.zeros(5, bool))
    assert path.read_bytes() == b"empty_set\n"
    assert read_nc_list(path) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n", []),
        (b"empty_set", []),
        (b"empty_set\r\n", []),
        (b"a 1\r\nb 2\r\n", ["a 1", "b 2"]),
        (b"empty_set\na\nempty_set\nb", ["a", "b"]),
        (b"\xef\xbb\xbfa\n\nb\n", ["a", "b"]),
    ],
)
def test_reads_lists_of_other_programs(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert read_nc_list(key_file(tmp_path, content)) == expected
