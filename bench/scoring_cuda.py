"""How fast are rows scored on the GPU, against torch and reading the rows alone?

The cells of scoring.py on CUDA tensors. Without a GPU this says so and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import record
import torch
import workload
from baselines import Factors, torch_votes
from clock import CudaTimer, Timer, host_time, significant, take_turns

from genkl_ext import GenKL

OURS = "genkl_ext"
BASELINES = ("torch eager", "torch.compile")
READERS = ("read: torch.sum", "read: compiled sum", "read: copy")
SLICE_BYTES = 1 << 30
MATRIX = 4096  # side of the float32 matrices whose product measures the multiply-add rate

Slices = list[list[torch.Tensor]]


def candidates(
    slices: Slices, rule: GenKL, matrix: torch.Tensor, compiled: dict[str, Callable]
) -> dict[str, Callable[[int], Any]]:
    """Name -> function of the turn."""
    factors = Factors.of(rule, np.float32).on(str(matrix.device))
    target = torch.empty_like(slices[0][0])

    def models(turn: int) -> list[torch.Tensor]:
        return slices[turn % len(slices)]

    return {
        "read: torch.sum": lambda turn: [m.view(-1).sum() for m in models(turn)],
        "read: compiled sum": lambda turn: compiled["sums"](models(turn)),
        "read: copy": lambda turn: [target.copy_(m) for m in models(turn)],
        OURS: lambda turn: rule.score(models(turn)),
        "torch eager": lambda turn: torch_votes(models(turn), factors),
        "torch.compile": lambda turn: compiled["votes"](models(turn), factors),
        "multiply-add": lambda turn: matrix @ matrix,
    }


def sums(models: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of each array; compiled, one look at every byte."""
    return [m.view(-1).sum() for m in models]


def check(calls: dict[str, Callable[[int], Any]], slices: Slices, rule: GenKL) -> dict[str, Any]:
    """As in scoring.py; the GPU's decisions are also compared with the CPU's, on every row."""
    scores = calls[OURS](0).numpy()
    arrays = [m.cpu().numpy() for m in slices[0]]
    workload.check_exact(scores, arrays, rule)
    on_cpu = rule.score(arrays)
    for column in ("votes", "nc", "top_class", "top_prob"):
        if not np.array_equal(getattr(scores, column), getattr(on_cpu, column)):
            raise RuntimeError(f"bench: {column} differs between the devices for {rule}")
    return {
        name: {
            "rows": len(on_cpu),
            "differ": workload.check_close(name, calls[name](0).cpu().numpy(), on_cpu, rule),
        }
        for name in BASELINES
    }


def measure(
    slices: Slices,
    rule: GenKL,
    matrix: torch.Tensor,
    compiled: dict[str, Callable],
    timer: Timer,
    quick: bool,
) -> dict[str, Any]:
    """The figures of one cell."""
    calls = candidates(slices, rule, matrix, compiled)
    agreement = check(calls, slices, rule)
    times = take_turns(
        calls, seconds=0.05 if quick else 1.0, rounds=(2 if quick else 10, 200), timer=timer
    )
    rows, input_bytes = len(slices[0][0]), sum(m.nbytes for m in slices[0])
    moved = {name: input_bytes * (2 if name.endswith("copy") else 1) for name in READERS}
    reading = {name: moved[name] / times[name].median / 1e9 for name in READERS}
    figures = workload.figures(
        rule,
        slices[0],
        {name: (rows, times[name]) for name in (OURS, *BASELINES)},
        [OURS],
        max(reading.values()),
        len(matrix) ** 3 / times["multiply-add"].median / 1e9,
    )
    readers = {name: significant(rate, 4) for name, rate in reading.items()}
    return {**figures, "readers_gb_s": readers, "agreement": agreement}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser(__doc__)
    workload.add_choices(parser)
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="a quick run on the CPU: shows that the script works where there is no GPU",
    )
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.rehearse):
        print("no GPU here: nothing is timed, nothing is written")
        return
    options.quick |= options.rehearse
    choice = workload.Choice.of(options, SLICE_BYTES)
    device = "cpu" if options.rehearse else "cuda"
    timer = host_time if options.rehearse else CudaTimer()
    side = 64 if choice.quick else MATRIX
    matrix = torch.rand(side, side, device=device)

    cells: list[dict[str, Any]] = []
    for rule_name, rule in choice.rules.items():
        for kind in choice.kinds:
            pool = workload.Pool(rule.num_classes, kind, choice.slice_bytes, device)
            for models in choice.models:
                torch.compiler.reset()
                compiled: dict[str, Callable[..., Any]] = {
                    "sums": torch.compile(sums, dynamic=False),
                    "votes": torch.compile(torch_votes, dynamic=False),
                }
                figures = measure(pool.slices(models), rule, matrix, compiled, timer, choice.quick)
                cell = {"rule": rule_name, "classes": rule.num_classes, "models": models}
                cells.append({**cell, "kind": kind, **figures})
                print(workload.line(cells[-1], OURS), flush=True)
            del pool  # before the next is drawn: each is several times SLICE_BYTES
    folder = options.out or (record.RESULTS if choice.full else None)
    record.write("scoring_cuda", {**choice.settings(), "device": device}, cells, folder)


if __name__ == "__main__":
    main()
