"""What of a recipe cannot work, said before anything starts: the setting, and what to do."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.manifest import SPLITS
from ..rule import MAX_MODELS
from .settings import Recipe, Rule

if TYPE_CHECKING:
    from ..data import Manifest

_MOST_SEED = 2**32 - 1  # NumPy's legacy generator takes no larger one
_FITS = ("members", "training", "finetune")
_SPLIT_NAMES = {"clean": "verified", "val": "validation"}
_WANTED_BY_LOGGERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


@dataclasses.dataclass(frozen=True)
class _Range:
    """Numbers from ``low`` to ``high``; ``above``, ``below``: without these themselves."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and over and under

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


_COUNT, _NOT_NEGATIVE, _POSITIVE = _Range(1), _Range(0), _Range(0, above=True)
_SHARE, _INSIDE = _Range(0, 1), _Range(0, 1, above=True, below=True)
_OF_A_FIT = {
    "epochs": _COUNT,
    "batch_size": _Range(2),  # batch normalisation has no variance of one image
    "optimizer.lr": _POSITIVE,
    "optimizer.momentum": _Range(0, 1, below=True),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "schedule.patience": _NOT_NEGATIVE,
    "schedule.factor": _INSIDE,
    "validate_every": _COUNT,
}
_RANGES: dict[str, _Range] = {
    **{f"{part}.{name}": allowed for part in _FITS for name, allowed in _OF_A_FIT.items()},
    "data.num_classes": _Range(2),
    "data.threads": _COUNT,
    "rule.alpha": _NOT_NEGATIVE,
    "rule.beta": _Range(),
    "rule.sigma": _NOT_NEGATIVE,
    "rule.num_vectors": _Range(1, 1 << 16),
    "rule.seed": _Range(0, _MOST_SEED),
    "rule.flag_validation": _INSIDE,
    "training.omega_clean": _NOT_NEGATIVE,
    "training.omega_nnc": _NOT_NEGATIVE,
    "training.omega_nc": _NOT_NEGATIVE,
    "training.loss_scale": _POSITIVE,
    "training.mixup_alpha": _Range(),
    "training.clean_threshold": _SHARE,
    "finetune.epochs": _NOT_NEGATIVE,
    "finetune.loss_scale": _POSITIVE,
    "finetune.clean_threshold": _SHARE,
    "loop.iterations": _NOT_NEGATIVE,
    "loop.stop_accuracy": _SHARE,
    "loop.stop_jaccard": _Range(0, 1, above=True),
    "engine.accumulate": _COUNT,
    "engine.clip": _POSITIVE,
    "engine.ema": _INSIDE,
    "engine.save_every": _COUNT,
    "engine.log_every": _COUNT,
    "engine.predict_batch_size": _COUNT,
}


def check(recipe: Recipe) -> None:
    """Refuse settings that cannot work together, whatever the images are.

    Warns of members that count twice, which is legal (trap R15).

    Raises:
        ValueError: the first such setting, and what to do about it.
    """
    for key, allowed in _RANGES.items():
        value: Any = functools.reduce(getattr, key.split("."), recipe)
        if value is not None:
            _require(value in allowed, f"{key} must be {allowed}, got {value}")
    _check_data(recipe)
    _check_members(recipe)
    _check_rule(recipe.rule, recipe.data.num_classes)
    _check_relabel(recipe)
    _check_trainings(recipe)
    _check_loop(recipe)
    _check_engine(recipe)


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    _require(
        bool(data.root),
        "data.root must be given: the folder, table or saved manifest of the data set "
        "(data.root=PATH)",
    )
    there = "://" in data.root or Path(data.root).exists()
    _require(there, f"data.root must be there, got {data.root}")
    _require(
        not data.eval.is_random,
        "data.eval must give the same pixels each time: crop center, flip 0, rotation 0; "
        f"got crop {data.eval.crop}, flip {data.eval.flip:g}, rotation {data.eval.rotation:g}",
    )


def _check_members(recipe: Recipe) -> None:
    members = recipe.members
    given = _given_members(recipe)
    _require(
        len(given) <= 1,
        f"{' and '.join(f'members.{name}' for name in given)} are given; give one of them: an "
        "average needs no predictions, and predictions need no weights",
    )
    for name, paths in given.items():
        for path in paths:
            _require_file(f"members.{name}", path)
    if members.nc_list is not None:
        _require_file("members.nc_list", members.nc_list)
    _require_seeds("members.seeds", members.seeds)

    files = next(iter(given.values()), [])
    if not files and not members.seeds:
        wanted = "members.seeds (to train them), weights, predictions or average"
        if members.nc_list is not None:
            raise ValueError(
                "recipe: members.nc_list says which images do not conform, but the targets of the "
                f"others need predictions: give {wanted}"
            )
        raise ValueError(f"recipe: there are no members: give {wanted}")
    if not files and members.source == "folds":
        _require(members.folds >= 2, f"members.folds must be at least 2, got {members.folds}")

    _require(
        not (members.pick and "average" in given),
        "members.pick chooses members, and members.average is one file for all: empty one of them",
    )
    known = list(range(len(files))) if files else members.seeds
    by = "numbers of the given files, from 0," if files else "among members.seeds"
    _require_most("members", max([len(known), *map(len, members.pick.values())]))
    for trial, picked in members.pick.items():
        strangers = [member for member in picked if member not in known]
        _require(
            bool(picked) and not strangers,
            f"members.pick of trial {trial} must be {by} {known}, got {picked}",
        )
        _require(
            trial in recipe.loop.seeds,
            f"members.pick names trial {trial}, and loop.seeds are {recipe.loop.seeds}; "
            "leave it out, or members.pick={} to use all members",
        )
        _warn_of_repeats(f"members.pick of trial {trial}", picked)
    _warn_of_repeats("members", files)


