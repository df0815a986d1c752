"""The stages of an iteration, each from files to files.

    fit_labels   images and given labels          -> weights         members, baselines
    predict      weights and images               -> (n, k) .npy
    join_folds   predictions of each fold         -> (N, k) .npy
    score        predictions of the members       -> scores.parquet, nc_set.txt
    relabel      scores                           -> targets.parquet
    train        targets and images               -> weights
    finetune     weights and clean images         -> weights
    evaluate     predictions and labels           -> accuracy

Every process of a job calls them. Each returns plain facts for the records of the run; the files
that it writes are complete or absent. Nothing here knows how a run's folder is laid out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .. import __version__
from ..calibration import alpha_reached_by
from ..data import Loader, Manifest, make_loader
from ..data.published import read_class_ratio, read_row_list
from ..files import atomic_write, settings_of
from ..ranks import Ranks
from ..relabel import Targets
from ..rule import GenKL
from ..scoring import read_settings, rows_without_prediction, score_files
from . import engine, networks
from . import predict as predictions
from .batches import Batches, grouped, labelled
from .records import Facts, Say
from .settings import Compatibility, Data, Finetune, Fit, Recipe, Relabel
from .steps import GenKLStep, PlainStep

if TYPE_CHECKING:
    from torch import nn

Rows = NDArray[np.int64]
Progress = Callable[[str], Callable[[int, int], None]]  # of what -> (done, all)

TARGETS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("target", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("top_class", pa.int32(), nullable=False),
        pa.field("top_prob", pa.float32(), nullable=False),
        pa.field("given_label", pa.int32(), nullable=False),
        pa.field("prior", pa.float32(), nullable=False),
    ]
)
KINDS = ("double-hot", "uniform", "left out")
TARGETS_KEY = b"genkl_ext.targets"


@dataclasses.dataclass(frozen=True)
class Job:
    """What all stages of a run share."""

    recipe: Recipe
    manifest: Manifest
    unusable: NDArray[np.bool_]  #: (rows of the manifest,) images known to be broken
    ranks: Ranks
    say: Say
    progress: Progress

    def rows(self, split: str) -> Rows:
        """The rows of a split that can be trained on: the image can be used, and has a label."""
        rows = self.manifest.rows(split)
        return rows[~self.unusable[rows] & (self.manifest.labels[rows] >= 0)]

    def network(self, seed: int, weights: Path | None = None) -> nn.Module:
        """A new network, with the weights of a file if one is given."""
        built = networks.build(self.recipe.network, self.manifest.num_classes, seed)
        if weights is not None:
            networks.load_into(built, weights)
        return built

    @property
    def data(self) -> Data:
        """How images are read by this process: with its share of the processors."""
        threads = self.recipe.data.threads or self.ranks.processors
        return dataclasses.replace(self.recipe.data, threads=threads)

    def labelled(self, rows: Rows, batch_size: int, seed: int) -> Batches:
        """This process's share of some rows, with their given labels."""
        return labelled(
            self.manifest,
            rows,
            self.data,
            batch_size,
            seed,
            device=self.loader_device,
            shard=(self.ranks.rank, self.ranks.size),
            channels_last=self.recipe.network.channels_last,
        )

    def validation(self, batch_size: int) -> Loader | None:
        """The validation images, if the data set has any; shared by all ranks.

        Args:
            batch_size: of the training; with trap N3 the size of the last batch counts.
        """
        rows = self.rows("val")
        if not len(rows):
            return None
        data, ranks = self.data, self.ranks
        most = self.recipe.engine.predict_batch_size
        if self.recipe.compatibility.last_batch_validation_loss:
            most = batch_size
        return make_loader(
            self.manifest.select(rows),
            None,
            data.eval,
            min(most, -(-len(rows) // ranks.size)),  # no rank may be left without an image
            device=self.loader_device,
            shard=(ranks.rank, ranks.size),
            on_error=data.on_error,
            threads=data.threads,
            channels_last=self.recipe.network.channels_last,
            fast=data.fast,
        )

    @property
    def loader_device(self) -> str:
        return str(self.ranks.device(self.recipe.engine.accelerator))


def fit_labels(
    job: Job,
    rows: Rows,
    fit: Fit,
    out: Path,
    seed: int,
    *,
    eval_mode_after_first_epoch: bool = False,
) -> Facts:
    """Train with plain cross-entropy on the given labels of some rows; see :func:`engine.fit`."""
    batches = job.labelled(rows, fit.batch_size, seed)
    return _fit(
        job,
        job.network(seed),
        batches,
        PlainStep(),
        out,
        fit,
        seed,
        eval_mode_after_first_epoch=eval_mode_after_first_epoch,
    )


def predict(job: Job, weights: Path, rows: Rows, out: Path) -> Facts:
    """Write the softmax of a trained network for some rows; NaN where an image is unusable."""
    dtype = "float16" if job.recipe.compatibility.float16_predictions else "float32"
    made = predictions.predict(
        job.network(0, weights),
        job.manifest.select(rows),
        out,
        data=job.data,
        engine=job.recipe.engine,
        ranks=job.ranks,
        unusable=job.unusable[rows],
        dtype=dtype,
        begin_anew="if other",  # the recipe, or the training before, may have been changed
        progress=job.progress("predicting"),
    )
    return {"rows": made.rows, "broken": [str(failure) for failure in made.broken]}


def join_folds(
    parts: Sequence[tuple[Rows, Path]], num_rows: int, num_classes: int, out: Path
) -> Facts:
    """One (N, k) prediction file of the parts that each fold's model made.

    Args:
        parts: (rows of the result, (n, k) file of their predictions); each row in exactly one.
    """
    with atomic_write(out) as temporary:
        joined = np.lib.format.open_memmap(
            temporary, "w+", np.load(parts[0][1], mmap_mode="r").dtype, (num_rows, num_classes)
        )
        for rows, path in parts:
            joined[rows] = np.load(path, mmap_mode="r")
        joined.flush()
    return {"rows": num_rows}


def calibrate(rule: GenKL, validation: Sequence[Path], share: float) -> GenKL:
    """The rule with the alpha that a share of the validation images reaches.

    Which alpha is right depends on how sharp the networks are; images known to conform show that.

    Args:
        rule: its alpha does not matter.
        validation: (V, k) files of the members; rows of NaN are of images that cannot be used.
        share: of the validation images that the rule may flag.
    """
    made = [np.load(path) for path in validation]
    usable = np.logical_and.reduce([~np.isnan(q).all(axis=1) for q in made])
    if not usable.any():
        raise ValueError("calibrate: validation must have an image that can be used, got none")
    critical = np.asarray(rule.score([q[usable] for q in made]).critical_alpha)
    return dataclasses.replace(rule, alpha=alpha_reached_by(critical, share))


def score(
    members: Sequence[Path], rule: GenKL, keys: Path, out: Path, nc_list: Path, progress: Any
) -> Facts:
    """Score the average of the members' predictions; rows without one are left out."""
    missing = rows_without_prediction(members)
    scored = score_files(
        list(members),
        rule,
        out,
        keys=keys,
        nc_list=nc_list,
        leave_out=missing if missing.any() else None,
        begin_anew="if other",  # the recipe may have been changed
        progress=progress,
    )
    return {
        "rows": scored.rows,
        "nc": scored.nc_count,
        "left_out": int(missing.sum()),
        "alpha": rule.alpha,
        "seed": rule.seed,
    }


def relabel(
    manifest: Manifest,
    scores: Path,
    out: Path,
    settings: Relabel,
    *,
    nc_list: Path | None = None,
    ratio_broadcast: bool = False,
) -> Facts:
    """Write the target of each noisy image, from its scores and its given label.

    The table has a row for each noisy image (``TARGETS``): "uniform" for one that does not conform,
    "double-hot" else, and "left out" for one without prediction or without label.

    Args:
        manifest: the data set; row i of the scores is noisy row i.
        scores: the table of scores, Parquet.
        out: the Parquet file to write.
        settings: where the class ratio is from, and which parts are taken away.
        nc_list: rows that do not conform, found elsewhere, instead of those of the scores.
        ratio_broadcast: goes with the table (trap T2).

    Raises:
        ValueError: the scores are of another number of images; a class without an image.
    """
    noisy = manifest.split("train")
    rule = read_settings(scores)["rule"]
    table = pq.read_table(scores)
    if len(table) != len(noisy) or rule["num_classes"] != manifest.num_classes:
        raise ValueError(
            f"relabel: {scores} must have a row for each of {len(noisy)} noisy images and be of "
            f"{manifest.num_classes} classes, got {len(table)} of {rule['num_classes']}"
        )
    if "key" in table.column_names:
        other = pc.not_equal(table["key"], noisy.table["key"])
        row = pc.index(other, True).as_py()
        if row >= 0:
            raise ValueError(
                f"relabel: {scores} must have the noisy images in the manifest's order, got "
                f"{table['key'][row].as_py()!r} for {noisy.keys([row])[0]!r} in row {row}"
            )
    if settings.ratio_file is not None:
        ratio = read_class_ratio(settings.ratio_file)
        if len(ratio) != manifest.num_classes:
            raise ValueError(
                f"relabel: {settings.ratio_file} must have {manifest.num_classes} classes, "
                f"got {len(ratio)}"
            )
    else:
        ratio = manifest.class_ratio(*settings.ratio_splits)
    labels = noisy.labels
    nc = np.asarray(table["nc"])
    used = (labels >= 0) & ~np.isnan(np.asarray(table["critical_alpha"]))
    if nc_list is not None:
        nc = read_row_list(nc_list, manifest)
    nc = nc & used if settings.uniform else np.zeros_like(nc)
    kind = np.where(used, np.where(nc, 1, 0), 2).astype(np.int8)
    top_prob = np.asarray(table["top_prob"])
    # Without the belief of the model the one entry left is 1: the loss is the cross-entropy.
    prior = ratio if settings.double_hot else np.ones_like(ratio)
    columns = {
        "row": np.arange(len(noisy)),
        "key": noisy.table["key"],
        "target": pa.DictionaryArray.from_arrays(pa.array(kind), pa.array(KINDS)),
        "top_class": np.where(used, np.asarray(table["top_class"]), 0).astype(np.int32),
        "top_prob": np.where(used & settings.double_hot, top_prob, 0).astype(np.float32),
        "given_label": labels,
        "prior": np.where(labels >= 0, prior[labels], 0).astype(np.float32),
    }
    about = {
        "version": __version__,
        "manifest": manifest.fingerprint,
        "num_classes": manifest.num_classes,
        "ratio": ratio.tolist(),
        "ratio_broadcast": ratio_broadcast,
        "relabel": dataclasses.asdict(settings),
        "rule": rule,
    }
    schema = TARGETS.with_metadata({TARGETS_KEY: json.dumps(about).encode()})
    with atomic_write(out) as temporary:
        pq.write_table(pa.table(columns, schema), temporary, use_dictionary=["target"])
    counts = np.bincount(kind, minlength=len(KINDS)).tolist()
    moved = used & ~nc & (columns["top_class"] != labels)
    return {**dict(zip(KINDS, counts, strict=True)), "top_class_not_given": int(moved.sum())}


def read_targets(path: Path, manifest: Manifest) -> tuple[Targets, NDArray[np.bool_]]:
    """The targets of all noisy images, and (N,) which of them are used.

    Raises:
        OSError: it cannot be read. ValueError: it is no table of targets, or of other images.
    """
    wanted = "a table of targets that genkl relabel wrote"
    about = settings_of(path, TARGETS_KEY, "targets", wanted)
    if about["manifest"] != manifest.fingerprint:
        raise ValueError(f"targets: {path} must be made for {manifest!r}, and was for another")
    table = pq.read_table(path)
    kind = np.asarray(table["target"].combine_chunks().indices)
    targets = Targets(
        top_class=np.asarray(table["top_class"]),
        top_prob=np.asarray(table["top_prob"]),
        label=np.asarray(table["given_label"]),
        prior=np.asarray(table["prior"]),
        nc=kind == KINDS.index("uniform"),
        num_classes=about["num_classes"],
        prior_everywhere=about["ratio_broadcast"],
    )
    return targets, kind != KINDS.index("left out")


def train(
    job: Job,
    targets: Path,
    out: Path,
    seed: int,
    *,
    start: Path | None = None,
    members: Sequence[Path] = (),
) -> Facts:
    """Train a new network with the three-term objective on the relabelled images.

    Args:
        targets: what :func:`relabel` wrote.
        out: folder for weights, state and metrics.
        seed: of the first weights, the order of the images and the mixup.
        start: weights to begin with instead.
        members: the prediction files that were averaged; for ``nc_target: averaged`` (trap T1).
    """
    recipe = job.recipe
    compatibility = recipe.compatibility
    table, used = read_targets(targets, job.manifest)
    used = used & ~job.unusable[job.manifest.rows("train")]
    batches = grouped(
        job.manifest,
        table,
        used,
        job.rows("clean"),
        job.data,
        recipe.training,
        seed,
        compatibility=compatibility,
        averaged=list(members) if compatibility.nc_target == "averaged" else None,
        device=job.loader_device,
        shard=(job.ranks.rank, job.ranks.size),
        channels_last=recipe.network.channels_last,
    )
    step = GenKLStep(recipe.training, compatibility)
    return _fit(job, job.network(seed, start), batches, step, out, recipe.training, seed)


def finetune(
    job: Job, weights: Path, clean: Rows, out: Path, seed: int, best: tuple[float, float] | None
) -> Facts:
    """Go on with cross-entropy on clean images.

    Args:
        weights: of the training.
        clean: rows of the manifest, whose given labels are taken as right.
        best: validation accuracy and loss of the training, which the result must beat to be kept.
    """
    settings: Finetune = job.recipe.finetune
    compatibility = job.recipe.compatibility
    batches = job.labelled(clean, settings.batch_size, seed)
    return _fit(
        job,
        job.network(seed, weights),
        batches,
        PlainStep(settings.loss_scale),
        out,
        settings,
        seed,
        start=best if settings.beat_training else None,
        lr_zero=compatibility.finetune_lr_zero,
    )


def clean_rows(job: Job, softmax: Path | None, nc: NDArray[np.bool_] | None) -> Rows:
    """What fine-tuning learns from: the verified images, or, with predictions, those believed."""
    if softmax is None:
        return job.rows("clean")
    rows = believed(job.manifest, softmax, job.recipe.finetune.clean_threshold, nc)
    return rows[~job.unusable[rows]]


def believed(
    manifest: Manifest, softmax: Path, threshold: float, nc: NDArray[np.bool_] | None
) -> Rows:
    """Rows of the manifest: the noisy images whose softmax at the given label is at least the
    threshold, less those of ``nc`` ((N,) or None).

    Raises:
        ValueError: the softmax is not of these images.
    """
    rows = manifest.rows("train")
    labels = manifest.labels[rows]
    q = np.load(softmax, mmap_mode="r")
    if q.shape != (len(rows), manifest.num_classes):
        raise ValueError(
            f"believed: {softmax} must have a row for each noisy image and a column for each "
            f"class, {(len(rows), manifest.num_classes)}, got {q.shape}"
        )
    labelled_rows = np.flatnonzero(labels >= 0)
    belief = np.full(len(rows), -1.0)
    belief[labelled_rows] = q[labelled_rows, labels[labelled_rows]]
    clean = np.nan_to_num(belief, nan=-1.0) >= threshold
    return rows[clean if nc is None else clean & ~nc]


def evaluate(manifest: Manifest, split: str, softmax: Path) -> Facts:
    """Top-1 and top-5 accuracy of predictions of a split."""
    labels = manifest.labels[manifest.rows(split)]
    return dataclasses.asdict(predictions.accuracy(softmax, labels))


def _fit(
    job: Job,
    network: nn.Module,
    batches: Batches,
    step: Any,
    out: Path,
    fit: Fit,
    seed: int,
    **options: Any,
) -> Facts:
    validation = job.validation(fit.batch_size)
    compatibility: Compatibility = job.recipe.compatibility
    try:
        fitted = engine.fit(
            network,
            batches,
            step,
            out,
            fit,
            job.recipe.engine,
            seed=seed,
            ranks=job.ranks,
            validation=validation,
            say=job.say,
            last_batch_validation_loss=compatibility.last_batch_validation_loss,
            **options,
        )
    finally:
        batches.close()
        if validation is not None:
            validation.close()
    return dataclasses.asdict(fitted)
