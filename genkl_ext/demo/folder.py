"""The run's folder. Every file in it is complete or absent.

    recipe.yaml                           the settings; marks the folder as made by this demo
    data/                                 the JPEG files and their lists (digits.py)
    plain/SEED/, plain-both/SEED/         baselines: noisy labels; noisy and clean labels
    iteration-0/members/SEED/             clean-subset models, which are a baseline too
    iteration-T/predictions/SEED.npy      (N, k) float32, of each member, rows as in the noisy list
    iteration-T/scores.parquet, nc_set.txt, summary.json
    iteration-T/trial-SEED/               the networks trained with the objective, and fine-tuned
    summary.json, results.md, critical_alpha.png, most_nonconforming.png

A training leaves best.safetensors, last.safetensors and metrics.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from ..files import atomic_write
from .training import Trained

_MARK = "command: demo\n"
_PARTS = (
    "data", "plain", "plain-both", "iteration-*", "summary.json", "results.md",
    "critical_alpha.png", "most_nonconforming.png",
    ".data-*", ".*.partial*",  # of a run that was killed
)  # fmt: skip


def prepare(out: Path, recipe: dict[str, Any]) -> None:
    """Make the folder, without the parts of an earlier run, and write its recipe.

    Raises:
        ValueError: it holds files that no demo made. OSError: it cannot be made or written.
    """
    mark = out / "recipe.yaml"
    if out.is_dir():
        made_here = mark.is_file() and mark.read_text().startswith(_MARK)
        if not made_here and any(not p.name.startswith(".") for p in out.iterdir()):
            raise ValueError(
                f"demo: out must be a new or empty folder, or one that genkl demo made, got {out}"
            )
        if made_here:
            for path in [path for part in _PARTS for path in out.glob(part)]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"demo: cannot make the folder {out}: {error.strerror}") from error
    with atomic_write(mark) as temporary:
        lines = (f"{name}: {json.dumps(value)}\n" for name, value in recipe.items())
        temporary.write_text(_MARK + "".join(lines))


def save_training(folder: Path, trained: Trained, prefix: str = "") -> None:
    """Weights of the best check and of the last step, and every check in a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in (("best", trained.best), ("last", trained.last)):
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        with atomic_write(folder / f"{prefix}{name}.safetensors") as temporary:
            save_file(weights, temporary)
    with (
        atomic_write(folder / f"{prefix}metrics.csv") as temporary,
        temporary.open("w", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "training_loss", "validation_loss", "validation_accuracy"])
        table.writerows(dataclasses.astuple(check) for check in trained.history)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """A ``.npy`` file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def save_json(path: Path, value: Any) -> None:
    """A JSON file for people and programs."""
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_text(path: Path, text: str) -> None:
    """A text file."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
