"""``genkl train`` and ``genkl finetune``: single stages of a recipe, on given files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .run import Bars, say

if TYPE_CHECKING:
    from ..training.stages import Job


def train(
    recipe: str,
    overrides: list[str] = [],  # noqa: B006 (never changed)
    *,
    data_root: str,
    out: Path,
    targets: Path | None = None,
    split: Literal["clean", "train"] = "clean",
    weights: Path | None = None,
    predictions: list[Path] = [],  # noqa: B006 (never changed)
    ledger: Path | None = None,
    seed: int = 0,
) -> None:
    """Train one network: with the objective of GenKL on targets, or plainly on given labels.

    With --targets it is a trial (settings: training of the recipe), without them a member
    (settings: members). Started again, it goes on where it was stopped.

    Args:
        recipe: name of a recipe, or a YAML file
        overrides: settings of the recipe to replace, as training.epochs=5
        data_root: the data set: a folder, table or manifest
        out: folder for best.safetensors, last.ckpt and metrics.csv
        targets: what genkl relabel wrote
        split: without targets: the images whose given labels are learnt
        weights: file to begin with
        predictions: the averaged files; needed for compatibility.nc_target=averaged only
        ledger: what genkl scan wrote: these images are left out
        seed: of the first weights, the order of the images and the mixup

    Example:
        genkl train clothing1m --data-root /data/clothing1m --targets targets.parquet -o trial-0
        genkl train clothing1m --data-root /data/clothing1m --split clean --seed 3 -o member-3
    """
    from ..training import stages

    def work(job: Job) -> Any:
        if targets is None:
            members = job.recipe.members
            if weights is not None:
                raise ValueError("train: weights must be left out without targets")
            frozen = job.recipe.compatibility.members_eval_mode
            return stages.fit_labels(
                job, job.rows(split), members, out, seed, eval_mode_after_first_epoch=frozen
            )
        return stages.train(job, targets, out, seed, start=weights, members=predictions)

    inputs = [path for path in (targets, weights, *predictions) if path is not None]
    asked = [seed, None if targets else split]
    _stage("train", recipe, overrides, data_root, ledger, out, inputs, asked, work)


def finetune(
    recipe: str,
    overrides: list[str] = [],  # noqa: B006 (never changed)
    *,
    data_root: str,
    weights: Path,
    out: Path,
    predictions: Path | None = None,
    nc_list: Path | None = None,
    ledger: Path | None = None,
    seed: int = 0,
) -> None:
    """Go on with cross-entropy on the clean images, from trained weights.

    The weights of the best epoch are kept, whether or not they beat those of the training
    (finetune.beat_training is for genkl run, which knows both).

    Args:
        recipe: name of a recipe, or a YAML file
        overrides: settings of the recipe to replace, as finetune.epochs=5
        data_root: the data set: a folder, table or manifest
        weights: of the training, as best.safetensors
        out: folder for best.safetensors, last.ckpt and metrics.csv
        predictions: of these weights for the noisy images; needed for finetune.clean=dynamic
        nc_list: keys of the NC images (nc_set.txt); needed for finetune.without_nc=true with it
        ledger: what genkl scan wrote: these images are left out
        seed: of the order of the images

    Example:
        genkl finetune clothing1m --data-root /data/clothing1m --weights trial-0/best.safetensors \
-o tuned-0
    """
    from ..data.published import read_row_list
    from ..training import stages

    def work(job: Job) -> Any:
        tuning = job.recipe.finetune
        nc = None
        if tuning.clean == "dynamic":
            if predictions is None:
                raise ValueError("finetune: predictions must be given for finetune.clean=dynamic")
            if tuning.without_nc and nc_list is None:
                raise ValueError(
                    "finetune: nc_list must be given, or finetune.without_nc=false to take NC "
                    "images, too"
                )
            if nc_list is not None and tuning.without_nc:
                nc = read_row_list(nc_list, job.manifest)
        softmax = predictions if tuning.clean == "dynamic" else None
        clean = stages.clean_rows(job, softmax, nc)
        return stages.finetune(job, weights, clean, out, seed, None)

    inputs = [path for path in (weights, predictions, nc_list) if path is not None]
    _stage("finetune", recipe, overrides, data_root, ledger, out, inputs, [seed], work)


def _stage(
    name: str,
    recipe: str,
    overrides: list[str],
    data_root: str,
    ledger: Path | None,
    out: Path,
    inputs: list[Path],
    asked: list[Any],
    work: Callable[[Job], Any],
) -> None:
    """Run one stage in its own folder, with its own records."""
    import dataclasses
    from contextlib import ExitStack

    import numpy as np

    from ..data import Ledger
    from ..files import exclusive
    from ..ranks import join
    from ..training import recipe as recipes
    from ..training.loop import depends_on, pretrained_files, read_manifest
    from ..training.records import Records, Stage
    from ..training.stages import Job

    settings = recipes.load(recipe, [f"data.root={json.dumps(data_root)}", *overrides])
    recipes.check(settings)
    manifest = read_manifest(settings.data)
    ranks = join(settings.engine.accelerator)
    unusable = np.zeros(len(manifest), bool)
    if ledger is not None:
        unusable[Ledger.load(ledger).rows_in(manifest)] = True
    for path in inputs:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
    log = say if ranks.first else lambda line: None
    bars = Bars()
    job = Job(settings, manifest, unusable, ranks, log, bars.begin)
    parts = ("training", "members", "finetune", "compatibility")
    stage = Stage(
        name,
        {
            **depends_on(job, "train"),
            "asked": asked,
            **{part: dataclasses.asdict(getattr(settings, part)) for part in parts},
        },
        [*inputs, *pretrained_files(settings)],
        [out / "metrics.csv", out / "best.safetensors"],
        [out / "last.ckpt"],
    )
    with ExitStack() as stack:
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(out / ".lock"))
        ranks.barrier()
        facts = Records(out, ranks, log).do(stage, lambda: work(job))
    bars.close()
    if ranks.first:
        accuracy = facts.get("best_accuracy")
        if accuracy is not None:
            print(f"{'validation':<18}{100 * accuracy:.2f} % (epoch {facts['best_epoch']})")
        print(f"{'weights':<18}{out / 'best.safetensors'}")
