"""What one process of several may find wrong; the rest is tested through ``predict``."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from genkl_ext import unfinished as unfinished_module
from genkl_ext.ranks import Ranks
from genkl_ext.unfinished import Unfinished

ABOUT = {"network": "a", "dtype": "float32", "batch_size": 2}


@dataclasses.dataclass(frozen=True)
class Second(Ranks):
    """The second process of two; what the first one says is given."""

    said: Any = None

    def broadcast(self, value: Any) -> Any:
        return self.said


def second(said: Any) -> Ranks:
    return Second(1, 2, 1, 2, said=said)


def unfinished(folder: Path, rows: int, ranks: Ranks) -> Unfinished:
    return Unfinished(folder / "q.npy", ABOUT, rows=rows, row_bytes=12, batch_size=2, ranks=ranks)


def test_processes_with_different_networks(tmp_path: Path) -> None:
    message = r"^predict: network must be the same on all processes, process 1 has another than "
    ranks = second([[], {**ABOUT, "network": "b"}])
    with pytest.raises(ValueError, match=message):
        unfinished(tmp_path, 5, ranks)
    assert list(tmp_path.iterdir()) == []


def test_processes_with_different_disks(tmp_path: Path) -> None:
    message = r"^cannot write .*/q\.npy: its folder must be the same for all processes, and process"
    with pytest.raises(FileNotFoundError, match=message):
        unfinished(tmp_path, 5, second([[], ABOUT]))


def test_shares_of_what_is_left(tmp_path: Path) -> None:
    (tmp_path / ".q.npy.partial").write_bytes(b"")
    ranks = second([[1, 5, 6], ABOUT])
    with unfinished(tmp_path, 13, ranks) as file:
        assert file.todo == [3, 4]  # of 0, 2, 3, 4
        assert file.resumed == 5  # the last batch has one row


def test_work_of_another_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished_module, "MARK_SECONDS", 0)

    def start(about: dict[str, Any], **more: Any) -> Unfinished:
        return Unfinished(
            tmp_path / "q.npy", about, rows=5, row_bytes=1, batch_size=2, ranks=Ranks(),
            name="score", **more,
        )  # fmt: skip

    mine = {"rule": {"alpha": 1.0, "seed": 0}, "inputs": [{"name": "p"}], "version": "1"}
    with start(mine):
        pass  # nothing is filled
    other = {"rule": {"alpha": 1.1, "seed": 0}, "inputs": [{"name": "q"}], "models": 1}
    with start(other) as file:
        file.write(1, b"ab")
    content = (tmp_path / ".q.npy.partial").read_bytes()
    assert content == b"\0\0ab\0"
    message = (
        r"^score: an unfinished q\.npy, of which 1 batches are done, is of other inputs or "
        r"settings \(inputs, models, rule\.alpha 1\.1, not 1\.0, version\): start that job again to "
        r"finish it, or give begin_anew \(--begin-anew\) to throw it away$"
    )
    with pytest.raises(ValueError, match=message):
        start(mine)
    assert (tmp_path / ".q.npy.partial").read_bytes() == content
    with start(other) as file:
        assert file.todo == [0, 2]
    with pytest.warns(UserWarning, match="begun anew"), start(mine, begin_anew=True) as file:
        assert file.todo == [0, 1, 2]
    assert (tmp_path / ".q.npy.partial").read_bytes() == bytes(5)


def test_damaged_batches_are_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished_module, "MARK_SECONDS", 0)

    def start() -> Unfinished:
        return Unfinished(
            tmp_path / "q.npy", ABOUT, rows=7, row_bytes=1, batch_size=2, ranks=Ranks(),
            header=b"head",
        )  # fmt: skip

    with start() as file:
        for batch, content in enumerate([b"ab", b"\0\0", b"ef", b"g"][:3]):
            file.write(batch, content)
    partial = tmp_path / ".q.npy.partial"
    assert partial.read_bytes() == b"headab\0\0ef\0"
    partial.write_bytes(b"headab\0\0Ef\0")
    message = r"^predict: 1 batches of the unfinished q\.npy are damaged; they are made again$"
    with pytest.warns(UserWarning, match=message), start() as file:
        assert (file.todo, file.resumed) == ([2, 3], 4)
        file.write(2, b"EF")
    with start() as file:  # the last word on a batch counts
        assert (file.todo, file.resumed) == ([3], 6)
        file.write(3, b"g")
        file.complete()
    assert (tmp_path / "q.npy").read_bytes() == b"headab\0\0EFg"
