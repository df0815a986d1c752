"""The pictures of a run: where critical alpha puts the images, and which it puts on top."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..report import style
from .results import Results

_COLUMNS, _ROWS = 10, 4


def draw(out: Path, results: Results) -> list[Path]:
    """Write both pictures; return their paths."""
    made = {
        "critical_alpha.png": _histogram(results),
        "most_nonconforming.png": _contact_sheet(results),
    }
    return [style.save(figure, out / name) for name, figure in made.items()]


def _histogram(results: Results) -> Figure:
    """Critical alpha of the noisy images, one panel per iteration."""
    figure = style.figure(10, 3.4)
    axes = figure.subplots(1, len(results.critical), sharey=True, squeeze=False)[0]
    truth = results.nonconforming
    alphas = [i.threshold for i in results.identifications if i.score == "GenKL"]
    for t, (axis, critical, alpha) in enumerate(zip(axes, results.critical, alphas, strict=True)):
        bins = np.linspace(0, critical.max(), 41)
        for name, colour, rows in (
            ("digit 0 to 7: fits a class", style.BLUE, ~truth),
            ("digit 8 or 9: fits none", style.RED, truth),
        ):
            axis.hist(
                critical[rows],
                bins,
                label=name,
                histtype="stepfilled",
                facecolor=(colour, 0.35),
                edgecolor=colour,
                linewidth=1.5,
            )
        axis.axvline(alpha, color=style.INK, linestyle="--", linewidth=1.2)
        axis.annotate(
            f"alpha = {alpha:.2g}\nNC from here on",
            (alpha, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="top",
            color=style.INK,
        )
        axis.set_yscale("log")
        style.label(axis, f"iteration {t}", "critical alpha", "images" if t == 0 else "")
    # Below the words beside the line, wherever that is.
    axes[-1].legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.85))
    return figure


def _contact_sheet(results: Results) -> Figure:
    """The images of the last iteration with the largest critical alpha, in that order."""
    critical, noisy = results.critical[-1], results.noisy
    order = np.argsort(-critical, kind="stable")[: _COLUMNS * _ROWS]
    hits = int(results.nonconforming[order].sum())
    figure = style.figure(10, 6.1)
    figure.suptitle(
        f"The {len(order)} most non-conforming of {len(noisy):,} crawled images",
        x=0.005,
        horizontalalignment="left",
        fontweight="bold",
    )
    for axis, row in zip(figure.subplots(_ROWS, _COLUMNS).flat, order, strict=True):
        with Image.open(noisy.path(row)) as image:
            axis.imshow(np.asarray(image), cmap="gray_r", interpolation="bicubic")
        axis.set_xticks([])
        axis.set_yticks([])
        colour = style.RED if results.nonconforming[row] else style.BLUE
        for side in axis.spines.values():
            side.set(color=colour, linewidth=2)
        axis.set_xlabel(
            f"label {noisy.labels[row]}, top {results.top_class[row]}\n{critical[row]:.2f}",
            fontsize=8,
            color=style.INK,
        )
    figure.supxlabel(
        f"orange frame: an 8 or a 9, fits none of the classes 0 to 7 ({hits} of {len(order)}); "
        f"blue: fits one.\nlabel: given by the crawl; top: most probable class; below: "
        "critical alpha.",
        x=0.005,
        horizontalalignment="left",
        fontsize=9,
        color=style.INK,
    )
    return figure
