"""What one process of several may find wrong, and what an earlier job may have left; the rest is
tested through ``predict`` and ``score_files``."""

import dataclasses
import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

from genkl_ext import unfinished as unfinished_module
from genkl_ext.ranks import Ranks
from genkl_ext.unfinished import Unfinished

ABOUT = {"network": "a", "dtype": "float32", "batch_size": 2}
PARTIAL = ".q.npy.partial"


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


@pytest.fixture
def marked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished_module, "MARK_SECONDS", 0)


def start(folder: Path, about: dict[str, Any] = ABOUT, rows: int = 5, **more: Any) -> Unfinished:
    """A job on bytes, two a batch."""
    given: dict[str, Any] = {"ranks": Ranks(), "name": "score", **more}
    return Unfinished(folder / "q.npy", about, rows=rows, row_bytes=1, batch_size=2, **given)


def leave(folder: Path, about: dict[str, Any] = ABOUT) -> None:
    """An unfinished file whose second batch is filled."""
    with start(folder, about) as file:
        file.write(1, b"ab")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def journal_of(lines: list[Any]) -> bytes:
    texts = [json.dumps(line, separators=(",", ":")).encode() for line in lines]
    return b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


def refused(done: int, differs: str) -> str:
    return (
        rf"^score: an unfinished q\.npy, of which {done} batches are done, is of other inputs or "
        rf"settings \({differs}\): start that job again to finish it, or give begin_anew "
        r"\(--begin-anew\) to throw it away$"
    )