def _check_rule(rule: Rule, num_classes: int | None) -> None:
    """tau = 1/k - beta > 0; where k is not known it is at least 2."""
    k = 2 if num_classes is None else num_classes
    _require(
        rule.beta is None or 1 / k - rule.beta > 0,
        f"rule.beta must be below 1/k = {1 / k:.6g} for {'at least ' * (num_classes is None)}{k} "
        f"classes, so that tau = 1/k - beta is positive, got {rule.beta}; null: what suits k",
    )


def _check_relabel(recipe: Recipe) -> None:
    relabel = recipe.relabel
    _require(
        relabel.double_hot or not recipe.compatibility.ratio_broadcast,
        "relabel.double_hot=false with compatibility.ratio_broadcast=true leaves targets that are "
        "the same for every class; switch one of them off",
    )
    _require(
        not (relabel.ratio_file is not None and relabel.ratio_splits),
        "relabel.ratio_file and relabel.ratio_splits both say where the class ratio is from; "
        "give one of them",
    )
    if relabel.ratio_file is not None:
        _require_file("relabel.ratio_file", relabel.ratio_file)
    allowed = [split for split in SPLITS if split != "test"]
    for split in relabel.ratio_splits:
        _require(
            split in allowed,
            f"relabel.ratio_splits must be of {', '.join(allowed)}, got {split!r}",
        )


def _check_trainings(recipe: Recipe) -> None:
    training = recipe.training
    for part in _FITS:
        optimizer = getattr(recipe, part).optimizer
        _require(
            not (optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0),
            f"{part}.optimizer.nesterov needs momentum, got 0; set nesterov to false",
        )
    _require(
        training.omega_clean + training.omega_nnc + training.omega_nc > 0,
        "training.omega_clean, omega_nnc and omega_nc must not all be 0",
    )
    _require(
        training.start == "pretrained" or not recipe.members.predictions + _average(recipe),
        "training.start=member needs the weights of a member, and only their predictions are "
        "given; give members.weights, or use training.start=pretrained",
    )
    _require(
        recipe.rule.alpha is not None or not recipe.members.predictions + _average(recipe),
        "rule.alpha=null needs the members' weights, to see what they make of the validation "
        "images, and only their predictions are given; give members.weights, or rule.alpha",
    )


def _check_loop(recipe: Recipe) -> None:
    loop = recipe.loop
    _require_seeds("loop.seeds", loop.seeds)
    _require(
        bool(loop.seeds) or not (loop.iterations or loop.baselines),
        "loop.seeds must hold a seed for each trial, got none",
    )
    if loop.iterations > 1:
        _require_most("trials, which are the members of the next iteration,", len(loop.seeds))
    _require(
        bool(loop.iterations or loop.baselines) or not _given_members(recipe),
        "loop.iterations=0 trains the members and stops, and they are given: nothing is to be done",
    )


def _check_engine(recipe: Recipe) -> None:
    engine = recipe.engine
    _require(
        not (engine.precision == "16-mixed" and engine.accelerator == "cpu"),
        "engine.precision=16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU",
    )
    for name in engine.loggers:
        modules = _WANTED_BY_LOGGERS.get(name, ())
        _require(
            not modules or any(map(find_spec, modules)),
            f"engine.loggers: {name} needs a package that is not here: pip install {name}",
        )


