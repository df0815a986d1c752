from pathlib import Path

import numpy as np
import pytest

from genkl_ext.scoring import keys as keys_module
from genkl_ext.scoring.keys import Keys, read_nc_list, write_nc_list


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


@pytest.mark.parametrize("block", [2, 1 << 20])
def test_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(keys_module, "BLOCK_ROWS", block)
    keys = Keys(key_file(tmp_path, b"a\nb\na\nc\nb\na\n"), 6)
    assert keys.repeats() == [2, 4, 5]


def test_equal_hashes_are_not_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "hash", len, raising=False)
    assert Keys(key_file(tmp_path, b"a\nb\naa\nc\nb\n"), 5).repeats() == [4]


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