def test_work_of_another_job_is_refused(tmp_path: Path, marked_at_once: None) -> None:
    mine = {"rule": {"alpha": 1.0, "seed": 0}, "inputs": [{"name": "p"}], "version": "1"}
    with start(tmp_path, mine):
        pass  # nothing is filled
    other = {"rule": {"alpha": 1.1, "seed": 0}, "inputs": [{"name": "q"}], "models": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leave(tmp_path, other)
    left = contents(tmp_path)
    assert left[".q.npy.partial"] == b"\0\0ab\0"
    message = refused(1, r"inputs: q, not p, models, rule\.alpha 1\.1, not 1\.0, version")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            start(tmp_path, mine)
        assert contents(tmp_path) == left
    with start(tmp_path, other) as file:
        assert file.todo == [0, 2]


P0 = {"name": "p0.npy", "size": 7, "shape": [2, 3], "sample": "ab", "state": [1, 2]}
P1 = {**P0, "name": "p1.npy"}


@pytest.mark.parametrize(
    ("mine", "differs"),
    [
        ([P0, {**P1, "sample": "ef", "state": [1, 3]}], r"inputs: p1\.npy in sample, state"),
        ([P0, {**P1, "state": None}], r"inputs: p1\.npy in state"),
        ([{**P0, "size": 8}, {**P1, "size": 8}], r"inputs: p0\.npy in size"),
        ([{**P0, "new": 8}, P1], r"inputs: p0\.npy in new"),
        ([P1, P0], r"inputs: p0\.npy, not p1\.npy"),
        ([P0, P1, P1], "inputs: 2, not 3"),
        ([], "inputs: 2, not 0"),
        ([P0, 3], "inputs: number 2"),
        (None, "inputs"),
    ],
)
def test_which_input_differs(tmp_path: Path, marked_at_once: None, mine: Any, differs: str) -> None:
    leave(tmp_path, {"inputs": [P0, P1]})
    with pytest.raises(ValueError, match=refused(1, differs)):
        start(tmp_path, {"inputs": mine})


def test_batches_of_all_processes_are_told(tmp_path: Path, marked_at_once: None) -> None:
    """The first one has filled none."""
    with start(tmp_path):
        pass
    with start(tmp_path, ranks=second([[], ABOUT])) as file:
        assert file.todo == [2]
        file.write(2, b"c")
    with start(tmp_path, ranks=Second(2, 3, 2, 3, said=[[], ABOUT])) as file:
        file.write(0, b"ab")
    left = contents(tmp_path)
    assert sorted(left) == [".q.npy.journal-0", ".q.npy.journal-1", ".q.npy.journal-2", PARTIAL]
    with pytest.raises(ValueError, match=refused(2, "network 'a', not 'b'")):
        start(tmp_path, {**ABOUT, "network": "b"})
    assert contents(tmp_path) == left
    with start(tmp_path) as file:
        assert file.todo == [1]
        file.write(1, b"xy")
        file.complete()
    assert contents(tmp_path) == {"q.npy": b"abxyc"}


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
def test_beginning_anew(tmp_path: Path, marked_at_once: None, same: bool, processes: int) -> None:
    """True: in any case; "if other": where it would be refused."""
    mine = ABOUT if same else {**ABOUT, "network": "b"}
    folder, copy = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    leave(folder)
    if processes == 2:
        with start(folder, ranks=second([[1], ABOUT])) as file:
            file.write(2, b"c")
    shutil.copytree(folder, copy)
    message = "thrown away" if same else "of other inputs or settings"
    with (
        pytest.warns(
            UserWarning, match=rf"^score: an unfinished q\.npy was {message}; begun anew$"
        ),
        start(folder, mine, begin_anew=True) as file,
    ):
        assert (file.todo, file.resumed) == ([0, 1, 2], 0)
    assert sorted(contents(folder)) == [".q.npy.journal-0", PARTIAL]
    assert (folder / PARTIAL).read_bytes() == bytes(5)
    with warnings.catch_warnings():  # there is nothing any more that could be thrown away
        warnings.simplefilter("error")
        with start(folder, ABOUT, begin_anew=True) as file:
            assert file.todo == [0, 1, 2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with start(copy, mine, begin_anew="if other") as file:
            assert file.todo == ([0, 2][: 3 - processes] if same else [0, 1, 2])
    assert [str(one.message) for one in caught] == (
        [] if same else ["score: an unfinished q.npy was of other inputs or settings; begun anew"]
    )


def test_begin_anew_is_one_of_three(tmp_path: Path) -> None:
    message = r"^score: begin_anew must be False, True or 'if other', got 'always'$"
    with pytest.raises(ValueError, match=message):
        start(tmp_path, begin_anew="always")
    assert contents(tmp_path) == {}


OTHER_FORMATS: dict[str, list[Any]] = {
    "before checksums": [ABOUT, None, {"batches": [1], "noted": []}],
    "before notes": [ABOUT, {"batches": [1, 2]}],
    "later": [{"format": 3, "about": ABOUT}, {"new": 5}, {"batches": [[1, 7]], "noted": []}],
    "no about": [{"format": 2}, {"new": 5}],
    "a list": [[2, ABOUT], [1]],
    "a word": ["job", "done"],
    **{
        f"part {i}": [{"format": 2, "about": ABOUT}, {"new": 5}, part]
        for i, part in enumerate(
            [
                None, 7, "new", [], {}, {"new": None}, {"batches": [[1, 7]]}, {"noted": []},
                {"batches": [1], "noted": []}, {"batches": [[1]], "noted": []},
                {"batches": [[1, 7, 7]], "noted": []}, {"batches": [["1", 7]], "noted": []},
                {"batches": [[-1, 7]], "noted": []}, {"batches": 1, "noted": []},
                {"batches": {"1": 7}, "noted": []}, {"batches": [], "noted": [[]]},
                {"batches": [], "noted": [3]}, {"batches": [], "noted": [["a"], [3]]},
                {"batches": [], "noted": None},
            ]
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FORMATS)
@pytest.mark.parametrize("begin_anew", [True, "if other"])
def test_journals_of_other_versions(tmp_path: Path, kind: str, begin_anew: Any) -> None:
    """Also where they are about the same."""
    left = {PARTIAL: b"\0\0ab\0", ".q.npy.journal-0": journal_of(OTHER_FORMATS[kind])}
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    message = (
        r"^score: an unfinished q\.npy was begun by another version of genkl_ext: finish it with "
        r"that version, or give begin_anew \(--begin-anew\) to throw it away$"
    )
    for about in (ABOUT, {"rule": 1}):
        with pytest.raises(ValueError, match=message):
            start(tmp_path, about)
        assert contents(tmp_path) == left
    message = r"^score: an unfinished q\.npy was begun by another version of genkl_ext; begun anew$"
    with (
        pytest.warns(UserWarning, match=message),
        start(tmp_path, begin_anew=begin_anew) as file,
    ):
        assert file.todo == [0, 1, 2]
    assert (tmp_path / PARTIAL).read_bytes() == bytes(5)


def test_a_part_of_another_version_in_the_second_journal(
    tmp_path: Path, marked_at_once: None
) -> None:
    leave(tmp_path)
    lines = [{"format": 2, "about": ABOUT}, {"batches": [2], "noted": []}]
    (tmp_path / ".q.npy.journal-1").write_bytes(journal_of(lines))
    with pytest.raises(ValueError, match="was begun by another version of genkl_ext: finish"):
        start(tmp_path)
    with (
        pytest.warns(UserWarning, match="was begun by another version of genkl_ext; begun anew$"),
        start(tmp_path, begin_anew="if other") as file,
    ):
        assert file.todo == [0, 1, 2]
    assert sorted(contents(tmp_path)) == [".q.npy.journal-0", PARTIAL]


@pytest.mark.parametrize("what", ["no file", "shorter", "longer", "old format", "second journal"])
@pytest.mark.parametrize("begin_anew", [False, True, "if other"])
def test_a_journal_without_its_file_holds_nothing(
    tmp_path: Path, marked_at_once: None, what: str, begin_anew: Any
) -> None:
    """As a job leaves it that was killed when its file was removed, or had become the target."""
    leave(tmp_path)
    if what in ("shorter", "longer"):
        (tmp_path / PARTIAL).write_bytes(b"\0\0ab" if what == "shorter" else b"\0\0ab\0\0")
    elif what == "second journal":  # of a file that was gone before that of the first was begun
        older = (tmp_path / ".q.npy.journal-0").read_bytes()
        (tmp_path / PARTIAL).unlink()
        with start(tmp_path, {"begun": "and killed"}):
            pass
        (tmp_path / ".q.npy.journal-1").write_bytes(older)
    else:
        (tmp_path / PARTIAL).unlink()
        if what == "old format":
            content = journal_of(OTHER_FORMATS["before checksums"])
            (tmp_path / ".q.npy.journal-0").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with start(tmp_path, {"rule": 1}, rows=4, begin_anew=begin_anew) as file:
            assert file.todo == [0, 1]
    assert (tmp_path / PARTIAL).read_bytes() == bytes(4)


def test_the_same_job_does_not_believe_a_journal_without_its_file(
    tmp_path: Path, marked_at_once: None
) -> None:
    with start(tmp_path) as file:
        file.write(1, b"ab", [(2, "noted")])
    (tmp_path / PARTIAL).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with start(tmp_path) as file:
                assert (file.todo, file.noted) == ([0, 1, 2], [])
        with start(tmp_path) as file:
            for batch in range(3):
                file.write(batch, b"abcde"[2 * batch :][:2])
            assert file.complete() == []
    assert contents(tmp_path) == {"q.npy": b"abcde"}


def test_a_file_that_is_gone_can_be_discarded(tmp_path: Path, marked_at_once: None) -> None:
    leave(tmp_path)
    with start(tmp_path) as file:
        (tmp_path / PARTIAL).unlink()
        file.discard()
    assert contents(tmp_path) == {}


def test_no_rows(tmp_path: Path, marked_at_once: None) -> None:
    """They refuse what another job has left as others do, and leave nothing."""
    leave(tmp_path, {"rows": 5})
    with pytest.raises(ValueError, match=refused(1, "rows 5, not 0")):
        start(tmp_path, {"rows": 0}, rows=0)
    with pytest.warns(UserWarning, match="begun anew"):
        file = start(tmp_path, {"rows": 0}, rows=0, begin_anew=True)
    assert (file.todo, file.resumed) == ([], 0)
    file.gather()
    file.discard()
    assert contents(tmp_path) == {}
    for header in (b"", b"head"):
        with start(tmp_path, {"rows": 0}, rows=0, header=header):
            pass  # killed
        with start(tmp_path, {"rows": 0}, rows=0, header=header) as file:
            assert file.complete() == []
        assert contents(tmp_path) == {"q.npy": header}


def test_damaged_batches_are_filled_again(tmp_path: Path, marked_at_once: None) -> None:
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
