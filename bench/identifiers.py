"""What does each identifier cost, against GenKL's own score of the same rows?

All of them score the same arrays on all processors, taking turns. Those that need members get
three; those that need logits, the probabilities in their place, which takes as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import record
import torch
import workload
from clock import CPU_PAUSE, Candidate, significant, take_turns

from genkl_ext import GenKL, identifiers
from genkl_ext.rule import num_threads

ROWS = {14: 1_000_000, 101: 200_000}  # classes -> rows of one call: 56 MB, 81 MB
QUICK_ROWS = 2_000
MEMBERS = 3
BASE = "genkl"


def candidates(k: int, rows: int) -> dict[str, Candidate]:
    """Identifier -> function of the turn; and entropy as one would write it on one line."""
    slices = workload.Pool(k, "peaked", 4 * k * rows).slices(1)
    inputs = [predictions.numpy() for (predictions,) in slices]
    labels = np.random.default_rng(k).integers(0, k, len(inputs[0]))
    rule = GenKL(k, alpha=1.05, beta=0.4 / k, sigma=0.5 / k)

    def candidate(name: str) -> Candidate:
        options = {"rule": rule} if name == BASE else {}
        identifier = identifiers.get(name, **options)

        def call(turn: int) -> Any:
            some = [inputs[(turn + i) % len(inputs)] for i in range(MEMBERS)]
            return identifier(some[0], logits=some[0], members=some, labels=labels)

        return call

    found = {
        name: candidate(name)
        for name in identifiers.names()
        if "features" not in identifiers.get(name).needs
    }

    def one_line(turn: int) -> Any:
        q = inputs[turn % len(inputs)]
        return -(q * np.log(q)).sum(axis=1) / np.log(q.shape[1])

    check(found["entropy"](0), one_line(0))
    return found | {"entropy on one line of NumPy": one_line}


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raise ``RuntimeError`` unless the two entropies are the same but for float32 rounding."""
    worst = float(np.abs(ours - theirs).max())
    if not worst < 1e-5:
        raise RuntimeError(
            f"bench: entropy must agree with NumPy's within 1e-5, differs by {worst}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options = record.parser(__doc__).parse_args(arguments)
    cells: list[dict[str, Any]] = []
    for k, full in ROWS.items():
        rows = QUICK_ROWS if options.quick else full
        times = take_turns(
            candidates(k, rows),
            seconds=0.05 if options.quick else 30.0,
            rounds=(2, 100) if options.quick else (5, 100),
            pause=CPU_PAUSE,
        )
        base = times[BASE].median
        for name, taken in times.items():
            cell = {
                "classes": k,
                "rows": rows // 64 * 64,
                "identifier": name,
                "mrow_s": significant(rows // 64 * 64 / taken.median / 1e6, 4),
                "ratio": significant(taken.median / base, 4),
                **taken.as_json(),
            }
            cells.append(cell)
            print(
                f"k = {k:4}  {name:30} {cell['mrow_s']:8.2f} Mrow/s  "
                f"{cell['ratio']:6.1f} x the time of GenKL",
                flush=True,
            )
    settings = {
        "quick": options.quick,
        "threads": num_threads(),
        "torch_threads": torch.get_num_threads(),
        "members": MEMBERS,
    }
    record.write(
        "identifiers", settings, cells, options.out or (None if options.quick else record.RESULTS)
    )


if __name__ == "__main__":
    main()
