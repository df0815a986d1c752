"""What a step sees: images with labels, or with groups and targets, epoch after epoch.

    labelled(...)   "image", "label", "row": members, baselines, fine-tuning
    grouped(...)    also "group", "target" and, with mixup, "mixup" and "partner_target"

    image           (n, 3, H, W) float32, normalised, augmented, not yet mixed
    label, row      (n,) int64, given labels, and rows of the whole manifest
    group           (n,) int64, CLEAN, NNC or NC of ``objective.py``
    target          (n, k) float32, of the unmixed image
    partner_target  (n, k) float32, of the image that it is mixed with
    mixup           ``objective.Mixup``: with whom, and how much

Nothing random needs to be saved: a batch is a function of seed, epoch, its number in the epoch and
the rank. Batches are full, unless there are fewer images than fill one: what is left over at the
end of an epoch is left out, because batch normalisation does badly on a handful of images. An
image that turns out to be broken is missing from its batch (``Data.on_error``). With several ranks
a batch may lose all of its images that way, and is given out empty, so that the ranks stay in step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import Loader, Manifest, make_loader
from ..objective import CLEAN, NC, NNC, Objective
from ..reference import average
from ..relabel import Targets
from .settings import Compatibility, Data, Training

Rows = NDArray[np.int64]
Batch = dict[str, Any]  # tensors, and a Mixup

_AS_MEANT = Compatibility()
_CLEAN_SEED = 1 << 32  # added to the seed: clean images come in an order of their own
_MIXUP = 1  # keeps the random numbers of mixup apart from those of the order


class Batches:
    """Batches, epoch after epoch: made by :func:`labelled` and :func:`grouped`.

    ``for batch in batches`` is one epoch, and the next loop is the next epoch.
    """

    def __init__(self, loader: Loader, rows: Rows) -> None:
        self._loader = loader
        self._rows = rows  # of the whole manifest, for each row of the loader
        self._given = 0  # batches of this epoch
        self._start = 0  # number of the first batch of the next loop

    def __len__(self) -> int:
        """Batches of an epoch on this rank; some less if all images of a batch are broken."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self._given, self._start = self._start, 0
        for images in self._loader:
            batch = self._complete(images, self._given)
            self._given += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """The next loop is this epoch, from its first batch."""
        self._loader.set_epoch(epoch)
        self._given = self._start = 0

    def state_dict(self) -> dict[str, Any]:
        """The position: so many batches of an epoch have been given out. Plain numbers and text."""
        loader = self._loader.state_dict()
        return {"epoch": loader["epoch"], "batches": self._given, "loader": loader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next loop goes on after the batch at which ``state_dict`` was called.

        Raises:
            ValueError: the state is of other images or settings; with the setting.
        """
        self._loader.load_state_dict(state["loader"])
        finished = self._loader.epoch > state["epoch"]
        self._given = self._start = 0 if finished else state["batches"]

    def close(self) -> None:
        """End the threads that wait between two loops. A later loop starts new ones."""
        self._loader.close()

    def _complete(self, batch: Batch, number: int) -> Batch:
        """The batch with this number in its epoch, from what the loader gives."""
        return {**batch, "row": torch.from_numpy(self._rows[batch["row"].numpy()])}


def labelled(
    manifest: Manifest,
    rows: Rows,
    data: Data,
    batch_size: int,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    shard: tuple[int, int] = (0, 1),
    channels_last: bool = False,
) -> Batches:
    """Shuffled batches of images with their given labels.

    Args:
        manifest: the whole data set.
        rows: (n,) int64, rows of it, all with a label.
        data: how images are read and augmented (``train``).
        batch_size: images per batch, of all ranks together.
        seed: of order and augmentation.
        device: where images are decoded and come out.
        shard: (rank, number of ranks).
        channels_last: memory format of the images.

    Raises:
        ValueError: no rows, a row without label, or a batch that the ranks cannot share equally.
    """
    where = "labelled"
    _require_labels(where, "rows", manifest, rows)
    loader = _loader(where, manifest, rows, data, batch_size, seed, device, shard, channels_last)
    return Batches(loader, rows)


def grouped(
    manifest: Manifest,
    targets: Targets,
    used: NDArray[np.bool_],
    clean_rows: Rows,
    data: Data,
    training: Training,
    seed: int,
    *,
    compatibility: Compatibility = _AS_MEANT,
    averaged: Sequence[str | PathLike[str]] | None = None,
    device: str | torch.device = "cpu",
    shard: tuple[int, int] = (0, 1),
    channels_last: bool = False,
) -> Batches:
    """Shuffled batches of relabelled images, with clean ones as ``training.clean`` says.

    loader: each noisy batch comes with a clean one of the same size after it; the clean images
    begin anew, in another order, whenever they are used up. joint: clean and noisy images are
    shuffled together. dynamic: noisy images only; the step decides which are clean.

    Args:
        manifest: the whole data set.
        targets: of all N noisy images, the rows of split "train", in NumPy.
        used: (N,) bool, the noisy images to train on.
        clean_rows: (n,) int64, rows of the manifest with verified labels; not for "dynamic".
        data: how images, NC ones too, are read and augmented (``train``).
        training: batch size, kind of clean instances, mixup.
        seed: of order, augmentation and mixup.
        compatibility: ``nc_target`` and ``unpermuted_prior``; ``ratio_broadcast`` goes with
            ``targets``.
        averaged: for ``nc_target="averaged"`` the (N, k) prediction files whose average the
            targets were made from, in the order in which they were averaged. Rows are read when
            they are needed.
        device: where images are decoded and come out.
        shard: (rank, number of ranks).
        channels_last: memory format of the images.

    Raises:
        ValueError: arguments that are not of the same images, nothing to train on, or a batch
            that the ranks cannot share equally. OSError: a prediction file cannot be read.
    """
    where = "grouped"
    noisy = manifest.rows("train")
    _require_same_images(where, manifest, noisy, targets, used)
    if training.clean == "dynamic":
        clean_rows = np.empty(0, np.int64)
    else:
        _require_labels(where, "clean_rows", manifest, clean_rows)
    files = None
    if compatibility.nc_target == "averaged":
        files = _prediction_files(where, averaged, len(noisy), targets.num_classes)

    clean_targets = Targets.of_labels(manifest.labels[clean_rows], targets.num_classes)
    groups = [np.where(targets.nc[used], NC, NNC), np.full(len(clean_rows), CLEAN)]
    relabelled = _Relabelled(
        targets=targets[used].joined(clean_targets),
        groups=np.concatenate(groups).astype(np.int8),
        averaged=files,
        noisy=np.flatnonzero(used),
        objective=Objective(mixup_alpha=training.mixup_alpha),
        unpermuted_prior=compatibility.unpermuted_prior,
    )

    def loader(rows: Rows, seed: int) -> Loader:
        size = training.batch_size
        return _loader(where, manifest, rows, data, size, seed, device, shard, channels_last)

    rows = np.concatenate([noisy[used], clean_rows])
    if training.clean == "loader":
        images = loader(noisy[used], seed)
        clean = _Cycle(loader(clean_rows, seed + _CLEAN_SEED))
    else:
        images = loader(rows, seed)
        clean = None
    return _Grouped(images, clean, rows, relabelled, seed, shard[0])


@dataclass(frozen=True)
class _Relabelled:
    """Group and target of every row that is trained on: noisy ones, then clean ones."""

    targets: Targets
    groups: NDArray[np.int8]
    averaged: list[NDArray[Any]] | None  #: (N, k) predictions; their average is the NC target
    noisy: Rows  #: which row of the predictions a noisy row is
    objective: Objective  #: draws the mixup
    unpermuted_prior: bool

    def describe(self, rows: Rows, rng: np.random.Generator) -> Batch:
        """Groups, targets and mixup of a batch."""
        targets = self.targets[rows]
        group = torch.from_numpy(self.groups[rows].astype(np.int64))
        nc_targets = None
        if self.averaged is not None:
            nc = self.noisy[rows[targets.nc]]
            nc_targets = average([predictions[nc] for predictions in self.averaged])
        batch = {"group": group, "target": torch.from_numpy(targets.dense(nc_targets))}
        mixup = self.objective.draw_mixup(group, rng)
        if mixup is None:
            return batch
        partners = targets[mixup.partner.numpy()]
        if self.unpermuted_prior:
            partners = replace(partners, label=targets.label, prior=targets.prior)
        return {
            **batch,
            "mixup": mixup,
            "partner_target": torch.from_numpy(partners.dense()),
        }


class _Cycle:
    """The batches of a loader, begun anew whenever they are used up."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._batches = self._endless()

    def next(self) -> Batch:
        return next(self._batches)

    def move(self, epoch: int, batches: int) -> None:
        """Go on after so many batches of an epoch."""
        self.load_state_dict({**self.loader.state_dict(), "epoch": epoch, "batches": batches})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.close()  # with what it has made ahead
        self.loader.load_state_dict(state)
        self._batches = self._endless()

    def close(self) -> None:
        self.load_state_dict(self.loader.state_dict())
        self.loader.close()

    def _endless(self) -> Generator[Batch, None, None]:
        while True:
            batch = None
            for batch in self.loader:
                yield batch
            if batch is None:
                raise ValueError("grouped: clean_rows must have images that can be read, got none")


class _Grouped(Batches):
    """Batches of relabelled images, each with a batch of clean ones after it if those cycle."""

    def __init__(
        self,
        loader: Loader,
        clean: _Cycle | None,
        rows: Rows,  # of ``loader``, then of ``clean``
        relabelled: _Relabelled,
        seed: int,
        rank: int,
    ) -> None:
        super().__init__(loader, rows)
        self._clean = clean
        self._relabelled = relabelled
        self._seed = seed
        self._rank = rank

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self._clean is not None:
            # Where a training that nothing disturbed would be.
            self._clean.move(*divmod(epoch * len(self), len(self._clean.loader)))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self._clean is None else {**state, "clean": self._clean.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self._clean is not None:
            self._clean.load_state_dict(state["clean"])

    def close(self) -> None:
        super().close()
        if self._clean is not None:
            self._clean.close()

    def _complete(self, batch: Batch, number: int) -> Batch:
        image, label, rows = batch["image"], batch["label"], batch["row"].numpy()
        if self._clean is not None:
            clean = self._clean.next()
            image = torch.cat([image, clean["image"]])
            label = torch.cat([label, clean["label"]])
            rows = np.concatenate([rows, len(self._loader.manifest) + clean["row"].numpy()])
        rng = np.random.default_rng([self._seed, self._loader.epoch, number, self._rank, _MIXUP])
        described = self._relabelled.describe(rows, rng)
        return {
            "image": image,
            "label": label,
            "row": torch.from_numpy(self._rows[rows]),
            **{name: x.to(image.device, non_blocking=True) for name, x in described.items()},
        }


def _loader(
    where: str,
    manifest: Manifest,
    rows: Rows,
    data: Data,
    batch_size: int,
    seed: int,
    device: str | torch.device,
    shard: tuple[int, int],
    channels_last: bool,
) -> Loader:
    """Shuffled, augmented batches of some rows; "row" is a position in ``rows``."""
    ranks = shard[1]
    if batch_size % ranks:
        raise ValueError(
            f"{where}: batch_size must be a multiple of the {ranks} ranks, got {batch_size}"
        )
    return make_loader(
        manifest.select(rows),
        None,
        data.train,
        batch_size // ranks,
        device=device,
        shuffle=True,
        seed=seed,
        shard=shard,
        drop_last=len(rows) >= batch_size,
        on_error=data.on_error,
        channels_last=channels_last,
        threads=data.threads,
        fast=data.fast,
    )


def _require_labels(where: str, name: str, manifest: Manifest, rows: Rows) -> None:
    if not len(rows):
        raise ValueError(f"{where}: {name} must be rows of the manifest, got none")
    missing = manifest.labels[rows] < 0
    if missing.any():
        row = int(rows[missing.argmax()])
        raise ValueError(
            f"{where}: {name} must be rows with a label, got row {row}, "
            f"key {manifest.keys([row])[0]!r}, which has none"
        )


def _require_same_images(
    where: str, manifest: Manifest, noisy: Rows, targets: Targets, used: NDArray[np.bool_]
) -> None:
    """Raise ``ValueError`` unless targets and ``used`` can be of the manifest's noisy images."""
    n, k = len(noisy), manifest.num_classes
    if (len(targets), targets.num_classes) != (n, k):
        raise ValueError(
            f"{where}: targets must be of {n} noisy images and {k} classes, "
            f"got {len(targets)} and {targets.num_classes}"
        )
    if used.shape != (n,) or used.dtype != bool:
        raise ValueError(f"{where}: used must be ({n},) bool, got {used.shape} {used.dtype}")
    if not used.any():
        raise ValueError(f"{where}: used must be True for some noisy image, got none")
    given = manifest.labels[noisy]
    wrong = used & ((given < 0) | (targets.label != given))
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"{where}: targets must be made of the given labels of the manifest, "
            f"got label {targets.label[i]} where noisy row {i} has {given[i]}"
        )


def _prediction_files(
    where: str, paths: Sequence[str | PathLike[str]] | None, rows: int, num_classes: int
) -> list[NDArray[Any]]:
    """The prediction files, mapped into memory."""
    if not paths:
        raise ValueError(
            f"{where}: averaged must be prediction files for nc_target='averaged', got {paths}"
        )
    files = [np.load(path, mmap_mode="r") for path in paths]
    for path, file in zip(paths, files, strict=True):
        if file.shape != (rows, num_classes):
            raise ValueError(
                f"{where}: averaged must be files of shape {(rows, num_classes)}, "
                f"got {file.shape} in {path}"
            )
    return files
