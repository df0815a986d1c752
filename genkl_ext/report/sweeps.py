"""The figures of a sweep: what is flagged over alpha, how stable that is, and how good.

style.save(sweeps.overview(found), "sweep.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..sweep import Sweep

_PANEL = (6.4, 3.6)  # inches
_MAP = "cividis"  # even in brightness, and alike with any kind of colour vision


def overview(sweep: Sweep, quality: str = "f1") -> Figure:
    """All that the sweep can show, a panel for each, one below the other.

    Args:
        sweep: the NC share always; stability where rules differ in the seed; a map of false
            positives with verified rows, and one of ``quality`` with the truth.
        quality: see :meth:`Sweep.quality`.
    """
    panels: list[Any] = [draw_shares]
    if sweep.both_counts:
        panels.append(draw_stability)
    if sweep.clean_counts is not None:
        panels.append(draw_false_positives)
    if sweep.true_counts is not None:
        panels.append(lambda axes, found: draw_quality(axes, found, quality))
    figure = style.figure(_PANEL[0], _PANEL[1] * len(panels))
    for axes, draw in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        draw(axes, sweep)
    return figure


def draw_shares(axes: Axes, sweep: Sweep) -> None:
    """NC share over alpha, a line for each group: the mean over seeds, in a band of all of them."""
    shares = 100 * sweep.shares
    for colour, name, group in zip(_colours(sweep), sweep.names(), sweep.groups, strict=True):
        lines = shares[list(group)]
        axes.plot(sweep.alphas, lines.mean(axis=0), color=colour, label=name)
        if len(group) > 1:
            low, high = lines.min(axis=0), lines.max(axis=0)
            axes.fill_between(sweep.alphas, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.set_ylim(0, None)
    several = any(len(group) > 1 for group in sweep.groups)
    style.label(
        axes,
        "Rows that do not conform",
        "alpha",
        "NC share, % of rows" + (" (band: all seeds)" if several else ""),
    )
    _alpha_axis(axes, sweep)
    axes.legend(frameon=False, fontsize="small")


def draw_stability(axes: Axes, sweep: Sweep) -> None:
    """Mean Jaccard index of the NC sets of two seeds, over alpha, as far as all sets have a row."""
    stability = sweep.stability()
    for g, (colour, name) in enumerate(zip(_colours(sweep), sweep.names(), strict=True)):
        flagged = sweep.nc_counts[list(sweep.groups[g])].all(axis=0)
        axes.plot(sweep.alphas[flagged], stability[g][flagged], color=colour, label=name)
    axes.set_ylim(0, 1.02)
    style.label(
        axes, "Agreement of the NC sets of two seeds", "alpha", "mean Jaccard index (1: the same)"
    )
    _alpha_axis(axes, sweep)
    axes.legend(frameon=False, fontsize="small")


def draw_false_positives(axes: Axes, sweep: Sweep) -> None:
    """Share of verified rows flagged, over alpha and groups; lines where it falls to 10 and 5 %."""
    values = 100 * sweep.mean(sweep.false_positives)
    _draw_map(axes, sweep, values, "flagged, % of verified rows", 0, None)
    for g, line in enumerate(values):
        for level, side in ((5, "left"), (10, "right")):
            # They fall with alpha: this is the first one that keeps the level.
            a = int(np.argmax(line <= level))
            if a > 0:
                axes.plot([sweep.alphas[a]] * 2, [g - 0.5, g + 0.5], color=style.RED, linewidth=1.2)
                text = f"{level} %"
                axes.text(
                    sweep.alphas[a], g, text, color="white", rotation=90, va="center", ha=side,
                    fontsize="small",
                )  # fmt: skip
    style.label(axes, "Verified rows that are flagged", "alpha", _group_axis(sweep))


def draw_quality(axes: Axes, sweep: Sweep, name: str = "f1") -> None:
    """A quality over alpha and groups (mean over seeds), its best cell marked."""
    values = sweep.mean(sweep.quality(name))
    title = {"f1": "F1"}.get(name, name.replace("_", " "))
    _draw_map(axes, sweep, values, title, 0, 1 if name == "balanced_accuracy" else None)
    if not np.isnan(values).all():
        g, a = np.unravel_index(np.nanargmax(values), values.shape)
        best = f"best {title} {values[g, a]:.3f} at alpha {sweep.alphas[a]:.3g}"
        axes.plot(sweep.alphas[a], g, "o", markerfacecolor="white", markeredgecolor=style.RED)
    else:
        best = "nowhere defined"
    style.label(axes, f"Agreement with the truth: {best}", "alpha", _group_axis(sweep))


def _draw_map(
    axes: Axes,
    sweep: Sweep,
    values: NDArray[np.float64],
    what: str,
    low: float | None,
    high: float | None,
) -> None:
    """Cells of (G, A) values; groups are rows, whatever their distance."""
    mesh = axes.pcolormesh(
        _edges(sweep.alphas),
        np.arange(len(values) + 1) - 0.5,
        values,
        cmap=_MAP,
        vmin=low,
        vmax=high,
        rasterized=True,
    )
    axes.figure.colorbar(mesh, ax=axes, label=what)
    names = [name.removeprefix("beta ") if _beta_only(sweep) else name for name in sweep.names()]
    axes.set_yticks(range(len(values)), names)


def _edges(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the cells of some ascending points end: halfway between them."""
    if len(points) == 1:
        return np.array([points[0] - 0.5, points[0] + 0.5])
    middle = (points[1:] + points[:-1]) / 2
    first, last = 2 * points[0] - middle[0], 2 * points[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])


def _alpha_axis(axes: Axes, sweep: Sweep) -> None:
    """All alphas, and a line where all rules have theirs, if it is one."""
    if len(sweep.alphas) > 1:
        axes.set_xlim(sweep.alphas[0], sweep.alphas[-1])
    own = {rule.alpha for rule in sweep.rules}
    if len(own) == 1:
        axes.axvline(own.pop(), color=style.INK, linestyle="--", linewidth=1)


def _beta_only(sweep: Sweep) -> bool:
    return all(name.startswith("beta ") and "," not in name for name in sweep.names())


def _group_axis(sweep: Sweep) -> str:
    return "beta" if _beta_only(sweep) else ""


def _colours(sweep: Sweep) -> list[Any]:
    """One for each group: told apart by hue while they are few, else in order of brightness."""
    count = len(sweep.groups)
    if count <= len(style.ALL):
        return list(style.ALL[:count])
    import matplotlib

    return list(matplotlib.colormaps[_MAP](np.linspace(0, 0.9, count)))
