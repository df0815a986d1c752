"""``predict``: the softmax of a trained network for every image of a manifest, in an ``.npy`` file.

    made = predict(network, manifest.split("train"), "0.npy", data=data, engine=engine, ranks=ranks)
    made.broken                         # images that could not be used; their rows are NaN
    accuracy("0.npy", labels).top1

Row i of the file is row i of the manifest. A job that was killed, at whatever moment, goes on where
it was when it is started again, with any number of processes. On a CPU the file has the same bytes
however often that happened, and for any number of processes and threads: batches are always cut at
the same rows, a broken image keeps its place in its batch with a blank one, and the network sees
``PART`` images at a time on one thread each, for sums over more threads are taken in another order.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .. import __version__
from ..data import ImageError, Manifest, make_loader
from ..data.loader import Failure
from ..ranks import Ranks
from ..unfinished import BeginAnew, Unfinished
from .settings import Data, Engine

PART = 8  # images that a thread of the CPU takes through the network together
CHUNK_BYTES = 64 << 20  # of predictions that ``accuracy`` looks at together

Broken = tuple[int, str, str]  # an image that cannot be used: row, reason, detail
Wait = Callable[[], NDArray[np.float32]]  # for the (n, k) softmax of a batch that was begun


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A prediction file, and what it took to make it."""

    path: Path
    rows: int  #: N
    num_classes: int  #: k
    broken: list[Failure]  #: images met that cannot be used, beside those known before; by row
    resumed: int  #: rows that an earlier, killed job had left


def predict(
    network: nn.Module,
    manifest: Manifest,
    out: str | os.PathLike[str],
    *,
    data: Data,
    engine: Engine,
    ranks: Ranks,
    unusable: NDArray[np.bool_] | None = None,
    dtype: str = "float32",
    begin_anew: BeginAnew = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predicted:
    """Write the softmax outputs of a network for all images of a manifest.

    Every process of the job calls it and takes its share of the batches. Memory does not grow with
    the number of images, apart from the manifest.

    Args:
        network: (n, 3, size, size) images to (n, k) logits. It is moved to this process's device
            and put into evaluation mode; images are channels-last where its weights are. Several
            threads of a CPU call it at a time.
        manifest: the images; N rows.
        out: the ``.npy`` file, (N, k). One that is there is replaced when all is done.
        data: ``eval`` is how images are transformed; ``on_error``, ``threads`` (on a CPU also those
            that compute) and ``fast`` count too.
        engine: device, precision, and ``predict_batch_size``.
        ranks: the processes of the job.
        unusable: (N,) which images are known to be broken; they are not read.
        dtype: of the file: "float32", or "float16", in which rows do not sum to 1 exactly (N5).
        begin_anew: throw away an unfinished file: True, any; "if other", one of other weights,
            images or settings; False, none.
        progress: called with (rows done, N), as far as this process can tell.

    Returns:
        Predicted. The rows of images that cannot be used are NaN.

    Raises:
        ImageError: an image cannot be used, and ``data.on_error`` is "raise". ValueError: the
            network gives something else than (n, k) logits, or no finite softmax of a healthy
            image; an unfinished file is of other weights, images or settings, and ``begin_anew``
            is False. OSError: the file cannot be written, or another job is at work on it.

    Warns:
        UserWarning: an unfinished file was thrown away.
    """
    out, n = Path(out), len(manifest)
    if out.suffix != ".npy":
        raise ValueError(f"predict: out must be an .npy file, got {out}")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"predict: dtype must be 'float32' or 'float16', got {dtype!r}")
    known = np.zeros(n, bool) if unusable is None else unusable
    if known.shape != (n,) or known.dtype != bool:
        raise ValueError(
            f"predict: unusable must be ({n},) booleans, got {known.shape} {known.dtype}"
        )
    device = ranks.device(engine.accelerator)
    network = network.to(device).eval()
    eager = _eager(network)
    reading = _Reading(
        data,
        engine.predict_batch_size,
        device,
        channels_last=_is_channels_last(eager),
        threads=data.threads or ranks.processors,
    )
    about = {
        "genkl_ext": __version__,
        "torch": torch.__version__,
        "network": _digest(eager),
        "images": manifest.fingerprint,
        "root": manifest.root if "://" in manifest.root else os.path.abspath(manifest.root),
        "unusable": hashlib.blake2b(np.packbits(known).tobytes(), digest_size=16).hexdigest(),
        "transforms": json.loads(json.dumps(dataclasses.asdict(data.eval))),
        "fast": data.fast,
        "batch_size": reading.batch_size,
        "precision": engine.precision,
        "dtype": dtype,
        "device": device.type,
        "channels_last": reading.channels_last,
    }
    k = _softmax(eager, reading.blank(), engine.precision).shape[1]

    with (
        Unfinished(
            out,
            about,
            rows=n,
            row_bytes=k * np.dtype(dtype).itemsize,
            batch_size=reading.batch_size,
            ranks=ranks,
            header=_header((n, k), dtype),
            begin_anew=begin_anew,
        ) as file,
        _computing(network, device, engine.precision, reading.threads) as begin,
        closing(reading.batches(manifest, known, file.todo)) as batches,
    ):
        done = file.resumed
        for batch, q in _in_flight(batches, begin, reading.ahead):
            bad = batch.ok & ~np.isfinite(q).all(axis=1)
            if bad.any():
                row = int(batch.rows[np.argmax(bad)])
                key = manifest.keys([row])[0]
                raise ValueError(
                    f"predict: the network's softmax must be finite, got NaN for row {row}, {key!r}"
                )
            q[~batch.ok] = np.nan
            file.write(batch.number, np.ascontiguousarray(q, dtype), batch.broken)
            done += len(q) * ranks.size  # the other processes are as far, more or less
            if progress is not None:
                progress(min(done, n), n)
        broken = [(row, reason, detail) for row, reason, detail in file.complete()]
    return Predicted(out, n, k, _failures(manifest, broken), file.resumed)


