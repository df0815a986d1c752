"""``genkl plot``: single figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["alpha", "classes", "flow", "accuracy", "learning"]


def plot(
    kind: Kind,
    source: Path,
    *,
    out: Path,
    iteration: int | None = None,
    alpha: float | None = None,
    data: str | None = None,
) -> None:
    """Draw one figure of a run or of a table of scores, as PNG, SVG or PDF.

    alpha: histogram of the critical alphas. classes: the share of non-conforming images in each
    class. flow: from given label to most probable class. accuracy: of every kind of training.
    learning: the trainings of an iteration, epoch by epoch.

    Args:
        kind: alpha, classes, flow, accuracy or learning
        source: folder of a run; or, for the first three, a table of scores as Parquet
        out: figure to write; .png, .svg or .pdf
        iteration: of the run, not for accuracy; by default the last one that has scores, or, for
            learning, trainings
        alpha: decide at another alpha than the rule's; for the first three
        data: for classes or flow of a table of scores: the data set that has the labels

    Example:
        genkl plot alpha runs/clothing1m -o alpha.png
        genkl plot alpha scores.parquet --alpha 1.2 -o alpha.pdf
        genkl plot flow scores.parquet --data /data/clothing1m -o flow.svg
    """
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out must end in .png, .svg or .pdf, got {out}")
    if alpha is not None:
        if kind in ("accuracy", "learning"):
            raise UsageError(f"--alpha does not go with {kind}, which has no scores")
        if alpha < 0:
            raise UsageError(f"--alpha must not be negative, got {alpha}")
    if kind == "accuracy" and iteration is not None:
        raise UsageError("--iteration does not go with accuracy, which is of all iterations")
    if source.is_dir():
        if data is not None:
            raise UsageError("--data goes with a table of scores; a run has its own")
        figure = _of_run(kind, source, iteration, alpha)
    elif kind in ("accuracy", "learning"):
        raise UsageError(f"{kind} needs the folder of a run, got {source}")
    elif iteration is not None:
        raise UsageError("--iteration goes with the folder of a run")
    elif kind == "alpha" and data is not None:
        raise UsageError("--data does not go with alpha, which needs no labels")
    else:
        figure = _of_table(kind, source, alpha, data)

    from ..report import style

    print(f"{'figure':<10}{style.save(figure, out)}")


def _of_run(kind: Kind, source: Path, iteration: int | None, alpha: float | None) -> Figure:
    from ..report import findings, html, plots

    run = findings.open_run(source)
    if kind == "accuracy":
        what, groups = html.accuracies(run.groups)
        return plots.accuracy(groups, what=what)
    what, known = ("trainings", run.trained) if kind == "learning" else ("scores", run.scored)
    t = iteration if iteration is not None else max(known, default=0)
    if t not in known:
        there = ", ".join(map(str, known)) or "none"
        raise ValueError(f"plot: {source} must have {what} of iteration {t}, it has: {there}")
    if kind == "learning":
        return html.learning(run, t)
    scores = next(run.identifications(t))
    title = f"{run.name}, iteration {t}"
    return _draw(kind, scores, run.labels, run.manifest.class_names, alpha, title)


def _of_table(kind: Kind, source: Path, alpha: float | None, data: str | None) -> Figure:
    import numpy as np

    from ..report import findings

    scores = findings.read_scores(source)
    if data is None:
        if kind == "flow":
            raise UsageError("flow needs --data, which has the given labels")
        k = scores.num_classes
        return _draw(kind, scores, None, [str(c) for c in range(k)], alpha, source.name)
    manifest = findings.read_data(data)
    labels = np.asarray(manifest.labels[manifest.rows("train")])
    if len(labels) != len(scores.nc):
        raise ValueError(
            f"plot: {source} must have a row for each of {len(labels)} noisy images of {data}, "
            f"got {len(scores.nc)}"
        )
    return _draw(kind, scores, labels, manifest.class_names, alpha, source.name)


def _draw(
    kind: Kind, scores: Any, labels: Any, names: Any, alpha: float | None, title: str
) -> Figure:
    """A figure of scores; without labels, classes are the most probable ones."""
    from ..report import plots

    scores = scores if alpha is None else scores.at(alpha)
    if kind == "alpha":
        return plots.critical_alpha(scores.critical_alpha, scores.alpha, title=title)
    if kind == "flow":
        return plots.label_flow(scores.flow(labels, len(names)), names)
    if labels is None:
        return plots.nc_share(scores.top_class, scores.nc, names, by="most probable class")
    return plots.nc_share(scores.labels_scored(labels), scores.nc, names)
