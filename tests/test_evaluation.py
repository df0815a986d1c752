import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn import metrics as sk

from genkl_ext import evaluation as ev
from genkl_ext.data import Manifest

Case = tuple[Any, Any]


def cases() -> dict[str, Case]:
    """Scores and truth with what scores can be: ties, infinities, halves, integers, few rows."""
    stream = np.random.default_rng(0)
    truth = stream.random(301) < 0.3
    value = stream.standard_normal(301) + truth
    wild = value.copy()
    wild[:20], wild[20:50] = np.inf, -np.inf
    return {
        "float64": (value, truth),
        "ties": (np.round(value), truth),
        "float16": (value.astype(np.float16), truth),
        "integers": (np.round(3 * value).astype(np.int64), truth.astype(np.int64)),
        "all equal": (np.zeros(301, np.float32), truth),
        "infinite": (wild, truth),
        "best": (truth.astype(np.float32), truth),
        "worst": (-truth.astype(np.float32), truth),
        "two rows": (np.array([0.1, 0.2]), np.array([True, False])),
        "one positive": (np.round(value), np.arange(301) == 7),
    }


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return cases()[request.param]


def finite(scores: np.ndarray) -> np.ndarray:
    """The same order in numbers that scikit-learn takes."""
    return np.unique(scores, return_inverse=True)[1]


def test_areas_are_those_of_scikit_learn(case: Case) -> None:
    scores, truth = case
    auroc = sk.roc_auc_score(truth, finite(scores))
    assert ev.auroc(scores, truth) == pytest.approx(auroc, abs=1e-12)
    precision = sk.average_precision_score(truth, finite(scores))
    assert ev.average_precision(scores, truth) == pytest.approx(precision, abs=1e-12)
    share = np.mean(truth)
    expected = (1 - share) * auroc + share / 2
    assert ev.area_under_recall(scores, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.29, 0.5, 1.0])
def test_recall_at_false_positives_is_on_the_curve_of_scikit_learn(case: Case, rate: float) -> None:
    scores, truth = case
    fpr, tpr, _ = sk.roc_curve(truth, finite(scores), drop_intermediate=False)
    last = int(np.flatnonzero(fpr <= rate)[-1])
    expected = tpr[last]
    if last + 1 < len(fpr):
        part = (rate - fpr[last]) / (fpr[last + 1] - fpr[last])
        expected += part * (tpr[last + 1] - tpr[last])
    assert ev.recall_at_false_positives(scores, truth, rate) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("negatives", [20, 100, 1400])
def test_a_rate_that_is_reached_exactly_counts(negatives: int) -> None:
    # 0.05 of 20 or 1400 is a whole number of rows: the positive behind it is still found.
    count = round(0.05 * negatives)
    truth = np.zeros(negatives + 2, bool)
    truth[[count, count + 2]] = True
    scores = -np.arange(negatives + 2.0)
    assert ev.recall_at_false_positives(scores, truth, 0.05) == 0.5


@pytest.mark.parametrize("rate", [7 / 1000, 0.7 / 100])
def test_a_rate_that_was_computed_counts_like_the_one_meant(rate: float) -> None:
    truth = np.zeros(1003, bool)
    truth[[0, 8, 500]] = True  # 7 of 1000 negatives lie between the first two
    scores = -np.arange(1003.0)
    assert 0.7 / 100 < 7 / 1000
    assert ev.recall_at_false_positives(scores, truth, rate) == pytest.approx(2 / 3, abs=1e-12)
    flagged = ev.recall_at_flagged(-np.arange(1000.0), truth[3:], rate)
    assert flagged == pytest.approx(0.5, abs=1e-12)


