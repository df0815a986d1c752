"""A finished run judged by the truth: accuracies, NC identification, and the tables of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from .. import __version__, identifiers
from ..data import Manifest
from ..files import atomic_write
from ..training.loop import Spread, Summary, chosen
from . import digits

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    "noisy": "plain, noisy labels",
    "both": "plain, noisy and clean labels",
    "members": "clean labels only",
}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One kind of training: accuracies from 0 to 1, one number per seed."""

    name: str
    validation: list[float]
    test: list[float]


@dataclasses.dataclass(frozen=True)
class Identification:
    """How well one score finds the images that fit no class."""

    iteration: int
    score: str  #: "GenKL" (critical alpha) or "entropy" (normalised entropy)
    threshold: float  #: reached by 5 % of the clean validation images
    flagged: float  #: share of the noisy images
    recall: float
    precision: float
    auroc: float


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that the demo reports."""

    accuracies: list[Accuracy]
    identifications: list[Identification]
    noisy: Manifest  #: the noisy images
    critical: list[NDArray[np.float32]]  #: (N,) of each iteration
    top_class: NDArray[np.int32]  #: (N,) of the last iteration
    nonconforming: NDArray[np.bool_]  #: (N,) the truth: digit 8 or 9
    notes: list[str]


def judge(out: Path, summary: Summary) -> Results:
    """Look at which noisy images fit no class, and compare."""
    run = summary.out
    manifest = Manifest.load(run / "manifest.parquet")
    noisy = manifest.split("train")
    digit = read_pairs(out / "data" / "true_digit_kv.txt")
    true = np.array([digit[key] for key in noisy.keys()])  # noqa: SIM118 (a method, not a dict)
    nonconforming = true >= digits.CLASSES

    def accuracy(name: str, fitted: list[Any]) -> Accuracy:
        validation = [facts["best_accuracy"] for facts in fitted]
        return Accuracy(name, validation, [facts["test"]["top1"] for facts in fitted])

    accuracies = [accuracy(NAMES[name], facts) for name, facts in summary.baselines.items()]
    identifications, critical = [], []
    for facts in summary.iterations:
        t, trials = facts["iteration"], facts["trials"]
        accuracies += [
            accuracy(f"GenKL iteration {t}", [trial["train"] for trial in trials]),
            accuracy(f"GenKL iteration {t}, fine-tuned", [chosen(trial) for trial in trials]),
        ]
        place = run / f"iteration-{t}"
        scores = pq.read_table(place / "scores.parquet")
        critical.append(np.asarray(scores["critical_alpha"]))
        entropy, validation = (
            np.asarray(
                identifiers.entropy(
                    [np.load(place / name / f"{trial['seed']}.npy") for trial in trials]
                )
            )
            for name in ("predictions", "validation")
        )
        limit = float(np.quantile(validation, 0.95, method="higher"))
        alpha = facts["nonconforming"][0]["alpha"]
        identifications += [
            identify(t, "GenKL", critical[-1], alpha, nonconforming),
            identify(t, "entropy", entropy, limit, nonconforming),
        ]
    return Results(
        accuracies,
        identifications,
        noisy,
        critical,
        np.asarray(scores["top_class"]),
        nonconforming,
        _notes(out, summary, int(((noisy.labels != true) & ~nonconforming).sum()), nonconforming),
    )


def read_pairs(path: Path) -> dict[str, int]:
    """A "key label" file."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {key: int(label) for key, label in pairs}


def identify(
    iteration: int,
    name: str,
    score: NDArray[np.floating],
    limit: float,
    nonconforming: NDArray[np.bool_],
) -> Identification:
    """Compare the images whose score reaches the limit with those that fit no class."""
    # The table of scores is float32: an alpha between two of its values is the next one above.
    flagged = score >= np.asarray(limit, score.dtype)
    hits = int((flagged & nonconforming).sum())
    return Identification(
        iteration=iteration,
        score=name,
        threshold=limit,
        flagged=float(flagged.mean()),
        recall=hits / int(nonconforming.sum()),
        precision=hits / int(flagged.sum()) if flagged.any() else float("nan"),
        auroc=float(roc_auc_score(nonconforming, score)),
    )


def save(out: Path, results: Results, seconds: float) -> None:
    """``results.md`` and ``results.json``."""
    facts = {
        "version": __version__,
        "seconds": round(seconds, 1),
        "accuracy": [dataclasses.asdict(a) for a in results.accuracies],
        "identification": [dataclasses.asdict(i) for i in results.identifications],
        "notes": results.notes,
    }
    for name, text in (
        ("results.md", markdown(results)),
        ("results.json", json.dumps(facts, indent=2) + "\n"),
    ):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def tables(results: Results) -> list[Table]:
    """The two tables for the screen."""
    from rich.table import Table

    made = []
    for title, header, rows in _tables(results):
        table = Table(title=title, title_justify="left", title_style="bold")
        for column, name in enumerate(header):
            table.add_column(name, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def markdown(results: Results) -> str:
    """The two tables and the notes as a Markdown page."""
    lines = ["# The GenKL loop on 1,797 scanned digits", ""]
    for title, header, rows in _tables(results):
        rule = ["---"] + ["---:"] * (len(header) - 1)
        lines += [title, "", *(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows]), ""]
    return "\n".join(lines + [f"- {note}" for note in results.notes]) + "\n"


def _tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table."""
    seeds = len(results.accuracies[0].test)
    spread = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return [
        (
            f"Accuracy in %, {spread}",
            ["training", "validation", "test"],
            [
                [a.name, str(Spread.of(a.validation)), str(Spread.of(a.test))]
                for a in results.accuracies
            ],
        ),
        (
            "Finding the images that fit no class, in %",
            ["score", "threshold", "flagged", "recall", "precision", "AUROC"],
            [
                [f"{i.score}, iteration {i.iteration}", f"{i.threshold:.3f}"]
                + [f"{100 * value:.1f}" for value in (i.flagged, i.recall, i.precision, i.auroc)]
                for i in results.identifications
            ],
        ),
    ]


def _notes(
    out: Path, summary: Summary, flipped: int, nonconforming: NDArray[np.bool_]
) -> list[str]:
    """What the numbers rest on."""
    sizes = summary.images
    flips = json.loads((out / "demo.json").read_text())["flips"]
    lookalike = "the class that looks most alike (0 and 6, 1 and 4, 2 and 7, 3 and 5)"
    alphas = [f"{facts['nonconforming'][0]['alpha']:.3g}" for facts in summary.iterations]
    return [
        f"Noisy set: {sizes['train']:,} images, of which {nonconforming.sum()} are 8s or 9s under "
        f"random labels and {flipped} carry the label of "
        f"{lookalike if flips == 'lookalike' else 'any other class'}. Besides: {sizes['clean']} "
        f"clean, {sizes['val']} validation and {sizes['test']} test images of the digits 0 to 7.",
        "All settings are in run/recipe.yaml: beta and sigma are Clothing1M's times 14/8, the "
        "weights of the objective and the mixup are Clothing1M's.",
        f"alpha, {' and '.join(alphas)}, is the critical alpha that 5 % of the clean validation "
        "images reach; the threshold of the entropy is chosen in the same way.",
        "The best weights are chosen by the clean validation images, for every kind of training.",
        "Which images fit no class was looked up for these tables only. AUROC needs no threshold.",
    ]
