"""How fast are rows scored on the CPU, against NumPy, torch and reading the rows alone?

A cell is a rule, a number of models, a kind of rows and a number of threads. In each, genkl_ext
(from NumPy arrays and from tensors), the baselines and the two ceilings take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import record
import torch
import workload
from baselines import Factors, chunked_numpy, researcher_numpy, torch_votes
from ceilings import fmas_of, multiply_add, read
from clock import CPU_PAUSE, take_turns
from threadpoolctl import threadpool_limits

from genkl_ext import GenKL, Scores

OURS = ("genkl_ext numpy", "genkl_ext torch")
BASELINES = (
    "researcher numpy",
    "chunked numpy",
    "chunked float32 numpy",
    "torch eager",
    "torch.compile",
)

SLICE_BYTES = 64 << 20  # input of one call
RESEARCHER_BYTES = 64 << 20  # of the (m, N, k) temporary; larger ones are slower for each row
# Baselines are called on a quarter of the input. That lets them be called more often, and spares
# them the page faults of temporaries above 32 MiB, which glibc returns to the system every time.
BASELINE_SHARE = 4
NUMPY_CHUNK = 64  # rows of a NumPy product, as a share of the input: 1 MiB of logarithms for M = 1

BASELINE_MODELS = (1, 5)  # where baselines are timed; elsewhere there is no time for them

COLUMNS = ("critical_alpha", "divergence", "votes", "nc", "top_class", "top_prob")

# Name -> function of the turn, and how many rows it scores in one call.
Calls = dict[str, tuple[Callable[[int], Any], int]]


class Inputs:
    """The inputs of one cell that candidates take by the number of their turn."""

    def __init__(self, slices: list[list[torch.Tensor]]) -> None:
        self.tensors = slices
        self.arrays = [[m.numpy() for m in models] for models in slices]
        self.rows = len(slices[0][0])
        self.bytes = sum(m.nbytes for m in slices[0])

    def some(self, slices: list[list[Any]], turn: int, rows: int) -> list[Any]:
        """``rows`` rows of each model: of another input, and of another part of it, every time."""
        models = slices[turn % len(slices)]
        begin = turn // len(slices) % BASELINE_SHARE * (self.rows // BASELINE_SHARE)
        return [m[begin : begin + rows] for m in models]


def candidates(inputs: Inputs, rule: GenKL, threads: int, compiled: Callable | None) -> Calls:
    """All candidates of a cell; the ceilings score no rows. ``compiled`` is the compiled
    ``torch_votes``, or None for a cell without baselines."""
    arrays, tensors, rows = inputs.arrays, inputs.tensors, inputs.rows
    found: Calls = {
        "read": (lambda turn: read(arrays[turn % len(arrays)], threads), 0),
        "genkl_ext numpy": (lambda turn: rule.score(arrays[turn % len(arrays)]), rows),
        "genkl_ext torch": (lambda turn: rule.score(tensors[turn % len(tensors)]), rows),
        "multiply-add": (lambda turn: multiply_add(threads), 0),
    }
    if compiled is None:
        return found
    part = rows // BASELINE_SHARE
    few = min(part, RESEARCHER_BYTES // (8 * rule.num_vectors * rule.num_classes))
    exact, fast = Factors.of(rule, np.float64), Factors.of(rule, np.float32)
    tensor_factors = fast.on("cpu")

    def chunked(factors: Factors, turn: int) -> np.ndarray:
        return chunked_numpy(inputs.some(arrays, turn, part), factors, rows // NUMPY_CHUNK)

    found |= {
        "researcher numpy": (
            lambda turn: researcher_numpy(inputs.some(arrays, turn, few), rule),
            few,
        ),
        "chunked numpy": (lambda turn: chunked(exact, turn), part),
        "chunked float32 numpy": (lambda turn: chunked(fast, turn), part),
        "torch eager": (
            lambda turn: torch_votes(inputs.some(tensors, turn, part), tensor_factors),
            part,
        ),
        "torch.compile": (
            lambda turn: compiled(inputs.some(tensors, turn, part), tensor_factors),
            part,
        ),
    }
    return found


def check(calls: Calls, inputs: Inputs, rule: GenKL) -> dict[str, dict[str, int]]:
    """Compare what the candidates decide on the first rows before they are timed.

    Returns:
        Baseline -> how many rows it was compared on, and on how many it decides differently
        (within float32 rounding of the threshold).

    Raises:
        RuntimeError: genkl_ext is not exact, or a baseline computes something else.
    """
    scores: Scores = calls["genkl_ext numpy"][0](0)
    workload.check_exact(scores, inputs.arrays[0], rule)
    other = calls["genkl_ext torch"][0](0).numpy()
    for column in COLUMNS:
        if not np.array_equal(getattr(scores, column), getattr(other, column)):
            raise RuntimeError(f"bench: {column} differs between arrays and tensors for {rule}")
    agreement = {}
    for name in BASELINES:
        if name in calls:
            votes = np.asarray(calls[name][0](0))
            differ = workload.check_close(name, votes, scores, rule)
            agreement[name] = {"rows": len(votes), "differ": differ}
    return agreement


def measure(
    inputs: Inputs, rule: GenKL, threads: int, compiled: Callable | None, quick: bool
) -> dict[str, Any]:
    """The figures of one cell."""
    calls = candidates(inputs, rule, threads, compiled)
    agreement = check(calls, inputs, rule)
    times = take_turns(
        {name: call for name, (call, _) in calls.items()},
        seconds=0.05 if quick else 3.0 if compiled else 1.0,
        rounds=(2, 100) if quick else (5, 100),
        pause=CPU_PAUSE if threads > 1 else 0.0,
    )
    read_gb_s = inputs.bytes / times["read"].median / 1e9
    figures = workload.figures(
        rule,
        inputs.tensors[0],
        {name: (rows, times[name]) for name, (_, rows) in calls.items() if rows},
        OURS,
        read_gb_s,
        fmas_of(threads) / times["multiply-add"].median / 1e9,
    )
    return {**figures, "agreement": agreement}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser(__doc__)
    workload.add_choices(parser)
    options = parser.parse_args(arguments)
    choice = workload.Choice.of(options, SLICE_BYTES)
    every = torch.get_num_threads()
    threads_tried = options.threads or ([every] if choice.quick else sorted({1, every}))

    cells: list[dict[str, Any]] = []
    pools: dict[tuple[int, str], workload.Pool] = {}
    for rule_name, rule in choice.rules.items():
        k = rule.num_classes
        pools = {
            (k, kind): pools.get((k, kind)) or workload.Pool(k, kind, choice.slice_bytes)
            for kind in choice.kinds
        }
        for models in choice.models:
            inputs = {kind: Inputs(pools[k, kind].slices(models)) for kind in choice.kinds}
            for threads in threads_tried:
                torch.set_num_threads(threads)
                torch.compiler.reset()  # what was compiled for other shapes and threads
                compiled = None
                if models in BASELINE_MODELS:
                    compiled = torch.compile(torch_votes, dynamic=False)
                for kind in choice.kinds:
                    with threadpool_limits(threads, user_api="blas"):
                        figures = measure(inputs[kind], rule, threads, compiled, choice.quick)
                    cell = {"rule": rule_name, "classes": k, "models": models, "kind": kind}
                    cells.append({**cell, "threads": threads, **figures})
                    print(workload.line(cells[-1], OURS[0]), flush=True)
    torch.set_num_threads(every)
    folder = options.out or (record.RESULTS if choice.full else None)
    record.write("scoring", {**choice.settings(), "all_threads": every}, cells, folder)


if __name__ == "__main__":
    main()