def test_recall_at_flagged_is_expected_over_the_orders_of_ties() -> None:
    scores = np.array([3, 2, 2, 2, 1, 1, 0.0])
    truth = np.array([0, 1, 0, 0, 1, 1, 1], bool)
    for flagged in range(1, 8):
        recalls = []
        for order in itertools.permutations(range(7)):
            if (np.diff(scores[list(order)]) <= 0).all():
                recalls.append(truth[list(order)][:flagged].sum() / 4)
        got = ev.recall_at_flagged(scores, truth, flagged / 7)
        assert got == pytest.approx(np.mean(recalls), abs=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.35, 1.0])
def test_recall_at_flagged_without_ties(share: float) -> None:
    stream = np.random.default_rng(1)
    scores, truth = stream.permutation(1000), stream.random(1000) < 0.1
    top = np.argsort(-scores)[: round(1000 * share)]
    expected = truth[top].sum() / truth.sum()
    assert ev.recall_at_flagged(scores, truth, share) == pytest.approx(expected, abs=1e-12)


def test_area_under_recall_is_the_area_under_recall(case: Case) -> None:
    scores, truth = case
    # Recall is linear between whole rows: the trapezoid rule is exact there.
    shares = np.arange(1, len(truth) + 1) / len(truth)
    recall = [0.0, *(ev.recall_at_flagged(scores, truth, share) for share in shares)]
    area = np.trapezoid(recall, dx=1 / len(truth))
    assert ev.area_under_recall(scores, truth) == pytest.approx(area, abs=1e-9)


def test_rows_without_score_are_never_flagged() -> None:
    stream = np.random.default_rng(2)
    truth = stream.random(200) < 0.4
    scores = stream.standard_normal(200) + truth
    broken = stream.random(200) < 0.2
    scores[broken] = np.nan
    lost = truth[broken].sum() / truth.sum()
    lowest = np.where(broken, -1e9, scores)
    assert ev.auroc(scores, truth) == pytest.approx(sk.roc_auc_score(truth, lowest))
    assert ev.recall_at_flagged(scores, truth, 1.0) == pytest.approx(1 - lost)
    assert ev.recall_at_flagged(scores, truth, 0.1) == ev.recall_at_flagged(lowest, truth, 0.1)
    assert ev.recall_at_false_positives(scores, truth, 1.0) == pytest.approx(1 - lost)
    found = sk.average_precision_score(truth[~broken], scores[~broken]) * (1 - lost)
    assert ev.average_precision(scores, truth) == pytest.approx(found)

    result = ev.evaluate({"a": scores}, truth, draws=0)
    assert result.overall["a"].unscored == broken.sum()
    assert f"{broken.sum()} rows have no score of a: never flagged" in result.table()
    assert result.curves["a"].flagged[-1] == pytest.approx((~broken).mean())
    assert result.curves["a"].recall[-1] == pytest.approx(1 - lost)


def test_no_row_has_a_score() -> None:
    truth = np.array([True, False, True])
    scores = np.full(3, np.nan)
    assert ev.auroc(scores, truth) == 0.5
    assert ev.average_precision(scores, truth) == 0.0
    assert ev.area_under_recall(scores, truth) == 0.0
    assert ev.recall_at_flagged(scores, truth, 1.0) == 0.0
    assert ev.recall_at_false_positives(scores, truth, 1.0) == 0.0


@pytest.mark.parametrize(("truth", "defined"), [([1, 1], {"precision", "recall"}), ([0, 0], set())])
def test_undefined_is_nan(truth: list[int], defined: set[str]) -> None:
    scores, kinds = [0.3, 0.7], np.array(truth)
    assert math.isnan(ev.auroc(scores, kinds))
    assert math.isnan(ev.recall_at_false_positives(scores, kinds))
    assert math.isnan(ev.average_precision(scores, kinds)) == ("precision" not in defined)
    assert math.isnan(ev.recall_at_flagged(scores, kinds, 0.5)) == ("recall" not in defined)


