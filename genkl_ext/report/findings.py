"""What the folder of a run holds, as far as the run has come.

    run = open_run("runs/clothing1m")
    run.groups                     the kinds of training, with accuracies by seed
    run.missing                    stages that are still to come
    for t in run.scored: run.identifications(t)    scores of the noisy images

Tables are read when they are asked for, and only the columns that are needed. The layout of the
folder is that of ``training/loop.py``.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data import layouts
from ..data.ledger import Ledger
from ..data.manifest import Manifest
from ..scoring.sources import open_source
from ..scoring.tables import read_settings

if TYPE_CHECKING:
    from typing_extensions import Self

State = Literal["done", "begun", "missing"]

_RUN_FILES = ("recipe.yaml", "manifest.parquet")  # that make a folder that of a run
_COLUMNS = ("critical_alpha", "nc", "top_class", "top_prob")
_PLAIN = {"noisy": "plain training, noisy labels", "both": "plain training, noisy and clean labels"}
_MEMBERS = {"clean": "members: clean labels only", "noisy": "members: noisy labels"}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of one seed."""

    name: str  #: of its stage
    seed: int
    state: State
    kept: bool  #: its weights are those that count; not so a fine-tuning without gain
    validation: float | None  #: best accuracy on the validation images, 0 to 1
    test: float | None  #: accuracy of these weights on the test images
    metrics: Path  #: a line per epoch


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    sd: float | None  #: None for one seed
    seeds: int


