"""How fast can this machine read memory and multiply-add, when it does nothing else?

Shows the reader that the other benchmarks measure against beside what NumPy and torch read with.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from clock import CPU_PAUSE, significant, take_turns
from numpy.typing import NDArray

SOURCE = Path(__file__).with_name("ceilings.cpp")
FMA_ROUNDS = 2_000_000  # some 4 ms


def read(arrays: Sequence[NDArray[np.float32]], threads: int) -> float:
    """The sum of contiguous float32 arrays of one size: one look at every byte of them."""
    pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    return float(_library().read_floats(pointers, len(arrays), arrays[0].size, threads))


def multiply_add(threads: int) -> float:
    """Do float32 multiply-adds on every thread, ``fmas_of(threads)`` together, and nothing else."""
    return float(_library().multiply_add(FMA_ROUNDS, threads, 0.999, 0.001))


def fmas_of(threads: int) -> int:
    """How many multiply-adds one call of :func:`multiply_add` does."""
    return FMA_ROUNDS * threads * int(_library().fmas_per_round())


@functools.cache
def _library() -> ctypes.CDLL:
    """ceilings.cpp, compiled for this very machine."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("bench: a C++ compiler is needed (c++, g++ or the one that CXX names)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        command = [*compiler.split(), "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast"]
        command += ["-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bench: {' '.join(command)} failed:\n{done.stderr}")
        loaded = ctypes.CDLL(str(library))  # stays mapped when the file is gone
    loaded.read_floats.restype = ctypes.c_float
    loaded.read_floats.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int,
    ]  # fmt: skip
    loaded.multiply_add.restype = ctypes.c_float
    loaded.multiply_add.argtypes = [
        ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_float,
    ]  # fmt: skip
    return loaded


def candidates(
    arrays: list[NDArray[np.float32]], threads: int
) -> dict[str, Callable[[int], object]]:
    """Name -> function of the turn: readers of one of the arrays, and the multiply-adds."""
    tensors = [torch.from_numpy(a) for a in arrays]
    n = len(arrays)
    return {
        "C++ loop": lambda turn: read([arrays[turn % n]], threads),
        "torch.sum": lambda turn: tensors[turn % n].sum(),
        "torch.amax": lambda turn: tensors[turn % n].amax(),
        "numpy.sum (one thread)": lambda turn: arrays[turn % n].sum(),
        "numpy.max (one thread)": lambda turn: arrays[turn % n].max(),
        "multiply-add": lambda turn: multiply_add(threads),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = record.parser(__doc__).parse_args(arguments)
    megabytes = 1 if options.quick else 64
    arrays = [np.random.default_rng(i).random(megabytes << 18, dtype=np.float32) for i in range(4)]
    cells: list[dict[str, Any]] = []
    every = torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        times = take_turns(
            candidates(arrays, threads),
            seconds=0.1 if options.quick else 3,
            rounds=(2, 100),
            pause=CPU_PAUSE if threads > 1 else 0.0,
        )
        for name, t in times.items():
            adds = name == "multiply-add"
            amount = fmas_of(threads) if adds else arrays[0].nbytes
            rate, unit = amount / t.median / 1e9, "Gfma/s" if adds else "GB/s"
            cell = {"candidate": name, "threads": threads, "rate": significant(rate, 4)}
            cells.append({**cell, "unit": unit, **t.as_json()})
            print(f"{threads} threads  {name:24} {rate:8.1f} {unit}", flush=True)
    torch.set_num_threads(every)
    settings = {"megabytes": megabytes, "quick": options.quick}
    folder = options.out or (None if options.quick else record.RESULTS)
    record.write("ceilings", settings, cells, folder)


if __name__ == "__main__":
    main()
