"""Many rules in one read: held against one rule at a time, and against counting by hand."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import genkl_ext as gk
from genkl_ext import reference
from genkl_ext import sweep as sweeps
from genkl_ext.sweep import critical_alphas, from_critical_alphas, grid, sweep

RULE = gk.GenKL.preset("clothing1m")


def rows(count: int, classes: int = 14, seed: int = 0) -> np.ndarray:
    """Softmax outputs from flat to sharp."""
    stream = np.random.default_rng(seed)
    scale = stream.choice([0.3, 1.0, 2.0], (count, 1))
    return reference.softmax(stream.normal(size=(count, classes)) * scale)


def sets(found: sweeps.Sweep, critical: np.ndarray) -> list[list[set[int]]]:
    """The NC rows of each rule at each alpha, one comparison at a time."""
    return [
        [{n for n, value in enumerate(line) if float(value) >= alpha} for alpha in found.alphas]
        for line in critical
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 700, None])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 63])
def test_every_rule_scores_as_it_does_alone(
    count: int, models: int, chunk_bytes: int | None
) -> None:
    q = [rows(count, seed=s) for s in range(models)]
    rules = grid(RULE, betas=[0.0, 0.03], sigmas=[0.0, 0.05], num_vectors=[1, 20], seeds=[0, 3])
    assert len(rules) == len(set(rules)) == 16
    critical = critical_alphas(q, rules, chunk_bytes=chunk_bytes)
    assert critical.shape == (16, count) and critical.dtype == np.float32
    for rule, values in zip(rules, critical, strict=True):
        np.testing.assert_array_equal(values, rule.score(q).critical_alpha)
        exact = reference.nc_score(q, rule.vectors, rule.alpha, rule.tau)
        np.testing.assert_allclose(values, exact.critical_alpha, rtol=rule.resolution)
        np.testing.assert_array_equal(values >= rule.alpha, exact.votes > 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_classes_and_logits(dtype: type) -> None:
    logits = np.random.default_rng(1).normal(size=(2, 40, 2)).astype(dtype)
    rules = grid(gk.GenKL(2, 1.0, 0.1, 0.05), betas=[0.1, 0.3, -0.2])
    for rule, values in zip(rules, critical_alphas(list(logits), rules, logits=True), strict=True):
        alone = rule.score(list(logits), logits=True)
        np.testing.assert_array_equal(values, alone.critical_alpha)
    q = reference.softmax(logits[0]).astype(dtype)
    for models in ([q], [q, q[::-1]]):
        for rule, values in zip(rules, critical_alphas(models, rules), strict=True):
            np.testing.assert_array_equal(values, rule.score(models).critical_alpha)


def test_tensors(device: str) -> None:
    q = torch.tensor(rows(50))
    rules = grid(RULE, betas=[0.01, 0.03])
    expected = critical_alphas(q.numpy(), rules)
    on = q.to(device)
    np.testing.assert_allclose(critical_alphas(on, rules, chunk_bytes=500), expected, rtol=1e-6)
    half = on.bfloat16()
    alone = [rule.score(half).numpy().critical_alpha for rule in rules]
    np.testing.assert_array_equal(critical_alphas([half], rules, chunk_bytes=500), alone)


@pytest.mark.parametrize("order", ["C", "F"])
def test_files(tmp_path: Path, order: str) -> None:
    q = [np.asarray(rows(301, seed=s), order=order) for s in range(2)]
    files = [tmp_path / f"{s}.npy" for s in range(2)]
    for file, values in zip(files, q, strict=True):
        np.save(file, values)
    rules = grid(RULE, seeds=[0, 1])
    done: list[tuple[int, int]] = []
    found = sweep(files, rules, chunk_bytes=11_000, progress=lambda *state: done.append(state))
    assert done == [(n, 301) for n in (98, 196, 294, 301)]
    assert found.to_json() == sweep(q, rules).to_json()
    np.testing.assert_array_equal(critical_alphas(files[0], rules), critical_alphas(q[0], rules))


def test_counts_at_every_alpha_ties_included() -> None:
    q = np.repeat(rows(40), 2, axis=0)
    rules = grid(RULE, betas=[0.01, 0.05], seeds=[0, 1, 2])
    critical = critical_alphas(q, rules)
    # Alphas on values that occur, and one float64 beside them, which no float32 can be.
    on = critical[0, ::7].astype(np.float64)
    alphas = [*on, *np.nextafter(on, 9), *np.nextafter(on, 0), 0.0, 5.0]
    found = sweep(q, rules, alphas=alphas, chunk_bytes=56 * 7)
    assert found.rows == 80 and found.left_out == 0
    assert found.alphas.tolist() == sorted({*alphas, RULE.alpha})
    flagged = sets(found, critical)
    assert found.nc_counts.tolist() == [[len(nc) for nc in line] for line in flagged]
    np.testing.assert_allclose(found.shares, found.nc_counts / 80)
    at = found.alphas.tolist().index(RULE.alpha)
    for r, rule in enumerate(rules):
        assert found.nc_counts[r, at] == rule.score(q).nc.sum()


def test_stability_is_the_mean_jaccard_index_of_all_pairs_of_seeds() -> None:
    q = rows(60)
    rules = grid(RULE, betas=[0.01, 0.05], seeds=[0, 1, 2, 3])
    found = sweep(q, rules, alphas=np.linspace(0, 2, 31), chunk_bytes=56 * 11)
    flagged = sets(found, critical_alphas(q, rules))
    assert found.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    for g, group in enumerate(found.groups):
        for a in range(len(found.alphas)):
            indices = []
            for one, other in itertools.combinations(group, 2):
                either = flagged[one][a] | flagged[other][a]
                both = flagged[one][a] & flagged[other][a]
                indices.append(len(both) / len(either) if either else 1.0)
            assert found.stability()[g, a] == pytest.approx(np.mean(indices), abs=1e-12)
    assert 0 < found.stability().min() < 1  # or nothing was seen
    assert np.isnan(sweep(q, RULE).stability()).all()


def test_seeds_do_not_matter_without_sigma() -> None:
    found = sweep(rows(50), grid(RULE, sigmas=[0.0], seeds=[0, 1]))
    assert (found.stability() == 1).all()


def test_quality_against_the_truth() -> None:
    q = rows(70)
    rules = grid(RULE, betas=[0.01, 0.05])
    truth = np.random.default_rng(3).random(70) < 0.3
    found = sweep(q, rules, truth=truth, chunk_bytes=56 * 13)
    critical = critical_alphas(q, rules)
    right = set(np.flatnonzero(truth).tolist())
    wrong = set(range(70)) - right
    for r, line in enumerate(sets(found, critical)):
        for a, nc in enumerate(line):
            hits = len(nc & right)
            recall, specificity = hits / len(right), 1 - len(nc & wrong) / len(wrong)
            assert found.quality("recall")[r, a] == pytest.approx(recall)
            assert found.quality("f1")[r, a] == pytest.approx(2 * hits / (len(nc) + len(right)))
            balanced = found.quality("balanced_accuracy")[r, a]
            assert balanced == pytest.approx((recall + specificity) / 2)
            precision = found.quality("precision")[r, a]
            assert precision == pytest.approx(hits / len(nc)) if nc else math.isnan(precision)
        pairs = [
            (critical[r, p] > critical[r, n]) + 0.5 * (critical[r, p] == critical[r, n])
            for p in right
            for n in wrong
        ]
        assert found.auroc is not None and found.auroc[r] == pytest.approx(np.mean(pairs))
    rule, value = found.best("f1")
    assert value == found.quality("f1").max()
    nc = rule.score(q).nc
    assert 2 * (nc & truth).sum() / (nc.sum() + truth.sum()) == pytest.approx(value)
    with pytest.raises(ValueError, match="quality must be one of f1, .*, got 'auc'"):
        found.quality("auc")
    with pytest.raises(ValueError, match="quality needs truth"):
        sweep(q, rules).quality()


def test_verified_rows() -> None:
    q, clean = rows(30), rows(20, seed=9)
    rules = grid(RULE, betas=[0.01, 0.05], seeds=[0, 1])
    found = sweep(q, rules, clean=clean)
    assert found.clean_rows == 20
    alone = sweep(clean, rules)
    np.testing.assert_array_equal(found.false_positives, alone.shares)
    with pytest.raises(ValueError, match="false_positives needs clean"):
        _ = alone.false_positives
    np.testing.assert_allclose(found.mean(found.shares)[1], found.shares[2:].mean(axis=0))


def test_rows_without_prediction_are_left_out(tmp_path: Path) -> None:
    q = [rows(20, seed=s) for s in range(2)]
    truth = np.arange(20) < 8
    rules = grid(RULE, seeds=[0, 1])
    holes = [values.copy() for values in q]
    holes[0][3] = np.nan
    holes[1][[3, 12]] = np.nan
    kept = np.delete(np.arange(20), [3, 12])
    found = sweep(holes, rules, truth=truth, clean=holes, chunk_bytes=500)
    expected = sweep(
        [values[kept] for values in q], rules, truth=truth[kept],
        clean=[values[kept] for values in q],
    )  # fmt: skip
    assert (found.rows, found.left_out, found.truly_nc) == (18, 2, 7)
    assert dataclasses.replace(found, left_out=0).to_json() == expected.to_json()
    critical = critical_alphas(holes, rules)
    assert np.flatnonzero(np.isnan(critical[0])).tolist() == [3, 12]
    again = from_critical_alphas(critical, rules, truth=truth, clean=critical)
    assert again.to_json() == found.to_json()
    np.save(tmp_path / "bad.npy", holes[0])
    holes[0][15, 2] = np.nan  # a number beside it: no missing row but a bad one
    np.save(tmp_path / "bad.npy", holes[0])
    with pytest.raises(ValueError, match=r"predictions\[0\] must be finite .* nan at row 15, cl"):
        sweep(holes, rules, chunk_bytes=112 * 4)
    with pytest.raises(ValueError, match=r"bad.npy must be finite .* nan at row 15, class 2"):
        sweep(tmp_path / "bad.npy", rules, chunk_bytes=500)
    sweep(holes, rules, validate=False)


def test_the_first_of_many_bad_rows_is_told() -> None:
    q = rows(400)
    q[[37, 38, 250], 5] = -1
    for _ in range(5):
        with pytest.raises(ValueError, match="got -1.0 at row 37, class 5"):
            sweep(q, grid(RULE, seeds=range(5)), chunk_bytes=56 * 2)


def test_no_rows() -> None:
    found = sweep(rows(0), grid(RULE, seeds=[0, 1]), truth=np.zeros(0, bool), clean=rows(0))
    assert found.rows == 0 and not found.nc_counts.any()
    assert np.isnan(found.shares).all() and np.isnan(found.false_positives).all()
    assert found.auroc is not None and np.isnan(found.auroc).all()
    with pytest.raises(ValueError, match="sweep: precision is defined at no alpha"):
        found.best("precision")
    assert "-" in found.table()
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_of_some_known_positives_there_is_recall_and_nothing_else() -> None:
    q = rows(70)
    q[3] = q[4] = np.nan
    rules = grid(RULE, betas=[0.01, 0.05])
    verified = np.arange(70) % 4 == 0
    found = sweep(q, rules, verified=verified, chunk_bytes=56 * 13)
    alike = sweep(q, rules, truth=verified)
    assert found.positives_only and found.auroc is None and found.truly_nc == alike.truly_nc == 17
    np.testing.assert_array_equal(found.quality("recall"), alike.quality("recall"))
    for name in ("f1", "precision", "balanced_accuracy"):
        with pytest.raises(ValueError, match=f"quality must be 'recall' .*, got '{name}'"):
            found.quality(name)
    stored = from_critical_alphas(critical_alphas(q, rules), rules, verified=verified)
    assert stored.to_json() == found.to_json()
    facts = json.loads(found.to_json())
    assert facts["verified"] == {"nc": 17, "true_counts": found.true_counts.tolist()}
    assert "truth" not in facts
    header, first, _ = found.table().splitlines()
    assert header.endswith("recall %") and "F1" not in header
    at = found.alphas.tolist().index(1.05)
    assert first.split()[-1] == f"{100 * found.quality('recall')[0, at]:.2f}"


def test_json_and_table_say_what_was_counted() -> None:
    q = rows(50)
    rules = grid(RULE, betas=[0.01, 0.05], seeds=[0, 7])
    truth = np.arange(50) < 20
    found = sweep(q, rules, truth=truth, clean=q[:10])
    facts = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert [gk.GenKL(**settings) for settings in facts["rules"]] == list(rules)
    assert facts["nc_counts"] == found.nc_counts.tolist()
    assert facts["truth"]["true_counts"] == found.true_counts.tolist()
    assert facts["clean"] == {"rows": 10, "nc_counts": found.clean_counts.tolist()}
    assert [group["name"] for group in facts["groups"]] == ["beta 0.01", "beta 0.05"]
    header, first, second = [line.split("  ") for line in found.table().splitlines()]
    columns = [entry.strip() for entry in header if entry]
    assert columns == [
        "beta", "sigma", "m", "seeds", "alpha", "NC %", "J", "FP %", "AUROC", "F1", "best F1",
        "at alpha",
    ]  # fmt: skip
    values = dict(zip(columns, [e.strip() for e in second if e.strip()], strict=True))
    at = found.alphas.tolist().index(1.05)
    assert values["beta"] == "0.05" and values["seeds"] == "0,7" and values["alpha"] == "1.05"
    assert values["NC %"] == f"{100 * found.shares[2:, at].mean():.2f}"
    assert values["J"] == f"{found.stability()[1, at]:.3f}"
    assert values["best F1"] == f"{found.quality()[2:].mean(axis=0).max():.4f}"
    assert len(first) == len(header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": []}, "rules must be at least one, got none"),
        ({"rules": [RULE, gk.GenKL(10, 1, 0, 0)]}, r"one num_classes, got \[10, 14\]"),
        ({"rules": [RULE, dataclasses.replace(RULE, alpha=2)]}, "must differ in more than alpha"),
        ({"alphas": [0.5, -1]}, r"alphas must be finite numbers >= 0, got \[0.5, -1\]"),
        ({"truth": [True] * 9}, r"truth must be \(10,\) booleans, got \(9,\) bool"),
        ({"truth": [1] * 10}, r"truth must be \(10,\) booleans, got \(10,\) int64"),
        ({"verified": [True] * 9}, r"verified must be \(10,\) booleans, got \(9,\) bool"),
        ({"verified": [False] * 10}, "verified must have a row that is NC, got none"),
        (
            {"verified": [True] * 10, "truth": [True] * 10},
            "truth and verified cannot both be given",
        ),
        ({"chunk_bytes": 0}, "chunk_bytes must be at least 1, got 0"),
        ({"clean": rows(3, 10)}, r"must have shape \(N, 14\), got \(3, 10\)"),
        ({"predictions": rows(3, 10)}, r"must have shape \(N, 14\), got \(3, 10\)"),
        ({"predictions": []}, "predictions must be 1 to 64 arrays, got a sequence of 0"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**{"predictions": rows(10), "rules": RULE, **change})


def test_wrong_files_grids_and_critical_alphas(tmp_path: Path) -> None:
    np.save(tmp_path / "ten.npy", rows(3, 10))
    with pytest.raises(ValueError, match=r"ten.npy must have num_classes = 14 columns, got .* 10"):
        sweep(tmp_path / "ten.npy", RULE)
    with pytest.raises(FileNotFoundError, match="none.npy does not exist"):
        sweep([tmp_path / "none.npy"], RULE)
    with pytest.raises(ValueError, match=r"grid: values of betas? must differ, got \[0.01, 0.01\]"):
        grid(RULE, betas=[0.01, 0.01], seeds=[0, 1])
    with pytest.raises(ValueError, match="beta must be below"):
        grid(RULE, betas=[0.2])
    with pytest.raises(ValueError, match=r"critical must be \(2, N\), got \(3, 5\)"):
        from_critical_alphas(np.zeros((3, 5)), grid(RULE, seeds=[0, 1]))


def test_groups_are_named_by_what_differs() -> None:
    rules = grid(RULE, betas=[0.01, 0.03], num_vectors=[5, 20], seeds=[1, 2])
    found = sweep(rows(3), rules)
    assert found.names() == (
        "beta 0.01, m 5", "beta 0.01, m 20", "beta 0.03, m 5", "beta 0.03, m 20",
    )  # fmt: skip


def test_real_softmax(shared_data: Path) -> None:
    file = shared_data / "softmax" / "cifar10_noise2_sparsity2_probs.npy"
    if not file.exists():
        file = sorted((shared_data / "softmax").glob("*_probs.npy"))[0]
    q = np.load(file)[:5000]
    rules = grid(gk.GenKL(10, 0.5, 0.042, 0.07), betas=[0.02, 0.042], seeds=[0, 1])
    found = sweep(q, rules, chunk_bytes=1 << 14)
    for r, rule in enumerate(rules):
        exact = reference.nc_score(q, rule.vectors, rule.alpha, rule.tau)
        at = found.alphas.tolist().index(rule.alpha)
        assert found.nc_counts[r, at] == (exact.votes > 0).sum()
