"""Entropy and density ratio together: formulas against plain NumPy, one row at a time."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_rows import as_kind, assert_rounded, strided
from scipy.stats import rankdata

from genkl_ext import evaluation, identifiers
from genkl_ext.identifiers.combined import combined, density_ratio, least_nc_share


def unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    return x.astype(float) / np.where(lengths == 0, 1, lengths)


def drawn(rows: int = 40, verified: int = 30, width: int = 6, seed: int = 0):
    """Crawled rows, verified rows near them, the labels of the latter."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((3, width))
    labels = rng.integers(0, 3, verified)
    reference = centres[labels] + rng.standard_normal((verified, width))
    crawl = centres[rng.integers(0, 3, rows)] + rng.standard_normal((rows, width)) + 0.3
    return crawl.astype(np.float32), reference.astype(np.float32), labels


def exact_ratio(
    x: np.ndarray, reference: np.ndarray, labels: np.ndarray, s: float, crawl: np.ndarray | None
) -> np.ndarray:
    """The formula of the docstring, as it stands there."""
    z, verified = unit(x), unit(reference)
    v = verified.mean(axis=0)
    spread = verified - np.stack([verified[labels == c].mean(axis=0) for c in labels])
    c = spread.T @ spread / len(verified)
    shrunk = (1 - s) * c + s * np.trace(c) / len(c) * np.eye(len(c))
    out = []
    for i, row in enumerate(z):
        others = np.delete(z, i, axis=0) if crawl is None else unit(crawl)
        m = others.mean(axis=0)
        out.append((m - v) @ np.linalg.solve(shrunk, row - (m + v) / 2))
    return np.array(out)


def predictions(rows: int, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), rows).astype(np.float32)


class TestDensityRatio:
    @pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0])
    def test_itself_left_out(self, shrinkage: float, kind: str) -> None:
        x, reference, labels = drawn()
        x[3] = x[4]
        x[9] = 0
        came = density_ratio(
            as_kind(kind, x),
            reference=as_kind(kind, reference),
            reference_labels=labels,
            shrinkage=shrinkage,
        )
        assert_rounded(came, exact_ratio(x, reference, labels, shrinkage, None))

    def test_with_crawl(self, kind: str) -> None:
        x, reference, labels = drawn()
        crawl, _, _ = drawn(17, seed=1)
        came = density_ratio(
            as_kind(kind, x),
            reference=as_kind(kind, reference),
            reference_labels=labels,
            crawl=as_kind(kind, crawl),
        )
        assert_rounded(came, exact_ratio(x, reference, labels, 0.5, crawl))

    def test_more_features_than_verified_rows(self) -> None:
        x, reference, labels = drawn(12, 9, width=40)
        came = density_ratio(x, reference=reference, reference_labels=labels)
        assert_rounded(came, exact_ratio(x, reference, labels, 0.5, None))

    def test_pieces_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, reference, labels = drawn(101)
        whole = density_ratio(x, reference=reference, reference_labels=labels)
        module = sys.modules["genkl_ext.identifiers.combined"]
        monkeypatch.setattr(module, "_PIECE_BYTES", 8 * 6 * 7)
        pieces = density_ratio(x, reference=reference, reference_labels=labels)
        np.testing.assert_allclose(pieces, whole, rtol=1e-6)

    def test_verified_rows_without_label_are_left_out(self) -> None:
        x, reference, labels = drawn()
        some = labels.copy()
        some[::3] = -1
        came = density_ratio(x, reference=reference, reference_labels=some)
        kept = some >= 0
        assert_rounded(came, exact_ratio(x, reference[kept], labels[kept], 0.5, None))

    def test_rows_that_are_not_finite(self) -> None:
        x, reference, labels = drawn()
        x[5, 2] = np.nan
        with pytest.raises(ValueError, match="density_ratio: features .* nan at row 5, column 2"):
            density_ratio(x, reference=reference, reference_labels=labels)
        came = density_ratio(x, reference=reference, reference_labels=labels, validate=False)
        assert np.isnan(came[5])
        rest = np.delete(np.arange(len(x)), 5)
        assert_rounded(came[rest], exact_ratio(x[rest], reference, labels, 0.5, None))

    def test_none_and_one(self) -> None:
        x, reference, labels = drawn()
        near = {"reference": reference, "reference_labels": labels}
        assert density_ratio(x[:0], **near).shape == (0,)
        assert density_ratio(x[:1], **near).tolist() == [0.0]

    def test_strides_and_precision(self) -> None:
        x, reference, labels = drawn()
        near = {"reference": reference, "reference_labels": labels}
        whole = density_ratio(x, **near)
        np.testing.assert_array_equal(density_ratio(strided(x), **near), whole)
        np.testing.assert_allclose(density_ratio(x.astype(np.float64), **near), whole, rtol=1e-6)
        half = density_ratio(x.astype(np.float16), **near)
        exact = exact_ratio(x.astype(np.float16), reference, labels, 0.5, None)
        assert_rounded(half, exact)

    def test_what_is_wrong_is_named(self) -> None:
        x, reference, labels = drawn()
        near = {"reference": reference, "reference_labels": labels}
        with pytest.raises(ValueError, match=r"features must have 6 columns .* got 5"):
            density_ratio(x[:, :5], **near)
        with pytest.raises(ValueError, match=r"crawl must have 6 columns .* got 5"):
            density_ratio(x, **near, crawl=x[:, :5])
        with pytest.raises(ValueError, match="crawl must have at least one finite row"):
            density_ratio(x, **near, crawl=x[:0])
        with pytest.raises(ValueError, match=r"features must have shape \(N, d\), got \(6,\)"):
            density_ratio(x[0], **near)
        with pytest.raises(TypeError, match="features must be floating-point, got int64"):
            density_ratio(x.astype(np.int64), **near)
        with pytest.raises(ValueError, match=r"reference_labels must have shape \(30,\)"):
            density_ratio(x, reference=reference, reference_labels=labels[:-1])
        with pytest.raises(ValueError, match="at least one class two rows, got 3 classes"):
            density_ratio(x, reference=reference[:3], reference_labels=np.arange(3))
        with pytest.raises(ValueError, match="shrinkage must be from 0 to 1, got 2"):
            density_ratio(x, **near, shrinkage=2)
        wide, verified, y = drawn(12, 9, width=40)
        with pytest.raises(ValueError, match="singular"):
            density_ratio(wide, reference=verified, reference_labels=y, shrinkage=0)


