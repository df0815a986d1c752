"""The GenKL loop on the digits, with baselines beside it. ``folder.py`` says what it writes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data import Manifest
from ..data.manifest import SPLITS
from ..relabel import Targets, class_ratio
from ..rule import GenKL, Scores
from ..scoring import score_files
from . import digits, folder
from .layout import Split, read_split
from .training import Settings, Trained, fine_tune, predict, train_genkl, train_plain
from .workers import Workers

ITERATIONS = 2
FALSE_ALARMS = 0.05  # share of the clean validation images that the rule may flag

Predictions = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Data:
    """The four splits, in the order of a manifest's."""

    noisy: Split
    clean: Split
    validation: Split
    test: Split


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What one round of the loop made."""

    rule: GenKL
    scores: Scores  #: of the noisy images
    noisy_predictions: list[Predictions]  #: (N, k) of each member
    validation_predictions: list[Predictions]  #: (V, k) of each member
    trials: list[Trained]
    tuned: list[Trained]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before the truth is looked at; lists of trainings hold one per seed."""

    out: Path
    data: Data
    seeds: list[int]
    flips: digits.Flips
    settings: Settings
    plain: list[Trained]  #: on the noisy labels, taken as right
    plain_both: list[Trained]  #: on the noisy and the clean labels
    members: list[Trained]  #: on the clean labels only: the members of iteration 0
    iterations: list[Iteration]


def run(
    out: Path,
    seeds: list[int],
    flips: digits.Flips,
    settings: Settings,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Run:
    """Write the data, train the baselines, and run the loop.

    Args:
        out: the run's folder: new, empty, or made by this demo before; then it is replaced.
        seeds: every kind of network is trained once per seed, and these networks are the members
            that are averaged. The first seed is that of the data and of the rule, too.
        flips: which wrong labels the crawl gives (``digits.write``).
        settings: of every training.
        say: called with a line after every stage.
        progress: called with (steps done, steps) while training.

    Raises:
        ValueError: ``out`` holds something else. OSError: it cannot be written.
    """
    start = time.perf_counter()

    def report(line: str) -> None:
        say(f"{time.perf_counter() - start:6.1f} s  {line}")

    recipe = {"seeds": seeds, "flips": flips, "training": dataclasses.asdict(settings)}
    folder.prepare(out, recipe)
    digits.write(out / "data", seeds[0], flips)
    manifest = Manifest.from_clothing1m(out / "data")
    data = Data(*(read_split(manifest, name) for name in SPLITS))
    noisy, clean, validation, k = data.noisy, data.clean, data.validation, digits.CLASSES
    report(
        f"wrote {len(noisy):,} noisy, {len(clean)} clean, {len(validation)} validation "
        f"and {len(data.test)} test images"
    )

    per_seed = (3 + ITERATIONS) * settings.steps + ITERATIONS * settings.fine_tune_steps
    workers = Workers(len(seeds) * per_seed, progress)

    def plain_training(split: Split, seed: int) -> Trained:
        return train_plain(split, k, validation, settings, seed, workers.tick)

    def trial(targets: Targets, seed: int) -> Trained:
        return train_genkl(noisy, targets, clean, validation, settings, seed, workers.tick)

    def tuning(trained: Trained, seed: int) -> Trained:
        return fine_tune(trained, clean, validation, settings, seed, workers.tick)

    n = len(seeds)
    sources = [clean] * n + [noisy] * n + [noisy + clean] * n
    trained = workers.map(plain_training, sources, 3 * seeds)
    members, plain, plain_both = trained[:n], trained[n : 2 * n], trained[2 * n :]
    kinds = {"iteration-0/members": members, "plain": plain, "plain-both": plain_both}
    for name, networks in kinds.items():
        for seed, network in zip(seeds, networks, strict=True):
            folder.save_training(out / name / str(seed), network)
    report(f"trained {n} clean-subset models and the baselines")

    ratio = class_ratio(clean.labels, k)
    iterations: list[Iteration] = []
    for t in range(ITERATIONS):
        # The members: clean-subset models, then the trials of the iteration before.
        models = [m.best for m in (iterations[-1].trials if iterations else members)]
        predictions = workers.map(predict, models, repeat(noisy))
        validation_predictions = workers.map(predict, models, repeat(validation))
        rule = choose_rule(validation_predictions, k, seeds[0])
        scores = _score(out, t, seeds, predictions, rule)
        report(f"iteration {t}: {scores.nc.sum()} images do not conform, alpha {rule.alpha:.3g}")

        targets = Targets.of(scores, noisy.labels, ratio)
        trials = workers.map(trial, repeat(targets), seeds)
        tuned = workers.map(tuning, trials, seeds)
        for seed, before, after in zip(seeds, trials, tuned, strict=True):
            place = out / f"iteration-{t}" / f"trial-{seed}"
            folder.save_training(place, before)
            folder.save_training(place, after, prefix="finetune_")
        iterations.append(
            Iteration(rule, scores, predictions, validation_predictions, trials, tuned)
        )
        report(f"iteration {t}: relabelled, trained and fine-tuned {n} networks")
    return Run(out, data, seeds, flips, settings, plain, plain_both, members, iterations)


def choose_rule(validation_predictions: list[Predictions], k: int, seed: int) -> GenKL:
    """Clothing1M's rule scaled to k classes, with alpha from the clean validation images.

    beta and sigma are Clothing1M's times 14 / k: both are distances from 1/k. Which alpha is right
    depends on how sharp the networks are, and images known to conform show that: alpha is the
    critical alpha that 5 % of them reach.
    """
    preset = GenKL.preset("clothing1m", seed=seed)
    scale = preset.num_classes / k
    rule = dataclasses.replace(
        preset, num_classes=k, beta=preset.beta * scale, sigma=preset.sigma * scale
    )
    scores = rule.score(validation_predictions)
    return dataclasses.replace(rule, alpha=threshold(np.asarray(scores.critical_alpha)))


def threshold(validation_values: NDArray[np.floating]) -> float:
    """The value that a share of ``FALSE_ALARMS`` of the validation images reaches."""
    return float(np.quantile(validation_values, 1 - FALSE_ALARMS, method="higher"))


def _score(
    out: Path, iteration: int, seeds: list[int], predictions: list[Predictions], rule: GenKL
) -> Scores:
    """Scores of the noisy images; the predictions, the table and the NC list go to files."""
    place = out / f"iteration-{iteration}"
    files = [place / "predictions" / f"{seed}.npy" for seed in seeds]
    for file, q in zip(files, predictions, strict=True):
        folder.save_array(file, q)
    return score_files(
        files,
        rule,
        place / "scores.parquet",
        keys=out / "data" / "images" / "noisy_train_key_list.txt",
        nc_list=place / "nc_set.txt",
    ).scores
