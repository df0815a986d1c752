from pathlib import Path

import numpy as np
import pytest

from genkl_ext import evaluation
from genkl_ext.report import curves, style


def evaluated(positives_only: bool, identifiers: int = 2) -> evaluation.Evaluation:
    stream = np.random.default_rng(0)
    truth = stream.random(300) < 0.3
    scores = {
        f"score {i}": np.round(stream.standard_normal(300) + truth, 1) for i in range(identifiers)
    }
    decisions = {"score 0": scores["score 0"] > 1}
    known = {"verified": truth} if positives_only else {"truth": truth}
    return evaluation.evaluate(scores, **known, decisions=decisions, draws=0)


def lines(axes: object, style_: str = "-") -> list[np.ndarray]:
    return [line.get_xydata() for line in axes.get_lines() if line.get_linestyle() == style_]  # type: ignore[attr-defined]


def test_full_truth() -> None:
    result = evaluated(positives_only=False)
    recall, roc, precision = curves.draw(result).axes
    for i, curve in enumerate(result.curves.values()):
        drawn = 100 * np.array([curve.flagged, curve.recall]).T
        np.testing.assert_array_equal(lines(recall)[i], drawn)
        drawn = 100 * np.array([curve.false_positives, curve.recall]).T
        np.testing.assert_array_equal(lines(roc)[i], drawn)
        drawn = 100 * np.array([curve.recall, curve.precision]).T
        np.testing.assert_array_equal(lines(precision)[i], drawn)
    assert [line.get_drawstyle() for line in precision.get_lines()][:2] == ["steps-pre"] * 2
    assert (recall.get_xlabel(), recall.get_ylabel()) == (
        "flagged, % of all rows",
        "recall, % of the positives",
    )
    assert precision.get_lines()[-1].get_ydata()[0] == pytest.approx(
        100 * result.positives / result.rows
    )


def test_the_own_threshold_lies_on_the_curves() -> None:
    result = evaluated(positives_only=False)
    for axes in curves.draw(result).axes:
        dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
        assert len(dots) == 1 and dots[0].get_color() == style.BLUE
        (dot,) = dots[0].get_xydata()
        assert np.isclose(lines(axes)[0], dot).all(axis=1).any()


def test_positives_only() -> None:
    result = evaluated(positives_only=True)
    figure = curves.draw(result)
    assert len(figure.axes) == 1
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    areas = [100 * q.metrics["area"].value for q in result.overall.values()]
    assert legend == [f"score {i}: area {area:.1f}" for i, area in enumerate(areas)]


def test_more_identifiers_than_colours_are_told_apart() -> None:
    axes = curves.draw(evaluated(positives_only=True, identifiers=9)).axes[0]
    looks = [
        (line.get_color(), line.get_linestyle())
        for line in axes.get_lines()
        if str(line.get_label()).startswith("score")
    ]
    assert len(looks) == len(set(looks)) == 9


@pytest.mark.parametrize("suffix", style.FORMATS)
def test_saved(tmp_path: Path, suffix: str) -> None:
    result = evaluated(positives_only=False)
    once, again = (
        style.save(curves.draw(result), tmp_path / f"{name}{suffix}").read_bytes() for name in "ab"
    )
    assert once == again and len(once) > 5000