def sample(rows: int, seed: int = 3) -> dict[str, Any]:
    """Two identifiers with ties and NaN, decisions and classes for ``evaluate``."""
    stream = np.random.default_rng(seed)
    truth = stream.random(rows) < 0.35
    first = np.round(stream.standard_normal(rows) + truth, 1)
    second = (stream.standard_normal(rows) + 0.5 * truth).astype(np.float32)
    second[stream.random(rows) < 0.1] = np.nan
    return {
        "scores": {"first": first, "second": second},
        "truth": truth,
        "decisions": {"first": first > 0.8},
        "groups": stream.integers(-1, 3, rows),
    }


def brute_force(scores: Any, truth: Any, flagged: Any, shares: Any, rate: float) -> dict[str, Any]:
    """All metrics of one draw, whose rows are there as often as it took them."""
    made = {
        "auroc": ev.auroc(scores, truth),
        "average_precision": ev.average_precision(scores, truth),
        f"recall_at_{100 * rate:g}_fpr": ev.recall_at_false_positives(scores, truth, rate),
        "area": ev.area_under_recall(scores, truth),
        **{
            f"recall_at_{100 * share:g}_flagged": ev.recall_at_flagged(scores, truth, share)
            for share in shares
        },
    }
    if truth.any() and not truth.all():
        lowest = np.where(np.isnan(scores), -1e9, scores)
        assert made["auroc"] == pytest.approx(sk.roc_auc_score(truth, lowest))
    if flagged is not None:
        made["flagged"] = flagged.mean()
        made["recall"] = sk.recall_score(truth, flagged, zero_division=np.nan)
        made["precision"] = sk.precision_score(truth, flagged, zero_division=np.nan)
        made["f1"] = sk.f1_score(truth, flagged, zero_division=np.nan)
    return made


@pytest.mark.parametrize("rows", [12, 60])
def test_intervals_are_those_of_a_plain_bootstrap(rows: int) -> None:
    given = sample(rows)
    shares, rate, draws, seed = (0.05, 0.3), 0.1, 20, 5
    result = ev.evaluate(
        **given, shares=shares, false_positives=rate, draws=draws, seed=seed, level=0.8
    )
    values: dict[Any, list[dict[str, float]]] = {}
    for draw in range(draws):
        taken = np.repeat(np.arange(rows), ev._resample(rows, seed, draw))
        assert len(taken) == rows
        truth = given["truth"][taken]
        for name, scores in given["scores"].items():
            flagged = given["decisions"].get(name)
            for group in (None, 1):
                part = slice(None) if group is None else given["groups"][taken] == group
                decided = None if flagged is None else flagged[taken][part]
                args = scores[taken][part], truth[part], decided
                if not len(args[0]):
                    made = dict.fromkeys(result.overall[name].metrics, math.nan)
                else:
                    made = brute_force(*args, shares, rate)
                values.setdefault((name, group), []).append(made)

    def interval(samples: list[float]) -> list[float]:
        kept = [value for value in samples if not math.isnan(value)]
        return np.quantile(kept, [0.1, 0.9]).tolist() if kept else [math.nan] * 2

    checked = 0
    for (name, group), draws_of in values.items():
        of = result.overall if group is None else result.classes[str(group)]
        for metric, estimate in of[name].metrics.items():
            if math.isnan(estimate.value):
                continue
            expected = interval([made[metric] for made in draws_of])
            assert [estimate.low, estimate.high] == pytest.approx(expected, abs=1e-6, nan_ok=True)
            checked += 1
        for metric, estimate in of[name].differences.items():
            first = of["first"].metrics[metric].value
            assert estimate.value == pytest.approx(
                of[name].metrics[metric].value - first, abs=1e-12, nan_ok=True
            )
            if math.isnan(estimate.value):
                continue
            pairs = zip(draws_of, values["first", group], strict=True)
            expected = interval([made[metric] - other[metric] for made, other in pairs])
            assert [estimate.low, estimate.high] == pytest.approx(expected, abs=1e-6, nan_ok=True)
            checked += 1
    assert checked > 30


