"""What scoring is timed on and judged by: the rules, the rows, the check before the clock, the
roofline. For the CPU and the GPU alike."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from clock import Times, significant
from numpy.typing import NDArray

from genkl_ext import GenKL, Scores, reference

# Rows are the softmax of so many times N(0, 1).
ROWS = {"peaked": 4.0, "confident": 10.0, "flat": 0.3}

SLICES = 4  # inputs that take turns: together they are far larger than a CPU's cache

LOG2_SLOTS = 16  # multiply-adds that one log2 is counted as
CHECKED_ROWS = 1024  # per cell, held against reference.py, which is slow


def rules() -> dict[str, GenKL]:
    """Name -> rule. food101n's own sigma is 0, which makes all vectors equal and scoring easier:
    it is timed with a spread of vectors too."""
    return {
        "clothing1m": GenKL.preset("clothing1m"),
        "webvision": GenKL.preset("webvision"),
        "food101n-spread": GenKL.preset("food101n", sigma=0.5 / 101),
        "food101n": GenKL.preset("food101n"),
        "thousand": GenKL(1000, alpha=1.05, beta=0.4 / 1000, sigma=0.5 / 1000),
    }


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that run some of the cells."""
    group = parser.add_argument_group("some of the cells; not written without --out")
    group.add_argument("--rule", nargs="+", choices=list(rules()), metavar="NAME")
    group.add_argument("--models", nargs="+", type=int, metavar="M")
    group.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="KIND")
    group.add_argument("--threads", nargs="+", type=int, metavar="T", help="not on a GPU")


class Choice(NamedTuple):
    """The cells to run, as the options have it."""

    quick: bool
    full: bool  # all cells at their full size
    rules: dict[str, GenKL]
    models: list[int]
    kinds: list[str]
    slice_bytes: int

    @classmethod
    def of(cls, options: argparse.Namespace, slice_bytes: int) -> Choice:
        every, quick = rules(), options.quick
        some = options.rule or options.models or options.rows or options.threads
        return cls(
            quick=quick,
            full=not (quick or some),
            rules={name: every[name] for name in options.rule or every},
            models=options.models or ([1] if quick else [1, 3, 5]),
            kinds=options.rows or (["peaked"] if quick else list(ROWS)),
            slice_bytes=2 << 20 if quick else slice_bytes,
        )

    def settings(self) -> dict[str, Any]:
        """For the record."""
        return {
            "quick": self.quick,
            "slice_bytes": self.slice_bytes,
            "slices": SLICES,
            "log2_slots": LOG2_SLOTS,
            "rows": ROWS,
            "rules": {name: dataclasses.asdict(rule) for name, rule in self.rules.items()},
        }


class Pool:
    """Random predictions of one kind, cut into the models' inputs by :meth:`slices`.

    The models are drawn independently. Averaging then leaves more entries dominant than the
    models of one data set would, which mostly agree: cells of several models are the harder ones.
    """

    def __init__(self, classes: int, kind: str, slice_bytes: int, device: str = "cpu") -> None:
        self.classes = classes
        self.slice_rows = slice_bytes // (4 * classes)
        generator = torch.Generator(device=device).manual_seed(classes)
        rows = SLICES * self.slice_rows
        logits = torch.randn(rows, classes, generator=generator, device=device)
        self._rows = logits.mul_(ROWS[kind]).softmax(dim=1)

    def slices(self, models: int) -> list[list[torch.Tensor]]:
        """``SLICES`` inputs of M contiguous (N, k) tensors, all together ``slice_bytes`` each."""
        n = self.slice_rows // models // 64 * 64 or 64  # whole chunks for the baselines
        if n * models * SLICES > len(self._rows):
            raise ValueError(
                f"workload: {models} models need slices of {64 * models} rows of {self.classes} "
                f"classes, got {self.slice_rows}"
            )
        blocks = self._rows[: n * models * SLICES].reshape(SLICES, models, n, self.classes)
        return [list(block) for block in blocks]


def dominant_entries(models: list[torch.Tensor], rule: GenKL) -> float:
    """Mean number of dominant entries in a row of the average."""
    q = sum(models[1:], models[0]) / len(models)
    tau = torch.tensor(rule.tau, dtype=q.dtype, device=q.device)
    return float((q >= tau).sum(dtype=torch.int64)) / len(q)


def fma_slots(dominant: float, rule: GenKL) -> float:
    """Multiply-adds that a row with so many dominant entries cannot do without.

    A log2 and one product per vector for each; when all vectors are one uniform vector, a single
    multiplication: the logarithm of the product of all is taken once.
    """
    if (rule.vectors == rule.vectors[0, 0]).all():
        return dominant
    return dominant * (rule.num_vectors + LOG2_SLOTS)


