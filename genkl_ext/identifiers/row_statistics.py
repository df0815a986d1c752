"""Sums and largest entries of rows of predictions, from which the row-wise identifiers are made.

For NumPy arrays one read by the native kernel gives them all (csrc/kernels/row_statistics.h); for
tensors each is an operator or two on their device. In float64 either way.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

LN_2 = math.log(2.0)


class NumpyStatistics:
    """Of (n, k) rows; everything is (n,) float64.

    Args:
        q: float16, float32 or float64, any strides.
        entropy: whether ``plogp`` will be asked for.
        floor: that of ``logs``; None if they will not be asked for.
    """

    def __init__(self, q: np.ndarray, entropy: bool = False, floor: float | None = None) -> None:
        from .. import _native

        if q.dtype == np.float16:
            q = q.astype(np.float32)
        self._q = np.ascontiguousarray(q)
        self.total: Any  #: sum of q_i
        self.lowest: Any  #: smallest q_i
        self.squares: Any  #: sum of q_i^2
        self.top: Any  #: largest q_i
        self.second: Any  #: second largest
        (
            self.total,
            self.lowest,
            self.squares,
            self.top,
            self.second,
            top_class,
            self._bits,
            self._log_bits,
        ) = _native.row_statistics(
            self._q, entropy, floor is not None, 1.0 if floor is None else floor
        )

        self._top_class = top_class

    @property
    def top_class(self) -> Any:
        """Integers: the lowest class of the largest entry; of a row with NaN, anything."""
        return np.nan_to_num(self._top_class).astype(np.int64)

    @property
    def plogp(self) -> Any:
        """Sum of q_i ln q_i, 0 ln 0 being 0."""
        return LN_2 * self._bits

    @property
    def logs(self) -> Any:
        """Sum of ln max(q_i, floor)."""
        return LN_2 * self._log_bits

    def own(self, y: Any) -> Any:
        """q_y, the entry of each row at its class in ``y``."""
        return self._q[np.arange(len(y)), y].astype(np.float64)

    def best_of_others(self, y: Any) -> Any:
        """Largest entry of each row, that of its class in ``y`` left out."""
        return np.where(self._top_class == y, self.second, self.top)


class TorchStatistics:
    """The same of a tensor, each computed when it is asked for."""

    def __init__(self, q: Any, entropy: bool = False, floor: float | None = None) -> None:
        self._q = q.double()
        self._floor = floor

    @cached_property
    def total(self) -> Any:
        return self._q.sum(1)

    @property
    def lowest(self) -> Any:
        return self._q.amin(1)

    @property
    def squares(self) -> Any:
        return self._q.square().sum(1)

    @property
    def top(self) -> Any:
        return self._q.amax(1)

    @property
    def second(self) -> Any:
        return self._q.topk(2, dim=1).values[:, 1]

    @property
    def top_class(self) -> Any:
        return self._q.argmax(1)

    @property
    def plogp(self) -> Any:
        return self._q.xlogy(self._q).sum(1)

    @property
    def logs(self) -> Any:
        return self._q.clamp_min(self._floor).log().sum(1)

    def own(self, y: Any) -> Any:
        return self._q.gather(1, y[:, None])[:, 0]

    def best_of_others(self, y: Any) -> Any:
        return self._q.scatter(1, y[:, None], -math.inf).amax(1)


RowStatistics = NumpyStatistics | TorchStatistics
