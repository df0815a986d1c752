"""Types of the native module; csrc/bindings says what the functions do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def nc_score(
    models: Sequence[NDArray[Any]],
    vectors: NDArray[np.float64],
    entropies: NDArray[np.float64],
    alpha: float,
    tau: float,
    ballot: int,
    logits: bool,
    num_threads: int,
    simd: str = "",
) -> tuple[
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.float32],
    int,
]: ...
def entropies(vectors: NDArray[np.float64]) -> NDArray[np.float64]: ...
def row_statistics(
    rows: NDArray[Any], entropy: bool, logs: bool, floor: float, simd: str = ""
) -> NDArray[np.float64]: ...
def build_info() -> dict[str, Any]: ...
def resample(
    source: NDArray[np.uint8],
    origin: tuple[int, int],
    full: tuple[int, int],
    resized: tuple[int, int],
    window: tuple[int, int, int, int],
    flip: bool,
    out: NDArray[Any],
    kind: str,
    scale: Sequence[float] | NDArray[np.float32],
    shift: Sequence[float] | NDArray[np.float32],
    simd: str = "",
) -> None: ...
def resample_support(full: int, resized: int, first: int, count: int) -> tuple[int, int]: ...
def rotate(
    source: NDArray[np.uint8],
    angle: float,
    window: tuple[int, int, int, int],
    out: NDArray[np.uint8],
) -> None: ...
