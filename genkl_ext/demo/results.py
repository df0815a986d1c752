"""A finished run judged by the truth: accuracies, NC identification, and the table of both."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from .. import __version__
from . import digits, folder
from .layout import read_pairs
from .loop import FALSE_ALARMS, Predictions, Run, threshold
from .training import Trained, accuracy, predict
from .workers import one_thread

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Test accuracy of one kind of training, from 0 to 1, one number per seed."""

    name: str
    best: list[float]  #: of the weights with the best validation accuracy
    last: list[float]  #: of the weights after the last step


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
    nonconforming: NDArray[np.bool_]  #: (N,) the truth: digit 8 or 9
    notes: list[str]


@one_thread()
def judge(run: Run) -> Results:
    """Look at the test images and at which noisy images fit no class, and compare."""

    def test(name: str, networks: list[Trained]) -> Accuracy:
        def each(weights: Iterable[nn.Module]) -> list[float]:
            images = run.data.test
            return [accuracy(predict(network, images), images.labels) for network in weights]

        return Accuracy(name, each(n.best for n in networks), each(n.last for n in networks))

    accuracies = [
        test("plain, noisy labels", run.plain),
        test("plain, noisy and clean labels", run.plain_both),
        test("clean labels only", run.members),
    ]
    digit = read_pairs(run.out / "data" / "true_digit_kv.txt")
    true = np.array([digit[key] for key in run.data.noisy.keys])
    nonconforming = true >= digits.CLASSES
    identifications = []
    for t, iteration in enumerate(run.iterations):
        accuracies += [
            test(f"GenKL iteration {t}", iteration.trials),
            test(f"GenKL iteration {t}, fine-tuned", iteration.tuned),
        ]
        entropy = normalised_entropy(iteration.noisy_predictions)
        limit = threshold(normalised_entropy(iteration.validation_predictions))
        critical, rule = np.asarray(iteration.scores.critical_alpha), iteration.rule
        identifications += [
            identify(t, "GenKL", critical, rule.alpha, nonconforming),
            identify(t, "entropy", entropy, limit, nonconforming),
        ]
    flipped = int(((run.data.noisy.labels != true) & ~nonconforming).sum())
    return Results(accuracies, identifications, nonconforming, _notes(run, nonconforming, flipped))


def identify(
    iteration: int,
    name: str,
    score: NDArray[np.floating],
    limit: float,
    nonconforming: NDArray[np.bool_],
) -> Identification:
    """Compare the images whose score reaches the limit with those that fit no class."""
    flagged = score >= limit
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


def normalised_entropy(predictions: list[Predictions]) -> NDArray[np.float64]:
    """H(q) / log k of the mean prediction q of each row: 0 for one-hot, 1 for uniform."""
    q = np.mean(predictions, axis=0, dtype=np.float64)
    return -np.sum(q * np.log(np.where(q > 0, q, 1.0)), axis=1) / np.log(q.shape[1])


def save(run: Run, results: Results, seconds: float) -> None:
    """``results.md`` and the summaries of the run and of its iterations."""
    folder.save_text(run.out / "results.md", markdown(results))
    for t, iteration in enumerate(run.iterations):
        source = f"iteration-{t - 1}/trial-" if t else "iteration-0/members/"
        names = (f"GenKL iteration {t}", f"GenKL iteration {t}, fine-tuned")
        folder.save_json(
            run.out / f"iteration-{t}" / "summary.json",
            {
                "members": [f"{source}{seed}/best.safetensors" for seed in run.seeds],
                "rule": dataclasses.asdict(iteration.rule),
                "noisy_images": len(iteration.scores),
                "nc_images": int(iteration.scores.nc.sum()),
                "accuracy": [dataclasses.asdict(a) for a in results.accuracies if a.name in names],
                "identification": [
                    dataclasses.asdict(i) for i in results.identifications if i.iteration == t
                ],
            },
        )
    summary: dict[str, Any] = {
        "version": __version__,
        "seeds": run.seeds,
        "flips": run.flips,
        "seconds": round(seconds, 1),
        "settings": dataclasses.asdict(run.settings),
        "accuracy": [dataclasses.asdict(a) for a in results.accuracies],
        "identification": [dataclasses.asdict(i) for i in results.identifications],
        "notes": results.notes,
    }
    folder.save_json(run.out / "summary.json", summary)  # last: the run is complete


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
    seeds = len(results.accuracies[0].best)
    spread = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return [
        (
            f"Test accuracy in %, {spread}",
            ["training", "best validation", "last step"],
            [[a.name, _spread(a.best), _spread(a.last)] for a in results.accuracies],
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


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _notes(run: Run, nonconforming: NDArray[np.bool_], flipped: int) -> list[str]:
    """What the numbers rest on."""
    noisy, clean = run.data.noisy, run.data.clean
    validation, settings = run.data.validation, run.settings
    alphas = " and ".join(f"{iteration.rule.alpha:.3g}" for iteration in run.iterations)
    rule = run.iterations[0].rule
    lookalike = "the class that looks most alike (0 and 6, 1 and 4, 2 and 7, 3 and 5)"
    other = lookalike if run.flips == "lookalike" else "any other class"
    return [
        f"Noisy set: {len(noisy):,} images, of which {nonconforming.sum()} are 8s or 9s under "
        f"random labels and {flipped} carry the label of {other}. Besides: {len(clean)} clean, "
        f"{len(validation)} validation and {len(run.data.test)} test images of the digits 0 to 7.",
        f"Every training takes {settings.steps:,} steps with the same network; a step sees "
        f"{settings.objective.batch_size} images, and with GenKL as many clean ones besides.",
        "The best weights are chosen by the clean validation images, for every kind of training.",
        f"Rule: beta {rule.beta:.4g} and sigma {rule.sigma:.4g} are Clothing1M's times 14/8; "
        f"{rule.num_vectors} vectors. alpha, {alphas}, is the critical alpha that "
        f"{100 * FALSE_ALARMS:.0f} % of the clean validation images reach; the threshold of the "
        "entropy is chosen in the same way. Objective: the weights and the mixup of Clothing1M.",
        "Which images fit no class was looked up for these tables only. AUROC needs no threshold.",
    ]
