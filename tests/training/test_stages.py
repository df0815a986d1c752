"""Stages that need no network: files in, files out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genkl_ext import GenKL, Manifest, score_files
from genkl_ext.data.published import write_class_ratio
from genkl_ext.training import stages
from genkl_ext.training.settings import Relabel

K = 4
RULE = GenKL(num_classes=K, alpha=1.0, beta=0.1, sigma=0.1, seed=3)


@pytest.fixture
def manifest() -> Manifest:
    """Noisy rows between others; one without a label."""
    splits = ["clean", *["train"] * 9, "val", "train", "clean", "clean", "clean"]
    labels = [0, 0, 1, 2, 3, 0, None, 1, 2, 3, 0, 1, 1, 2, 3]
    table = pa.table(
        {
            "key": [f"k{i}" for i in range(len(splits))],
            "path": [f"{i}.jpg" for i in range(len(splits))],
            "given_label": pa.array(labels, pa.int32()),
            "split": splits,
        }
    )
    return Manifest(table, tuple("abcd"), "table", "/nowhere")


@pytest.fixture
def predictions(tmp_path: Path) -> list[Path]:
    """Of two members for the ten noisy images; noisy image 7 has none of the second."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(2):
        q = rng.dirichlet(np.full(K, 0.5), 10).astype(np.float32)
        if i == 1:
            q[7] = np.nan
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], q)
    return files


@pytest.fixture
def scores(manifest: Manifest, predictions: list[Path], tmp_path: Path) -> Path:
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{key}\n" for key in manifest.split("train").table["key"].to_pylist()))
    out = tmp_path / "scores.parquet"
    facts = stages.score(predictions, RULE, keys, out, tmp_path / "nc_set.txt", None)
    assert (facts["rows"], facts["left_out"]) == (10, 1)
    return out


def test_targets(manifest: Manifest, predictions: list[Path], scores: Path, tmp_path: Path) -> None:
    """Against the definition, row by row."""
    out = tmp_path / "targets.parquet"
    facts = stages.relabel(manifest, scores, out, Relabel())
    a, b = (np.load(path) for path in predictions)
    q = (a + b) / np.float32(2)
    labels = manifest.split("train").labels
    counts = np.array([1, 1, 1, 1])  # the clean images' labels: 0, 1, 2, 3
    ratio = (1 / counts) / (1 / counts).sum()
    targets, used = stages.read_targets(out, manifest)
    assert np.flatnonzero(~used).tolist() == [5, 7]  # no label; no prediction
    nc = RULE.score(np.nan_to_num(q, nan=1 / K)).nc
    for row in np.flatnonzero(used):
        if nc[row]:
            expected = np.full(K, 1 / K)
        else:
            expected = np.zeros(K)
            expected[q[row].argmax()] = q[row].max()
            expected[labels[row]] += ratio[labels[row]]
        np.testing.assert_allclose(targets[[row]].dense()[0], expected, rtol=1e-6)
    assert (facts["left out"], facts["uniform"]) == (2, int((nc & used).sum()))
    assert facts["double-hot"] == int((~nc & used).sum())
    table = pq.read_table(out)
    assert table["key"].to_pylist() == manifest.split("train").table["key"].to_pylist()
    assert set(table["target"].to_pylist()) <= set(stages.KINDS)


def test_targets_from_lists_and_ratios(manifest: Manifest, scores: Path, tmp_path: Path) -> None:
    ratio = tmp_path / "ratio.txt"
    write_class_ratio(ratio, np.array([0.4, 0.3, 0.2, 0.1]))
    nc_list = tmp_path / "nc.txt"
    nc_list.write_text("k2\r\nk6\r\n")  # noisy images 1 and 5; the latter has no label
    out = tmp_path / "targets.parquet"
    stages.relabel(manifest, scores, out, Relabel(ratio_file=str(ratio)), nc_list=nc_list)
    targets, used = stages.read_targets(out, manifest)
    assert np.flatnonzero(targets.nc).tolist() == [1]
    np.testing.assert_allclose(
        targets.prior[used], np.array([0.4, 0.3, 0.2, 0.1])[targets.label[used]]
    )


