"""Fixtures of the identifiers' tests."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from awkward_rows import Cifar, awkward, some_labels

CIFAR = ("noise2_sparsity0", "noise4_sparsity0", "noise4_sparsity4")


def load_cifar(folder: Path, name: str) -> Cifar:
    stem = folder / "softmax" / f"cifar10_{name}"
    labels = np.load(f"{stem}_labels.npy").astype(np.int64)
    return Cifar(np.load(f"{stem}_probs.npy"), labels[:, 0], labels[:, 1])


@pytest.fixture(params=["awkward, k = 2", "awkward, k = 10", *CIFAR])
def rows(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """(N, k) predictions, made up (float64) or real (float16), and (N,) labels, all known."""
    if request.param in CIFAR:
        data = load_cifar(request.getfixturevalue("shared_data"), request.param)
        return data.predictions, data.given
    k = int(request.param.rpartition(" ")[2])
    q = np.concatenate([awkward(k, "float64", seed) for seed in range(5)])
    return q, some_labels(q).clip(0)


@pytest.fixture(params=["numpy", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    """What arrays come as."""
    return request.param


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are walked in pieces of a few rows, so that small inputs have many."""
    from genkl_ext.identifiers import inputs

    monkeypatch.setattr(inputs, "PIECE_BYTES", 1000)
