"""The torch operators: their Python names, their types and shape rules.

They are loaded when this module is first imported; a build without nvcc has the CPU library only,
and a CUDA tensor then gets torch's own message that there is no CUDA kernel. The schemas are in
``csrc/bindings/library.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).parent

torch.ops.load_library(_HERE / "libgenkl_ops_cpu.so")
HAS_CUDA = torch.version.cuda is not None and (_HERE / "libgenkl_ops_cuda.so").exists()
if HAS_CUDA:
    torch.ops.load_library(_HERE / "libgenkl_ops_cuda.so")


def nc_score(
    predictions: Sequence[Tensor],
    vectors: Tensor,
    entropies: Tensor,
    alpha: float,
    tau: float,
    *,
    ballot: int = 1,
    logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score how little each row conforms to any class (GenKL, arXiv 2307.09810).

    ``GenKL.score`` is the call for users; this one checks only what memory safety needs.

    Args:
        predictions: 1 to 64 tensors (N, k) of one dtype and device, any strides; averaged in
            float32 in this order. float32, float16, bfloat16 or float64.
        vectors: (m, k) float64, contiguous, positive, rows summing to 1.
        entropies: (m,) float64, sum_i u_ji log2 u_ji of every vector (``GenKL.entropies``).
        alpha: scale of the entropy part.
        tau: threshold of a dominant entry, above 0.
        ballot: the votes each vector stands for.
        logits: take the softmax of the predictions first.

    Returns:
        critical_alpha float32 (N,), divergence float32 (N,), votes int32 (N,), top_class int32
        (N,), top_prob float32 (N,), and first_bad_row int64 (1,), -1 when every row is valid.
    """
    return torch.ops.genkl_ext.nc_score.default(
        list(predictions), vectors, entropies, alpha, tau, ballot, logits
    )


@torch.library.register_fake("genkl_ext::nc_score")
def _(predictions, vectors, entropies, alpha, tau, ballot, logits):  # type: ignore[no-untyped-def]
    first = predictions[0]
    rows = first.shape[0]
    floats = [first.new_empty(rows, dtype=torch.float32) for _ in range(3)]
    integers = [first.new_empty(rows, dtype=torch.int32) for _ in range(2)]
    return (
        floats[0], floats[1], integers[0], integers[1], floats[2],
        first.new_empty(1, dtype=torch.int64),
    )  # fmt: skip