def test_values_are_those_of_the_functions() -> None:
    given = sample(500)
    result = ev.evaluate(**given, draws=0)
    for name, scores in given["scores"].items():
        flagged = given["decisions"].get(name)
        expected = brute_force(scores, given["truth"], flagged, ev.SHARES, ev.FALSE_POSITIVES)
        quality = result.overall[name]
        assert {m: e.value for m, e in quality.metrics.items()} == pytest.approx(expected)
        assert all(math.isnan(e.low) and math.isnan(e.high) for e in quality.metrics.values())
        for group, of in result.classes.items():
            part = given["groups"] == int(group)
            inside = brute_force(
                scores[part], given["truth"][part], None if flagged is None else flagged[part],
                (), 0.05,
            )  # fmt: skip
            del inside["recall_at_5_fpr"]
            assert {m: e.value for m, e in of[name].metrics.items()} == pytest.approx(inside)
            assert (of[name].rows, of[name].positives) == (
                part.sum(),
                given["truth"][part].sum(),
            )
    assert set(result.classes) == {"0", "1", "2"}
    assert set(result.overall["first"].differences) == set()


@pytest.mark.parametrize("stripe", [1 << 15, 7])
def test_a_draw_takes_as_many_rows_at_random(monkeypatch: pytest.MonkeyPatch, stripe: int) -> None:
    monkeypatch.setattr(ev, "_STRIPE", stripe)
    rows, draws = 20, 4000
    counts = np.stack([ev._resample(rows, 0, draw) for draw in range(draws)]).astype(float)
    assert (counts.sum(1) == rows).all()
    # Multinomial: mean 1, variance 1 - 1/N, covariance -1/N; within 5 standard errors.
    assert abs(counts.mean(0) - 1).max() < 5 / draws**0.5
    covariance = np.cov(counts.T)
    expected = np.eye(rows) - 1 / rows
    assert abs(covariance - expected).max() < 5 * 2 / draws**0.5
    assert len(np.unique(counts, axis=0)) > 0.99 * draws


def test_a_number_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    given = sample(300)
    whole = ev.evaluate(**given, draws=40)
    monkeypatch.setattr(ev, "_CELLS", 700)  # two draws at a time
    monkeypatch.setattr(ev, "num_threads", lambda: 3)
    assert ev.evaluate(**given, draws=40) == whole
    alone = ev.evaluate({"second": given["scores"]["second"]}, given["truth"], draws=40)
    assert alone.overall["second"].metrics == whole.overall["second"].metrics
    assert ev.evaluate(**given, draws=40, seed=1).overall["first"] != whole.overall["first"]


def test_intervals_cover_the_true_value() -> None:
    # AUROC of normal scores d apart is Phi(d / sqrt 2). 150 experiments: 95 % within 3 errors.
    distance, inside, both = 1.0, 0, 0
    true = 0.5 * (1 + math.erf(distance / 2))
    for experiment in range(150):
        stream = np.random.default_rng((9, experiment))
        truth = np.arange(120) % 3 == 0
        first = stream.standard_normal(120) + distance * truth
        second = stream.standard_normal(120) + distance * truth
        result = ev.evaluate(
            {"a": first, "b": second}, truth, shares=(), draws=100, seed=experiment
        )
        found = result.overall["a"].metrics["auroc"]
        inside += found.low <= true <= found.high
        difference = result.overall["b"].differences["auroc"]
        both += difference.low <= 0 <= difference.high
    assert 135 <= inside <= 149
    assert 135 <= both <= 149


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    stream = np.random.default_rng(4)
    truth = stream.random(400) < 0.3
    first = stream.standard_normal(400) + truth
    second = first + 0.1 * stream.standard_normal(400)
    result = ev.evaluate({"a": first, "b": second}, truth, draws=300)
    difference = result.overall["b"].differences["auroc"]
    alone = result.overall["b"].metrics["auroc"]
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)


