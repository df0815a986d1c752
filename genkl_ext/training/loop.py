"""``run``: the whole framework by a recipe, from raw images to accuracies.

    run("clothing1m", data_root="/data/clothing1m", out="runs/clothing1m")

    RUN/recipe.yaml                    all settings as resolved
        manifest.parquet, keys.txt     the rows; the keys of the noisy ones
        ledger.parquet                 images that could not be used, and why
        records.json                   what is done, with which settings, from which files
        baselines/NAME/SEED/           plain training on given labels
        iteration-T/
          members/SEED/                T = 0: weights and metrics of each member [/fold-F/]
          predictions/SEED.npy         (N, k) of each member, rows as in the manifest's "train"
          validation/SEED.npy          the same of the validation images, where alpha is from them
          scores.parquet, nc_set.txt   one row per noisy image; the keys of the NC ones
          targets.parquet              what they are trained towards
          trial-SEED/                  train/ and finetune/: weights, state, metrics, test.npy
          summary.json                 accuracies, NC counts, seconds, versions
        summary.json                   the iterations together

A trial that has members or vectors of its own has its own scores and targets, in its folder.
The same command again goes on where it was stopped. Test images are never looked at to choose.

Source: GenKL (arXiv 2307.09810), the iterative framework.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .. import __version__
from ..data import Ledger, Manifest, layouts
from ..data.published import read_row_list
from ..data.scan import scan
from ..files import atomic_write, exclusive, remove_leftovers
from ..ranks import Ranks, join
from ..scoring.sources import open_models
from . import networks, stages
from . import recipe as recipes
from .records import Facts, Planned, Records, Say, Stage
from .settings import Data, Fit, Recipe
from .stages import Job, Progress

_FLOAT = 4


class Variant(NamedTuple):
    """What the trials that share it have in common: members and uniform-like vectors."""

    members: tuple[int, ...]
    rule_seed: int


@dataclasses.dataclass
class Summary:
    """What a run came to; ``summary.json`` holds the same."""

    out: Path
    recipe: Recipe  #: all settings as resolved
    images: dict[str, int]  #: of each split
    classes: int
    unusable: int
    baselines: dict[str, list[Facts]]  #: members and plain trainings: one entry per seed
    iterations: list[Facts]
    stopped: str  #: why there are no more iterations
    seconds: dict[str, float]  #: of each stage
    plan: list[Planned]  #: of a dry run


def run(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    out: str | os.PathLike[str],
    data_root: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    say: Say = print,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Summary:
    """Train members, find the NC images, relabel, train, fine-tune; and again.

    What is done is not done again: the same call goes on where an earlier one was stopped, and
    settings that were changed meanwhile run again what depends on them.

    Args:
        recipe: a YAML file, the name of a recipe that comes with the package, or a ``Recipe``.
        out: the run's folder; made if it is not there.
        data_root: the data set; ``data.root`` of the recipe.
        overrides: "training.omega_nnc=16" and the like.
        say: called with a line for every stage and every epoch, on the first process.
        progress: called with what is going on; gives what is called with (done, all).
        dry_run: do nothing and write nothing; the summary's ``plan`` says what would be done.

    Returns:
        Summary: accuracies by seed, NC counts, seconds.

    Raises:
        ValueError: settings that are wrong, or do not fit the data; before anything is begun.
        OSError: a file cannot be read or written. FloatingPointError: a training diverged.
    """
    more = [] if data_root is None else [f"data.root={json.dumps(os.fspath(data_root))}"]
    settings = recipes.load(recipe, [*more, *overrides])
    recipes.check(settings)
    ranks = join(settings.engine.accelerator)
    quiet: Say = say if ranks.first else lambda line: None
    folder = Path(out)
    with ExitStack() as stack:
        if not dry_run:
            if ranks.first:
                _prepare(folder)
                stack.enter_context(exclusive(folder / ".lock"))
                remove_leftovers(folder)
            ranks.barrier()
        return _Run(settings, folder, ranks, quiet, progress or _no_progress, dry_run).all()


class _Run:
    """One run; its methods are the stages in order."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        ranks: Ranks,
        say: Say,
        progress: Progress,
        dry: bool,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.ranks = ranks
        self.say = say
        self.progress = progress if ranks.first else _no_progress
        self.dry = dry
        self.records = Records(folder, ranks, say, dry=dry)
        self.ledger = folder / "ledger.parquet"
        self.keys = folder / "keys.txt"

    def all(self) -> Summary:
        manifest = self.manifest = self.read_data()
        self.noisy = manifest.rows("train")
        for problem in manifest.problems:
            self.say(f"data: {problem}")
        unusable = self.scan(manifest)
        self.job = Job(self.recipe, manifest, unusable, self.ranks, self.say, self.progress)

        loop = self.recipe.loop
        baselines = self.baselines()
        members = self.train_members(baselines)
        iterations: list[Facts] = []
        stopped = f"{loop.iterations} iterations are done"
        before: list[NDArray[np.bool_]] | None = None
        for t in range(loop.iterations):
            variants = self.variants(t)
            files = self.predict(t, members if t == 0 else self.trial_weights(t - 1))
            scored = {v: self.score(t, v, files, self.place(t, v, variants)) for v in set(variants)}
            now = [self.nonconforming(t, self.place(t, v, variants)) for v in variants]
            similar = None if before is None or self.dry else _jaccard(before, now)
            before = now
            if similar is not None:
                self.say(f"iteration-{t}: Jaccard index with the last NC set {similar:.3f}")
            limit = loop.stop_jaccard
            if limit is not None and similar is not None and similar >= limit:
                stopped = (
                    f"the NC set of iteration {t} has Jaccard index {similar:.3f} with the last"
                )
                break
            trials = [
                self.trial(t, seed, self.place(t, variant, variants), variant, files)
                for seed, variant in zip(loop.seeds, variants, strict=True)
            ]
            iterations.append(self.summarise(t, variants, scored, similar, trials))
            gain = _gain(iterations)
            limit = loop.stop_accuracy
            if limit is not None and gain is not None and gain <= limit:
                stopped = f"iteration {t} gained {100 * gain:.2f} points of validation accuracy"
                break
        summary = Summary(
            out=self.folder,
            recipe=self.recipe,
            images=manifest.split_sizes(),
            classes=manifest.num_classes,
            unusable=int(unusable.sum()),
            baselines=baselines,
            iterations=iterations,
            stopped=stopped,
            seconds=self.records.seconds(),
            plan=self.records.plan,
        )
        if self.ranks.first and not self.dry:
            facts = dataclasses.asdict(dataclasses.replace(summary, plan=[]))
            del facts["plan"], facts["out"], facts["recipe"]
            _write_json(self.folder / "summary.json", {"version": __version__, **facts})
        return summary

    # Data

    def read_data(self) -> Manifest:
        """The manifest; the first process reads the data set, the others what it saved.

        Before anything is written, what cannot work is refused.
        """
        path = self.folder / "manifest.parquet"
        if self.ranks.first:
            manifest = read_manifest(self.recipe.data)
            recipes.check_against(self.recipe, manifest)
            self.check_given(manifest)
            if not self.dry:
                _write(self.folder / "recipe.yaml", recipes.to_yaml(self.recipe))
                keys = manifest.split("train").table["key"].to_pylist()
                _write(self.keys, "".join(f"{key}\n" for key in keys))
                manifest.save(path)
        if self.dry:
            return manifest if self.ranks.first else read_manifest(self.recipe.data)
        self.ranks.barrier()
        return manifest if self.ranks.first else Manifest.load(path)

    def check_given(self, manifest: Manifest) -> None:
        """Build the network, and look at the files that are given, before hours are spent.

        Raises:
            ValueError, OSError: one does not fit.
        """
        recipe, k = self.recipe, manifest.num_classes
        network = networks.build(recipe.network, k, 0)
        for path in recipe.members.weights:
            networks.load_into(network, path)
        wanted = (len(manifest.rows("train")), k)
        average = recipe.members.average
        with ExitStack() as stack:
            files = [*recipe.members.predictions, *([] if average is None else [average])]
            for file in open_models(files, stack):
                if file.shape != wanted:
                    raise ValueError(
                        f"run: {file.name} must have a row for each noisy image and a column for "
                        f"each class, {wanted}, got {file.shape}"
                    )
        for name in ("members", "training", "finetune"):
            size = getattr(recipe, name).batch_size
            if size % self.ranks.size:
                raise ValueError(
                    f"run: {name}.batch_size must be a multiple of the {self.ranks.size} "
                    f"processes, got {size}"
                )

    def scan(self, manifest: Manifest) -> NDArray[np.bool_]:
        """Which rows of the manifest have an image that cannot be used, as far as is known."""
        unusable = np.zeros(len(manifest), bool)
        data = self.recipe.data
        if not data.scan:
            return unusable
        settings = {"manifest": manifest.fingerprint, "root": manifest.root}

        def work() -> Facts:
            if not self.ranks.first:
                return {}
            bar = self.progress("scanning")
            done = scan(manifest, self.ledger, threads=data.threads, progress=bar)
            return {"images": len(manifest), "reasons": done.ledger.counts()}

        facts = self.records.do(Stage("scan", settings, outputs=[self.ledger]), work)
        for reason, count in facts.get("reasons", {}).items():
            self.say(f"scan: {count:,} images left out: {reason}")
        if self.ledger.exists():
            unusable[Ledger.load(self.ledger).rows_in(manifest)] = True
        return unusable

    # Plain trainings

    def baselines(self) -> dict[str, list[Facts]]:
        """Plain cross-entropy on given labels, with the settings of the training."""
        splits = {"noisy": ["train"], "both": ["train", "clean"]}
        made: dict[str, list[Facts]] = {}
        for name in self.recipe.loop.baselines:
            rows = np.concatenate([self.job.rows(split) for split in splits[name]])
            made[name] = [
                self.fit_labels(
                    f"baselines/{name}/{seed}", np.sort(rows), self.recipe.training, seed
                )
                for seed in self.recipe.loop.seeds
            ]
        return made

    def train_members(self, baselines: dict[str, list[Facts]]) -> dict[int, Path]:
        """The weights of the members of iteration 0, or of nothing if predictions are given."""
        members = self.recipe.members
        if members.average or members.predictions:
            return {}
        if members.weights:
            return {i: Path(path) for i, path in enumerate(members.weights)}
        if members.source == "folds":
            for seed in members.seeds:
                for fold, rows in enumerate(self.folds(seed)):
                    name = f"iteration-0/members/{seed}/fold-{fold}"
                    self.fit_labels(
                        name, np.setdiff1d(self.job.rows("train"), rows), members, seed, test=False
                    )
            return {seed: self.member(seed) for seed in members.seeds}
        rows = self.job.rows("clean" if members.source == "clean" else "train")
        baselines["members"] = [
            self.fit_labels(f"iteration-0/members/{seed}", rows, members, seed)
            for seed in members.seeds
        ]
        return {seed: self.member(seed) for seed in members.seeds}

    def member(self, seed: int) -> Path:
        """Where the weights of a member of iteration 0 are; of folds, those of the first."""
        fold = "fold-0" if self.recipe.members.source == "folds" else ""
        return self.folder / "iteration-0/members" / str(seed) / fold / "best.safetensors"

    def folds(self, seed: int) -> list[NDArray[np.int64]]:
        """Rows of the manifest, the noisy ones dealt into folds with like shares of each label.

        Rows without label are dealt, too: they are predicted, and not trained on.
        """
        from sklearn.model_selection import StratifiedKFold

        labels = self.manifest.labels[self.noisy]
        dealer = StratifiedKFold(self.recipe.members.folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # A class of fewer images than folds is missing in some; that is no harm.
            warnings.simplefilter("ignore", UserWarning)
            folds = [rows for _, rows in dealer.split(labels, labels)]
        return [self.noisy[rows] for rows in folds]

    def fit_labels(
        self, name: str, rows: NDArray[np.int64], fit: Fit, seed: int, *, test: bool = True
    ) -> Facts:
        """One plain training, and how well it does on the test images."""
        out = self.folder / name
        is_member = "/members/" in name
        frozen = is_member and self.recipe.compatibility.members_eval_mode
        settings = {
            **depends_on(self.job, "train"),
            "seed": seed,
            "rows": _digest(rows),
            "fit": _plain_settings(fit),
            "eval_mode_after_first_epoch": frozen,
        }
        fitted = self.records.do(
            self.fitting(name, settings, out, fit, len(rows)),
            lambda: stages.fit_labels(
                self.job, rows, fit, out, seed, eval_mode_after_first_epoch=frozen
            ),
        )
        tested = self.test(name, out / "best.safetensors", out / "test.npy") if test else None
        return {"seed": seed, **fitted, "test": tested}

    def fitting(
        self, name: str, settings: Facts, out: Path, fit: Fit, images: int, **more: Any
    ) -> Stage:
        """The stage of a training."""
        inputs = [*pretrained_files(self.recipe), *more.pop("inputs", [])]
        return Stage(
            name,
            settings,
            inputs,
            [out / "best.safetensors", out / "metrics.csv"],
            [out / "last.ckpt"],
            images=len(self.job.rows("val")) * fit.epochs // fit.validate_every,
            trained=images * fit.epochs,
            # The best ones, and the last ones with one or two moments of the optimiser.
            weights=3 if fit.optimizer.name == "sgd" else 4,
            **more,
        )

    # One iteration

    def variants(self, t: int) -> list[Variant]:
        """The variant of each trial."""
        seeds, rule_seed = self.recipe.loop.seeds, self.recipe.rule.seed
        return [
            Variant(
                tuple(seeds if t > 0 else self.picked(seed)),
                seed if rule_seed is None else rule_seed,
            )
            for seed in seeds
        ]

    def place(self, t: int, variant: Variant, variants: list[Variant]) -> Path:
        """The folder of the scores and targets of a variant."""
        folder = self.folder / f"iteration-{t}"
        if len(set(variants)) == 1:
            return folder
        return folder / f"trial-{self.recipe.loop.seeds[variants.index(variant)]}"

    def trial_weights(self, t: int) -> dict[int, Path]:
        """The weights of the trials of an iteration: before fine-tuning, as published."""
        return {
            seed: self.folder / f"iteration-{t}/trial-{seed}/train/best.safetensors"
            for seed in self.recipe.loop.seeds
        }

    def predict(self, t: int, weights: dict[int, Path]) -> dict[int, Path]:
        """The prediction file of each member."""
        members = self.recipe.members
        if t == 0 and (members.average or members.predictions):
            given = [members.average] if members.average else members.predictions
            return {i: Path(path) for i, path in enumerate(given)}
        return {i: self.predict_noisy(t, i, path) for i, path in weights.items()}

    def predict_noisy(self, t: int, member: int, weights: Path) -> Path:
        """The predictions of one member for all noisy images."""
        out = self.folder / f"iteration-{t}/predictions/{member}.npy"
        members = self.recipe.members
        given = members.weights or members.predictions or members.average
        if t > 0 or members.source != "folds" or given:
            self.predict_rows(f"iteration-{t}/predictions/{member}", weights, self.noisy, out)
            return out
        parts = []
        for fold, rows in enumerate(self.folds(member)):
            place = self.folder / f"iteration-0/members/{member}/fold-{fold}"
            part = place / "predictions.npy"
            name = f"iteration-0/predictions/{member}/fold-{fold}"
            self.predict_rows(name, place / "best.safetensors", rows, part)
            parts.append((np.searchsorted(self.noisy, rows), part))
        files = [path for _, path in parts]
        k = self.manifest.num_classes
        stage = Stage(
            f"iteration-0/predictions/{member}",
            {"folds": [_digest(rows) for rows, _ in parts]},
            files,
            [out],
            bytes=len(self.noisy) * k * _FLOAT,
        )
        self.on_first(stage, lambda: stages.join_folds(parts, len(self.noisy), k, out))
        return out

    def predict_rows(self, name: str, weights: Path, rows: NDArray[np.int64], out: Path) -> None:
        stage = Stage(
            name,
            {**depends_on(self.job, "eval"), "rows": _digest(rows), "batch": self.batch_size()},
            [weights, *pretrained_files(self.recipe)],
            [out],
            images=len(rows),
            bytes=len(rows) * self.manifest.num_classes * _FLOAT,
        )
        facts = self.records.do(stage, lambda: stages.predict(self.job, weights, rows, out))
        for failure in facts.get("broken", []):
            self.say(f"{name}: left out {failure}")

    def score(self, t: int, variant: Variant, files: dict[int, Path], place: Path) -> Facts:
        """Scores and targets of a variant."""
        members = [files[i] for i in variant.members]
        rule = self.recipe.rule.of(self.manifest.num_classes, variant.rule_seed)
        inputs = list(members)
        share = None
        validation: list[Path] = []
        if self.recipe.rule.alpha is None:
            share = self.recipe.rule.flag_validation
            validation = [self.validation(t, i) for i in variant.members]
            inputs += validation
        out, nc_list = place / "scores.parquet", place / "nc_set.txt"
        name = place.relative_to(self.folder).as_posix()

        def work() -> Facts:
            fitting = rule if share is None else stages.calibrate(rule, validation, share)
            bar = self.progress("scoring")
            return stages.score(members, fitting, self.keys, out, nc_list, bar)

        asked = {"rule": dataclasses.asdict(self.recipe.rule), "seed": variant.rule_seed}
        stage = Stage(f"{name}/score", asked, [*inputs, self.keys], [out, nc_list])
        scored = self.on_first(stage, work)
        if scored:
            self.say(
                f"{place.name}: {scored['nc']:,} of {scored['rows']:,} images do not conform "
                f"(alpha {scored['alpha']:.4g})"
            )

        relabelling = self.recipe.relabel
        given_list = self.recipe.members.nc_list if t == 0 else None
        lists = [Path(path) for path in (given_list, relabelling.ratio_file) if path is not None]
        broadcast = self.recipe.compatibility.ratio_broadcast
        targets = place / "targets.parquet"
        stage = Stage(
            f"{name}/relabel",
            {
                "manifest": self.manifest.fingerprint,
                "relabel": dataclasses.asdict(relabelling),
                "ratio_broadcast": broadcast,
                "nc_list": given_list,
            },
            [out, *lists],
            [targets],
        )
        relabelled = self.on_first(
            stage,
            lambda: stages.relabel(
                self.manifest,
                out,
                targets,
                relabelling,
                nc_list=None if given_list is None else Path(given_list),
                ratio_broadcast=broadcast,
            ),
        )
        if given_list is not None and relabelled:
            scored = {**scored, "nc": relabelled["uniform"], "nc_list": given_list}
        return {**scored, "targets": relabelled}

    def validation(self, t: int, member: int) -> Path:
        """A member's predictions of the validation images."""
        weights = self.member(member) if t == 0 else self.trial_weights(t - 1)[member]
        if t == 0 and self.recipe.members.weights:
            weights = Path(self.recipe.members.weights[member])
        out = self.folder / f"iteration-{t}/validation/{member}.npy"
        rows = self.job.rows("val")
        self.predict_rows(f"iteration-{t}/validation/{member}", weights, rows, out)
        return out

    def nonconforming(self, t: int, place: Path) -> NDArray[np.bool_]:
        """(N,) which noisy images do not conform, for the stop rule."""
        if self.dry and not (place / "scores.parquet").exists():
            return np.zeros(len(self.noisy), bool)
        given = self.recipe.members.nc_list if t == 0 else None
        if given is not None:
            return read_row_list(given, self.manifest)
        return np.asarray(pq.read_table(place / "scores.parquet", columns=["nc"])["nc"])

    def trial(
        self, t: int, seed: int, place: Path, variant: Variant, files: dict[int, Path]
    ) -> Facts:
        """Train, fine-tune and test one network."""
        name = f"iteration-{t}/trial-{seed}"
        training = self.recipe.training
        compatibility = self.recipe.compatibility
        out = self.folder / name / "train"
        targets = place / "targets.parquet"
        members = [files[i] for i in variant.members]
        averaged = compatibility.nc_target == "averaged"
        start = self.first_member(seed) if training.start == "member" else None
        settings = {
            **depends_on(self.job, "train"),
            "seed": seed,
            "fit": dataclasses.asdict(training),
            "compatibility": {
                key: getattr(compatibility, key)
                for key in ("nc_target", "unpermuted_prior", "separate_passes")
            },
        }
        inputs = [targets, *(members if averaged else []), *([] if start is None else [start])]
        images = len(self.noisy) * (2 if training.clean == "loader" else 1)
        if training.clean == "joint":
            images += len(self.job.rows("clean"))
        trained = self.records.do(
            self.fitting(f"{name}/train", settings, out, training, images, inputs=inputs),
            lambda: stages.train(self.job, targets, out, seed, start=start, members=members),
        )
        weights = out / "best.safetensors"
        tested = self.test(f"{name}/train", weights, out / "test.npy")
        tuned = None
        if self.recipe.finetune.epochs:
            tuned = self.finetune(t, seed, weights, place, trained)
        return {"seed": seed, "train": {**trained, "test": tested}, "finetune": tuned}

    def picked(self, seed: int) -> list[int]:
        """The members of iteration 0 that a trial uses."""
        members = self.recipe.members
        if members.average:
            return [0]
        given = members.predictions or members.weights
        return members.pick.get(seed, list(range(len(given))) if given else members.seeds)

    def first_member(self, seed: int) -> Path:
        """What a trial starts from: the first of its members of iteration 0, in later ones, too."""
        members = self.recipe.members
        first = self.picked(seed)[0]
        return Path(members.weights[first]) if members.weights else self.member(first)

    def finetune(self, t: int, seed: int, weights: Path, place: Path, trained: Facts) -> Facts:
        """Fine-tune a trial, and test what it came to."""
        name = f"iteration-{t}/trial-{seed}/finetune"
        tuning = self.recipe.finetune
        out = self.folder / name
        inputs = [weights]
        nc: NDArray[np.bool_] | None = None
        softmax: Path | None = None
        if tuning.clean == "dynamic":
            # The predictions that the next iteration starts from.
            softmax = self.predict_noisy(t + 1, seed, weights)
            inputs.append(softmax)
            if tuning.without_nc:
                nc = self.nonconforming(t, place)
                inputs.append(place / "scores.parquet")
        best = None
        if trained.get("best_accuracy") is not None:
            best = (trained["best_accuracy"], trained["best_loss"])

        def work() -> Facts:
            clean = stages.clean_rows(self.job, softmax, nc)
            if len(clean) < max(2, self.ranks.size):
                self.say(f"{name}: {len(clean)} clean images are too few; the training is kept")
                return {"clean_images": len(clean), "improved": False, "best_accuracy": None}
            tuned = stages.finetune(self.job, weights, clean, out, seed, best)
            return {"clean_images": len(clean), **tuned}

        settings = {
            **depends_on(self.job, "train"),
            "seed": seed,
            "fit": dataclasses.asdict(tuning),
            "lr_zero": self.recipe.compatibility.finetune_lr_zero,
            "best": best,
        }
        images = len(self.noisy if tuning.clean == "dynamic" else self.job.rows("clean"))
        stage = self.fitting(name, settings, out, tuning, images, inputs=inputs)
        tuned = self.records.do(stage, work)
        tested = None
        if tuned.get("improved", self.dry):
            tested = self.test(name, out / "best.safetensors", out / "test.npy")
        return {**tuned, "test": tested}

    def test(self, name: str, weights: Path, softmax: Path) -> Facts | None:
        """How well a network does on the test images, if there are any."""
        rows = self.manifest.rows("test")
        if not len(rows):
            return None
        self.predict_rows(f"{name}/test", weights, rows, softmax)
        if self.dry:
            return None
        tested = stages.evaluate(self.manifest, "test", softmax)
        return tested if tested["images"] else None

    def summarise(
        self,
        t: int,
        variants: list[Variant],
        scored: dict[Variant, Facts],
        similar: float | None,
        trials: list[Facts],
    ) -> Facts:
        """The facts of an iteration, and ``summary.json``."""
        trained = Spread.of([_top1(trial["train"]["test"]) for trial in trials])
        tuned = Spread.of([_top1(chosen(trial)["test"]) for trial in trials])
        facts = {
            "iteration": t,
            "nonconforming": [scored[variant] for variant in variants],
            "jaccard": similar,
            "trials": trials,
            "test": trained and dataclasses.asdict(trained),
            "finetuned_test": tuned and dataclasses.asdict(tuned),
        }
        if self.ranks.first and not self.dry:
            path = self.folder / f"iteration-{t}/summary.json"
            _write_json(path, {"version": __version__, **facts})
        if trained and tuned:
            self.say(f"iteration-{t}: test accuracy {trained} %, fine-tuned {tuned} %")
        return facts

    # What results depend on

    def on_first(self, stage: Stage, work: Any) -> Facts:
        """A stage whose work one process does."""
        return self.records.do(stage, lambda: work() if self.ranks.first else {})

    def batch_size(self) -> list[Any]:
        return [
            self.recipe.engine.predict_batch_size,
            self.recipe.compatibility.float16_predictions,
        ]


def depends_on(job: Job, transforms: Literal["train", "eval"]) -> Facts:
    """The settings that whatever a network makes depends on.

    Not where the data set is: it may move.
    """
    recipe = job.recipe
    network = dataclasses.asdict(recipe.network)
    facts = {
        "manifest": job.manifest.fingerprint,
        "unusable": _digest(np.flatnonzero(job.unusable)),
        "network": {name: network[name] for name in ("name", "pretrained", "options")},
        "transforms": dataclasses.asdict(getattr(recipe.data, transforms)),
        "fast": recipe.data.fast,
        "precision": recipe.engine.precision,
    }
    if transforms == "train":
        facts["validation"] = dataclasses.asdict(recipe.data.eval)
        for name in ("accumulate", "clip", "ema"):
            facts[name] = getattr(recipe.engine, name)
        facts["last_batch_validation_loss"] = recipe.compatibility.last_batch_validation_loss
    return facts


def pretrained_files(recipe: Recipe) -> list[Path]:
    """The file of weights that every network starts from, if there is one."""
    given = recipe.network.pretrained
    return [Path(given)] if given is not None and Path(given).is_file() else []


def read_manifest(data: Data) -> Manifest:
    """The data set that a recipe names."""
    layout = layouts.detect(data.root) if data.layout == "auto" else data.layout
    if layout == "webvision":
        return Manifest.from_webvision(data.root, data.num_classes)
    if data.layout == "auto":
        return layouts.read(data.root)
    manifest: Manifest = getattr(Manifest, f"from_{layout}")(data.root)
    return manifest


def chosen(trial: Facts) -> Facts:
    """What a trial came to: its fine-tuning, where that was better, else its training."""
    tuned = trial["finetune"]
    best: Facts = tuned if tuned and tuned.get("improved") else trial["train"]
    return best


@dataclasses.dataclass(frozen=True)
class Spread:
    """Accuracies of several seeds."""

    mean: float
    sd: float | None  #: of the sample; None for one seed
    seeds: int

    @classmethod
    def of(cls, accuracies: Sequence[float | None]) -> Spread | None:
        """Of shares from 0 to 1; None where there are none."""
        values = [value for value in accuracies if value is not None]
        if not values:
            return None
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), sd, len(values))

    def __str__(self) -> str:
        text = f"{100 * self.mean:.2f}"
        return text if self.sd is None else f"{text} ± {100 * self.sd:.2f}"