def check_exact(scores: Scores, models: list[NDArray[np.float32]], rule: GenKL) -> None:
    """Raise ``RuntimeError`` unless votes and top class of the first rows equal reference.py's."""
    head = [m[:CHECKED_ROWS] for m in models]
    expected = reference.nc_score(head, rule.vectors, rule.alpha, rule.tau)
    for name in ("votes", "top_class"):
        came, wanted = getattr(scores, name)[:CHECKED_ROWS], getattr(expected, name)
        if (differ := np.flatnonzero(came != wanted)).size:
            row = int(differ[0])
            raise RuntimeError(
                f"bench: {name} must equal the definition, got {came[row]} in place of "
                f"{wanted[row]} at row {row} ({differ.size} rows differ; {rule})"
            )


def check_close(name: str, votes: NDArray, scores: Scores, rule: GenKL) -> int:
    """How many of a baseline's decisions differ from the exact ones, all of them within float32
    rounding of the threshold.

    Raises:
        RuntimeError: one of them is not: then it is not the same computation.
    """
    nc = np.asarray(scores.nc)[: len(votes)]
    critical = np.asarray(scores.critical_alpha, dtype=np.float64)[: len(votes)]
    differ = np.flatnonzero((votes > 0) != nc)
    # Rounding of the weights, the logarithms and k sums: a few times what genkl_ext guards against.
    near = np.abs(critical[differ] / rule.alpha - 1) <= 4 * rule.resolution
    if not near.all():
        row = int(differ[~near][0])
        raise RuntimeError(
            f"bench: {name} must decide like genkl_ext where the threshold is not near, got "
            f"another decision at row {row}, critical alpha {critical[row]:.7g} of {rule}"
        )
    return int(differ.size)


def figures(
    rule: GenKL,
    models: list[torch.Tensor],
    scored: Mapping[str, tuple[int, Times]],
    ours: Sequence[str],
    read_gb_s: float,
    gfma_s: float,
) -> dict[str, Any]:
    """What a cell is judged by.

    Args:
        rule, models: what was scored, all of it by each of ``ours``.
        scored: candidate -> how many rows it scored in one call, and the times of its calls.
        ours: the candidates of genkl_ext; the others are baselines.
        read_gb_s: measured rate of reading the same arrays and doing nothing else.
        gfma_s: measured rate of float32 multiply-adds that wait for nothing, 10^9 a second.
    """
    rows, input_bytes = len(models[0]), sum(m.nbytes for m in models)
    dominant = dominant_entries(models, rule)
    reading = input_bytes / read_gb_s / 1e9
    adding = rows * fma_slots(dominant, rule) / gfma_s / 1e9
    roofline = max(reading, adding)
    rates = {name: count / times.median / 1e6 for name, (count, times) in scored.items()}
    return {
        "rows": rows,
        "bytes": input_bytes,
        "dominant": significant(dominant, 4),
        "read_gb_s": significant(read_gb_s, 4),
        "gfma_s": significant(gfma_s, 4),
        "roofline_ms": significant(1e3 * roofline),
        "bound": "memory" if reading >= adding else "arithmetic",
        "times": {name: {"rows": count, **t.as_json()} for name, (count, t) in scored.items()},
        "mrow_s": {name: significant(rate, 4) for name, rate in rates.items()},
        "ours": {
            name: {
                "gb_s": significant(input_bytes / scored[name][1].median / 1e9, 4),
                "share_of_read": significant(reading / scored[name][1].median, 4),
                "share_of_roofline": significant(roofline / scored[name][1].median, 4),
                "times_faster": {
                    other: significant(rates[name] / rates[other], 4)
                    for other in scored
                    if other not in ours
                },
            }
            for name in ours
        },
    }


def line(cell: dict[str, Any], ours: str) -> str:
    """A cell on one line, for whoever watches."""
    figures = cell["ours"][ours]
    threads = f"  {cell['threads']} threads" if "threads" in cell else ""
    others = "".join(f"  {x:6.1f} x {name}" for name, x in figures["times_faster"].items())
    return (
        f"{cell['rule']:15}  M = {cell['models']}  {cell['kind']:9}{threads}"
        f"  {cell['mrow_s'][ours]:8.2f} Mrow/s  {figures['gb_s']:6.1f} GB/s"
        f"  {figures['share_of_read']:5.2f} of reading"
        f"  {figures['share_of_roofline']:5.2f} of roofline{others}"
    )