def test_unknown_rows_are_left_out() -> None:
    given = sample(200)
    known = np.arange(200) % 4 > 0
    unsure = ev.evaluate(
        **{**given, "truth": np.where(known, given["truth"].astype(int), -1)}, draws=30
    )
    shorter = ev.evaluate(
        {name: scores[known] for name, scores in given["scores"].items()},
        given["truth"][known],
        decisions={"first": given["decisions"]["first"][known]},
        groups=given["groups"][known],
        draws=30,
    )
    assert unsure == dataclasses.replace(shorter, unknown=50)
    assert "50 rows of which nothing is known are left out" in unsure.table()


def test_verified_positives_only() -> None:
    given = sample(200)
    rows = np.flatnonzero(given["truth"])[::2]
    mask = np.isin(np.arange(200), rows)
    scores, decisions = given["scores"], given["decisions"]
    result = ev.evaluate(scores, verified=rows, decisions=decisions, draws=20)
    assert result == ev.evaluate(scores, verified=mask, decisions=decisions, draws=20)
    assert result.positives_only and result.positives == len(rows)
    names = {"area", "flagged", "recall", *(f"recall_at_{p}_flagged" for p in (1, 2, 5, 10, 20))}
    assert set(result.overall["first"].metrics) == names
    metrics = result.overall["first"].metrics
    assert metrics["recall"].value == decisions["first"][rows].mean()
    assert metrics["flagged"].value == decisions["first"].mean()
    assert metrics["recall_at_10_flagged"].value == ev.recall_at_flagged(scores["first"], mask, 0.1)
    curve = result.curves["first"]
    assert curve.false_positives == () and curve.precision == ()
    assert "AUROC" not in result.table() and "known to be positive" in result.table()


@pytest.mark.parametrize("rows", [30, 20000])
def test_curves_go_through_the_thresholds(rows: int) -> None:
    given = sample(rows)
    truth, scores = given["truth"], given["scores"]["first"]
    curve = ev.evaluate({"a": scores + 1e-9 * np.arange(rows)}, truth, draws=0).curves["a"]
    tied = ev.evaluate({"a": scores}, truth, draws=0).curves["a"]
    assert len(curve.flagged) <= ev._CURVE_POINTS
    assert tied.flagged[0] == 0 and tied.recall[-1] == 1
    assert tied.precision[0] == tied.precision[1]
    for threshold in np.unique(scores):
        flagged = scores >= threshold
        assert np.isclose(flagged.mean(), tied.flagged).any()
        place = int(np.argmin(abs(np.subtract(tied.flagged, flagged.mean()))))
        assert tied.recall[place] == pytest.approx(flagged[truth].mean())
        assert tied.false_positives[place] == pytest.approx(flagged[~truth].mean())
        assert tied.precision[place] == pytest.approx(truth[flagged].mean())
    assert np.trapezoid(tied.recall, tied.false_positives) == pytest.approx(
        ev.auroc(scores, truth), abs=1e-9
    )
    # Thinned out, the curve is still within half a percent of all of it.
    assert np.trapezoid(curve.recall, curve.flagged) == pytest.approx(
        ev.area_under_recall(scores, truth), abs=5e-3 if rows > 30 else 0.05
    )


def test_tensors_are_taken() -> None:
    import torch

    given = sample(50)
    tensors = {name: torch.tensor(scores) for name, scores in given["scores"].items()}
    result = ev.evaluate(tensors, torch.tensor(given["truth"]), draws=0)
    assert result == ev.evaluate(given["scores"], given["truth"], draws=0)


