"""``make_loader``: the images of a manifest as batches of tensors.

    loader = make_loader(manifest, "train", Transforms.preset("clothing1m", "train"), 64,
                         shuffle=True, seed=0, on_error="skip")
    for batch in loader:
        batch["image"]     # (n, 3, size, size), normalised
        batch["row"]       # (n,) int64, rows of the manifest
        batch["label"]     # (n,) int64, given labels; -1 where there is none

Every row of the split comes exactly once in an epoch, over all ranks together, without padding.
What a batch holds depends on seed, epoch, batch size and ranks only: not on threads, and not on
whether an epoch was interrupted and taken up again. (A GPU's pixels differ a little from a CPU's.)

What happens to an image that cannot be used (``on_error``):

    raise     the first one ends the epoch with ``ImageError``
    skip      it is left out, its batch is smaller; ``loader.failures`` lists it. A batch that loses
              all of its images is passed over, or, with several ranks, given out with none, so that
              the ranks stay in step
    report    it keeps its place with a blank image, and ``batch["ok"]`` is False there
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..rule import processors
from .cpu import CpuEngine, Job, Kind, Made, Output
from .decode import BrokenImage, Limits
from .manifest import Manifest
from .order import epoch_order, num_batches, shard_batches
from .transforms import DRAWS, Transforms, uniforms

if TYPE_CHECKING:
    from .ledger import Ledger

OnError = Literal["raise", "skip", "report"]
_DTYPES = {getattr(torch, kind): kind for kind in get_args(Kind)}


@dataclasses.dataclass(frozen=True)
class Failure:
    """An image that could not be used."""

    row: int  #: of the manifest
    key: str
    path: str
    reason: str  #: one of the words of ``decode.Reason``
    detail: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.path}: {self.reason} ({self.detail})"


class ImageError(Exception):
    """An image could not be used and ``on_error`` is "raise"; ``failure`` says which and why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)  # what unpickling calls it with
        self.failure = failure

    def __str__(self) -> str:
        return f"cannot use the image of {self.failure}; on_error='skip' leaves such images out"


