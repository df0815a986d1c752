"""Chunks scored on a GPU: while one is scored there, the next is on its way.

Results are those of the CPU, bit for bit, so a chunk with rows that hold no valid prediction is
simply left to the CPU, which knows what to do with them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..rule import GenKL
from .tables import LEFT_OUT

if TYPE_CHECKING:
    import torch

LANES = 2  # streams: one chunk is copied while another is scored


def device_of(name: str, local_rank: int = 0) -> torch.device | None:
    """The GPU that is meant; None for the CPU.

    Args:
        name: "cpu"; "cuda", the one of this process's number; "cuda:1".
        local_rank: this process's number among those on this machine.

    Raises:
        ValueError: another name, this process sees no such GPU, or genkl_ext was built without
            CUDA kernels.
    """
    require_name(name)
    if name == "cpu":
        return None
    import torch

    from .. import ops

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A launcher may show each process its own GPU only; and processes may share one.
    wanted = int(name[5:]) if name[5:] else local_rank % max(1, there)
    if wanted >= there:
        raise ValueError(f"score: device {name} needs GPU {wanted}, and this process sees {there}")
    if not ops.HAS_CUDA:
        raise ValueError(
            f"score: device {name} needs CUDA kernels, and this genkl_ext was built without "
            "(genkl info says why)"
        )
    return torch.device("cuda", wanted)


def require_name(name: str, caller: str = "score") -> None:
    """Raise ``ValueError`` unless it is the name of a device."""
    if name != "cpu" and not (isinstance(name, str) and re.fullmatch("cuda(:[0-9]+)?", name)):
        raise ValueError(f"{caller}: device must be cpu, cuda or cuda:NUMBER, got {name!r}")


class GpuScorer:
    """Scores chunks on a device, several at a time.

    Args:
        rule: what to score with.
        device: a GPU; torch's CPU gives the same results without any of the overlap.
        logits: chunks hold logits.
        validate: look for rows that are no predictions.
    """

    def __init__(self, rule: GenKL, device: torch.device, logits: bool, validate: bool) -> None:
        import torch

        self._rule, self._device = rule, device
        self._logits, self._validate = logits, validate
        self._cuda = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(LANES)] if self._cuda else []
        self._turn = 0

    def stage(self, models: Sequence[Any]) -> list[torch.Tensor]:
        """Copies of M arrays or CPU tensors of (n, k), from which a GPU can fetch them while the
        host goes on: in pinned memory, of which torch keeps what was used before."""
        import torch

        staged = []
        for model in models:
            is_array = isinstance(model, np.ndarray)
            dtype = getattr(torch, model.dtype.name) if is_array else model.dtype
            with self._failures():
                copy = torch.empty(model.shape, dtype=dtype, pin_memory=self._cuda)
            if is_array:  # not by torch, which warns of arrays that are read-only
                copy.numpy()[...] = model
            else:
                copy.copy_(model)
            staged.append(copy)
        return staged

    def begin(self, staged: Sequence[torch.Tensor]) -> Pending:
        """Have a chunk copied and scored; does not wait for it."""
        import torch

        lane: AbstractContextManager[Any] = nullcontext()
        if self._cuda:
            stream = self._streams[self._turn % LANES]
            self._turn += 1
            lane = torch.cuda.stream(stream)
        with lane, self._failures():
            there = [tensor.to(self._device, non_blocking=True) for tensor in staged]
            scores = self._rule._score(there, logits=self._logits, validate=self._validate)
            columns = {name: self._back(getattr(scores, name)) for name in LEFT_OUT}
            first_bad_row = self._back(torch.as_tensor(scores._first_bad_row))
            done = stream.record_event() if self._cuda else None
        return Pending(columns, first_bad_row, done, self._failures)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What CUDA reports of a chunk, an earlier one perhaps, as ``OSError`` that names the
        device."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise OSError(f"score: device {self._device} failed: {reason}") from error

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if not self._cuda or tensor.device.type == "cpu":
            return tensor
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return here.copy_(tensor, non_blocking=True)


def new_scorer(
    rule: GenKL, device: str, logits: bool, validate: bool, local_rank: int = 0
) -> GpuScorer | None:
    """One on the device of this name (:func:`device_of`); None for the CPU."""
    where = device_of(device, local_rank)
    return None if where is None else GpuScorer(rule, where, logits, validate)


# One for all batches of a worker, which does not know that they belong together.
scorer_of = functools.lru_cache(maxsize=8)(new_scorer)


class Pending:
    """A chunk on its way."""

    def __init__(
        self,
        columns: dict[str, torch.Tensor],
        first_bad_row: torch.Tensor,
        done: Any,
        failures: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._columns, self._first_bad_row, self._done = columns, first_bad_row, done
        self._failures = failures

    def result(self) -> dict[str, NDArray[Any]] | None:
        """Wait for it: the columns of ``tables.py``; None if a row is no valid prediction.

        The columns lie in pinned memory, which is better not kept for long.
        """
        if self._done is not None:
            with self._failures():
                self._done.synchronize()
        if int(self._first_bad_row) >= 0:
            return None
        return {name: np.asarray(column) for name, column in self._columns.items()}