def _header(shape: tuple[int, int], dtype: str) -> bytes:
    """The first bytes of an ``.npy`` file."""
    about = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often predictions are right; NaN where no image has both a label and a prediction."""

    top1: float  #: share of the images whose label is the most probable class
    top5: float  #: share of those whose label is among the five most probable
    images: int  #: that have a label and a prediction
    unusable: int  #: that have a label and no prediction


def accuracy(predictions: str | os.PathLike[str] | NDArray[Any], labels: ArrayLike) -> Accuracy:
    """Top-1 and top-5 accuracy, in bounded memory. Of equal probabilities the lower class is first.

    Args:
        predictions: (N, k) ``.npy`` file or array; rows of NaN are images without a prediction.
        labels: (N,) integers below k; -1 where there is none.

    Raises:
        OSError: the file cannot be read. ValueError: it holds something else; labels of another
            shape or kind; a row that is NaN in part.
    """
    q = predictions if isinstance(predictions, np.ndarray) else _mapped(predictions)
    if q.ndim != 2 or q.dtype.kind != "f":
        raise ValueError(f"accuracy: predictions must be (N, k) floats, got {q.shape} {q.dtype}")
    n, k = q.shape
    y = np.asarray(labels)
    if y.shape != (n,) or (n and y.dtype.kind not in "iu"):
        raise ValueError(f"accuracy: labels must be ({n},) integers, got {y.shape} {y.dtype}")
    outside = (y < -1) | (y >= k)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"accuracy: labels must be from -1 to {k - 1}, got {y[row]} at row {row}")

    y = y.astype(np.int64)  # an empty list is of floats
    rows = np.flatnonzero(y >= 0)
    step = max(1, CHUNK_BYTES // max(1, k * q.itemsize))
    images = top1 = top5 = 0
    for part in np.split(rows, range(step, len(rows), step)):
        nan = np.isnan(q[part])
        there = ~nan.all(axis=1)
        if nan[there].any():
            row = int(part[there][np.argmax(nan[there].any(axis=1))])
            raise ValueError(f"accuracy: predictions must not be NaN in part, as row {row} is")
        p, label = q[part[there]], y[part[there], None]
        own = np.take_along_axis(p, label, axis=1)
        before = ((p > own) | ((p == own) & (np.arange(k) < label))).sum(axis=1)
        images += len(p)
        top1 += int((before < 1).sum())
        top5 += int((before < 5).sum())
    share = 1 / images if images else float("nan")
    return Accuracy(top1 * share, top5 * share, images, len(rows) - images)


def _mapped(path: str | os.PathLike[str]) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, "r")
    except ValueError as error:
        name = os.fspath(path)
        raise ValueError(f"accuracy: {name} must be a whole .npy file: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Batch:
    number: int
    rows: NDArray[np.int64]  #: of the manifest
    images: Tensor
    ok: NDArray[np.bool_]  #: (n,) whose image can be used
    broken: list[Broken]  #: the others, less those known before


@dataclasses.dataclass(frozen=True)
class _Reading:
    """How images become batches."""

    data: Data
    batch_size: int
    device: torch.device
    channels_last: bool
    threads: int

    @property
    def ahead(self) -> int:
        """Batches that are begun before one is waited for: work for all threads."""
        return -(-self.threads * PART // self.batch_size)

    def blank(self) -> Tensor:
        """A batch of one image."""
        size = self.data.eval.size
        return torch.zeros(1, 3, size, size, device=self.device)

    def batches(
        self, manifest: Manifest, known: NDArray[np.bool_], numbers: list[int]
    ) -> Generator[_Batch]:
        """These batches of the manifest; ``known`` (N,) are the images that are not read."""
        n, size = len(manifest), self.batch_size
        parts = [np.arange(b * size, min(b * size + size, n)) for b in numbers]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        loader = make_loader(
            _without(manifest.select(rows), known[rows]),
            None,
            self.data.eval,
            size,
            device=str(self.device),
            on_error="report",
            channels_last=self.channels_last,
            threads=self.threads,
            fast=self.data.fast,
        )
        with closing(loader):
            start = seen = 0
            for number, part, batch in zip(numbers, parts, loader, strict=True):
                # Not batch["ok"]: on a GPU, asking for it waits for the batches that are computed.
                new = {failure.row - start: failure for failure in loader.failures[seen:]}
                start, seen = start + len(part), seen + len(new)
                ok = np.ones(len(part), bool)
                ok[list(new)] = False
                broken = [
                    (int(part[i]), failure.reason, failure.detail)
                    for i, failure in new.items()
                    if not known[part[i]]
                ]
                if broken and self.data.on_error == "raise":
                    raise ImageError(_failures(manifest, broken)[0])
                yield _Batch(number, part, batch["image"], ok, broken)


def _without(manifest: Manifest, known: NDArray[np.bool_]) -> Manifest:
    """The manifest with nothing to read for some of its images."""
    # What is no regular file is refused without being read, wherever the other images are.
    path = pc.if_else(pa.array(known), os.devnull, manifest.table["path"])
    place = manifest.table.column_names.index("path")
    return dataclasses.replace(manifest, table=manifest.table.set_column(place, "path", path))


def _failures(manifest: Manifest, broken: list[Broken]) -> list[Failure]:
    rows = [row for row, _, _ in broken]
    return [
        Failure(row, key, path, reason, detail)
        for (row, reason, detail), key, path in zip(
            broken, manifest.keys(rows), manifest.paths(rows), strict=True
        )
    ]


@contextmanager
def _computing(
    network: nn.Module, device: torch.device, precision: str, threads: int
) -> Iterator[Callable[[Tensor], Wait]]:
    """Gives what begins a batch."""
    if device.type == "cpu":
        with _computing_on_cpu(_eager(network), precision, threads) as begin:
            yield begin
        return

    def begin_on_gpu(images: Tensor) -> Wait:
        q = _softmax(network, images, precision)
        host = torch.empty(q.shape, pin_memory=True)
        host.copy_(q, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> NDArray[np.float32]:
            copied.synchronize()  # with this batch, not with those begun since
            return host.numpy()

        return wait

    with torch.cuda.device(device):
        yield begin_on_gpu


@contextmanager
def _computing_on_cpu(
    network: nn.Module, precision: str, threads: int
) -> Iterator[Callable[[Tensor], Wait]]:
    # Each thread of the pool has torch compute on itself alone.
    pool = ThreadPoolExecutor(threads, "genkl-predict", torch.set_num_threads, (1,))

    def begin(images: Tensor) -> Wait:
        parts = [pool.submit(_softmax, network, part, precision) for part in images.split(PART)]
        return lambda: np.concatenate([part.result().numpy() for part in parts])

    before = torch.get_num_threads()
    try:
        yield begin
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # it is also what later threads begin with


def _in_flight(
    batches: Iterable[_Batch], begin: Callable[[Tensor], Wait], ahead: int
) -> Iterator[tuple[_Batch, NDArray[np.float32]]]:
    """Each batch with its softmax, while the following ones are computed."""
    begun: deque[tuple[_Batch, Wait]] = deque()
    for batch in batches:
        begun.append((batch, begin(batch.images)))
        if len(begun) > ahead:
            first, wait = begun.popleft()
            yield first, wait()
    for batch, wait in begun:
        yield batch, wait()


def _softmax(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    """(n, k) float32."""
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.inference_mode():
        with torch.autocast(images.device.type, kind, enabled=kind is not None):
            logits = network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"predict: the network must give ({len(images)}, k) logits, got {got}")
        return logits.float().softmax(dim=1)


def _eager(network: nn.Module) -> nn.Module:
    """The network without torch.compile, whose functions are not for several threads."""
    return copy.copy(getattr(network, "_orig_mod", network))  # Module.compile is not copied


def _is_channels_last(network: nn.Module) -> bool:
    return any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in network.parameters()
    )


def _digest(network: nn.Module) -> str:
    """What the network computes: its modules and all that it has learnt."""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(network))  # addresses are new in each process
    digest = hashlib.blake2b(layers.encode(), digest_size=16)
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
