import dataclasses

import numpy as np
import pytest
import torch
import workload
from baselines import Factors, chunked_numpy, researcher_numpy, torch_votes
from clock import Times

from genkl_ext import GenKL, reference

RULES = workload.rules()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("kind", workload.ROWS)
def test_every_baseline_is_the_same_computation(name: str, models: int, kind: str) -> None:
    rule = RULES[name]
    tensors = workload.Pool(rule.num_classes, kind, 1 << 20).slices(models)[0]
    arrays = [m[:192].numpy() for m in tensors]
    expected = reference.nc_score(arrays, rule.vectors, rule.alpha, rule.tau).votes
    exact, fast = Factors.of(rule, np.float64), Factors.of(rule, np.float32)
    np.testing.assert_array_equal(researcher_numpy(arrays, rule), expected)
    for factors in (exact, fast):
        np.testing.assert_array_equal(chunked_numpy(arrays, factors, 64), expected)
    votes = torch_votes([m[:192] for m in tensors], fast.on("cpu"))
    np.testing.assert_array_equal(votes.numpy(), expected)


def test_slices_are_apart_and_no_rows_are_used_twice() -> None:
    slices = workload.Pool(14, "peaked", 1 << 20).slices(3)
    assert len(slices) == workload.SLICES
    starts = [m.data_ptr() for models in slices for m in models]
    assert len(set(starts)) == 3 * workload.SLICES
    rows = slices[0][0].shape[0]
    assert rows % 64 == 0
    assert all(m.shape == (rows, 14) and m.is_contiguous() for models in slices for m in models)
    assert np.diff(sorted(starts)).min() >= rows * 14 * 4


def test_rows_too_few_for_the_models() -> None:
    with pytest.raises(ValueError, match="5 models need slices of 320 rows of 1000 classes"):
        workload.Pool(1000, "flat", 1 << 20).slices(5)


def test_rows_are_what_their_kind_says() -> None:
    rule = RULES["webvision"]
    dominant = [
        workload.dominant_entries(workload.Pool(50, kind, 1 << 20).slices(1)[0], rule)
        for kind in ("confident", "peaked", "flat")
    ]
    assert dominant == sorted(dominant)
    assert dominant[0] < 5
    assert 49 < dominant[2] <= 50


def test_dominant_entries_are_counted_in_the_average() -> None:
    rule = GenKL(2, alpha=1.0, beta=0.1, sigma=0.0)  # tau = 0.4
    models = [torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.9, 0.1]])]
    assert workload.dominant_entries(models, rule) == 1.5


def test_a_wrong_score_stops_the_benchmark() -> None:
    rule = RULES["clothing1m"]
    rows = workload.Pool(14, "peaked", 1 << 20).slices(1)[0][0].numpy()
    scores = rule.score(rows)
    workload.check_exact(scores, [rows], rule)
    votes = scores.votes.copy()
    votes[7] += 1
    with pytest.raises(RuntimeError, match=r"votes must equal the definition.* at row 7 \(1 rows"):
        workload.check_exact(dataclasses.replace(scores, votes=votes), [rows], rule)


def test_a_baseline_may_differ_at_the_threshold_only() -> None:
    rule = RULES["clothing1m"]
    rows = workload.Pool(14, "flat", 1 << 20).slices(1)[0][0].numpy()
    scores = rule.score(rows)
    votes = scores.votes.copy()
    assert workload.check_close("theirs", votes, scores, rule) == 0
    votes[3] = votes[3] == 0
    with pytest.raises(RuntimeError, match="theirs must decide like genkl_ext .* at row 3,"):
        workload.check_close("theirs", votes, scores, rule)
    critical = scores.critical_alpha.copy()
    critical[3] = rule.alpha
    close = dataclasses.replace(scores, critical_alpha=critical)
    assert workload.check_close("theirs", votes, close, rule) == 1


def test_figures() -> None:
    rule = GenKL(2, alpha=1.0, beta=0.1, sigma=0.1)
    models = [torch.full((1000, 2), 0.5)] * 2  # 16,000 bytes, 2 dominant entries in each row

    def took(milliseconds: float) -> Times:
        return Times.of([milliseconds / 1e3] * 2)

    scored = {"ours": (1000, took(0.5)), "theirs": (100, took(1.0))}
    # 16,000 bytes at 0.1 GB/s: 0.16 ms. 1000 rows of 2 (20 + 16) multiply-adds: 0.36 ms at 0.2.
    figures = workload.figures(rule, models, scored, ["ours"], read_gb_s=0.1, gfma_s=0.2)
    assert figures["bytes"] == 16_000
    assert figures["dominant"] == 2
    assert figures["roofline_ms"] == pytest.approx(0.36)
    assert figures["bound"] == "arithmetic"
    assert figures["mrow_s"] == {"ours": 2.0, "theirs": 0.1}
    assert figures["ours"]["ours"] == {
        "gb_s": 0.032,
        "share_of_read": 0.32,
        "share_of_roofline": 0.72,
        "times_faster": {"theirs": 20.0},
    }
    memory = workload.figures(rule, models, scored, ["ours"], read_gb_s=0.04, gfma_s=0.2)
    assert memory["bound"] == "memory"
    assert memory["roofline_ms"] == pytest.approx(0.4)


def test_equal_vectors_cost_one_multiplication_for_each_dominant_entry() -> None:
    assert workload.fma_slots(10.0, RULES["food101n"]) == 10.0
    assert workload.fma_slots(10.0, RULES["food101n-spread"]) == 10.0 * (20 + 16)