class Loader:
    """Batches of images, epoch after epoch. Made by :func:`make_loader`.

    ``for batch in loader`` is one epoch, and the next loop is the next epoch. ``len(loader)`` is
    the number of batches of an epoch on this rank. ``state_dict`` and ``load_state_dict`` carry the
    position to another process, in the middle of an epoch too.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: NDArray[np.int64],
        transforms: Transforms,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        shard: tuple[int, int],
        drop_last: bool,
        on_error: OnError,
        prefetch: int,
        make_engine: Any,
    ) -> None:
        self.manifest = manifest
        self.transforms = transforms
        self.batch_size = batch_size
        self.on_error = on_error
        self.epoch = 0  #: of the last batch that was given out
        self._rows = rows
        self._shuffle = shuffle
        self._seed = seed
        self._shard = shard
        self._drop_last = drop_last
        self._prefetch = prefetch
        self._make_engine = make_engine
        self._idle_engine: Any = None
        self._owner = 0  # the process that it belongs to
        self._length = num_batches(len(rows), batch_size, shard[1], drop_last)
        self._done = 0  # batches given out in this epoch
        self._next = (0, 0)  # epoch and first batch of the next loop
        self._failures: dict[int, Failure] = {}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        epoch, start = self._next
        self._next = (epoch + 1, 0)
        self.epoch, self._done = epoch, start
        order = epoch_order(self._rows, self._shuffle, self._seed, epoch)
        todo = iter(shard_batches(order, self.batch_size, self._shard, self._drop_last)[start:])
        engine = self._take_engine()
        begun: deque[tuple[NDArray[np.int64], list[str]]] = deque()

        def begin(rows: NDArray[np.int64]) -> None:
            paths = self.manifest.paths(rows)
            random = self.transforms.is_random
            draws = uniforms(self._seed, epoch, rows) if random else np.zeros((len(rows), DRAWS))
            engine.submit(Job(paths, draws))
            begun.append((rows, paths))

        known = len(self._failures)
        held = True
        try:
            for rows in islice(todo, self._prefetch):
                begin(rows)
            while begun:
                rows, paths = begun.popleft()
                made = engine.result()
                for following in islice(todo, 1):
                    begin(following)
                batch = self._batch(rows, paths, made)
                self._done += 1
                if not begun:
                    # Before the last batch is given out: who knows the length asks for no more.
                    self._idle_engine, self._owner, held = engine, os.getpid(), False
                    self._warn(known)
                if len(batch["row"]) or self._shard[1] > 1:
                    yield batch
        finally:
            if held:
                engine.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle_engine": None}

    def _take_engine(self) -> Any:
        engine, self._idle_engine = self._idle_engine, None
        # A forked process has the engine of its parent, but none of its threads.
        return engine if engine and self._owner == os.getpid() else self._make_engine()

    def _warn(self, known: int) -> None:
        new = self.failures[known:]
        if self.on_error == "skip" and new:
            warnings.warn(
                f"make_loader: {len(new)} images could not be used and were left out, first "
                f"{new[0]}; loader.failures lists them",
                stacklevel=3,
            )

    @property
    def failures(self) -> list[Failure]:
        """The images that this loader could not use, in the order in which they were met."""
        return list(self._failures.values())

    def set_epoch(self, epoch: int) -> None:
        """The next loop is this epoch, from its first batch."""
        self._next = (epoch, 0)
        self.epoch, self._done = self._next

    def state_dict(self) -> dict[str, Any]:
        """The position: so many batches of an epoch have been given out. Plain numbers and text."""
        return {"epoch": self.epoch, "batches": self._done, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next loop goes on after the batch at which ``state_dict`` was called.

        Raises:
            ValueError: the state is of a loader that makes other batches; with the setting.
        """
        for name, mine in self._settings().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"load_state_dict: {name} must be that of this loader, {mine!r}, "
                    f"got {state.get(name)!r}"
                )
        epoch, batches = state["epoch"], state["batches"]
        self._next = (epoch + 1, 0) if batches >= len(self) else (epoch, batches)
        self.epoch, self._done = self._next

    def close(self) -> None:
        """End the threads that wait between two loops. A later loop starts new ones."""
        engine, self._idle_engine = self._idle_engine, None
        if engine is not None and self._owner == os.getpid():
            engine.close()

    def _settings(self) -> dict[str, Any]:
        """What decides which rows a batch holds."""
        return {
            "manifest": self.manifest.fingerprint,
            "rows": hashlib.blake2b(self._rows.tobytes(), digest_size=16).hexdigest(),
            "batch_size": self.batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "shard": list(self._shard),
            "drop_last": self._drop_last,
        }

    def _batch(
        self, rows: NDArray[np.int64], paths: list[str], made: Made
    ) -> dict[str, torch.Tensor]:
        ok = np.ones(len(rows), bool)
        for position in sorted(made.broken):
            ok[position] = False
            self._note(int(rows[position]), paths[position], made.broken[position])
        images = made.images
        if self.on_error == "skip" and made.broken:
            rows, images = rows[ok], images[torch.from_numpy(ok).to(images.device)]
        labels = torch.from_numpy(self.manifest.labels[rows].astype(np.int64))
        batch = {
            "image": images,
            "row": torch.from_numpy(rows.copy()),
            "label": labels.to(images.device, non_blocking=True),
        }
        if self.on_error == "report":
            batch["ok"] = torch.from_numpy(ok).to(images.device, non_blocking=True)
        return batch

    def _note(self, row: int, path: str, broken: BrokenImage) -> None:
        key = self.manifest.keys([row])[0]
        failure = Failure(row, key, path, broken.reason, broken.detail)
        self._failures.setdefault(row, failure)
        if self.on_error == "raise":
            raise ImageError(failure)


