"""One HTML page about a run: what was found, how much, and what it did for the accuracy.

The page stands alone: no server, no script, no link to anything outside. Pictures are data URIs,
figures are SVG in the page and take its colours, light or dark. The same run gives the same bytes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__, review
from ..files import atomic_write, require_writable
from . import plots, style
from .findings import Group, Identification, Run, open_run, spread
from .pictures import thumbnails

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
_FIGURE: plots.Size = (4.2, 3.0)  # inches: its text is still to be read on a phone
_MOST_FLOWS = 30
_MOST_BROKEN = 20
_MOST_NAMES = 10  # of stages that are missing
_PLAIN = ("noisy", "both", "members")  # kinds of training without the objective of GenKL
_CONTROL = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127) if chr(code) not in "\n\t"
}

_GALLERIES: tuple[tuple[review.Reason, str, str, str], ...] = (
    (
        "nc",
        "The most non-conforming",
        "They fit no class, or several. The number is the critical alpha, the largest first.",
        "No image is non-conforming.",
    ),
    (
        "mislabelled",
        "The most likely mislabelled",
        "They conform, and another class than the given label is the most probable. The number is "
        "how much more probable it is, the largest difference first.",
        "No conforming image has another most probable class than its label.",
    ),
    (
        "ambiguous",
        "The most ambiguous",
        "They conform, and two classes are nearly as probable. The number is the difference "
        "between the two, the smallest first.",
        "No image conforms.",
    ),
)
_STAGES = (  # of what a stage is, by its name; the first that fits
    (r"scan", "scan for broken files"),
    (r".*/test", "prediction of the test images"),
    (r".*/(predictions|validation)/.*", "prediction"),
    (r".*/(score|relabel)", "scoring and relabelling"),
    (r"baselines/.*", "plain training"),
    (r".*/members/.*", "training of members"),
    (r".*/train", "training with the objective of GenKL"),
    (r".*/finetune", "fine-tuning"),
    (r".*", "other"),
)


def build(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    pictures: int = 24,
    csv: str | os.PathLike[str] | None = None,
    csv_rows: int = 1000,
) -> Path:
    """Write the HTML page of a run, finished or not.

    Warns if the list of images has only the non-conforming ones, for the predictions are gone.
    Memory is some hundred bytes per image, and one iteration's scores; predictions are mapped.

    Args:
        run: the folder of the run.
        out: the page, .html or .htm; by default ``report.html`` in the folder of the run.
        root: where the images are now, if they have moved since the run.
        pictures: how many images of each kind are shown.
        csv: also write the images that people should look at; see ``review.write_list``.
        csv_rows: how many of each kind.

    Returns:
        The page.

    Raises:
        OSError: a file cannot be read or written; a list with decisions is never written over.
            ValueError: it is not the folder of a run, or its files do not fit together; another
            suffix of the page, or a page that is also the list.
    """
    opened = open_run(run, root)
    page = opened.folder / FILE if out is None else Path(out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: out must end in .html or .htm, got {page}")
    require_writable(page)
    if csv is not None:
        if os.path.realpath(csv) == os.path.realpath(page):
            raise ValueError(f"report: csv must be another file than the page, got {page} for both")
        require_writable(csv)
        review.require_undecided(csv)
    facts = _facts(opened, pictures, csv, csv_rows)
    text = _environment().get_template("report.html.j2").render(facts)
    with atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def printable(value: Any) -> Any:
        """Keys and names come from anywhere; HTML has no control characters."""
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return value.translate(_CONTROL) if plain else value

    environment = Environment(
        loader=PackageLoader("genkl_ext.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    environment.filters.update(
        count=lambda n: f"{n:,}",
        percent=lambda share: f"{100 * share:{'.2g' if 0 < share < 1e-3 else '.1f'}}",
        points=lambda gain: f"{abs(100 * gain):.1f} points {'more' if gain >= 0 else 'less'}",
        capital=lambda text: text[:1].upper() + text[1:],
        clock=lambda s: f"{int(s) // 3600}:{int(s) // 60 % 60:02}:{int(s) % 60:02}",
    )
    return environment


def _facts(
    run: Run, pictures: int, csv: str | os.PathLike[str] | None, csv_rows: int
) -> dict[str, Any]:
    """What the template speaks of."""
    iterations: list[dict[str, Any]] = []
    last: Identification | None = None
    for t in run.scored:
        part, last = _iteration(run, t, last)
        iterations.append(part)
    groups = run.groups
    what, naive, before, after = _gain(groups)
    sizes = run.manifest.split_sizes()
    facts = {
        "run": run,
        "sizes": ", ".join(f"{n:,} {'noisy' if s == 'train' else s}" for s, n in sizes.items()),
        "missing": _missing(run),
        "found": None,
        "galleries": [],
        "settled": 0,
        "moved_away": 0,
        "what": what,
        "images": sizes.get("test" if what == "test" else "val", 0),
        "naive": naive,
        "before": before,
        "after": after,
        "groups": [
            {"group": g, "validation": spread(g.validation), "test": spread(g.test)} for g in groups
        ],
        "several": any(len(group.trainings) > 1 for group in groups),
        "accuracy": _accuracy(run),
        "iterations": iterations,
        "ledger": _ledger(run),
        "times": _times(run),
        "stopped": (run.summary or {}).get("stopped") if not run.missing else None,
        "run_version": (run.summary or {}).get("version"),
        "version": __version__,
    }
    if last is not None:
        settled = review.settled(run.manifest)
        facts["settled"] = int(settled.sum())
        candidates = review.find(
            last.critical_alpha,
            last.nc,
            last.top_class,
            run.labels,
            last.members,
            max(pictures, csv_rows if csv is not None else 0),
            settled,
        )
        facts["found"] = {**iterations[-1], "members": len(last.members), "lost": last.lost}
        galleries = _galleries(run, last, candidates, pictures)
        facts["galleries"] = galleries
        shown = [card["picture"] for gallery in galleries for card in gallery["cards"]]
        gone = sum(picture.why.startswith("missing") for picture in shown)
        # One that is missing says so itself; most of them tell that the folder has moved.
        facts["moved_away"] = gone if 2 * gone > len(shown) else 0
        if csv is not None:
            if last.lost:
                warnings.warn(
                    f"{os.fspath(csv)} has non-conforming images only: {last.lost}", stacklevel=3
                )
            chosen = candidates.in_turn(csv_rows)
            review.write_list(csv, run.manifest, chosen, last.critical_alpha, last.members)
    elif csv is not None:
        raise ValueError(f"report: {run.folder} has no scores yet, and so no images to review")
    return facts


def _iteration(
    run: Run, t: int, before: Identification | None
) -> tuple[dict[str, Any], Identification]:
    """Facts and figures of an iteration, and the scores that they are of."""
    trials: list[dict[str, Any]] = []
    shown: Identification | None = None
    for scores in run.identifications(t):
        shown = shown or scores
        trials.append(
            {
                "name": scores.trial,
                "nc": int((scores.nc & scores.scored).sum()),
                "alpha": scores.alpha,
            }
        )
    assert shown is not None  # run.scored lists iterations that have scores
    labels, names = run.labels, run.manifest.class_names
    nc = shown.nc & shown.scored
    flow = shown.flow(labels, len(names))
    small = len(names) <= plots.MOST_CLASSES
    drawn = [
        (
            plots.critical_alpha(shown.critical_alpha, shown.alpha, size=_FIGURE),
            "Each image's critical alpha: from alpha on, it does not conform.",
        ),
        (
            plots.nc_share(shown.labels_scored(labels), nc, names, size=_FIGURE),
            "How many of the images with each given label do not conform.",
        ),
    ]
    if small:
        caption = (
            "Conforming images: off the diagonal, the models see another class than the label."
        )
        drawn.append((plots.label_flow(flow, names, size=_FIGURE), caption))
    if any(g.iteration == t and g.kind != "members" for g in run.groups):
        drawn.append((learning(run, t, _FIGURE), "The trainings of this iteration, seed by seed."))
    part: dict[str, Any] = {
        "iteration": t,
        "trial": shown.trial,
        "trials": trials,
        "alpha": shown.alpha,
        "nc_list": shown.nc_list,
        "scored": int(shown.scored.sum()),
        "left_out": int((~shown.scored).sum()),
        "nc": int(nc.sum()),
        "labelled": int(flow.sum()),
        "moved": int(flow.sum() - np.trace(flow)),
        "jaccard": None,
        "figures": _embedded(drawn, f"i{t}"),
        "flows": [] if small else _named(plots.largest_flows(flow, _MOST_FLOWS), names),
    }
    if before is not None and before.iteration == t - 1:
        both, either = int((before.nc & nc).sum()), int((before.nc | nc).sum())
        part["jaccard"] = both / either if either else 1.0
        part["stayed"] = both
        part["new"], part["gone"] = int(nc.sum()) - both, int(before.nc.sum()) - both
    return part, shown


def _accuracy(run: Run) -> list[dict[str, Any]]:
    """The figures of the section on accuracy."""
    what, groups = accuracies(run.groups)
    drawn = [(plots.accuracy(groups, what=what, size=_FIGURE), "Every training, over its seeds.")]
    if any(group.kind in _PLAIN for group in run.groups):
        drawn.append((learning(run, None, _FIGURE), "Members and plain trainings, seed by seed."))
    return _embedded(drawn, "a")


def accuracies(groups: Sequence[Group]) -> tuple[str, list[tuple[str, tuple[float, ...]]]]:
    """On which images accuracies are compared, and those of each kind of training, by seed."""
    what = "test" if any(group.test for group in groups) else "validation"
    return what, [(g.title, g.test if what == "test" else g.validation) for g in groups]


def learning(run: Run, iteration: int | None, size: plots.Size = plots.WIDE) -> Figure:
    """Accuracy on the validation images by epoch; where there are none, the loss.

    Fine-tuning goes on where the training of its seed ended.

    Args:
        iteration: the trainings of this iteration; None for members and plain trainings.
    """
    curves: dict[bool, list[plots.Curve]] = {True: [], False: []}
    ended: dict[int, float] = {}
    for group in run.groups:
        plain = group.kind in _PLAIN
        if plain != (iteration is None) or not (plain or group.iteration == iteration):
            continue
        for training in group.trainings:
            columns = run.metrics(training)
            if not columns:
                continue
            nothing = np.full(len(columns["epoch"]), np.nan)
            accuracy = 100 * columns.get("validation_accuracy", nothing)
            validated = bool(np.isfinite(accuracy).any())
            values = accuracy if validated else columns["loss"]
            there = np.isfinite(values)
            tuned = group.kind == "finetune"
            epochs = columns["epoch"] + (ended.get(training.seed, 0.0) if tuned else 0.0)
            ended.setdefault(training.seed, float(columns["epoch"][-1]))
            name = group.title if plain else ("fine-tuning" if tuned else "training")
            curves[validated].append(plots.Curve(name, epochs[there], values[there], dashed=tuned))
    validated = bool(curves[True])
    return plots.learning(
        curves[validated],
        what="validation accuracy, %" if validated else "loss",
        title="Members and plain training" if iteration is None else f"Iteration {iteration}",
        size=size,
    )


def _gain(groups: Sequence[Group]) -> tuple[str, Any, Any, Any]:
    """On which images accuracies are compared; the first plain training, the best of the plain ones
    and the best of GenKL: what is there of them. The best is so on the validation images."""
    what, _ = accuracies(groups)
    plain: list[Any] = []
    ours: list[Any] = []
    for group in groups:
        score = spread(group.test if what == "test" else group.validation)
        if score is not None:
            validation = spread(group.validation)
            found = {"group": group, "score": score, "by": validation.mean if validation else 0.0}
            (plain if group.kind in _PLAIN else ours).append(found)

    def best(of: list[Any]) -> Any:
        # Without validation images the last one.
        return max(reversed(of), key=lambda found: found["by"]) if of else None

    if not ours:
        return what, None, None, best(plain)
    return what, plain[0] if plain else None, best(plain), best(ours)


def _missing(run: Run) -> dict[str, Any] | None:
    names = run.missing
    if not names:
        return None
    begun = run.begun
    waiting = [name for name in names if name not in begun]
    return {
        "done": len(run.expected) - len(names),
        "all": len(run.expected),
        "begun": begun,
        "names": waiting[:_MOST_NAMES] or ["the summary"],
        "more": max(0, len(waiting) - _MOST_NAMES),
    }


def _galleries(
    run: Run, scores: Identification, candidates: review.Candidates, pictures: int
) -> list[dict[str, Any]]:
    return [
        {
            "title": title,
            "text": text if len(candidates.rows[reason]) else nothing,
            "found": candidates.found[reason],
            "cards": _cards(run, scores, candidates, reason, pictures),
        }
        for reason, title, text, nothing in _GALLERIES
        if reason == "nc" or scores.members
    ]


def _cards(
    run: Run,
    scores: Identification,
    candidates: review.Candidates,
    reason: review.Reason,
    pictures: int,
) -> list[dict[str, Any]]:
    rows = candidates.rows[reason][:pictures]
    names, labels = review.spellings(run.manifest.class_names), run.labels[rows]
    noisy = run.manifest.rows("train")[rows]
    if scores.members:
        tops = review.top_classes(review.averages(scores.members, rows))
    else:
        tops = [[(int(scores.top_class[row]), float(scores.top_prob[row]))] for row in rows]
    return [
        {
            "key": key,
            "given": names[label] if label >= 0 else "none",
            "score": abs(float(need)),
            "tops": [{"name": names[c], "prob": p, "given": c == label} for c, p in top],
            "picture": picture,
        }
        for key, label, need, top, picture in zip(
            run.manifest.keys(noisy),
            labels.tolist(),
            candidates.need[reason][:pictures],
            tops,
            thumbnails(run.manifest.paths(noisy)),
            strict=True,
        )
    ]


def _ledger(run: Run) -> dict[str, Any] | None:
    ledger = run.ledger
    if ledger is None:
        return None
    return {
        "broken": len(ledger),
        "scanned": ledger.scanned,
        "reasons": sorted(ledger.counts().items(), key=lambda item: (-item[1], item[0])),
        "first": ledger.table.slice(0, _MOST_BROKEN).to_pylist(),
    }


def _times(run: Run) -> list[dict[str, Any]]:
    """Seconds of the stages that are done, by what they are."""
    sums: dict[str, list[float]] = {what: [] for _, what in _STAGES}
    for name, stage in run.stages.items():
        if stage["state"] == "done":
            what = next(what for pattern, what in _STAGES if re.fullmatch(pattern, name))
            sums[what].append(stage["seconds"])
    rows = [(what, seconds) for what, seconds in sums.items() if seconds]
    if rows:
        rows.append(("all", [s for _, seconds in rows for s in seconds]))
    return [{"what": what, "stages": len(s), "seconds": sum(s)} for what, s in rows]


def _named(flows: Sequence[plots.Flow], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"given": names[f.given], "top": names[f.top], "images": f.images, "share": f.share}
        for f in flows
    ]


def _embedded(drawn: Sequence[tuple[Figure, str]], name: str) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [
        {"svg": Markup(style.svg(figure, f"{name}f{i}-")), "caption": caption}
        for i, (figure, caption) in enumerate(drawn)
    ]