def test_json_is_strict_and_complete() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    given = sample(60)
    given["decisions"]["first"] = np.zeros(60, bool)  # precision is undefined
    result = ev.evaluate(**given, draws=10)
    facts = json.loads(result.to_json(), parse_constant=refuse)
    assert facts["overall"]["first"]["metrics"]["precision"] == dict.fromkeys(
        ("value", "low", "high")
    )
    auroc = result.overall["second"].metrics["auroc"]
    assert facts["overall"]["second"]["metrics"]["auroc"] == dataclasses.asdict(auroc)
    assert facts["classes"]["1"]["first"]["positives"] == result.classes["1"]["first"].positives
    assert facts["curves"]["first"]["recall"] == list(result.curves["first"].recall)
    assert set(facts) == {field.name for field in dataclasses.fields(result)}


def test_table() -> None:
    scores = {"GenKL": np.array([4.0, 3, 2, 1]), "entropy": np.array([1.0, 4, 2, 3])}
    result = ev.evaluate(
        scores,
        np.array([1, 1, 0, 0]),
        decisions={"GenKL": scores["GenKL"] > 3},
        groups=np.array([0, 0, 0, 1]),
        group_names=["hat", "shoe"],
        shares=(0.5,),
        draws=0,
    )
    assert result.table() == (
        "4 rows, 2 (50 %) positive\n"
        "\n"
        "All thresholds\n"
        "identifier   AUROC     average   recall at 5 %\n"
        "                     precision      false pos.\n"
        "GenKL        100.0       100.0           100.0\n"
        "entropy       50.0        75.0            50.0\n"
        "\n"
        "Recall at a flagged share\n"
        "identifier   at 50 %   area under\n"
        "                           recall\n"
        "GenKL          100.0         75.0\n"
        "entropy         50.0         50.0\n"
        "\n"
        "At its own threshold\n"
        "identifier   flagged   recall   precision     F1\n"
        "GenKL           25.0     50.0       100.0   66.7\n"
        "\n"
        "Differences, in percentage points\n"
        "less GenKL   AUROC     average   recall at 5 %\n"
        "                     precision      false pos.\n"
        "entropy      -50.0       -25.0           -50.0\n"
        "\n"
        "Within each class: AUROC (1 of 2 classes)\n"
        "given label   rows   positive   GenKL   entropy\n"
        "hat              3          2   100.0      50.0"
    )


def test_the_table_of_classes_is_bounded() -> None:
    truth = np.arange(200) % 2 == 0
    scores = {f"s{i}": np.arange(200.0) for i in range(7)}
    groups = np.where(np.arange(200) < 60, np.arange(200) // 2, 30 + np.arange(200) // 50)
    table = ev.evaluate(scores, truth, groups=groups, draws=0).table()
    title, header, *rows = table.split("\n\n")[-1].splitlines()
    assert title == "Within each class: AUROC (30 of 33 classes, 6 of 7 identifiers)"
    assert "s5" in header and "s6" not in header
    # Those with the most positives, in the order of the classes.
    shown = [int(row.split()[0]) for row in rows]
    assert shown == [*range(27), 31, 32, 33]
    assert table.count("-0.0") == 0 and "+0.0" in table


def test_intervals_are_printed_below_the_values() -> None:
    given = sample(80)
    result = ev.evaluate(**given, draws=25)
    auroc = result.overall["second"].metrics["auroc"]
    table = result.table()
    assert "in %, with 95 % intervals from 25 bootstrap draws" in table
    assert f"{100 * auroc.low:.1f} to {100 * auroc.high:.1f}" in table
    difference = result.overall["second"].differences["auroc"]
    assert f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}" in table


def test_classes_of_one_name_are_numbered() -> None:
    scores, truth = np.arange(6.0), np.array([0, 1, 0, 1, 0, 1])
    names = ["crane", "hat", "crane"]
    found = ev.evaluate({"a": scores}, truth, groups=[0, 0, 1, 1, 2, 2], group_names=names, draws=0)
    assert list(found.classes) == ["crane (0)", "hat", "crane (2)"]
    assert "crane (2)" in found.table()


