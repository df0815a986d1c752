from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray


@pytest.fixture(scope="session")
def predict() -> Callable[..., NDArray]:
    """(rows, classes) softmax outputs, from nearly one-hot to nearly flat."""

    def predict(rows: int, classes: int = 10, *, seed: int = 0, dtype: str = "float32") -> NDArray:
        stream = np.random.default_rng(seed)
        sharpness = stream.choice([0.1, 1.0, 8.0], size=(rows, 1))
        logits = stream.standard_normal((rows, classes)) * sharpness
        exp = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return (exp / exp.sum(axis=1, keepdims=True)).astype(dtype)

    return predict
