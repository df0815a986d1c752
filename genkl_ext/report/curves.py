"""Figures of an evaluation: what is found as more rows are flagged, ROC, precision and recall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..evaluation import Curve, Evaluation

_STYLES = ("-", "--", ":", "-.")  # of the first seven identifiers, of the next seven ...
_RANDOM = {"color": style.GREY, "linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}


def draw(evaluation: Evaluation) -> Figure:
    """Recall over the flagged share; with full truth also the ROC and precision over recall.

    A dot is what an identifier flags by its own rule; a dotted line is what random scores reach. In
    the legend is the area under the ROC curve, or under recall where only positives are known.
    """
    full = not evaluation.positives_only
    columns = 3 if full else 2
    rows = -(-len(evaluation.curves) // columns)
    # Square panels, above as many lines as the legend takes.
    figure = style.figure(13 if full else 5.6, (4.7 if full else 6.1) + 0.26 * rows)
    panels = figure.subplots(1, 3 if full else 1, squeeze=False)[0]
    metric, title = ("auroc", "AUROC") if full else ("area", "area")
    for i, (name, curve) in enumerate(evaluation.curves.items()):
        look = {
            "color": style.ALL[i % len(style.ALL)],
            "linestyle": _STYLES[i // len(style.ALL) % len(_STYLES)],
            "linewidth": 1.8,
        }
        area = 100 * evaluation.overall[name].metrics[metric].value
        panels[0].plot(
            _percent(curve.flagged), _percent(curve.recall), label=f"{name}: {title} {area:.1f}",
            **look,
        )  # fmt: skip
        if full:
            panels[1].plot(_percent(curve.false_positives), _percent(curve.recall), **look)
            _steps(panels[2], curve, look)
    for i, name in enumerate(evaluation.curves):
        _own_threshold(panels, evaluation, name, style.ALL[i % len(style.ALL)])

    panels[0].plot([0, 100], [0, 100], **_RANDOM)
    style.label(panels[0], "Recall", "flagged, % of all rows", "recall, % of the positives")
    if full:
        share = 100 * evaluation.positives / evaluation.rows
        panels[1].plot([0, 100], [0, 100], **_RANDOM)
        style.label(panels[1], "ROC", "false positives, % of the negatives", "recall, %")
        panels[2].axhline(share, **_RANDOM)
        style.label(panels[2], "Precision", "recall, %", "precision, % of the flagged rows")
    for axes in panels:
        axes.set(xlim=(0, 100), ylim=(0, 101.5), aspect="equal")
    columns = min(columns, len(evaluation.curves))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _steps(axes: Axes, curve: Curve, look: dict[str, object]) -> None:
    """Precision over recall, in the steps whose area is the average precision."""
    precision = _percent(curve.precision)
    axes.step(_percent(curve.recall), precision, where="pre", **look)  # type: ignore[arg-type]


def _own_threshold(panels: np.ndarray, evaluation: Evaluation, name: str, colour: str) -> None:
    """A dot in each panel, for an identifier with decisions."""
    metrics = evaluation.overall[name].metrics
    if "flagged" not in metrics:
        return
    flagged, recall = metrics["flagged"].value, metrics["recall"].value
    points = [(flagged, recall)]
    if not evaluation.positives_only:
        positives, rows = evaluation.positives, evaluation.rows
        false = (flagged * rows - recall * positives) / (rows - positives)
        points += [(false, recall), (recall, metrics["precision"].value)]
    for axes, (x, y) in zip(panels, points, strict=True):
        axes.plot(
            100 * x, 100 * y, "o", color=colour, markeredgecolor="white", markersize=8, zorder=5,
            clip_on=False,
        )  # fmt: skip


def _percent(shares: tuple[float, ...]) -> np.ndarray:
    return 100 * np.asarray(shares)