def test_progress() -> None:
    calls: list[tuple[int, int]] = []
    ev.evaluate(**sample(30), draws=25, progress=lambda *call: calls.append(call))
    assert calls[-1] == (25, 25)


TRUTH = np.array([True, False, True])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": {}}, ValueError, "scores must name at least one identifier"),
        (
            {"scores": {"a": np.zeros(3), "b": np.zeros(4)}},
            ValueError,
            "scores must have one length, got 4 for 'b' and 3 for 'a'",
        ),
        ({"scores": {"a": np.zeros((3, 1))}}, ValueError, r"shape \(N,\), N > 0, got \(3, 1\)"),
        ({"scores": {"a": np.array(["x"] * 3)}}, TypeError, r"scores\['a'\] must be numbers"),
        ({"truth": None}, ValueError, "either truth or verified must be given, and not both"),
        ({"verified": [0]}, ValueError, "either truth or verified must be given, and not both"),
        ({"truth": TRUTH[:2]}, ValueError, r"truth must have shape \(3,\), got \(2,\)"),
        ({"truth": [1, 0, 2]}, ValueError, "truth must be 1, 0 or -1, got 2 at row 2"),
        ({"truth": [0.5, 0, 1]}, TypeError, "truth must be bool or integers, got float64"),
        ({"truth": [1, 1, -1]}, ValueError, "truth must have both 0 and 1, got 2 of 2 rows"),
        ({"truth": [0, 0, 0]}, ValueError, "truth must have both 0 and 1, got 0 of 3 rows"),
        ({"truth": None, "verified": []}, ValueError, "verified must name a row, got 0 of 3"),
        ({"truth": None, "verified": [3]}, ValueError, "verified must be rows from 0 to 2, got 3"),
        ({"truth": None, "verified": [0.0]}, ValueError, "verified must be a mask or .* float64"),
        (
            {"truth": None, "verified": TRUTH[:2]},
            ValueError,
            r"verified must have shape \(3,\), got \(2,\)",
        ),
        ({"decisions": {"b": TRUTH}}, ValueError, "decisions must be of 'a', got 'b'"),
        ({"decisions": {"a": [1, 0, 1]}}, ValueError, r"decisions\['a'\] must be \(3,\) bool"),
        ({"groups": [0.0, 1, 2]}, ValueError, r"groups must be \(3,\) integers"),
        (
            {"groups": [0, 1, 2], "group_names": ["x", "y"]},
            ValueError,
            "groups must be below 2, the number of group_names, got 2 at row 2",
        ),
        (
            {"groups": [0, 1, 0], "group_names": ["x", "x", "x (1)"]},
            ValueError,
            "group_names must differ from each other",
        ),
        ({"shares": [0.1, 0]}, ValueError, "shares must be above 0 and at most 1, got 0"),
        ({"false_positives": 5}, ValueError, "false_positives must be above 0 and at most 1"),
        ({"draws": -1}, ValueError, "draws must be an integer of at least 0, got -1"),
        ({"draws": 1e3}, ValueError, "draws must be an integer of at least 0, got 1000.0"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"level": 95}, ValueError, "level must be between 0 and 1, got 95"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^evaluate: .*{message}"):
        ev.evaluate(**{"scores": {"a": np.arange(3.0)}, "truth": TRUTH, **arguments})


def test_the_functions_refuse_unknown_rows() -> None:
    with pytest.raises(ValueError, match="^evaluate: truth must be 0 or 1, got -1 at row 1$"):
        ev.auroc([1.0, 2.0, 3.0], [1, -1, 0])
    with pytest.raises(ValueError, match="^evaluate: share must be above 0"):
        ev.recall_at_flagged([1.0, 2.0], [1, 0], 0.0)


KEYS = ["images/0/99/a b,1.jpg", "images/ü.jpg", "n.jpg"]


