"""A run that is killed at random moments and started again ends as one that was left alone.

GENKL_KILLS: how many times it is killed; more find more.
"""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import random
import runpy
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from genkl_ext.data import examples

KILLS = int(os.environ.get("GENKL_KILLS", "6"))
SETTINGS = [
    "network.name=genkl_ext.demo.network:small",
    "network.pretrained=null",
    "network.channels_last=false",
    "data.train={size: 16, resize: 18, crop: random, flip: 0.5, rotation: 0.0}",
    "data.eval={size: 16, resize: 16, crop: center, flip: 0.0}",
    "data.num_classes=4",
    "members={epochs: 3, seeds: [0, 1], batch_size: 8, pick: {}}",
    "training={epochs: 3, batch_size: 8}",
    "finetune={epochs: 2, batch_size: 8}",
    "rule={alpha: null, beta: null, sigma: null}",
    "loop={iterations: 2, seeds: [0, 1]}",
    "engine={save_every: 3, predict_batch_size: 16, accelerator: cpu}",
]
# Started once; its children have everything imported and are begun in no time.
_context = multiprocessing.get_context("forkserver")


def work(data: Path, out: Path) -> None:
    import genkl_ext as gk

    lines = (out.parent / f"{out.name}.log").open("a", buffering=1)
    with lines, contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
        gk.run("clothing1m", data_root=data, out=out, overrides=SETTINGS)


def start(data: Path, out: Path) -> Any:
    # By its path: how pytest was started decides whether this module has a name.
    names = {"init_globals": {"DATA": data, "OUT": out}, "run_name": "__main__"}
    process = _context.Process(target=runpy.run_path, args=(__file__,), kwargs=names)
    process.start()
    return process


def content(folder: Path) -> dict[str, Any]:
    """What a run has made; of tables of metrics all but the seconds."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == "metrics.csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        elif path.name in ("records.json", "last.ckpt", "summary.json"):
            found[name] = None  # they hold times; that they are there is all
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def accuracies(folder: Path) -> Any:
    summary = json.loads((folder / "summary.json").read_text())
    return [facts["test"] for facts in summary["iterations"]]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    _context.set_forkserver_preload(["genkl_ext.training.loop", "lightning.pytorch"])
    data = tmp_path / "data"
    examples.make("clothing1m", data, count=64, classes=4, seed=3)
    process = start(data, tmp_path / "whole")
    begin = time.monotonic()
    process.join()
    whole = time.monotonic() - begin
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()

    random_ = random.Random(0)
    killed: Counter[str] = Counter()
    out = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(data, out)
        # Each start does some of what is left; that many of them may reach the end.
        process.join(random_.uniform(0.02, 2.5 * whole / KILLS + 0.5))
        if process.exitcode is not None:
            assert process.exitcode == 0, (tmp_path / "killed.log").read_text()
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        log = (tmp_path / "killed.log").read_text().splitlines() if out.exists() else []
        killed[log[-1].split(":")[0] if log else "start"] += 1
    process = start(data, out)
    process.join()
    assert process.exitcode == 0, (tmp_path / "killed.log").read_text()
    print(f"killed {sum(killed.values())} times, in {dict(killed)}")

    expected, found = content(tmp_path / "whole"), content(out)
    assert sorted(found) == sorted(expected)  # nothing is lost, and nothing temporary is left
    different = [name for name in expected if found[name] != expected[name]]
    assert different == []
    assert accuracies(out) == accuracies(tmp_path / "whole")
    assert killed or KILLS == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_end_leaves_as_much(tmp_path: Path, number: int) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    examples.make("clothing1m", data, count=64, classes=4, seed=3)
    process = start(data, out)
    records = out / "records.json"
    while not (records.exists() and "members/0" in records.read_text()):
        assert process.is_alive()
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode != 0
    process = start(data, out)
    process.join()
    assert process.exitcode == 0
    assert not [path for path in out.rglob(".*") if path.is_file()]
    assert (out / "summary.json").exists()


if __name__ == "__main__":
    work(globals()["DATA"], globals()["OUT"])
