"""The figures: what they draw is counted again from the arrays."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.patches import StepPatch

import genkl_ext as gk
from genkl_ext.report import plots, style

NAMES = ("dress", "$x_{", "<b>&", "a very long name of a class")


def written(figure, path: Path) -> str:
    """The figure as a reader of the file sees it: drawing finds what cannot be drawn."""
    style.save(figure, path)
    return path.read_text(encoding="utf-8")


def bars(axes) -> list[StepPatch]:
    return [patch for patch in axes.patches if isinstance(patch, StepPatch)]


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_histogram_counts_every_row_on_its_side_of_alpha(tmp_path: Path, size: int) -> None:
    values = np.random.default_rng(size).gamma(2, 0.4, size).astype(np.float32)
    values[0] = alpha = np.float32(0.75)  # on the threshold: non-conforming
    if size > 1:
        values[1] = np.nan
    figure = plots.critical_alpha(values, float(alpha))
    axes = figure.axes[0]
    by_name = {patch.get_label(): patch.get_data() for patch in bars(axes)}
    nc, rest = int((values >= alpha).sum()), int((values < alpha).sum())
    expected = {f"non-conforming: {nc:,}": nc} | ({f"conforming: {rest:,}": rest} if rest else {})
    assert {name: data.values.sum() for name, data in by_name.items()} == expected
    for name, data in by_name.items():
        filled = np.flatnonzero(data.values)
        if name.startswith("non"):
            assert data.edges[filled[0]] >= alpha or size < 3
        elif size > 2:
            assert data.edges[filled[-1] + 1] <= alpha
    assert "alpha = 0.75" in axes.get_xlabel() and axes.get_ylabel() == "images (log scale)"
    written(figure, tmp_path / "a.svg")


def test_histogram_far_values_are_in_the_last_bar() -> None:
    values = np.concatenate([np.linspace(0, 1, 5000), [500.0, 900.0]])
    axes = plots.critical_alpha(values, 0.5).axes[0]
    assert "last bar: and beyond" in axes.get_xlabel()
    assert sum(patch.get_data().values.sum() for patch in bars(axes)) == 5002
    assert max(patch.get_data().edges[-1] for patch in bars(axes)) < 2


@pytest.mark.parametrize("values", [[], [np.nan, np.inf], [0.3], [0.0, 0.0], [-0.1, 5.0]])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 100.0])
def test_histogram_of_odd_values(tmp_path: Path, values: list[float], alpha: float | None) -> None:
    figure = plots.critical_alpha(np.array(values, np.float32), alpha)
    finite = np.isfinite(values).sum()
    assert sum(p.get_data().values.sum() for p in bars(figure.axes[0])) == finite
    text = written(figure, tmp_path / "a.svg")
    assert ("no image has a score" in text) == (not finite)


def test_share_of_each_class_the_largest_first(tmp_path: Path) -> None:
    classes = np.array([0] * 4 + [1] * 2 + [3] * 5 + [-1] * 3)
    nc = np.array([1, 0, 0, 0] + [1, 0] + [0] * 5 + [1, 1, 1], bool)
    figure = plots.nc_share(classes, nc, NAMES)
    axes = figure.axes[0]
    assert [patch.get_width() for patch in axes.patches] == [50, 25, 0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["$x_{", "dress", "a very long name …"]
    assert [t.get_text() for t in axes.texts] == ["1 of 2", "1 of 4", "0 of 5"]
    assert "18.2 % of all" in axes.get_xlabel()
    assert "$x_{" in written(figure, tmp_path / "a.svg")
    many = plots.nc_share(
        np.arange(300) % 100, np.arange(300) % 7 == 0, [str(c) for c in range(100)]
    )
    assert len(many.axes[0].patches) == 20
    assert many.get_suptitle() == "The 20 classes with the largest NC share"


def test_flow_is_a_matrix_of_all_pairs(tmp_path: Path) -> None:
    flow = np.array([[5, 0, 1, 0], [0, 0, 0, 0], [2, 3, 1234, 0], [0, 0, 0, 7]])
    figure = plots.label_flow(flow, NAMES)
    axes = figure.axes[0]
    cells = next(c for c in axes.collections if isinstance(c, PatchCollection))
    assert len(cells.get_paths()) == (flow > 0).sum()
    written_in = {(round(t.get_position()[1]), round(t.get_position()[0])): t for t in axes.texts}
    assert {place: t.get_text() for place, t in written_in.items()} == {
        (i, j): f"{flow[i, j]:,}" for i, j in zip(*np.nonzero(flow), strict=True)
    }
    shades = cells.get_facecolor()[:, 3]
    assert shades.max() <= 0.7 and np.argmax(shades) in (2, 5, 6)
    assert axes.get_ylabel() == "given label" and "most probable class" in axes.get_xlabel()
    text = written(figure, tmp_path / "a.svg")
    assert "&lt;b&gt;&amp;" in text


def test_of_many_classes_the_largest_flows_are_drawn() -> None:
    k = 50
    flow = np.random.default_rng(0).integers(0, 1000, (k, k))
    pairs = [(flow[i, j], i, j) for i in range(k) for j in range(k) if i != j]
    largest = sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))
    found = plots.largest_flows(flow, 30)
    assert [(f.images, f.given, f.top) for f in found] == largest[:30]
    assert all(f.share == f.images / flow[f.given].sum() for f in found)
    axes = plots.label_flow(flow, [f"c{c}" for c in range(k)]).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [n for n, _, _ in largest[:20]]
    assert axes.get_yticklabels()[0].get_text() == f"c{largest[0][1]} → c{largest[0][2]}"
    assert plots.largest_flows(np.diag([3, 4]), 5) == []
    plots.label_flow(np.zeros((k, k), int), [str(c) for c in range(k)])


def test_accuracy_has_seeds_mean_and_deviation(tmp_path: Path) -> None:
    groups = [("plain", (0.5, 0.6)), ("nothing yet", ()), ("GenKL", (0.7,))]
    figure = plots.accuracy(groups)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["plain", "GenKL"]
    seeds = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in seeds] == [[50, 60], [70]]
    means = [line for line in axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose([line.get_xdata()[0] for line in means], [55, 70])
    (low, _), (high, _) = axes.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose((high - low) / 2, np.std([50, 60], ddof=1))
    written(figure, tmp_path / "a.svg")
    assert "no training is done" in written(plots.accuracy([]), tmp_path / "b.svg")


def test_learning_has_a_line_for_each_training_and_a_word_for_each_group(tmp_path: Path) -> None:
    epochs = np.arange(1.0, 4.0)
    curves = [plots.Curve(name, epochs, epochs * i) for i, name in enumerate(["a", "a", "b"])]
    axes = plots.learning(curves).axes[0]
    assert len(axes.lines) == 3
    assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert "no training" in written(plots.learning([]), tmp_path / "b.svg")


def test_names_with_control_characters_stay_on_one_line() -> None:
    axes = plots.nc_share(np.array([0]), np.array([True]), ["a\nb\x00"]).axes[0]
    assert (
        axes.get_yticklabels()[0].get_text()
        == "a\N{REPLACEMENT CHARACTER}b" + "\N{REPLACEMENT CHARACTER}"
    )


def test_an_svg_takes_font_colours_and_size_from_its_page() -> None:
    figure = plots.critical_alpha(np.linspace(0, 1, 99), 0.5)
    text = style.svg(figure, "one")
    assert text.startswith('<svg role="img" viewBox="0 0 ') and text.endswith("</svg>\n")
    assert "http" not in text and "<style" not in text and "<?xml" not in text
    assert "currentColor" in text and "var(--blue)" in text and "var(--red)" in text
    assert not re.search("#[0-9a-f]{6}", text.replace("var(", "")), re.findall("#[0-9a-f]{6}", text)
    assert text == style.svg(plots.critical_alpha(np.linspace(0, 1, 99), 0.5), "one")
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    other = set(re.findall(r'\bid="([^"]*)"', style.svg(figure, "two")))
    assert ids and not ids & other
    assert all(name.startswith("one-") for name in ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= ids
    assert set(re.findall(r'href="#([^"]*)"', text)) <= ids


def test_scores_draw_their_histogram(tmp_path: Path) -> None:
    q = np.random.default_rng(0).dirichlet(np.full(14, 0.2), 500).astype(np.float32)
    scores = gk.GenKL.preset("clothing1m", alpha=0.3).score(q)
    nc = int(np.asarray(scores.nc).sum())
    assert 0 < nc < 500
    axes = scores.hist(path=tmp_path / "a.png").axes[0]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"non-conforming: {nc}" in [patch.get_label() for patch in bars(axes)]
    assert "alpha = 0.5" in scores.hist(0.5).axes[0].get_xlabel()
    with pytest.raises(ValueError, match="alpha must be"):
        scores.hist(-1)
    with pytest.raises(ValueError, match=r"a figure must end in .png, .svg, .pdf"):
        scores.hist(path=tmp_path / "a.gif")
