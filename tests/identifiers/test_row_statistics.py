"""The native walk against NumPy, bit for bit, with every instruction set that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from awkward_rows import awkward, strided

from genkl_ext import _native, reference
from genkl_ext.identifiers.row_statistics import NumpyStatistics, TorchStatistics

SIMD = _native.build_info()["simd_supported"]
FLOOR = 2.0**-126


def class_sum(terms: np.ndarray) -> np.ndarray:
    """Sum of each row's terms, in class order."""
    total = np.zeros(len(terms))
    for c in range(terms.shape[1]):
        total = total + terms[:, c]
    return total


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 7, 8, 9, 14, 101, 1000])
def test_bit_for_bit(k: int, dtype: str, simd: str) -> None:
    rows = awkward(k, dtype)[:-1]  # no whole number of lanes
    q = rows.astype(np.float64)
    came = _native.row_statistics(rows, True, True, FLOOR, simd)
    normal = np.where(q >= 2.0**-1022, q, 1.0)
    expected = [
        class_sum(q),
        q.min(axis=1),
        class_sum(q * q),
        q.max(axis=1),
        np.sort(q, axis=1)[:, -2],
        q.argmax(axis=1),
        class_sum(q * reference.log2(normal)),
        class_sum(reference.log2(np.maximum(q, FLOOR))),
    ]
    np.testing.assert_array_equal(came, np.array(expected))


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("logs", [False, True])
def test_what_is_not_asked_for_changes_nothing(entropy: bool, logs: bool, simd: str) -> None:
    rows = awkward(14)
    every = _native.row_statistics(rows, True, True, FLOOR, simd)
    some = _native.row_statistics(rows, entropy, logs, FLOOR, simd)
    kept = [0, 1, 2, 3, 4, 5] + [6] * entropy + [7] * logs
    np.testing.assert_array_equal(some[kept], every[kept])


@pytest.mark.parametrize("simd", SIMD)
def test_rows_that_are_no_numbers(simd: str) -> None:
    rows = np.full((4, 6), 1 / 6, dtype=np.float32)
    rows[0, 5], rows[1, 0], rows[2, 3] = np.nan, np.inf, -np.inf
    came = _native.row_statistics(rows, True, True, FLOOR, simd)
    assert np.isnan(came[2:, :3]).all()
    assert not np.isfinite(came[0, :3]).any()
    assert np.isfinite(came[:, 3]).all()
    rows[3, 1] = -0.25
    assert _native.row_statistics(rows, False, False, FLOOR, simd)[1, 3] == -0.25


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_numpy_and_torch_agree(dtype: str) -> None:
    rows = awkward(10, dtype)
    y = np.arange(len(rows)) % 10
    ours = NumpyStatistics(strided(rows), entropy=True, floor=1e-12)
    theirs = TorchStatistics(torch.as_tensor(rows), entropy=True, floor=1e-12)
    for name in ("total", "lowest", "squares", "top", "second", "top_class", "plogp", "logs"):
        came, wanted = getattr(ours, name), getattr(theirs, name).numpy()
        assert came.dtype == wanted.dtype, name
        np.testing.assert_allclose(came, wanted, rtol=1e-13, atol=1e-15, err_msg=name)
    for name in ("own", "best_of_others"):
        wanted = getattr(theirs, name)(torch.as_tensor(y)).numpy()
        np.testing.assert_array_equal(getattr(ours, name)(y), wanted)


def test_memory_safety() -> None:
    rows = awkward(10)
    for bad in (strided(rows), rows.astype(np.float16), rows[0], rows[:, :1].copy()):
        with pytest.raises(ValueError, match=r"^row_statistics: rows must be \(n, k\) contiguous"):
            _native.row_statistics(bad, False, False, FLOOR)
    with pytest.raises(ValueError, match="^row_statistics: floor too small"):
        _native.row_statistics(rows, False, True, 0.0)
    with pytest.raises(ValueError, match="^row_statistics: no kernel for sse9"):
        _native.row_statistics(rows, False, False, FLOOR, "sse9")
    assert _native.row_statistics(rows[:0], True, True, FLOOR).shape == (8, 0)
