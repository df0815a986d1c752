from pathlib import Path

import pytest

from genkl_ext.cli import bench as bench_module
from genkl_ext.cli.main import main

SCRIPT = '"""How fast is {name}?\n\nMore."""\nif __name__ == "__main__":\n    {body}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for bench/ of a source tree: two benchmarks and a part they share."""
    (tmp_path / "one.py").write_text(SCRIPT.format(name="one", body='print("one ran")'))
    (tmp_path / "two.py").write_text(SCRIPT.format(name="two", body="raise SystemExit(3)"))
    (tmp_path / "clock.py").write_text('"""Shared."""\n')
    monkeypatch.setattr(bench_module, "FOLDER", tmp_path)
    return tmp_path


def test_lists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list-only"]) == 0
    assert capsys.readouterr().out == "one  How fast is one?\ntwo  How fast is two?\n"


def test_runs_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "one"]) == 0
    assert capfd.readouterr().out == "== one\none ran\n"


def test_runs_all_and_names_what_failed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 1
    out, err = capfd.readouterr()
    assert out == "== one\none ran\n== two\n"
    assert err.startswith("genkl bench: ") and "failed: two" in err


def test_unknown_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "three"]) == 2
    assert "no benchmark 'three'; there are one, two" in capsys.readouterr().err


def test_without_a_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_module, "FOLDER", tmp_path / "none")
    assert main(["bench"]) == 1
    assert "come with the source tree" in capsys.readouterr().err
