"""The demo's data, and the recipe "demo" run on it.

OUT/demo.json                          what the data are; marks the folder as the demo's
    data/                              the JPEG files and their lists (digits.py)
    run/                               the run (genkl_ext/training/loop.py)
    results.md, results.json           the tables (results.py)
    critical_alpha.png, most_nonconforming.png
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..files import atomic_write
from ..training import loop
from ..training.records import Say
from ..training.stages import Progress
from . import digits

MARK = "demo.json"
QUICK = [
    "members.epochs=2",
    "members.validate_every=1",
    "training.epochs=1",
    "finetune.epochs=1",
    "finetune.validate_every=1",
]


def run(
    out: Path, seeds: list[int], flips: digits.Flips, quick: bool, say: Say, progress: Progress
) -> loop.Summary:
    """Write the data and run the recipe; what an earlier demo has done here is not done again.

    Args:
        out: new, empty, or made by a demo before.
        seeds: every kind of network is trained once per seed, and these networks are the members
            that are averaged. The first seed is that of the data and of the rule, too.
        flips: which wrong labels the crawl gives (``digits.write``).
        quick: a few steps each.
        say, progress: as of ``training.loop.run``.

    Raises:
        ValueError: ``out`` holds something else. OSError: it cannot be written.
    """
    _write_data(out, {"command": "demo", "seed": seeds[0], "flips": flips})
    return loop.run(
        "demo",
        out=out / "run",
        data_root=out / "data",
        overrides=[
            *(QUICK if quick else []),
            f"members.seeds={seeds}",
            f"loop.seeds={seeds}",
            f"rule.seed={seeds[0]}",
        ],
        say=say,
        progress=progress,
    )


def _write_data(out: Path, wanted: dict[str, object]) -> None:
    """The data set, unless it is there."""
    mark = out / MARK
    if out.is_dir() and not mark.is_file():
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(
                f"demo: out must be a new or empty folder, or one that genkl demo made, got {out}"
            )
    elif mark.is_file() and json.loads(mark.read_text()) == {**wanted, "complete": True}:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"demo: cannot make the folder {out}: {error.strerror}") from error
    _write_mark(mark, {**wanted, "complete": False})
    shutil.rmtree(out / "data", ignore_errors=True)
    digits.write(out / "data", int(str(wanted["seed"])), wanted["flips"])  # type: ignore[arg-type]
    _write_mark(mark, {**wanted, "complete": True})


def _write_mark(mark: Path, content: dict[str, object]) -> None:
    with atomic_write(mark) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
