"""The figures of a sweep show its numbers."""

from pathlib import Path

import numpy as np
import pytest

import genkl_ext as gk
from genkl_ext import reference
from genkl_ext.report import style, sweeps
from genkl_ext.sweep import Sweep, grid, sweep

RULE = gk.GenKL.preset("clothing1m")


def found(betas: list[float], seeds: list[int], **more: object) -> Sweep:
    stream = np.random.default_rng(0)
    q = reference.softmax(stream.normal(size=(80, 14)))
    rules = grid(RULE, betas=betas, seeds=seeds)
    return sweep(q, rules, alphas=np.linspace(0, 2, 21), **more)


def test_overview_has_a_panel_for_all_that_is_known(tmp_path: Path) -> None:
    clean = reference.softmax(np.random.default_rng(1).normal(size=(30, 14)) * 2)
    whole = found([0.01, 0.03, 0.05], [0, 1, 2], truth=np.arange(80) < 30, clean=clean)
    figure = sweeps.overview(whole)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [title.partition(":")[0] for title in titles] == [
        "Rows that do not conform",
        "Agreement of the NC sets of two seeds",
        "Verified rows that are flagged",
        "Agreement with the truth",
    ]
    for axes in panels:
        assert axes.get_xlabel() == "alpha" and axes.get_ylabel()
    assert f"best F1 {whole.mean(whole.quality()).max():.3f} " in titles[-1]
    for name in ("sweep.png", "sweep.svg", "sweep.pdf"):
        assert style.save(figure, tmp_path / name).stat().st_size > 1000
    first = (tmp_path / "sweep.png").read_bytes()
    style.save(sweeps.overview(whole), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first


def test_only_what_is_known_is_drawn() -> None:
    figure = sweeps.overview(found([0.01, 0.03], [0]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Rows that do not conform"]


def test_lines_are_the_means_over_seeds() -> None:
    of = found([0.01, 0.05], [0, 1])
    axes = style.figure().subplots()
    sweeps.draw_shares(axes, of)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["beta 0.01", "beta 0.05"] and "%" in axes.get_ylabel()
    for line, mean in zip(axes.lines, of.mean(of.shares), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), of.alphas)
        np.testing.assert_allclose(line.get_ydata(), 100 * mean)
    assert axes.lines[-1].get_xdata()[0] == RULE.alpha  # where the rules are
    axes = style.figure().subplots()
    sweeps.draw_stability(axes, of)
    for g, line in enumerate(axes.lines[:2]):
        there = of.nc_counts[list(of.groups[g])].all(axis=0)
        assert 0 < there.sum() < len(there)
        np.testing.assert_allclose(line.get_ydata(), of.stability()[g][there])


def test_maps_have_a_cell_for_each_group_and_alpha() -> None:
    clean = reference.softmax(np.random.default_rng(1).normal(size=(40, 14)))
    of = found([0.01, 0.05], [0, 1], truth=np.arange(80) < 30, clean=clean)
    axes = style.figure().subplots()
    sweeps.draw_quality(axes, of, "recall")
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array(), of.mean(of.quality("recall")))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.01", "0.05"]
    assert axes.get_ylabel() == "beta"
    axes = style.figure().subplots()
    sweeps.draw_false_positives(axes, of)
    np.testing.assert_allclose(axes.collections[0].get_array(), 100 * of.mean(of.false_positives))
    for line, text in zip(axes.lines, axes.texts, strict=True):
        group, level = round(text.get_position()[1]), float(text.get_text().removesuffix(" %"))
        share = 100 * of.mean(of.false_positives)[group]
        a = of.alphas.tolist().index(line.get_xdata()[0])
        assert share[a] <= level < share[a - 1]
    assert len(axes.lines) == 4


@pytest.mark.parametrize("count", [1, 7, 12])
def test_any_number_of_groups_and_of_rows(count: int) -> None:
    of = found(np.linspace(0.001, 0.06, count).tolist(), [0])
    axes = style.figure().subplots()
    sweeps.draw_shares(axes, of)
    assert len({str(line.get_color()) for line in axes.lines[:count]}) == count
    empty = sweep(np.zeros((0, 14)), grid(RULE, seeds=[0, 1]), truth=np.zeros(0, bool))
    sweeps.overview(empty, "precision").canvas.draw()


def test_groups_that_differ_in_more_than_beta_are_named_in_full() -> None:
    q = reference.softmax(np.random.default_rng(0).normal(size=(9, 14)))
    of = sweep(q, grid(RULE, betas=[0.01, 0.03], sigmas=[0, 0.05]), truth=np.arange(9) < 3)
    axes = style.figure().subplots()
    sweeps.draw_quality(axes, of)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[1] == "beta 0.01, sigma 0.05" and axes.get_ylabel() == ""
