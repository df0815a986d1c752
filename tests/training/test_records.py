"""What is done is not done again, and what depends on a change is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from genkl_ext.ranks import Ranks
from genkl_ext.training.records import FILE, Records, Stage


class Run:
    """Two stages: a makes a.txt from in.txt, b makes b.txt from a.txt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.worked: list[str] = []
        (folder / "in.txt").write_text("input")

    def go(self, *, dry: bool = False, fail: bool = False, b: str = "b", **a: object) -> Records:
        self.lines.clear()
        self.worked.clear()
        records = Records(self.folder, Ranks(0, 1, 0), self.lines.append, dry=dry)
        first, second = self.folder / "a.txt", self.folder / "sub" / "b.txt"
        scratch = self.folder / "scratch"

        def work_a() -> dict[str, int]:
            self.worked.append("a")
            scratch.mkdir(exist_ok=True)
            (scratch / "part").write_text("half")
            if fail:
                raise RuntimeError("killed")
            first.write_text((self.folder / "in.txt").read_text() + json.dumps(a, default=str))
            return {"length": len(first.read_text())}

        def work_b() -> dict[str, str]:
            self.worked.append("b")
            second.write_text(first.read_text() + b)
            return {"text": second.read_text()}

        made = Stage("a", a, [self.folder / "in.txt"], [first], [scratch])
        self.facts = (
            records.do(made, work_a),
            records.do(Stage("b", {"b": b}, [first], [second]), work_b),
        )
        return records


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_done_once(run: Run) -> None:
    run.go(x=1)
    facts = run.facts
    assert run.worked == ["a", "b"]
    records = run.go(x=1)
    assert run.worked == []
    assert run.facts == facts
    assert run.lines == ["a: done before", "b: done before"]
    assert set(records.seconds()) == {"a", "b"}


def test_a_changed_setting_runs_what_depends_on_it(run: Run) -> None:
    run.go(x={"y": 1})
    run.go(x={"y": 2})
    assert run.worked == ["a", "b"]
    assert run.lines == ["a: again, x.y is 2, was 1", "b: again, a.txt has changed"]


def test_a_change_further_down_leaves_the_rest(run: Run) -> None:
    run.go(x=1)
    run.go(x=1, b="c")
    assert run.worked == ["b"]


def test_the_same_result_stops_the_chain(run: Run) -> None:
    """What was made again with the same bytes is no reason to go on."""
    run.go(x=1)
    (run.folder / "a.txt").unlink()
    run.go(x=1)
    assert run.worked == ["a"]
    assert run.lines[0] == "a: again, a.txt is missing"


def test_a_touched_file_has_not_changed(run: Run) -> None:
    run.go(x=1)
    os.utime(run.folder / "in.txt", (1, 1))
    run.go(x=1)
    assert run.worked == []


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
def test_a_damaged_output_is_made_again(run: Run, name: str) -> None:
    run.go(x=1)
    (run.folder / name).write_text("damaged")
    run.go(x=1)
    assert run.worked == [name.removesuffix(".txt")[-1]]
    assert "is not as it was left" in " ".join(run.lines)


def test_tuples_and_numbered_keys_are_what_json_makes_of_them(run: Run) -> None:
    run.go(x=(1, 2), y={3: "z"})
    run.go(x=(1, 2), y={3: "z"})
    assert run.worked == []


def test_an_interrupted_stage_keeps_its_scratch(run: Run) -> None:
    with pytest.raises(RuntimeError):
        run.go(x=1, fail=True)
    assert (run.folder / "scratch/part").exists()
    with pytest.raises(RuntimeError):
        run.go(x=1, fail=True)
    assert run.lines == ["a: going on"]
    (run.folder / "scratch/mark").write_text("of the first try")
    run.go(x=1)
    assert (run.folder / "scratch/mark").exists()


@pytest.mark.parametrize("change", ["setting", "input"])
def test_scratch_of_other_settings_is_removed(run: Run, change: str) -> None:
    with pytest.raises(RuntimeError):
        run.go(x=1, fail=True)
    (run.folder / "scratch/mark").write_text("of the first try")
    if change == "input":
        (run.folder / "in.txt").write_text("another input")
    run.go(x=2 if change == "setting" else 1)
    assert not (run.folder / "scratch/mark").exists()
    assert "changed since it was begun" in run.lines[0]


def test_a_dry_run_does_nothing(run: Run) -> None:
    records = run.go(x=1, dry=True)
    assert run.worked == []
    assert [(p.stage.name, p.done) for p in records.plan] == [("a", False), ("b", False)]
    assert sorted(path.name for path in run.folder.iterdir()) == ["in.txt"]
    run.go(x=1)
    records = run.go(x=1, dry=True)
    assert [p.done for p in records.plan] == [True, True]
    records = run.go(x=2, dry=True)
    assert [(p.done, p.why) for p in records.plan] == [
        (False, "x is 2, was 1"),
        (False, "a.txt will be made anew"),
    ]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": {}}', "{"])
def test_a_file_that_is_no_record(run: Run, text: str) -> None:
    (run.folder / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"records\.json must be the records of a run"):
        run.go(x=1)


@pytest.mark.parametrize(
    ("first", "second"), [("012", "01"), ("01", "012"), ("01", "10"), ("0122", "012"), ("0", "")]
)
def test_fewer_repeated_or_reordered_inputs_are_a_change(
    tmp_path: Path, first: str, second: str
) -> None:
    for name in "012":
        (tmp_path / name).write_text(name)
    lines: list[str] = []

    def result(names: str) -> object:
        records = Records(tmp_path, Ranks(0, 1, 0), lines.append)
        return records.do(Stage("a", {}, [tmp_path / n for n in names]), lambda: {"made": names})

    assert result(first) == {"made": first}
    assert result(second) == {"made": second}
    assert result(second) == {"made": second}
    assert lines[-1] == "a: done before"


def test_an_output_that_may_be_missing(tmp_path: Path) -> None:
    """It is looked for only where it was left."""
    out = tmp_path / "out"
    lines: list[str] = []
    write = [False]

    def work() -> dict[str, int]:
        if write[0]:
            out.write_text("made")
        return {}

    def go() -> str:
        Records(tmp_path, Ranks(0, 1, 0), lines.append).do(Stage("a", {}, [], [out]), work)
        return lines[-1]

    go()
    assert go() == "a: done before"
    write[0] = True
    out.write_text("from somewhere else")
    assert go() == "a: again, out is not as it was left"
    assert go() == "a: done before"
    out.unlink()
    assert go() == "a: again, out is missing"


def test_one_byte_in_a_large_file_counts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    big = tmp_path / "in.txt"
    big.write_bytes(bytes(9 << 20))
    run.go(x=1)
    with big.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"!")
    run.go(x=1)
    assert run.worked[0] == "a"
