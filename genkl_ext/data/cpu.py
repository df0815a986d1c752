"""Batches made on the CPU: threads that read, decode, resize and normalise, one image at a time.

Of a JPEG only the part that the window shows is reconstructed, and the resize computes just the
window, in uint8 with SIMD, straight into the batch. Each thread has a decoder of its own; the work
runs outside Python's lock.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .._native import resample, resample_support, rotate
from .decode import BrokenImage, Decoder, Limits, Picture, read
from .transforms import Geometry, Transforms

Kind = Literal["uint8", "float32", "float16", "bfloat16"]
_STORED = {"uint8": np.uint8, "float32": np.float32, "float16": np.uint16, "bfloat16": np.uint16}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a batch is made of."""

    paths: list[str]
    draws: NDArray[np.float64]  #: (n, DRAWS)

    def parts(self, threads: int) -> list[range]:
        """Its positions, in parts so small that all threads finish a batch together, and so large
        that they are handed over seldom."""
        n = len(self.paths)
        step = max(1, min(16, n // (2 * threads)))
        return [range(start, min(start + step, n)) for start in range(0, n, step)]


@dataclasses.dataclass(frozen=True)
class Output:
    """What a batch is made into."""

    kind: Kind
    channels_last: bool
    pin_memory: bool = False


@dataclasses.dataclass(frozen=True)
class Made:
    """A batch. The images of broken files are blank: 0, which is the mean after normalising."""

    images: torch.Tensor  #: (n, 3, size, size)
    broken: dict[int, BrokenImage]  #: position in the batch -> why


class ImageMaker:
    """One image from its file to its place in a batch; not for several threads at a time."""

    def __init__(
        self, transforms: Transforms, kind: Kind, limits: Limits, fast: bool = False
    ) -> None:
        self._transforms = transforms
        self._kind = kind
        self._limits = limits
        self._fast = fast
        self._scale, self._shift = transforms.affine()
        self._decoder = Decoder(limits, fast_idct=fast)

    def make(self, path: str, draws: NDArray[np.float64], out: NDArray[Any]) -> None:
        """Fill ``out``, (3, size, size) of the kind's stored type, or raise ``BrokenImage``."""
        picture = self._decoder.open(read(path, self._limits))
        g = self._transforms.geometry(picture.height, picture.width, draws)
        whole = self._reduced(picture, g) if self._fast else None
        if whole is not None:
            g = dataclasses.replace(g, full=(whole.shape[0], whole.shape[1]))
        top, left, height, width = g.window
        y0, y1 = resample_support(g.full[0], g.resized[0], top, height)
        x0, x1 = resample_support(g.full[1], g.resized[1], left, width)
        origin = 0, 0
        if g.angle:
            source = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
            if whole is None:
                whole, _ = picture.region(0, 0, *g.full)
            rotate(whole, g.angle, (y0, x0, y1 - y0, x1 - x0), source)
            origin = y0, x0
        elif whole is None:
            source, origin = picture.region(y0, x0, y1, x1)
        else:
            source = whole
        self._resize(source, origin, g, out)

    @staticmethod
    def _reduced(picture: Picture, g: Geometry) -> NDArray[np.uint8] | None:
        """The picture at the least size from which the resize still shrinks; None: no less."""
        shrinking = min(full / resized for full, resized in zip(g.full, g.resized, strict=True))
        factor = next((factor for factor in (8, 4, 2) if factor <= shrinking), None)
        return None if factor is None else picture.reduced(factor)

    def _resize(
        self, source: NDArray[np.uint8], origin: tuple[int, int], g: Geometry, out: NDArray[Any]
    ) -> None:
        finish = (out, self._kind, self._scale, self._shift)
        if g.window[2:] == g.size:
            resample(source, origin, g.full, g.resized, g.window, g.flip, *finish)
            return
        window = np.empty((*g.window[2:], 3), np.uint8)
        plain = (window.transpose(2, 0, 1), "uint8", self._scale, self._shift)
        resample(source, origin, g.full, g.resized, g.window, False, *plain)
        whole = (0, 0, *g.size)
        resample(window, (0, 0), window.shape[:2], g.size, whole, g.flip, *finish)


class Buffers:
    """Memory for batches, used again when nobody holds the batch any more.

    A fresh batch of some 40 MB costs its page faults, which is a tenth of the time to fill it.
    Pinned memory is left to torch's own cache, which knows of copies that are still under way.
    """

    def __init__(self, output: Output, size: int, spare: int = 4) -> None:
        self._output = output
        self._size = size
        self._dtype = torch.from_numpy(np.empty(0, _STORED[output.kind])).dtype
        self._free: deque[Any] = deque(maxlen=spare)

    def batch(self, n: int) -> tuple[NDArray[Any], torch.Tensor]:
        """(n, 3, size, size) with the layout of the output: to be filled, and as a tensor.

        The array does not keep the memory from being used again; only the tensor does.
        """
        count = n * 3 * self._size**2
        if self._output.pin_memory:
            tensor = torch.empty(count, dtype=self._dtype, pin_memory=True)
            lease = tensor.numpy()
        else:
            lease = self._lease(count)
            tensor = torch.from_numpy(lease)
        if self._output.kind != "uint8":
            tensor = tensor.view(getattr(torch, self._output.kind))
        side = self._size
        if self._output.channels_last:
            array = lease.reshape(n, side, side, 3).transpose(0, 3, 1, 2)
            return array, tensor.view(n, side, side, 3).permute(0, 3, 1, 2)
        return lease.reshape(n, 3, side, side), tensor.view(n, 3, side, side)

    def _lease(self, count: int) -> NDArray[Any]:
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) < count:
            memory = torch.empty(count, dtype=self._dtype).numpy()
        lease = memory[:count]  # an object of its own: the tensor's storage keeps it alive
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return lease


class CpuEngine:
    """Makes batches in the order in which they are asked for, several at a time."""

    def __init__(
        self,
        transforms: Transforms,
        output: Output,
        limits: Limits,
        threads: int,
        fast: bool = False,
    ) -> None:
        self._maker = functools.partial(ImageMaker, transforms, output.kind, limits, fast)
        self._threads = threads
        self._local = threading.local()
        self._buffers = Buffers(output, transforms.size)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="genkl-images")
        self._jobs: deque[tuple[torch.Tensor, list[Future[dict[int, BrokenImage]]]]] = deque()

    def submit(self, job: Job) -> None:
        """Begin a batch."""
        array, tensor = self._buffers.batch(len(job.paths))
        parts = [
            self._pool.submit(self._fill, job, array, positions)
            for positions in job.parts(self._threads)
        ]
        self._jobs.append((tensor, parts))

    def result(self) -> Made:
        """The oldest batch that was begun and not yet taken."""
        tensor, parts = self._jobs.popleft()
        broken: dict[int, BrokenImage] = {}
        for part in parts:
            broken.update(part.result())
        return Made(tensor, broken)

    def close(self) -> None:
        """Forget what was begun and end the threads."""
        self._jobs.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, job: Job, array: NDArray[Any], positions: range) -> dict[int, BrokenImage]:
        if not hasattr(self._local, "maker"):
            self._local.maker = self._maker()
        broken = {}
        for i in positions:
            try:
                self._local.maker.make(job.paths[i], job.draws[i], array[i])
            except BrokenImage as error:
                array[i] = 0
                # Without its traceback, which would keep the file's bytes.
                broken[i] = BrokenImage(error.reason, error.detail)
        return broken