def check_against(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse settings that cannot work with these images.

    Raises:
        ValueError: the first such setting, and what to do about it. KeyError: a line of
            ``members.nc_list`` is no key of a noisy image. OSError: a file cannot be read.
    """
    from ..data.published import read_class_ratio, read_row_list

    sizes = manifest.split_sizes()
    k = manifest.num_classes
    wanted = recipe.data.num_classes
    _require(
        wanted in (None, k), f"data.num_classes must be that of the data set, {k}, got {wanted}"
    )
    _require(k >= 2, f"the data set must have at least 2 classes, got {k}")
    _require("train" in sizes, "the data set must have noisy images (split train), got none")
    _check_rule(recipe.rule, k)

    for need, split, instead in _needs(recipe):
        _require(
            split in sizes,
            f"{need} needs {_SPLIT_NAMES[split]} images (split {split}), and the data set has "
            f"none; {instead}",
        )
    for part, splits in _trained_on(recipe):
        size = sum(sizes.get(split, 0) for split in splits)
        _require(
            size >= 2,
            f"{part} needs at least 2 images of {' and '.join(splits)}, which make the smallest "
            f"batch, got {size}",
        )
    folds = recipe.members.folds
    if recipe.members.source == "folds" and _trains_members(recipe):
        largest = int(manifest.class_counts("train").max())
        _require(
            folds <= largest,
            f"members.folds must be at most the {largest} images of the largest class, got {folds}",
        )

    relabel = recipe.relabel
    if recipe.loop.iterations == 0:
        return
    if relabel.ratio_file is not None:
        length = len(read_class_ratio(relabel.ratio_file))
        _require(length == k, f"relabel.ratio_file must be of {k} classes, got {length} in it")
    else:
        try:
            manifest.class_ratio(*relabel.ratio_splits)
        except ValueError as error:
            raise ValueError(
                "recipe: relabel.ratio_splits must be splits that hold every class, "
                f"got {relabel.ratio_splits or 'those of the data set'}: {error}"
            ) from error
    if recipe.members.nc_list is not None:
        read_row_list(recipe.members.nc_list, manifest)


def _needs(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(setting, split that it needs, what to do where the data set lacks it)."""
    loops = recipe.loop.iterations > 0
    if _trains_members(recipe) and recipe.members.source == "clean":
        yield "members.source=clean", "clean", "use members.source=folds or noisy"
    if loops and recipe.training.clean != "dynamic":
        yield f"training.clean={recipe.training.clean}", "clean", "use training.clean=dynamic"
    if loops and recipe.finetune.epochs and recipe.finetune.clean == "split":
        yield "finetune.clean=split", "clean", "use finetune.clean=dynamic, or finetune.epochs=0"
    if "both" in recipe.loop.baselines:
        yield "loop.baselines=[both]", "clean", "leave it out"
    for split in recipe.relabel.ratio_splits:
        if loops and split in _SPLIT_NAMES:
            yield f"relabel.ratio_splits={split}", split, "leave it out"
    trained = {
        "members": _trains_members(recipe),
        "training": loops or bool(recipe.loop.baselines),
        "finetune": loops and recipe.finetune.epochs > 0,
    }
    for part in _FITS:
        if trained[part] and getattr(recipe, part).schedule.name == "plateau":
            yield f"{part}.schedule=plateau", "val", f"use {part}.schedule.name=cosine"
    if loops and recipe.rule.alpha is None:
        yield "rule.alpha=null", "val", "set some images apart for it, or give rule.alpha"
    if loops and recipe.loop.stop_accuracy is not None:
        yield "loop.stop_accuracy", "val", "use loop.stop_jaccard"


def _trained_on(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(part, splits that its batches are from)."""
    members, training, finetune = recipe.members, recipe.training, recipe.finetune
    if _trains_members(recipe):
        yield "members", ("clean",) if members.source == "clean" else ("train",)
    if recipe.loop.iterations:
        yield "training", ("train", "clean") if training.clean == "joint" else ("train",)
        if training.clean == "loader":
            yield "training.clean=loader", ("clean",)
        if finetune.epochs and finetune.clean == "split":
            yield "finetune", ("clean",)


def _trains_members(recipe: Recipe) -> bool:
    return not _given_members(recipe)


def _given_members(recipe: Recipe) -> dict[str, list[str]]:
    """Name -> files of the members that are given, by the names of the settings."""
    members = recipe.members
    files = {
        "weights": members.weights,
        "predictions": members.predictions,
        "average": _average(recipe),
    }
    return {name: paths for name, paths in files.items() if paths}


def _average(recipe: Recipe) -> list[str]:
    return [] if recipe.members.average is None else [recipe.members.average]


def _require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(f"recipe: {message}")


def _require_file(key: str, path: str) -> None:
    _require(Path(path).is_file(), f"{key} must be a file, got {path!r}")


def _require_seeds(key: str, seeds: list[int]) -> None:
    _require(len(set(seeds)) == len(seeds), f"{key} must not repeat a seed, got {seeds}")
    for seed in seeds:
        _require(
            0 <= seed <= _MOST_SEED,
            f"{key} must be at least 0 and at most {_MOST_SEED}, got {seed}",
        )


def _require_most(what: str, count: int) -> None:
    _require(count <= MAX_MODELS, f"{what} must be at most {MAX_MODELS}, got {count}")


def _warn_of_repeats(key: str, members: Sequence[Any]) -> None:
    if len(set(members)) < len(members):
        warnings.warn(
            f"recipe: {key} {list(members)} has a member more than once; it weighs more",
            stacklevel=4,
        )
