"""Chunks scored on a device: the bits of the CPU, whatever is in them. Without a GPU the same path
runs on torch's CPU, which shows what is done, not that copies and scores overlap rightly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import genkl_ext as gk
from genkl_ext.scoring import batches, gpu, plan, score_files
from genkl_ext.scoring.tables import LEFT_OUT

RULE = gk.GenKL(num_classes=5, alpha=0.9, beta=0.1, sigma=0.1)


def torch_cpu(name: str, *_: int) -> torch.device | None:
    """Stands in for the GPU."""
    return None if name == "cpu" else torch.device("cpu")


@pytest.fixture
def on(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What to give as ``device``."""
    if device == "cpu":
        monkeypatch.setattr(gpu, "device_of", torch_cpu)
        gpu.scorer_of.cache_clear()
    return "cuda"


def rows(n: int = 1040, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.4), n).astype(np.float32)


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every chunk that a GPU has scored."""
    begin, found = gpu.GpuScorer.begin, []

    def counted(self: gpu.GpuScorer, staged: Any) -> Any:
        pending = begin(self, staged)
        if pending.result() is not None:
            found.append(len(staged[0]))
        return pending

    monkeypatch.setattr(gpu.GpuScorer, "begin", counted)
    return found


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 2000, 1 << 20])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "logits"])
def test_same_bytes(
    on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk_bytes: int
) -> None:
    n = 30 if chunk_bytes == 1 else 1040
    models = [rows(n, i) for i in range(2)]
    if kind == "logits":
        models = [4 * np.log(q + 1e-3) for q in models]
    for i, q in enumerate(models):
        np.save(tmp_path / f"p{i}.npy", q if kind == "logits" else q.astype(kind))
    names = [tmp_path / f"p{i}.npy" for i in range(2)]
    given: dict[str, Any] = {"logits": kind == "logits", "chunk_bytes": chunk_bytes}
    score_files(names, RULE, tmp_path / "cpu.parquet", **given)
    scored = count(monkeypatch)
    score_files(names, RULE, tmp_path / "gpu.parquet", device=on, **given)
    assert sum(scored) == n and len(scored) >= {1: 30, 4000: 6, 1 << 20: 1}[chunk_bytes]
    assert (tmp_path / "gpu.parquet").read_bytes() == (tmp_path / "cpu.parquet").read_bytes()


def test_bfloat16(on: str, tmp_path: Path) -> None:
    save_file({"p": torch.tensor(rows()).bfloat16()}, tmp_path / "p.safetensors")
    cpu = score_files(tmp_path / "p.safetensors", RULE, chunk_bytes=1000)
    there = score_files(tmp_path / "p.safetensors", RULE, chunk_bytes=1000, device=on)
    for name in LEFT_OUT:
        np.testing.assert_array_equal(there.column(name), cpu.column(name))


@pytest.mark.parametrize("policy", ["raise", "nan", "skip"])
def test_bad_rows_and_gaps(
    on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    q = rows()
    q[[0, 5, 650], 2] = np.nan
    gaps = np.zeros(len(q), bool)
    gaps[300:310] = True
    np.save(tmp_path / "p.npy", q)
    given: dict[str, Any] = {"chunk_bytes": 2000, "leave_out": gaps, "on_bad_row": policy}
    if policy == "raise":
        with pytest.raises(
            ValueError, match=r"p\.npy must be finite .* got nan at row 0, class 2$"
        ):
            score_files(tmp_path / "p.npy", RULE, device=on, **given)
        return
    cpu = score_files(tmp_path / "p.npy", RULE, tmp_path / "cpu.csv", **given)
    scored = count(monkeypatch)
    there = score_files(tmp_path / "p.npy", RULE, tmp_path / "gpu.csv", device=on, **given)
    assert sum(scored) == 1040 - 3 * 100  # the chunks of rows 0 and 5, 300 to 309, and 650
    assert (tmp_path / "gpu.csv").read_bytes() == (tmp_path / "cpu.csv").read_bytes()
    assert there.bad_rows.tolist() == cpu.bad_rows.tolist() == [0, 5, 650]


def test_a_batch_scorer(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = rows(50)
    scorer = gk.BatchScorer(RULE, keep=(), device=on)
    scored = count(monkeypatch)
    there, cpu = scorer({"probs": q}), gk.BatchScorer(RULE, keep=())({"probs": q})
    assert scored == [50] and batches.scorer_of.cache_info().currsize
    q[7] = np.nan
    with pytest.raises(ValueError, match="got nan at row 7"):
        scorer({"probs": q})
    for name in LEFT_OUT:
        np.testing.assert_array_equal(there[name], cpu[name])
        assert there[name].dtype == cpu[name].dtype


def test_a_plan(on: str, tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", rows())
    what = plan(tmp_path / "p.npy", RULE, device=on)
    assert (what.device, what.rows) == ("cuda", 1040)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1", ""])
def test_names_of_no_device(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "p.npy", rows(3))
    with pytest.raises(ValueError, match="^score: device must be cpu, cuda or cuda:NUMBER, got "):
        score_files(tmp_path / "p.npy", RULE, device=name)
    with pytest.raises(ValueError, match="^BatchScorer: device must be cpu, cuda or cuda:NUMBER, "):
        gk.BatchScorer(RULE, device=name)  # where the job is planned there may be no GPU


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", rows(3))
    with pytest.raises(ValueError, match="^score: device cuda:99 needs GPU 99, and this process "):
        score_files(tmp_path / "p.npy", RULE, device="cuda:99")
    assert gpu.device_of("cpu") is None
