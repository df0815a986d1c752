import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from genkl_ext.files import atomic_folder, atomic_write, require_writable


def test_writes_a_new_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.csv") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".csv"
        assert not (tmp_path / "a.csv").exists()
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.csv"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert os.listdir(tmp_path) == ["a.csv"]
    assert target.read_text() == "old"


def test_a_failing_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.csv"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), atomic_write(target) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["a.csv"]
    assert target.read_text() == "old"


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    target.write_text("old")
    program = (
        "import os, signal, sys\n"
        "from genkl_ext.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_contents_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_write(tmp_path / "a.csv") as temporary:
        temporary.write_text("new")
    assert calls == [
        ("sync", str(temporary)),
        ("rename", str(tmp_path / "a.csv")),
        ("sync", str(tmp_path)),
    ]


def test_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "real" / "a.csv")
    with atomic_write(link) as temporary:
        assert temporary.parent == tmp_path / "real"
        temporary.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.csv").read_text() == "new"


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.csv"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "a.csv").stat().st_mode & 0o777 == 0o640


def test_long_names_fit(tmp_path: Path) -> None:
    with atomic_write(tmp_path / ("é" * 120 + ".csv")) as temporary:
        temporary.write_text("new")
    assert len(os.listdir(tmp_path)) == 1


def test_require_writable_touches_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    require_writable(target)
    assert os.listdir(tmp_path) == []
    target.write_text("old")
    before = target.stat()
    require_writable(target)
    assert os.listdir(tmp_path) == ["a.csv"]
    assert target.stat() == before


@pytest.mark.parametrize("check", [require_writable, lambda path: atomic_write(path).__enter__()])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none/a.csv", FileNotFoundError, r"cannot write .*a\.csv: .*none does not exist"),
        ("file/a.csv", FileNotFoundError, r"cannot write .*a\.csv: .*file is not a folder"),
        ("folder", IsADirectoryError, r"cannot write .*folder: it is a folder"),
        ("pipe", OSError, r"cannot write .*pipe: it is not a regular file"),
        ("/proc/a.csv", OSError, r"cannot write /proc/a\.csv: "),
    ],
)
def test_says_why_it_cannot_write(
    tmp_path: Path, check, name: str, error: type[OSError], message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=message):
        check(tmp_path / name)


def test_a_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.csv"
    target.write_text("old")
    # The superuser may write everything; for this test, nobody may.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"cannot write .*a\.csv: it is read-only"):
        require_writable(target)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with atomic_folder(target) as made:
        (made / "a").mkdir()
        (made / "a/b.txt").write_text("b")
        assert made.parent == tmp_path and not target.exists()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == [
        "made",
        "made/a",
        "made/a/b.txt",
    ]
    (tmp_path / "usual").mkdir()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "made") as made:
        (made / "a.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as made:
        (made / "a.txt").touch()
    assert os.listdir(tmp_path / "empty") == ["a.txt"]
    (tmp_path / "file").touch()
    for name in ("empty", "file"):  # no longer empty
        with (
            pytest.raises(FileExistsError, match=f"cannot make .*{name}: it exists"),
            atomic_folder(tmp_path / name),
        ):
            pass
    with (
        pytest.raises(FileNotFoundError, match="cannot make .*made: No such file or directory"),
        atomic_folder(tmp_path / "none/made"),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]