def make_loader(
    manifest: Manifest,
    split: str | None,
    transforms: Transforms,
    batch_size: int,
    *,
    device: str | torch.device = "auto",
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    drop_last: bool = False,
    on_error: OnError = "raise",
    ledger: Ledger | str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    pin_memory: bool = False,
    threads: int | None = None,
    prefetch: int = 3,
    fast: bool = False,
    limits: Limits = Limits(),
) -> Loader:
    """A loader of the images of a manifest.

    Args:
        manifest: the images; N rows.
        split: "train", "clean", "val" or "test"; None for all rows.
        transforms: from a picture to the network's input.
        batch_size: images per batch, on this rank.
        device: where images are decoded and come out: "cpu", "gpu" (the current one), "cuda:1",
            or "auto", which is the GPU if there is one.
        shuffle: another order in each epoch, from ``seed`` and the number of the epoch.
        seed: of the order and of the random transforms.
        shard: (rank, number of ranks): this loader's part of every epoch. All ranks have the same
            number of batches.
        drop_last: full batches only.
        on_error: what happens to an image that cannot be used: "raise", "skip" or "report"
            (:mod:`genkl_ext.data.loader`).
        ledger: what ``genkl scan`` wrote: the images in it are left out from the start ("report"
            does not look at it).
        dtype: float32, float16 or bfloat16, normalised; or uint8, values 0 to 255, to be
            normalised by :meth:`Transforms.affine`'s scale and shift on another device.
        channels_last: memory format of the images; their shape stays (n, 3, size, size).
        pin_memory: batches made on the CPU lie in pinned memory, for fast copies to a GPU.
        threads: that read and decode; by default as many as this process has processors. With
            several ranks on a machine, give each its share.
        prefetch: batches that are made ahead.
        fast: trade exact pixels for speed: libjpeg-turbo's fast inverse transform, and on the CPU
            JPEG files of at least twice the size wanted are decoded at a half, a quarter or an
            eighth of it (``bench/loading.py`` measures both gain and error).
        limits: sizes from which an image is refused.

    Returns:
        A loader of dictionaries: "image" (n, 3, size, size); "row" (n,) int64 on the CPU, rows of
        ``manifest`` (give ``manifest.split("train")`` and split None for rows of that split);
        "label" (n,) int64; with on_error="report" also "ok" (n,) bool.

    Raises:
        ValueError, TypeError: a setting outside its range; with the setting.
    """
    where = "make_loader"
    if on_error not in get_args(OnError):
        raise ValueError(f"{where}: on_error must be one of {get_args(OnError)}, got {on_error!r}")
    if dtype not in _DTYPES:
        wanted = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{where}: dtype must be one of {wanted}, got {dtype!r}")
    if threads is None:
        threads = processors()
    for name, value in (("batch_size", batch_size), ("prefetch", prefetch), ("threads", threads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be an integer of at least 1, got {value!r}")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"{where}: seed must be an integer of at least 0, got {seed!r}")
    if pin_memory and not torch.cuda.is_available():
        raise ValueError(f"{where}: pin_memory must be False on a machine without GPU, got True")
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"{where}: shard must be (rank, ranks) with rank < ranks, got {shard}")
    rows = np.arange(len(manifest)) if split is None else manifest.rows(split)
    if ledger is not None and on_error != "report":
        from .ledger import Ledger

        known = ledger if isinstance(ledger, Ledger) else Ledger.load(ledger)
        rows = np.setdiff1d(rows, known.rows_in(manifest), assume_unique=True)
    output = Output(_DTYPES[dtype], channels_last, pin_memory)
    device_id = _device_id(str(device))

    return Loader(
        manifest,
        rows,
        transforms,
        batch_size,
        shuffle=shuffle,
        seed=int(seed),
        shard=shard,
        drop_last=drop_last,
        on_error=on_error,
        prefetch=prefetch,
        make_engine=functools.partial(
            _engine, transforms, output, limits, threads, batch_size, prefetch, device_id, fast
        ),
    )


def _engine(
    transforms: Transforms,
    output: Output,
    limits: Limits,
    threads: int,
    batch_size: int,
    prefetch: int,
    device_id: int | None,
    fast: bool,
) -> Any:
    """What makes the batches."""
    if device_id is None:
        return CpuEngine(transforms, output, limits, threads, fast)
    from .dali import DaliEngine

    depth = max(1, prefetch - 1)
    return DaliEngine(transforms, output, limits, threads, batch_size, device_id, depth, fast)


def _device_id(device: str) -> int | None:
    """The number of a GPU, or None for the CPU."""
    if device == "auto":
        device = "gpu" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return None
    kind, _, number = device.partition(":")
    if kind not in ("gpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(
            f"make_loader: device must be 'auto', 'cpu', 'gpu' or 'cuda:N', got {device!r}"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"make_loader: device must be 'cpu' on a machine without GPU, got {device!r}"
        )
    return int(number) if number else torch.cuda.current_device()