def keyed(keys: list[str], dataset: str = "clothing1m") -> Manifest:
    table = pa.table({"key": keys, "path": keys, "split": ["train"] * len(keys)})
    return Manifest(table, (), dataset, ".")


@pytest.mark.parametrize(
    "content",
    [b"0/99/a b,1.jpg\r\nn.jpg\r\n", b"\xef\xbb\xbfimages/n.jpg\n\nimages/0/99/a b,1.jpg"],
)
def test_read_verified(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "NC_instances.txt"
    path.write_bytes(content)
    assert ev.read_verified(path, keyed(KEYS)).tolist() == [True, False, True]


def test_keys_listed_twice_are_one(tmp_path: Path) -> None:
    path = tmp_path / "NC_instances.txt"
    path.write_text("ü.jpg\nn.jpg\nimages/ü.jpg\nn.jpg\n")
    with pytest.warns(UserWarning, match=r"txt: 2 keys are listed more than once, and count once"):
        assert ev.read_verified(path, keyed(KEYS)).tolist() == [False, True, True]


def test_a_key_that_is_no_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "NC_instances.txt"
    path.write_bytes(b"empty_set\r\n\r\nn.jpg\r\nimages/m.jpg\r\nl.jpg\r\n")
    with pytest.raises(ValueError, match=r"txt: .*got 2 that are not, first 'm\.jpg' in line 4$"):
        ev.read_verified(path, keyed(KEYS))
    path.write_text("/data/Food-101N_release/images/pie/1.jpg\ncake/2.jpg\n")
    with pytest.raises(ValueError, match=r"got 1 that are not, first 'cake/2\.jpg'"):
        ev.read_verified(path, keyed(["pie/1.jpg"], "food101n"))


def test_the_published_list(shared_data: Path) -> None:
    path = shared_data.parent / "reference" / "data" / "genkl" / "NC_instances.txt"
    if not path.is_file():
        pytest.skip(f"no published files: {path} is no file")
    listed = path.read_text().split()
    order = np.random.default_rng(0).permutation(1000)
    keys = [*(f"images/{key}" for key in listed), *(f"images/0/00/{i}.jpg" for i in range(800))]
    verified = ev.read_verified(path, keyed([keys[i] for i in order]))
    assert verified.tolist() == (order < 200).tolist()
    # A score that puts half of the listed images first, the other half last.
    scores = np.where(order < 100, 2.0, np.where(order < 200, 0.0, 1.0))
    found = ev.evaluate({"half": scores}, verified=verified, draws=200).overall["half"].metrics
    assert found["recall_at_10_flagged"].value == 0.5
    assert found["recall_at_5_flagged"].value == pytest.approx(0.25)
    assert found["area"].value == pytest.approx(0.5)
    assert 0.4 < found["recall_at_20_flagged"].low < 0.5 < found["recall_at_20_flagged"].high < 0.6


def test_wrong_labels_of_cifar10(shared_data: Path) -> None:
    """Labels are the truth here: what looks at the given label finds the wrong ones."""
    from genkl_ext import identifiers

    name = str(shared_data / "softmax" / "cifar10_noise2_sparsity0")
    predictions = np.load(name + "_probs.npy")
    given, true = np.load(name + "_labels.npy").T.astype(np.int64)
    wrong = given != true
    scores = {
        word: identifiers.get(word)(predictions, labels=given, validate=False)
        for word in ("self_confidence", "normalised_margin", "entropy")
    }
    result = ev.evaluate(scores, wrong, groups=given, draws=40)
    for word, quality in result.overall.items():
        assert quality.metrics["auroc"].value == pytest.approx(
            sk.roc_auc_score(wrong, scores[word]), abs=1e-9
        )
        assert quality.metrics["average_precision"].value == pytest.approx(
            sk.average_precision_score(wrong, scores[word]), abs=1e-9
        )
    assert result.positives == wrong.sum() and len(result.classes) == 10
    assert result.overall["entropy"].differences["auroc"].high < 0