def _top1(tested: Facts | None) -> float | None:
    return None if tested is None else tested["top1"]


def _gain(iterations: list[Facts]) -> float | None:
    """How much better the last iteration is on the validation images than the one before."""

    def mean(facts: Facts) -> float | None:
        spread = Spread.of([chosen(trial).get("best_accuracy") for trial in facts["trials"]])
        return None if spread is None else spread.mean

    if len(iterations) < 2:
        return None
    before, now = mean(iterations[-2]), mean(iterations[-1])
    return None if before is None or now is None else now - before


def _jaccard(before: list[NDArray[np.bool_]], now: list[NDArray[np.bool_]]) -> float:
    """Mean over the trials; 1 for two empty sets."""
    pairs = zip(before, now, strict=True)
    shares = [(a & b).sum() / (a | b).sum() if (a | b).any() else 1.0 for a, b in pairs]
    return float(np.mean(shares))


def _digest(rows: NDArray[np.int64]) -> str:
    return hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _plain_settings(fit: Fit) -> Facts:
    """The settings of a plain training, of whatever kind the training is."""
    names = [field.name for field in dataclasses.fields(Fit)]
    return {name: value for name, value in dataclasses.asdict(fit).items() if name in names}


def _prepare(folder: Path) -> None:
    """Make the run's folder.

    Raises:
        ValueError: it holds something else. OSError: it cannot be made.
    """
    if folder.is_dir() and not (folder / "recipe.yaml").exists():
        strangers = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise ValueError(
                f"run: out must be a new or empty folder, or that of a run, got {folder}, "
                f"which holds {min(strangers)}"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"run: cannot make the folder {folder}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    """Write a text file, unless it has this text."""
    content = text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _no_progress(what: str) -> Any:
    return lambda done, all_: None
