"""Class ratio and targets, in NumPy and torch."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genkl_ext import GenKL, Scores, relabel

# Images per class behind the published class-ratio files, and what the files say of r.
CLOTHING1M = (3974, 3032, 2507, 5225, 4126, 3670, 2690, 1326, 4420, 3467, 2223, 3126, 4051, 3733)
WEBVISION = (
    1274, 1070, 1423, 1168, 462, 1904, 698, 1360, 713, 1170, 1438, 1398, 2159, 1238, 2769, 1895,
    701, 604, 713, 707, 1426, 609, 1668, 645, 2050, 1542, 1322, 535, 1296, 1086, 1419, 894, 3112,
    1333, 1822, 604, 661, 1466, 606, 1920, 2202, 1359, 717, 1107, 640, 1262, 1368, 1379, 3134,
    1896,
)  # fmt: skip
PUBLISHED = {
    # counts: (total, smallest r, largest r, n_c r_c)
    CLOTHING1M: (47570, 0.0415012, 0.1635323, 216.843833812),
    WEBVISION: (65944, 0.0067286, 0.0456441, 21.087575650),
}


def make_scores(q, nc, kind="numpy"):
    """Scores whose NC rows are given, so that nothing here depends on the rule."""
    q = np.asarray(q, dtype=np.float32)
    rows, k = q.shape
    columns = {
        "critical_alpha": np.zeros(rows, np.float32),
        "divergence": np.zeros(rows, np.float32),
        "votes": np.asarray(nc, dtype=np.int32),
        "nc": np.asarray(nc, dtype=bool),
        "top_class": q.argmax(axis=1).astype(np.int32),
        "top_prob": q.max(axis=1),
    }
    if kind == "torch":
        columns = {name: torch.from_numpy(column) for name, column in columns.items()}
    return Scores(**columns, rule=GenKL(k, alpha=1.0, beta=0.5 / k, sigma=0.0))


class TestClassRatio:
    @pytest.mark.parametrize("counts", PUBLISHED)
    @pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
    def test_agrees_with_the_published_files(self, counts, kind):
        total, smallest, largest, product = PUBLISHED[counts]
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
        assert len(labels) == total
        ratio = relabel.class_ratio(kind(labels), len(counts))
        assert type(ratio) is type(kind(labels))
        ratio = np.asarray(ratio)
        assert ratio.dtype == np.float64
        assert ratio.sum() == pytest.approx(1, abs=1e-15)
        assert ratio.min() == pytest.approx(smallest, abs=5e-8)
        assert ratio.max() == pytest.approx(largest, abs=5e-8)
        np.testing.assert_allclose(ratio * counts, product, rtol=1e-11)

    def test_a_rare_class_weighs_more(self):
        np.testing.assert_allclose(relabel.class_ratio([0, 1, 1, 1], 2), [0.75, 0.25])

    def test_an_empty_class_is_named(self):
        with pytest.raises(ValueError, match=r"^class_ratio: labels .* no image of class 1, 3$"):
            relabel.class_ratio(np.array([0, 2, 2]), 4)
        with pytest.raises(ValueError, match=r"class 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
            relabel.class_ratio(np.array([], dtype=np.int64), 40)

    @pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
    def test_bad_labels(self, kind):
        with pytest.raises(ValueError, match="must be from 0 to 2, got 3 at row 1"):
            relabel.class_ratio(kind([0, 3, 1, -1]), 3)
        with pytest.raises(ValueError, match="must be from 0 to 2, got -1 at row 2"):
            relabel.class_ratio(kind([0, 2, -1]), 3)
        with pytest.raises(TypeError, match="labels must be integers, got .*float"):
            relabel.class_ratio(kind([0.0, 1.0]), 2)
        with pytest.raises(TypeError, match="labels must be integers, got .*bool"):
            relabel.class_ratio(kind([True, False]), 2)
        with pytest.raises(ValueError, match=r"labels must have shape \(n,\), got \(1, 2\)"):
            relabel.class_ratio(kind([[0, 1]]), 2)

    def test_bad_number_of_classes(self):
        with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
            relabel.class_ratio(np.array([0]), 0)
        for value in (2.0, True):
            with pytest.raises(TypeError, match="num_classes must be an integer"):
                relabel.class_ratio(np.array([0, 1]), value)


Q = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]], np.float32)
LABELS = np.array([1, 1, 0, 2])
RATIO = np.array([0.5, 0.3, 0.2])
NC = [False, False, True, False]
EXPECTED = np.array(
    [
        [0.7, 0.3, 0.0],  # model says 0, the label 1
        [0.0, 0.5 + 0.3, 0.0],  # both say 1
        [1 / 3, 1 / 3, 1 / 3],  # non-conforming
        [0.4, 0.0, 0.2],  # a tie goes to the lowest class
    ],
    np.float32,
)


class TestTargets:
    def test_numpy(self):
        t = relabel.targets(make_scores(Q, NC), LABELS, RATIO)
        assert isinstance(t, np.ndarray)
        assert t.dtype == np.float32
        np.testing.assert_array_equal(t[0], EXPECTED[0])
        # The published program adds float32(max q) and float32(r_y) in float32.
        assert t[1, 1] == np.float32(0.5) + np.float32(0.3)
        np.testing.assert_allclose(t, EXPECTED, rtol=1e-7)

    @pytest.mark.parametrize("labels", [LABELS, torch.from_numpy(LABELS)])
    def test_torch_equals_numpy(self, labels):
        t = relabel.targets(make_scores(Q, NC, "torch"), labels, RATIO)
        assert isinstance(t, torch.Tensor)
        assert t.dtype == torch.float32
        np.testing.assert_array_equal(t, relabel.targets(make_scores(Q, NC), LABELS, RATIO))

    def test_devices(self, device):
        scores = make_scores(Q, NC, "torch")._map(lambda column: column.to(device))
        t = relabel.targets(scores, LABELS, RATIO)
        assert t.device.type == device
        np.testing.assert_array_equal(t.cpu(), relabel.targets(make_scores(Q, NC), LABELS, RATIO))

    def test_from_a_real_rule(self):
        rng = np.random.default_rng(3)
        logits = rng.standard_normal((500, 14))
        q = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels = rng.integers(0, 14, 500)
        scores = GenKL.preset("clothing1m", alpha=0.7).score(q.astype(np.float32))
        t = relabel.targets(scores, labels, relabel.class_ratio(labels, 14))
        assert 0 < scores.nc.sum() < 500
        np.testing.assert_array_equal(t[scores.nc], np.float32(1 / 14))
        conforming = t[~scores.nc]
        hot = 2 - (scores.top_class == labels)[~scores.nc]
        np.testing.assert_array_equal((conforming > 0).sum(axis=1), hot)

    def test_inputs_are_left_alone(self):
        labels, ratio = LABELS.copy(), RATIO.copy()
        scores = make_scores(Q, NC)
        top_prob = scores.top_prob.copy()
        relabel.targets(scores, labels, ratio)[:] = 7
        np.testing.assert_array_equal(labels, LABELS)
        np.testing.assert_array_equal(ratio, RATIO)
        np.testing.assert_array_equal(scores.top_prob, top_prob)

    def test_another_nc_list(self):
        nc = np.array([True, False, False, False])
        t = relabel.targets(make_scores(Q, NC), LABELS, RATIO, nc=nc)
        np.testing.assert_array_equal(t[0], np.float32(1 / 3))
        np.testing.assert_allclose(t[2], [0.5, 0, 0.8], rtol=1e-7)

    def test_no_rows(self):
        t = relabel.targets(make_scores(np.empty((0, 3)), []), np.array([], np.int64), RATIO)
        assert t.shape == (0, 3)
        assert t.dtype == np.float32

    def test_bad_arguments(self):
        scores = make_scores(Q, NC)
        for labels, message in (
            (np.array([0, 1]), "targets: labels must be one per scored row, 4, got 2"),
            (np.array([0, 1, 5, 0]), "targets: labels must be from 0 to 2, got 5 at row 2"),
        ):
            with pytest.raises(ValueError, match=message):
                relabel.targets(scores, labels, RATIO)
        for ratio, message in (
            (np.eye(3), r"targets: ratio must have shape \(3,\), got \(3, 3\)"),
            (np.array([0.5, np.nan, 0.5]), "finite and not negative, got nan for class 1"),
            (np.array([0.5, 0.6, -0.1]), "finite and not negative, got -0.1 for class 2"),
        ):
            with pytest.raises(ValueError, match=message):
                relabel.targets(scores, LABELS, ratio)
        with pytest.raises(ValueError, match=r"nc must be \(4,\) booleans, got \(4,\) int64"):
            relabel.targets(scores, LABELS, RATIO, nc=np.array([0, 1, 0, 1]))
        with pytest.raises(ValueError, match=r"nc must be \(4,\) booleans, got \(3,\) bool"):
            relabel.targets(scores, LABELS, RATIO, nc=np.zeros(3, bool))
        with pytest.raises(TypeError, match="labels must be a NumPy array like scores, got a t"):
            relabel.targets(scores, torch.from_numpy(LABELS), RATIO)

    def test_unchecked_scores_are_checked(self):
        def check():
            raise ValueError("score: rows must sum to 1")

        with pytest.raises(ValueError, match="must sum to 1"):
            relabel.targets(SimpleNamespace(check=check), LABELS, RATIO)


class TestCompact:
    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    @pytest.mark.parametrize(
        "rows", [slice(1, 3), np.array([3, 0, 0]), np.array([True, False, True, False])]
    )
    def test_rows_of_the_compact_form(self, kind, rows):
        compact = relabel.Targets.of(make_scores(Q, NC, kind), LABELS, RATIO)
        assert len(compact) == 4
        part = compact[rows]
        np.testing.assert_array_equal(part.dense(), compact.dense()[rows])
        assert len(part) == len(EXPECTED[rows])

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_averaged_targets_of_nc_rows(self, kind):
        """T1, as published for Clothing1M: NC rows keep their prediction."""
        compact = relabel.Targets.of(
            make_scores(Q, [True, False, True, False], kind), LABELS, RATIO
        )
        own = torch.from_numpy(Q[[0, 2]]) if kind == "torch" else Q[[0, 2]]
        t = compact.dense(own)
        assert type(t) is type(own)
        np.testing.assert_array_equal(t, np.stack([Q[0], EXPECTED[1], Q[2], EXPECTED[3]]))
        np.testing.assert_array_equal(compact[1:2].dense(own[:0]), EXPECTED[1:2])

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_prior_everywhere(self, kind):
        """T2, as published for mini WebVision: r_y is added to every class."""
        compact = relabel.Targets.of(make_scores(Q, NC, kind), LABELS, RATIO)
        assert not compact.prior_everywhere
        slip = dataclasses.replace(compact, prior_everywhere=True)
        expected = np.zeros((4, 3), np.float32)
        for row, y in enumerate(LABELS):
            for c in range(3):
                expected[row, c] = Q[row, c] if c == Q[row].argmax() else 0
                expected[row, c] += np.float32(RATIO[y])
        expected[NC] = 1 / 3
        np.testing.assert_array_equal(slip.dense(), expected)
        np.testing.assert_array_equal(slip[1:].dense(), expected[1:])

    @pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
    def test_of_labels(self, kind):
        """One-hot, also where a prior would be added everywhere or comes from another row."""
        compact = relabel.Targets.of_labels(kind([2, 0, 1, 1]), 3)
        one_hot = np.eye(3, dtype=np.float32)[[2, 0, 1, 1]]
        assert type(compact.dense()) is type(kind([0]))
        np.testing.assert_array_equal(compact.dense(), one_hot)
        np.testing.assert_array_equal(
            dataclasses.replace(compact, prior_everywhere=True).dense(), one_hot
        )
        other = dataclasses.replace(compact, label=kind(np.array([0, 0, 0, 0], np.int32)))
        np.testing.assert_array_equal(other.dense(), one_hot)
        with pytest.raises(ValueError, match="Targets.of_labels: labels must be from 0 to 2, got"):
            relabel.Targets.of_labels(kind([0, 3]), 3)

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_joined(self, kind):
        compact = relabel.Targets.of(make_scores(Q, NC, kind), LABELS, RATIO)
        labels = torch.tensor([1, 2]) if kind == "torch" else np.array([1, 2])
        joined = compact.joined(relabel.Targets.of_labels(labels, 3))
        assert len(joined) == 6
        np.testing.assert_array_equal(
            joined.dense(), np.concatenate([compact.dense(), np.eye(3, dtype=np.float32)[1:]])
        )
        for name in ("top_class", "top_prob", "label", "prior", "nc"):
            assert getattr(joined, name).dtype == getattr(compact, name).dtype

    def test_size(self):
        compact = relabel.Targets.of(make_scores(Q, NC), LABELS, RATIO)
        columns = ("top_class", "top_prob", "label", "prior", "nc")
        assert sum(getattr(compact, name).itemsize for name in columns) == 17


def test_numpy_use_imports_no_torch():
    program = (
        "import sys, numpy as np\n"
        "from genkl_ext import GenKL, relabel\n"
        "labels = np.array([0, 1, 2])\n"
        "scores = GenKL(3, alpha=1, beta=0.1, sigma=0).score(np.eye(3, dtype=np.float32))\n"
        "relabel.targets(scores, labels, relabel.class_ratio(labels, 3))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