@dataclasses.dataclass(frozen=True)
class Group:
    """One kind of training, all its seeds."""

    title: str
    kind: Literal["noisy", "both", "members", "train", "finetune"]
    iteration: int | None
    trainings: tuple[Training, ...]
    test: tuple[float, ...]  #: by seed, of those that are done
    validation: tuple[float, ...]

    @property
    def done(self) -> int:
        return sum(training.state == "done" for training in self.trainings)


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """A table of scores, as far as figures need it."""

    alpha: float
    num_classes: int
    inputs: list[dict[str, Any]]  #: fingerprints of the prediction files
    critical_alpha: NDArray[np.float32]  #: (N,), NaN for a row without a prediction
    nc: NDArray[np.bool_]  #: (N,)
    top_class: NDArray[np.int32]  #: (N,), -1 for a row without a prediction
    top_prob: NDArray[np.float32]  #: (N,)

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """(N,) which rows have a prediction."""
        return ~np.isnan(self.critical_alpha)

    def at(self, alpha: float) -> Self:
        """The same rows decided at another alpha."""
        # In float64: beside an array of float32 NumPy would round a Python number to float32.
        nc = self.critical_alpha.astype(np.float64) >= alpha
        return dataclasses.replace(self, alpha=alpha, nc=nc)

    def labels_scored(self, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """(N,) given labels, -1 where there is none or no prediction."""
        return np.where(self.scored, labels, -1)

    def flow(self, labels: NDArray[np.int32], k: int) -> NDArray[np.int64]:
        """(k, k) conforming rows by given label and most probable class."""
        rows = self.scored & ~self.nc & (labels >= 0)
        pairs = labels[rows].astype(np.int64) * k + self.top_class[rows]
        return np.bincount(pairs, minlength=k * k).reshape(k, k)


@dataclasses.dataclass(frozen=True, eq=False)
class Identification(Scored):
    """What the rule said of the noisy images in one iteration, for one set of members."""

    iteration: int
    trial: str | None  #: the trial it is of, where each has its own
    nc_list: str | None  #: where the NC set is from, if not from the rule
    members: tuple[Path, ...]  #: the (N, k) files that were averaged; none if one is gone
    lost: str  #: why there are none


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run's folder; see the module."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    manifest: Manifest
    stages: dict[str, Any]  #: records of the stages, by name
    summary: dict[str, Any] | None  #: of a run that has ended

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(N,) given labels of the noisy images, -1 for none."""
        return self.manifest.labels[self.manifest.rows("train")]

    @cached_property
    def ledger(self) -> Ledger | None:
        path = self.folder / "ledger.parquet"
        return Ledger.load(path) if path.is_file() else None

    @cached_property
    def scored(self) -> list[int]:
        """The iterations that have scores."""
        return [t for t in range(self._begun) if self._places(t)]

    @property
    def trained(self) -> list[int]:
        """The iterations of which a training has begun."""
        ours = {group.iteration for group in self.groups if group.kind in ("train", "finetune")}
        return sorted(t for t in ours if t is not None)

    @cached_property
    def missing(self) -> list[str]:
        """Names of the stages that a complete run would have and this one has not."""
        if self.summary is not None and not self.begun:
            return []  # it may have stopped early on purpose
        return [name for name in self.expected if self._state(name) != "done"]

    @property
    def begun(self) -> list[str]:
        """Names of the stages that are under way or were interrupted."""
        return [name for name, stage in self.stages.items() if stage["state"] == "begun"]

    @cached_property
    def groups(self) -> list[Group]:
        """The kinds of training that have begun, in the order of the method."""
        loop = self.recipe["loop"]
        found = [
            self._group(f"baselines/{name}/{{}}", name, None, _PLAIN.get(name, name), loop["seeds"])
            for name in loop["baselines"]
        ]
        if self._trains_members and self.recipe["members"]["source"] != "folds":
            title = _MEMBERS[self.recipe["members"]["source"]]
            seeds = self.recipe["members"]["seeds"]
            found.append(self._group("iteration-0/members/{}", "members", 0, title, seeds))
        for t in range(self._begun):
            name = f"iteration-{t}/trial-{{}}"
            title = f"GenKL, iteration {t}"
            found.append(self._group(f"{name}/train", "train", t, title, loop["seeds"]))
            if self.recipe["finetune"]["epochs"]:
                title += ", fine-tuned"
                found.append(self._group(f"{name}/finetune", "finetune", t, title, loop["seeds"]))
        return [group for group in found if any(t.state != "missing" for t in group.trainings)]

    def identifications(self, t: int) -> Iterator[Identification]:
        """The scores of an iteration: one, or one for each trial that differs.

        Raises:
            OSError: a table cannot be read. ValueError: it is of other images.
        """
        places = self._places(t)
        for place in places:
            yield self._identification(t, place, place.name if len(places) > 1 else None)

    def _identification(self, t: int, place: Path, trial: str | None) -> Identification:
        path = place / "scores.parquet"
        table = read_scores(path)
        if len(table.nc) != len(self.labels):
            raise ValueError(
                f"report: {path} must have a row for each of {len(self.labels)} noisy images, "
                f"got {len(table.nc)}"
            )
        nc_list = self.recipe["members"]["nc_list"] if t == 0 else None
        if nc_list is not None and (place / "targets.parquet").is_file():
            targets = pq.read_table(place / "targets.parquet", columns=["target"])["target"]
            nc = np.asarray(pc.equal(targets.cast(pa.string()), "uniform"))
            table = dataclasses.replace(table, nc=nc)
        members, lost = self._members(t, table.inputs)
        return Identification(
            **{field.name: getattr(table, field.name) for field in dataclasses.fields(table)},
            iteration=t,
            trial=trial,
            nc_list=nc_list,
            members=members,
            lost=lost,
        )

    def metrics(self, training: Training) -> dict[str, NDArray[np.float64]]:
        """Columns of a training's ``metrics.csv``, one number per epoch; NaN where it has none.

        Raises:
            OSError: it cannot be read. ValueError: it has a word in the place of a number.
        """
        path = training.metrics
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns: dict[str, list[float]] = {name: [] for name in reader.fieldnames or ()}
            for line in reader:
                for name, column in columns.items():
                    try:
                        column.append(float(line[name]) if line[name] else math.nan)
                    except ValueError:
                        raise ValueError(
                            f"report: {path}, line {reader.line_num}: {name} must be a number, "
                            f"got {line[name]!r}"
                        ) from None
        return {name: np.array(column) for name, column in columns.items() if column}

    @property
    def _trains_members(self) -> bool:
        members = self.recipe["members"]
        return not (members["weights"] or members["predictions"] or members["average"])

    @cached_property
    def _begun(self) -> int:
        """Iterations up to the last one of which there is anything."""
        # Not to the first that is not there: earlier ones may have been removed to save space.
        numbers = [re.fullmatch(r"iteration-(\d+)", path.name) for path in self.folder.iterdir()]
        return 1 + max((int(number[1]) for number in numbers if number), default=-1)

    @property
    def expected(self) -> list[str]:
        """Names of the stages of a complete run, without those that only predict."""
        loop, members = self.recipe["loop"], self.recipe["members"]
        names = ["scan"] if self.recipe["data"]["scan"] else []
        seeds = loop["seeds"]
        names += [f"baselines/{name}/{seed}" for name in loop["baselines"] for seed in seeds]
        if self._trains_members:
            folds = [""]
            if members["source"] == "folds":
                folds = [f"/fold-{fold}" for fold in range(members["folds"])]
            names += [
                f"iteration-0/members/{seed}{fold}" for seed in members["seeds"] for fold in folds
            ]
        for t in range(loop["iterations"]):
            if not any(f"iteration-{t}/trial-{seed}/score" in self.stages for seed in seeds):
                names += [f"iteration-{t}/score", f"iteration-{t}/relabel"]
            for seed in seeds:
                names.append(f"iteration-{t}/trial-{seed}/train")
                if self.recipe["finetune"]["epochs"]:
                    names.append(f"iteration-{t}/trial-{seed}/finetune")
        return names

    def _places(self, t: int) -> list[Path]:
        folder = self.folder / f"iteration-{t}"
        trials = [folder / f"trial-{seed}" for seed in self.recipe["loop"]["seeds"]]
        # A trial that shares members and vectors with an earlier one has no scores of its own.
        places = [place for place in trials if (place / "scores.parquet").is_file()]
        return [folder] if (folder / "scores.parquet").is_file() else places

    def _state(self, name: str) -> State:
        record = self.stages.get(name)
        if record is None:
            return "missing"
        return "done" if record["state"] == "done" else "begun"

    def _group(
        self, pattern: str, kind: Any, iteration: int | None, title: str, seeds: list[int]
    ) -> Group:
        trainings = tuple(self._training(pattern.format(seed), seed) for seed in seeds)
        counted = list(trainings)
        if kind == "finetune":
            # Where fine-tuning did not help, the training counts.
            for i, (tuned, seed) in enumerate(zip(trainings, seeds, strict=True)):
                if tuned.state == "done" and not tuned.kept:
                    counted[i] = self._training(f"iteration-{iteration}/trial-{seed}/train", seed)
        counted = [training for training in counted if training.state == "done"]
        return Group(
            title,
            kind,
            iteration,
            trainings,
            test=tuple(t.test for t in counted if t.test is not None),
            validation=tuple(t.validation for t in counted if t.validation is not None),
        )

    def _training(self, name: str, seed: int) -> Training:
        facts = self.stages.get(name, {}).get("facts", {})
        return Training(
            name,
            seed,
            self._state(name),
            kept=bool(facts.get("improved", False)),
            validation=facts.get("best_accuracy"),
            test=self._tested(name),
            metrics=self.folder / name / "metrics.csv",
        )

    def _tested(self, name: str) -> float | None:
        """Accuracy of a training on the test images; from its predictions of them."""
        softmax = self.folder / name / "test.npy"
        if self._state(f"{name}/test") != "done" or not softmax.is_file():
            return None
        known = self._summarised.get(name)
        if known is not None:
            return known
        from ..training.predict import accuracy  # needs torch: only for what has no summary yet

        rows = self.manifest.rows("test")
        tested = accuracy(softmax, self.manifest.labels[rows])
        return tested.top1 if tested.images else None

    @cached_property
    def _summarised(self) -> dict[str, float]:
        """Test accuracies that the run has written down, by name of the training."""
        known: dict[str, float] = {}

        def note(name: str, facts: dict[str, Any] | None) -> None:
            # Of an earlier training of that name, a summary may still tell.
            now = self.stages.get(name, {}).get("facts", {})
            if facts and facts.get("test") and now.items() <= facts.items():
                known[name] = facts["test"]["top1"]

        for name, trainings in (self.summary or {}).get("baselines", {}).items():
            place = "iteration-0/members" if name == "members" else f"baselines/{name}"
            for facts in trainings:
                note(f"{place}/{facts['seed']}", facts)
        for t in range(self._begun):
            path = self.folder / f"iteration-{t}/summary.json"
            for trial in _json(path)["trials"] if path.is_file() else []:
                for kind in ("train", "finetune"):
                    note(f"iteration-{t}/trial-{trial['seed']}/{kind}", trial[kind])
        return known

    def _members(self, t: int, inputs: list[dict[str, Any]]) -> tuple[tuple[Path, ...], str]:
        """The prediction files that a table of scores was made from, if they are still there."""
        members = self.recipe["members"]
        given = [*members["predictions"], *([members["average"]] if members["average"] else [])]
        found = []
        for facts in inputs:
            places = [self.folder / f"iteration-{t}/predictions" / facts["name"]]
            places += [Path(path) for path in given if Path(path).name == facts["name"]]
            for path in places:
                if path.is_file():
                    with open_source(path) as file:
                        if file.fingerprints()[0].sample == facts["sample"]:
                            found.append(path)
                            break
            else:
                return (
                    (),
                    f"the predictions {facts['name']} that were scored are not there any more",
                )
        return tuple(found), ""


def open_run(folder: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Run:
    """The folder of a run, finished or not.

    Args:
        folder: what ``genkl run`` was given as ``--out``.
        root: where the images are now, if they have moved since.

    Raises:
        OSError: it cannot be read. ValueError: it is not the folder of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"report: {folder} is no folder")
    for name in _RUN_FILES:
        if not (folder / name).is_file():
            hint = ""
            if (folder / "run" / name).is_file():
                hint = f"; {folder / 'run'} is one"
            raise ValueError(
                f"report: {folder} must be the folder of a run, and has no {name}{hint}"
            )
    import yaml

    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"report: {folder / 'recipe.yaml'} is no YAML: {error}") from error
    wanted = ("data", "members", "finetune", "loop")
    if not isinstance(recipe, dict) or not all(name in recipe for name in wanted):
        raise ValueError(f"report: {folder / 'recipe.yaml'} must be that of a run, and is not")
    records, summary = folder / "records.json", folder / "summary.json"
    return Run(
        folder,
        recipe,
        text,
        Manifest.load(folder / "manifest.parquet", root),
        _json(records) if records.is_file() else {},
        _json(summary) if summary.is_file() else None,
    )


def read_data(source: str) -> Manifest:
    """The manifest of a data set, or that of a run by the run's folder.

    Raises:
        OSError, ValueError: as ``layouts.read``.
    """
    folder = Path(source)
    of_run = all((folder / name).is_file() for name in _RUN_FILES)
    return layouts.read(folder / "manifest.parquet" if of_run else source)


def read_scores(path: str | os.PathLike[str]) -> Scored:
    """A table that ``score_files`` wrote as Parquet; only the columns that are needed.

    Raises:
        OSError: it cannot be read. ValueError: it is no table of scores.
    """
    try:
        settings = read_settings(path)
        table = pq.read_table(path, columns=list(_COLUMNS))
    except pa.ArrowInvalid as error:
        raise ValueError(f"report: {os.fspath(path)} is not a Parquet file") from error
    rule = settings["rule"]
    columns = {name: np.asarray(table[name]) for name in _COLUMNS}
    return Scored(rule["alpha"], rule["num_classes"], settings["inputs"], **columns)


def spread(values: tuple[float, ...]) -> Spread | None:
    """Of one number per seed; None where there are none."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), sd, len(values))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"report: {path} must hold an object, got {type(content).__name__}")
    return content
