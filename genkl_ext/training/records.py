"""What of a run is done: which stage, with which settings, from which files to which.

    records = Records(run, ranks, say)
    result = records.do(Stage("iteration-0/score", settings, inputs, outputs), work)

``work`` returns plain facts about what it made. It is not called where ``records.json`` says that
it was done with these settings from these files, and its outputs are as it left them. A stage that
was interrupted is taken up where it stopped; one whose settings or inputs have changed since begins
anew, and so does, through its outputs, all that depends on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..ranks import Ranks

FILE = "records.json"
_SHOWN = 3  # changed settings in a line
_BLOCK = 1 << 22  # bytes of a file in memory

Facts = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a run, as far as its result depends on it."""

    name: str  #: unique in the run
    settings: Mapping[str, Any]  #: as JSON knows them
    inputs: Sequence[Path] = ()  #: files
    outputs: Sequence[Path] = ()  #: files that it leaves, or may leave
    scratch: Sequence[Path] = ()  #: files and folders beside, for resuming; removed to begin anew
    images: int = 0  #: that pass through a network, for the plan
    trained: int = 0  #: that pass through it and back
    weights: int = 0  #: copies of the weights, or of what is as large, left on disk
    bytes: int = 0  #: left on disk besides


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage in a plan."""

    stage: Stage
    done: bool
    why: str  #: it is done again, where it was done before; else ""


class Records:
    """The records of one run, in ``records.json``.

    Args:
        folder: of the run; paths in the records are relative to it.
        ranks: the first decides and writes, and all follow.
        say: called with a line for each stage that is begun or skipped.
        dry: nothing is done; ``plan`` collects the stages.

    Raises:
        ValueError: the file is none of ours. OSError: it cannot be read.
    """

    def __init__(self, folder: Path, ranks: Ranks, say: Say, *, dry: bool = False) -> None:
        self._folder = folder
        self._ranks = ranks
        self._say = say
        self._dry = dry
        self._made: set[Path] = set()  # outputs of stages that would be done, in a dry run
        self.plan: list[Planned] = []
        self._stages = _read(folder / FILE)

    def do(self, stage: Stage, work: Callable[[], Facts]) -> Facts:
        """The facts of a stage, done now unless it was done before.

        Every rank calls it, and ``work`` is called on every rank; the facts are those of the first.
        In a dry run, of a stage that would be done there are none.
        """
        known: Facts | None = None
        why = ""
        if self._ranks.first:
            known, why = self._known(stage)
        if self._dry:
            if all(planned.stage.name != stage.name for planned in self.plan):
                self.plan.append(Planned(stage, known is not None, why))
            if known is None:
                self._made.update(stage.outputs)
            return known or {}
        known = self._ranks.broadcast(known)
        if known is not None:
            self._say(f"{stage.name}: done before")
            return known
        if self._ranks.first:
            self._begin(stage, why)
        self._ranks.barrier()
        start = time.perf_counter()
        facts = self._ranks.broadcast(work())
        if self._ranks.first:
            self._end(stage, facts, time.perf_counter() - start)
        self._ranks.barrier()
        return dict(facts)

    def seconds(self) -> dict[str, float]:
        """How long each stage that is done took, the last time that it was begun."""
        return {n: s["seconds"] for n, s in self._stages.items() if s["state"] == "done"}

    def _known(self, stage: Stage) -> tuple[Facts | None, str]:
        """The facts of a stage that is done, or None and why it is done again."""
        record = self._stages.get(stage.name)
        if record is None or record["state"] != "done":
            return None, ""
        pending = [path for path in stage.inputs if path in self._made]
        if pending:
            return None, f"{self._named(pending[0])} will be made anew"
        changed = _changes(record["settings"], _plain(stage.settings))
        if changed:
            return None, ", ".join(changed[:_SHOWN]) + (", ..." if len(changed) > _SHOWN else "")
        names = [self._named(path) for path in stage.inputs]
        recorded = [name for name, _ in record["inputs"]]
        if names != recorded:
            return None, f"it is made from {_list(names)}, was from {_list(recorded)}"
        for path, (_, before) in zip(stage.inputs, record["inputs"], strict=True):
            if self._look(path, before) != before:
                return None, f"{self._named(path)} has changed"
        for path in stage.outputs:
            before = record["outputs"].get(self._named(path))
            if before is not None and not path.is_file():
                return None, f"{self._named(path)} is missing"
            if path.is_file() and (before is None or self._look(path, before) != before):
                return None, f"{self._named(path)} is not as it was left"
        return record["facts"], ""

    def _begin(self, stage: Stage, why: str) -> None:
        # In order, each as often as it is given: both may matter.
        inputs = [(self._named(path), self._look(path)) for path in stage.inputs]
        begun = {"state": "begun", "settings": _plain(stage.settings), "inputs": inputs}
        record = self._stages.get(stage.name)
        interrupted = record is not None and record["state"] == "begun"
        if interrupted and _same(record, begun):
            self._say(f"{stage.name}: going on")
        else:
            # What lies there was made with other settings, or from other files, or was changed.
            if interrupted:
                why = "its settings or inputs have changed since it was begun"
            for path in [*stage.outputs, *stage.scratch]:
                _remove(path)
            self._say(f"{stage.name}: again, {why}" if why else stage.name)
        for path in stage.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._save(stage.name, begun)

    def _end(self, stage: Stage, facts: Facts, seconds: float) -> None:
        record = self._stages[stage.name]
        left = [path for path in stage.outputs if path.is_file()]
        outputs = {self._named(path): self._look(path) for path in left}
        done = {"state": "done", "outputs": outputs, "facts": facts, "seconds": round(seconds, 3)}
        self._save(stage.name, {**record, **done})

    def _save(self, name: str, record: dict[str, Any]) -> None:
        self._stages[name] = record
        with atomic_write(self._folder / FILE) as temporary:
            temporary.write_text(json.dumps(self._stages, indent=1) + "\n", encoding="utf-8")

    def _look(self, path: Path, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a file is now; its content is not read where it is untouched since ``before``."""
        try:
            status = path.stat()
        except OSError:
            return {"size": -1, "modified": 0, "digest": ""}
        found = {"size": status.st_size, "modified": status.st_mtime_ns}
        if before and {**found, "digest": before["digest"]} == before:
            return before
        digest = _digest(path)
        if before and (before["size"], before["digest"]) == (found["size"], digest):
            return before  # touched or copied, but not changed
        return {**found, "digest": digest}

    def _named(self, path: Path) -> str:
        try:
            return path.relative_to(self._folder).as_posix()
        except ValueError:
            return str(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
        if all({"state", "settings", "inputs"} <= set(record) for record in stages.values()):
            return dict(stages)
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"run: {path} must be the records of a run, and is not; remove it to go on")


def _same(a: Any, b: dict[str, Any]) -> bool:
    """Whether two beginnings of a stage had the same settings and inputs (not: touched when)."""

    def content(record: Any) -> Any:
        inputs = [(name, file["size"], file["digest"]) for name, file in record["inputs"]]
        return record["settings"], inputs

    return bool(content(a) == content(b))


def _changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two settings, as "training.lr is 0.1, was 0.2"."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in [*before, *(key for key in now if key not in before)]:
            path = f"{name}.{key}" if name else key
            found += _changes(before.get(key), now.get(key), path)
        return found
    return [] if before == now else [f"{name} is {_short(now)}, was {_short(before)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(settings: Mapping[str, Any]) -> Any:
    """Settings as they come back from JSON: tuples are lists there, numbered keys text."""
    return json.loads(json.dumps(settings))


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


def _digest(path: Path) -> str:
    """BLAKE2b-128 of the whole file: a few rows that changed in a large one count, too."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