@pytest.mark.parametrize("part", ["uniform", "double_hot"])
def test_a_part_taken_away(manifest: Manifest, scores: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "targets.parquet"
    stages.relabel(manifest, scores, out, dataclasses.replace(Relabel(), **{part: False}))
    targets, used = stages.read_targets(out, manifest)
    if part == "uniform":
        assert not targets.nc.any()
    else:
        rows = np.flatnonzero(used & ~targets.nc)
        assert (targets[rows].dense() > 0).sum(1).tolist() == [1] * len(rows)


def test_bad_files(manifest: Manifest, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "targets.parquet"
    fewer = manifest.select(np.arange(8))
    with pytest.raises(ValueError, match="relabel: .*scores.parquet must have a row for each of 7"):
        stages.relabel(fewer, scores, out, Relabel(ratio_splits=["train"]))
    assert not out.exists()
    order = np.arange(len(manifest))
    order[[1, 2]] = [2, 1]
    with pytest.raises(ValueError, match="in the manifest's order, got 'k1' for 'k2' in row 0"):
        stages.relabel(manifest.select(order), scores, out, Relabel())
    short = tmp_path / "ratio.txt"
    write_class_ratio(short, np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="ratio.txt must have 4 classes, got 2"):
        stages.relabel(manifest, scores, out, Relabel(ratio_file=str(short)))
    with pytest.raises(ValueError, match="is not a table of targets"):
        stages.read_targets(scores, manifest)
    out.write_text("text")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        stages.read_targets(out, manifest)
    stages.relabel(manifest, scores, out, Relabel())
    other = manifest.select(np.arange(len(manifest))[::-1])
    with pytest.raises(ValueError, match="must be made for"):
        stages.read_targets(out, other)


def test_calibrate_flags_the_share_it_promises(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], rng.dirichlet(np.full(K, 0.3), 160).astype(np.float32))
    rule = stages.calibrate(RULE, files, 0.05)
    assert dataclasses.replace(rule, alpha=RULE.alpha) == RULE
    assert rule.score([np.load(path) for path in files]).nc.sum() == 8


def test_calibrate_without_broken_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    files = [tmp_path / "0.npy", tmp_path / "1.npy"]
    q = [rng.dirichlet(np.full(K, 0.3), 40).astype(np.float32) for _ in files]
    for file, values in zip(files, q, strict=True):
        np.save(file, values)
    expected = stages.calibrate(RULE, files, 0.1)
    broken = np.insert(q[0], 7, np.nan, axis=0), np.insert(q[1], 7, 1 / K, axis=0)
    for file, values in zip(files, broken, strict=True):
        np.save(file, values)
    assert stages.calibrate(RULE, files, 0.1) == expected
    np.save(files[0], np.full((41, K), np.nan, np.float32))
    with pytest.raises(ValueError, match="must have an image that can be used, got none"):
        stages.calibrate(RULE, files, 0.1)


def test_folds_are_joined_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    whole = np.random.default_rng(2).random((11, K)).astype(np.float32)
    whole[4] = np.nan
    deal = np.random.default_rng(3).permutation(11)
    parts = []
    for fold in range(3):
        rows = np.sort(deal[fold::3])
        np.save(tmp_path / f"{fold}.npy", whole[rows])
        parts.append((rows, tmp_path / f"{fold}.npy"))
    stages.join_folds(parts, 11, K, tmp_path / "joined.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "joined.npy"), whole)


def test_believed_images(manifest: Manifest, tmp_path: Path) -> None:
    """T10: images that do not conform are no clean ones, unless asked for."""
    labels = manifest.split("train").labels
    q = np.full((10, K), 0.2, np.float32)
    for row in (0, 3, 4, 8):
        q[row, labels[row]] = 0.5 if row == 3 else 0.9
    q[4] = np.nan  # without prediction
    q[5] = 0.9  # without label
    path = tmp_path / "q.npy"
    np.save(path, q)
    noisy = manifest.rows("train")
    nc = np.zeros(10, bool)
    nc[8] = True
    assert stages.believed(manifest, path, 0.5, None).tolist() == noisy[[0, 3, 8]].tolist()
    assert stages.believed(manifest, path, 0.5, nc).tolist() == noisy[[0, 3]].tolist()
    np.save(path, q[:9])
    with pytest.raises(ValueError, match="must have a row for each noisy image"):
        stages.believed(manifest, path, 0.5, None)


def test_scores_of_a_run_are_those_of_score_files(
    predictions: list[Path], scores: Path, tmp_path: Path
) -> None:
    mask = np.zeros(10, bool)
    mask[7] = True
    again = score_files(predictions, RULE, leave_out=mask).scores
    found = pq.read_table(scores)
    np.testing.assert_array_equal(np.asarray(found["critical_alpha"]), again.critical_alpha)
