"""The same decision written the ways people write it today; what scoring is compared with.

All take a list of M (N, k) float32 arrays and return (N,) votes. None of them checks its input,
counts equal classes or settles a close call, as genkl_ext does inside the time it is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from genkl_ext import GenKL

Float32 = NDArray[np.float32]


def researcher_numpy(models: list[Float32], rule: GenKL) -> NDArray[np.int64]:
    """The formula as it stands on paper, with an (m, N, k) float64 temporary.

    Source: the algorithm of the published GenKL program, which works in this way.
    """
    q = np.stack(models, axis=1).mean(axis=1)
    q[q < np.float32(rule.tau)] = 0
    with np.errstate(divide="ignore"):
        log_q = np.log2(q)
    log_q[np.isneginf(log_q)] = 0
    entropy = rule.alpha * (rule.vectors * np.log2(rule.vectors)).sum(axis=1)
    cross = (rule.vectors[:, None, :] * log_q[None, :, :]).sum(axis=2)
    return (entropy[:, None] >= cross).sum(axis=0)


class Factors(NamedTuple):
    """What a matrix product needs of a rule, as arrays or tensors of one floating dtype."""

    weights: Any  # (k, m): the vectors, transposed
    offsets: Any  # (m,): alpha sum_i u_ji log2 u_ji
    tau: Any  # (), float32 like the rows

    @classmethod
    def of(cls, rule: GenKL, dtype: type[np.floating]) -> Factors:
        u = rule.vectors
        offsets = rule.alpha * (u * np.log2(u)).sum(axis=1)
        weights = np.ascontiguousarray(u.T, dtype=dtype)
        return cls(weights, offsets.astype(dtype), np.array(rule.tau, np.float32))

    def on(self, device: str) -> Factors:
        """The same as tensors."""
        return Factors(*(torch.from_numpy(part).to(device) for part in self))


def chunked_numpy(models: list[Float32], factors: Factors, chunk: int) -> NDArray[np.int64]:
    """Matrix products, ``chunk`` rows at a time so that their logarithms stay in cache.

    With float64 factors the votes are those of :func:`researcher_numpy`, but for the last bits of
    a sum; with float32 factors this is the fastest that NumPy can do.
    """
    parts = []
    for begin in range(0, len(models[0]), chunk):
        q = models[0][begin : begin + chunk]
        for other in models[1:]:
            q = q + other[begin : begin + chunk]
        if len(models) > 1:
            q = q / np.float32(len(models))
        keep = q >= factors.tau
        if factors.weights.dtype == np.float32:
            log_q = np.zeros_like(q)
            np.log2(q, out=log_q, where=keep)  # up to twice as fast as below when few are kept
        else:
            log_q = np.log2(np.where(keep, q, np.float32(1)))
        parts.append((factors.offsets >= log_q @ factors.weights).sum(axis=1))
    return np.concatenate(parts)


def torch_votes(models: list[torch.Tensor], factors: Factors) -> torch.Tensor:
    """The float32 products in torch; torch.compile fuses what is before and after the product."""
    q = models[0]
    for other in models[1:]:
        q = q + other
    if len(models) > 1:
        q = q / len(models)
    log_q = torch.where(q >= factors.tau, q.log2(), 0.0)
    return (factors.offsets >= log_q @ factors.weights).sum(dim=1, dtype=torch.int32)
