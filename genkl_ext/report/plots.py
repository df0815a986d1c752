"""The figures of a run, each in one place: for the page, for ``genkl plot``, for ``Scores.hist``.

    critical_alpha    where the rule puts the images, and from where on they are non-conforming
    nc_share          the share of non-conforming images in each class
    label_flow        given label -> most probable class
    accuracy          of each kind of training, over the seeds
    learning          of single trainings, over the epochs

All take arrays and return a matplotlib figure of ``size`` inches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Size = tuple[float, float]

WIDE = (6.4, 3.8)
MOST_CLASSES = 30  # of a matrix that can be read; beyond it the largest flows are listed
_MOST_NUMBERS = 12  # classes of a matrix with its numbers in it
_BINS = 60
_LONGEST_NAME = 18
_MOST_BARS = 20


@dataclasses.dataclass(frozen=True)
class Flow:
    """Images of one given label whose most probable class is one other class."""

    given: int
    top: int
    images: int
    share: float  #: of the images with that given label


@dataclasses.dataclass(frozen=True)
class Curve:
    """One number of one training, epoch by epoch."""

    group: str  #: trainings of one group have one colour and one entry in the legend
    epochs: NDArray[np.float64]
    values: NDArray[np.float64]
    dashed: bool = False


def critical_alpha(
    values: NDArray[Any], alpha: float | None, *, title: str = "Critical alpha", size: Size = WIDE
) -> Figure:
    """Histogram of critical alphas on a logarithmic axis; from ``alpha`` on in another colour.

    Args:
        values: (N,); what is not finite (rows without a prediction) is left out.
        alpha: of the rule; None draws no threshold.
    """
    figure = style.figure(*size)
    axes = figure.subplots()
    style.label(axes, title, "critical alpha", "images (log scale)")
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        _say_nothing(axes, "no image has a score")
        return figure
    low, high = float(finite.min()), float(finite.max())
    # Few far ones would press all others into the first bars.
    end = float(np.quantile(finite, 0.999))
    end = high if alpha is None else max(end, 1.5 * alpha)
    end = min(high, end) if end > low else high
    if end <= low:
        end = low + 1.0
    edges = np.linspace(low, end, _BINS + 1)
    clipped = high > end
    if alpha is not None and low < alpha < end:
        # The threshold is the edge of a bar: no bar is of both colours.
        edges = np.sort(np.append(edges, alpha))
    limit = np.inf if alpha is None else alpha
    for name, colour, part in (
        ("conforming", style.BLUE, finite[finite < limit]),
        ("non-conforming", style.RED, finite[finite >= limit]),
    ):
        if not len(part):
            continue
        counts, _ = np.histogram(np.minimum(part, end), edges)
        word = "images" if alpha is None else f"{name}: {len(part):,}"
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.75, linewidth=0, label=word)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    if alpha is not None:
        # Up to the legend.
        axes.axvline(alpha, ymax=0.8, color=style.INK, linestyle="--", linewidth=1.2)
    notes = [] if alpha is None else [f"dashed: alpha = {alpha:.4g}"]
    notes += ["last bar: and beyond"] if clipped else []
    if notes:
        axes.set_xlabel(f"critical alpha\n({'; '.join(notes)})")
    axes.legend(frameon=False, loc="upper right")
    return figure


def nc_share(
    classes: NDArray[np.integer],
    nc: NDArray[np.bool_],
    names: Sequence[str],
    *,
    by: str = "given label",
    size: Size = WIDE,
) -> Figure:
    """Share of non-conforming images in each class, the largest first; bars end with the counts.

    Args:
        classes: (N,) integers; -1 for none.
        nc: (N,).
        names: k names; with many classes, those with the largest shares are drawn.
        by: what the classes are.
    """
    of_class = classes >= 0
    images = np.bincount(classes[of_class], minlength=len(names))
    found = np.bincount(classes[of_class & nc], minlength=len(names))
    share = np.divide(found, images, out=np.zeros(len(names)), where=images > 0)
    order = np.lexsort((np.arange(len(names)), -images, -share))
    order = order[images[order] > 0][:_MOST_BARS]
    title = "Non-conforming share by class"
    if (images > 0).sum() > len(order):
        title = f"The {len(order)} classes with the largest NC share"
    figure = style.figure(size[0], max(size[1], 1.2 + 0.24 * len(order)))
    axes = figure.subplots()
    style.label(axes, title, f"non-conforming, % of each {by}", "")
    if not len(order):
        _say_nothing(axes, "no image has a class")
        return figure
    _bars(
        axes,
        [_short(names[c]) for c in order],
        100 * share[order],
        [f"{found[c]:,} of {images[c]:,}" for c in order],
    )
    overall = 100 * found.sum() / images.sum()
    axes.axvline(overall, color=style.GREY, linestyle="--", linewidth=1.2, zorder=0)
    axes.set_xlabel(f"{axes.get_xlabel()}\n(dashed: {overall:.3g} % of all)")
    return figure


def label_flow(flow: NDArray[np.integer], names: Sequence[str], *, size: Size = WIDE) -> Figure:
    """Given label -> most probable class: a matrix, or the largest flows where it would be too big.

    Args:
        flow: (k, k) counts, a row for each given label.
        names: k names.
    """
    k = len(names)
    if k > MOST_CLASSES:
        return _flow_bars(flow, names, size)
    side = max(size[1], 1.4 + 0.24 * k)
    figure = style.figure(max(size[0], side + 0.4), side)
    axes = figure.subplots()
    style.label(axes, "Given label and most probable class", "most probable class", "given label")
    images = flow.sum(axis=1, keepdims=True)
    share = np.divide(flow, images, out=np.zeros(flow.shape), where=images > 0)
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    row, column = np.nonzero(flow)
    # Never so dark that text of the page's own colour is hard to read on it.
    shades = [(*to_rgb(style.BLUE), 0.08 + 0.62 * share[i, j]) for i, j in zip(row, column)]  # noqa: B905
    cells = [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j in zip(row, column)]  # noqa: B905
    axes.add_collection(PatchCollection(cells, facecolors=shades, linewidths=0))
    if k <= _MOST_NUMBERS:
        for i, j in zip(row.tolist(), column.tolist(), strict=True):
            axes.text(
                j, i, f"{flow[i, j]:,}", ha="center", va="center", fontsize=8, color=style.INK
            )
    labels = [_short(name) for name in names]
    axes.set_xticks(range(k), labels, rotation=90, parse_math=False, fontsize=9)
    style.named_rows(axes, labels)
    axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5))
    axes.set_xlabel("most probable class\n(stronger: a larger share of the row)")
    return figure


def largest_flows(flow: NDArray[np.integer], most: int) -> list[Flow]:
    """The most frequent pairs of given label and another most probable class.

    Args:
        flow: (k, k) counts, a row for each given label.
        most: how many pairs.
    """
    moved = flow.copy()
    np.fill_diagonal(moved, 0)
    images = flow.sum(axis=1)
    pairs = np.argsort(-moved, axis=None, kind="stable")[:most]
    flows = []
    for pair in pairs:
        i, j = divmod(int(pair), len(moved))
        if moved[i, j]:
            flows.append(Flow(i, j, int(moved[i, j]), float(moved[i, j] / images[i])))
    return flows


def accuracy(
    groups: Sequence[tuple[str, Sequence[float]]], *, what: str = "test", size: Size = WIDE
) -> Figure:
    """Accuracy of each kind of training: a dot for each seed, mean and standard deviation.

    Args:
        groups: name, and accuracies from 0 to 1, one for each seed.
        what: of which images.
    """
    groups = [(name, values) for name, values in groups if len(values)]
    figure = style.figure(size[0], max(2.2, 1.2 + 0.3 * len(groups)))
    axes = figure.subplots()
    style.label(axes, f"Accuracy on the {what} images", f"{what} accuracy, %", "")
    if not groups:
        _say_nothing(axes, "no training is done")
        return figure
    for y, (_, values) in enumerate(groups):
        percent = 100 * np.asarray(values)
        axes.plot(percent, np.full(len(percent), y), "o", color=style.GREY, markersize=4, alpha=0.6)
        spread = percent.std(ddof=1) if len(percent) > 1 else 0.0
        axes.errorbar(
            percent.mean(), y, xerr=spread, fmt="D", color=style.BLUE, markersize=6, capsize=4
        )
    style.named_rows(axes, [_short(name, 32) for name, _ in groups])
    axes.grid(axis="x", color=style.GREY, alpha=0.3, linewidth=0.6)
    if any(len(values) > 1 for _, values in groups):
        axes.set_xlabel(f"{what} accuracy, % (dots: seeds; diamond: mean ± sd)", loc="right")
    return figure


def learning(
    curves: Sequence[Curve],
    *,
    what: str = "validation accuracy, %",
    title: str = "Training",
    size: Size = WIDE,
) -> Figure:
    """A number of several trainings over the epochs, a line for each."""
    from matplotlib.ticker import MaxNLocator

    figure = style.figure(*size)
    axes = figure.subplots()
    style.label(axes, title, "epoch", what)
    if not curves:
        _say_nothing(axes, "no training has ended an epoch")
        return figure
    groups = list(dict.fromkeys(curve.group for curve in curves))
    named = set()
    for curve in curves:
        axes.plot(
            curve.epochs,
            curve.values,
            color=style.ALL[groups.index(curve.group) % len(style.ALL)],
            linestyle="--" if curve.dashed else "-",
            marker="o",
            markersize=3,
            linewidth=1.3,
            label=None if curve.group in named else curve.group,
        )
        named.add(curve.group)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=style.GREY, alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _flow_bars(flow: NDArray[np.integer], names: Sequence[str], size: Size) -> Figure:
    flows = largest_flows(flow, _MOST_BARS)
    figure = style.figure(size[0], max(size[1], 1.0 + 0.24 * len(flows)))
    axes = figure.subplots()
    title = f"The {len(flows)} largest flows of labels"
    style.label(axes, title, "images", "")
    if not flows:
        _say_nothing(axes, "no image has another most probable class")
        return figure
    words = [f"{_short(names[f.given])} → {_short(names[f.top])}" for f in flows]
    counts = np.array([f.images for f in flows])
    _bars(axes, words, counts, [f"{f.images:,} ({100 * f.share:.3g} %)" for f in flows])
    axes.set_xlabel("images (share of those with the given label)")
    return figure


def _bars(axes: Axes, names: Sequence[str], values: NDArray[Any], words: Sequence[str]) -> None:
    """Horizontal bars from top to bottom, each with words at its end."""
    places = np.arange(len(names))
    axes.barh(places, values, color=style.BLUE, alpha=0.75)
    for y, value, word in zip(places, values, words, strict=True):
        axes.annotate(
            word,
            (value, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=style.INK,
        )
    style.named_rows(axes, names)
    axes.set_xlim(0, 1.4 * max(float(values.max()), 1e-9))


def _short(name: str, most: int = _LONGEST_NAME) -> str:
    """A name for an axis: one line, not too long."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= most else name[: most - 1] + "…"


def _say_nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=style.INK)
    axes.set(xticks=[], yticks=[])
