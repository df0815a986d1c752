"""How long does the genkl command take from start to end, on a file too small to matter?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
from clock import take_turns

ROWS = 10_000


def program() -> list[str]:
    """The installed ``genkl`` of this Python.

    Raises:
        FileNotFoundError: genkl_ext is not installed here.
    """
    path = Path(sys.executable).with_name("genkl")
    if not path.is_file():
        raise FileNotFoundError(f"bench: no {path}; install genkl_ext first (make setup)")
    return [str(path)]


def commands(folder: Path) -> dict[str, list[str]]:
    """Name -> command line; writes the small file it needs to ``folder``."""
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((ROWS, 14))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.save(folder / "p.npy", (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32))
    score = [*program(), "score", str(folder / "p.npy"), "--preset", "clothing1m", "-o"]
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import numpy": [sys.executable, "-c", "import numpy"],
        "genkl --help": [*program(), "--help"],
        "genkl score --help": [*program(), "score", "--help"],
        "genkl score, to .npy": [*score, str(folder / "scores.npy")],
        "genkl score, to .csv": [*score, str(folder / "scores.csv")],
        "genkl score, to .parquet": [*score, str(folder / "scores.parquet")],
    }


def runner(command: list[str]) -> Callable[[int], None]:
    """Runs the command, with Python's compiled files kept as they are for a user."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run(_: int) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bench: {' '.join(command)} failed: {done.stderr.strip()}")

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    options = record.parser(__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        times = take_turns(
            {name: runner(command) for name, command in commands(Path(folder)).items()},
            seconds=0.0 if options.quick else 20.0,
            rounds=(2, 2) if options.quick else (10, 100),
        )
    cells: list[dict[str, Any]] = []
    for name, taken in times.items():
        cells.append({"command": name, **taken.as_json()})
        print(f"{name:26} {1e3 * taken.median:7.0f} ms", flush=True)
    settings = {"rows": ROWS, "classes": 14, "quick": options.quick}
    record.write(
        "score_command", settings, cells, options.out or (None if options.quick else record.RESULTS)
    )


if __name__ == "__main__":
    main()