class TestCombined:
    def test_mean_of_ranks(self, kind: str) -> None:
        x, reference, labels = drawn()
        q = predictions(len(x))
        q[11] = q[12]  # a tie
        came = combined(
            as_kind(kind, q),
            as_kind(kind, x),
            reference=as_kind(kind, reference),
            reference_labels=labels,
        )
        h = -(q.astype(float) * np.log(q.astype(float))).sum(axis=1)
        ratio = exact_ratio(x, reference, labels, 0.5, None)
        assert rankdata(h)[11] == rankdata(h)[12]
        assert_rounded(came, (rankdata(h) + rankdata(ratio)) / (2 * len(x)))

    def test_members_are_averaged(self) -> None:
        x, reference, labels = drawn()
        near = {"reference": reference, "reference_labels": labels}
        members = [predictions(len(x), seed=seed) for seed in range(3)]
        mean = np.float32(members[0] + members[1] + members[2]) / np.float32(3)
        np.testing.assert_array_equal(combined(members, x, **near), combined(mean, x, **near))

    def test_rows_without_score(self) -> None:
        x, reference, labels = drawn()
        near = {"reference": reference, "reference_labels": labels}
        q = predictions(len(x))
        x[5, 0], q[8, 1] = np.inf, np.nan
        with pytest.raises(ValueError, match="row 8"):
            combined(q, x, **near)
        came = combined(q, x, **near, validate=False)
        assert np.flatnonzero(np.isnan(came)).tolist() == [5, 8]
        assert came[~np.isnan(came)].max() <= 1

    def test_what_is_wrong_is_named(self) -> None:
        x, reference, labels = drawn()
        with pytest.raises(ValueError, match="combined: features must be .* 7 predictions, got 40"):
            combined(predictions(7), x, reference=reference, reference_labels=labels)
        none = combined(predictions(7)[:0], x[:0], reference=reference, reference_labels=labels)
        assert none.shape == (0,)

    def test_device_of_the_predictions(self, device: str) -> None:
        x, reference, labels = drawn()
        q = torch.from_numpy(predictions(len(x))).to(device)
        came = combined(q, x, reference=reference, reference_labels=labels)
        assert came.device == q.device
        expected = combined(q.cpu().numpy(), x, reference=reference, reference_labels=labels)
        np.testing.assert_array_equal(came.cpu().numpy(), expected)

    def test_finds_more_than_entropy_on_photographs(self, shared_data: Path) -> None:
        """Half of the images of a class are verified; heads are the means of the classes."""
        folder = shared_data / "clothing"
        with (folder / "images.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        x = np.load(folder / "features_efficientnet_lite0.npy")
        known = np.array([row["kind"] == "in_vocabulary" for row in rows])
        _, y = np.unique([row["label"] for row in rows], return_inverse=True)
        verified = known & (np.random.default_rng(0).uniform(size=len(rows)) < 0.5)
        z, names = unit(x), np.unique(y[known])
        means = np.stack([z[verified & (y == c)].mean(axis=0) for c in names])
        logits = 50 * z[~verified] @ unit(means).T
        q = np.exp(logits - logits.max(axis=1, keepdims=True))
        q = (q / q.sum(axis=1, keepdims=True)).astype(np.float32)
        near = {"reference": x[verified], "reference_labels": y[verified]}
        found = {
            "entropy": identifiers.entropy(q),
            "combined": combined(q, x[~verified], **near),
        }
        auroc = {name: evaluation.auroc(s, ~known[~verified]) for name, s in found.items()}
        assert auroc["combined"] > auroc["entropy"] + 0.03


class TestLeastNcShare:
    @pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
    def test_bounds_the_share(self, share: float, kind: str) -> None:
        """Verified rows are drawn as the conforming part of the crawl; NC rows lie apart."""
        x, reference, labels = drawn(1000, 1000)
        x -= np.float32(0.3)
        nc = int(share * len(x))
        x[:nc] += 12 * np.float32([1, -1, 1, -1, 1, -1])
        found = least_nc_share(
            as_kind(kind, x), reference=as_kind(kind, reference), reference_labels=labels
        )
        assert isinstance(found, float)
        assert found == pytest.approx(share, abs=0.08)

    def test_labels_as_a_list_and_wrong_ones(self) -> None:
        x, reference, labels = drawn(60, 60)
        listed = {"reference": reference, "reference_labels": labels.tolist()}
        expected = {"reference": reference, "reference_labels": labels}
        assert least_nc_share(x, **listed) == least_nc_share(x, **expected)
        np.testing.assert_array_equal(density_ratio(x, **listed), density_ratio(x, **expected))
        for bad, error, came in (
            (labels[:-1], ValueError, r"shape \(60,\), got \(59,\)"),
            (None, TypeError, r"\(N,\) integers, got None"),
        ):
            with pytest.raises(error, match=f"^least_nc_share: reference_labels must .*{came}"):
                least_nc_share(x, reference=reference, reference_labels=bad)

    def test_verified_rows_from_elsewhere(self) -> None:
        x, reference, labels = drawn(500, 500)
        elsewhere = reference + 5 * np.float32([0, 0, 1, 0, 0, 0])
        near = least_nc_share(x, reference=reference, reference_labels=labels)
        assert near < 0.3
        assert least_nc_share(x, reference=elsewhere, reference_labels=labels) > near + 0.3

    def test_rows_that_are_not_finite(self) -> None:
        x, reference, labels = drawn(100, 100)
        x[5, 2] = reference[7, 1] = np.nan
        near = {"reference": reference, "reference_labels": labels}
        with pytest.raises(ValueError, match="must be finite"):
            least_nc_share(x, **near)
        assert 0 <= least_nc_share(x, **near, validate=False) < 1
        assert least_nc_share(x, **near, validate=False) == least_nc_share(
            x, **near, validate=False
        )
