"""Batches made by NVIDIA DALI: on a GPU, or with the same pipeline on the CPU.

Threads read the files, look at the JPEG headers and work out where each output's pixels come from
(``Transforms.geometry``); DALI is fed bytes and numbers and only executes. So the images are those
of the CPU engine up to rounding, whatever DALI's random numbers are.

DALI gets upright grey and colour JPEG files whose header is sound and whose end is there. Every
other picture is made by the CPU engine's ``ImageMaker``, and a tiny one takes its place in DALI's
batch. When DALI fails, as it does on damage that no header shows, it loses the whole batch: that
batch is made again by ``ImageMaker``, so only the broken pictures are lost.

Tested on the CPU. It has never run on a GPU: how nvJPEG's pixels differ, and what state a pipeline
is in after a damaged file, is not known.
"""

from __future__ import annotations

import dataclasses
import io
import threading
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from nvidia.dali.tensors import TensorCPU
from nvidia.dali.types import DALIDataType, DALIInterpType
from PIL import Image

from .cpu import Buffers, ImageMaker, Job, Made, Output
from .decode import PROGRESSIVE, SEQUENTIAL, BrokenImage, Limits, jpeg_header, read
from .transforms import Geometry, Transforms


@dataclasses.dataclass(frozen=True)
class Sample:
    """What DALI makes one image of."""

    jpeg: TensorCPU
    geometry: Geometry


# What becomes of a file: work for DALI, or already an image, or why there is none.
Picture = Sample | torch.Tensor | BrokenImage


def define(transforms: Transforms, output: Output, on_gpu: bool, fast: bool = False) -> Any:
    """The graph of a pipeline: its inputs are named as in :func:`numbers`, its output are images.

    Call it inside ``with pipeline:``.
    """

    def number(name: str, dtype: Any, ndim: int = 1) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    image: Any = fn.decoders.image_slice(
        fn.external_source(name="jpeg", dtype=DALIDataType.UINT8, ndim=1),
        device="mixed" if on_gpu else "cpu",
        start=number("start", DALIDataType.INT32),
        shape=number("shape", DALIDataType.INT32),
        axis_names="HW",
        adjust_orientation=False,  # only upright pictures come here
        jpeg_fancy_upsampling=True,  # chroma as on the CPU
        use_fast_idct=fast,
    )
    if transforms.rotation:
        image = fn.warp_affine(
            image,
            matrix=number("matrix", DALIDataType.FLOAT, 2),
            size=number("turned_shape", DALIDataType.FLOAT),
            interp_type=DALIInterpType.INTERP_NN,
            fill_value=0,
        )
    image = fn.resize(
        image,
        roi_start=number("roi_start", DALIDataType.FLOAT),
        roi_end=number("roi_end", DALIDataType.FLOAT),
        size=number("window", DALIDataType.FLOAT),
    )
    if transforms.crop == "random_resized":
        image = fn.resize(image, size=[transforms.size, transforms.size])
    plain = output.kind == "uint8"
    return fn.crop_mirror_normalize(
        image,
        mirror=number("flip", DALIDataType.INT32, 0),
        mean=[0.0] if plain else [255 * m for m in transforms.mean],
        std=[1.0] if plain else [255 * s for s in transforms.std],
        dtype={"uint8": DALIDataType.UINT8, "float16": DALIDataType.FLOAT16}.get(
            output.kind, DALIDataType.FLOAT
        ),
        output_layout="HWC" if output.channels_last else "CHW",
    )


def numbers(samples: list[Sample], rotation: bool) -> dict[str, NDArray[Any]]:
    """What DALI must know about each picture besides its bytes. Pairs are (y, x), in pixels."""
    geometries = [sample.geometry for sample in samples]
    full = np.array([g.full for g in geometries], np.float64)
    window = np.array([g.window for g in geometries], np.float64)
    scale = full / np.array([g.resized for g in geometries])
    # The window in the full picture, and the pixels that a triangle filter reads to make it. Two
    # more, as decoders may interpolate the chroma of a region's outermost pixels differently.
    low, high = window[:, :2] * scale, (window[:, :2] + window[:, 2:]) * scale
    reach = np.maximum(scale, 1) + 2
    start = np.maximum(np.floor(low - reach), 0)
    end = np.minimum(np.ceil(high + reach), full)
    inputs = {
        "start": np.zeros_like(start) if rotation else start,
        "shape": full if rotation else end - start,
        "roi_start": low - start,
        "roi_end": high - start,
        "window": window[:, 2:],
        "flip": np.array([g.flip for g in geometries]),
    }
    if rotation:
        angles = np.radians([g.angle for g in geometries])
        inputs["matrix"] = _matrices(angles, full / 2, start)
        inputs["turned_shape"] = end - start
    integers = ("start", "shape", "flip")
    return {
        name: values.astype(np.int32 if name in integers else np.float32)
        for name, values in inputs.items()
    }


def _matrices(
    angles: NDArray[np.float64], centre: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, 2, 3) maps from (x, y) in a region of the rotated picture to the picture.

    In steps of 2^-16 pixels from the centre of the first pixel on, as Pillow and the CPU engine
    rotate: over a few hundred pixels, exact steps would end up at other nearest pixels.
    """

    def fixed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.round(values * 2**16) / 2**16

    (cy, cx), (top, left) = (centre - 0.5).T, (start - 0.5).T
    cos, sin = np.cos(angles), np.sin(angles)
    first_x, first_y = fixed(cx + 0.5 - cos * cx + sin * cy), fixed(cy + 0.5 - sin * cx - cos * cy)
    cos, sin = fixed(cos), fixed(sin)
    along_x = [cos, -sin, first_x + cos * left - sin * top]
    along_y = [sin, cos, first_y + sin * left + cos * top]
    return np.stack([np.stack(along_x, 1), np.stack(along_y, 1)], 1)


def _placeholder(size: int) -> Sample:
    """Stands in DALI's batch for a picture that is made elsewhere."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    window = (0, 0, size, size)
    where = Geometry(0.0, (16, 16), (size, size), window, (size, size), False)
    return Sample(TensorCPU(buffer.getvalue()), where)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch that was begun."""

    job: Job
    parts: list[Future[list[Picture]]]

    def is_read(self) -> bool:
        return all(part.done() for part in self.parts)

    def pictures(self) -> list[Picture]:
        return [picture for part in self.parts for picture in part.result()]


class DaliEngine:
    """Makes batches in the order in which they are asked for, several at a time.

    Call it from one thread. On a GPU ``result`` does not wait for the images: they are ready for
    work on the stream that is current in that call.

    Args:
        transforms: what happens to the pictures.
        output: what a batch is made into; ``pin_memory`` plays no part.
        limits: larger pictures are refused.
        threads: that read files, and as many of DALI's.
        batch_size: images of a batch, at most.
        device_id: the GPU that decodes and augments; None for the CPU, which needs no driver.
        depth: batches that DALI works on at a time. Begin more than these, so that the files of
            the next one have been read when DALI is free.
        fast: take the less exact inverse transform where libjpeg-turbo decodes.
    """

    def __init__(
        self,
        transforms: Transforms,
        output: Output,
        limits: Limits,
        threads: int,
        batch_size: int,
        device_id: int | None,
        depth: int = 2,
        fast: bool = False,
    ) -> None:
        self._transforms = transforms
        self._output = output
        self._limits = limits
        self._threads = threads
        self._batch_size = batch_size
        self._device_id = device_id
        self._depth = depth
        self._fast = fast
        self._placeholder = _placeholder(transforms.size)
        self._buffers = Buffers(dataclasses.replace(output, pin_memory=False), transforms.size)
        self._local = threading.local()
        self._batches: deque[_Batch] = deque()  # begun and not yet taken
        self._fed = 0  # so many of them, from the left, are in the pipeline
        self._pipeline: Any = None
        self._start()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="genkl-files")

    def submit(self, job: Job) -> None:
        """Begin a batch."""
        parts = [
            self._pool.submit(self._open_all, job, positions)
            for positions in job.parts(self._threads)
        ]
        self._batches.append(_Batch(job, parts))
        self._feed()

    def result(self) -> Made:
        """The oldest batch that was begun and not yet taken."""
        batch = self._batches[0]
        made = {i: p for i, p in enumerate(batch.pictures()) if not isinstance(p, Sample)}
        self._feed()
        try:
            images = self._images()
        except RuntimeError as error:
            images = self._make_again(batch.job, made, error)
        self._batches.popleft()
        self._fed = max(self._fed - 1, 0)
        self._feed()
        broken = {}
        for i, picture in made.items():
            if isinstance(picture, BrokenImage):
                images[i] = 0
                broken[i] = picture
            else:
                images[i] = picture
        return Made(images, broken)

    def close(self) -> None:
        """Forget what was begun; end the threads and the pipeline."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.clear()
        self._pipeline = None  # waits for what it is doing

    # ---- files, on the pool's threads

    def _open_all(self, job: Job, positions: range) -> list[Picture]:
        return [self._open(job.paths[i], job.draws[i]) for i in positions]

    def _open(self, path: str, draws: NDArray[np.float64]) -> Picture:
        try:
            data = read(path, self._limits)
            header = jpeg_header(data)
        except BrokenImage as error:
            return error
        if (
            header is None
            or not header.complete
            or header.orientation != 1
            or header.frame not in (*SEQUENTIAL, PROGRESSIVE)
            or header.components not in (1, 3)
        ):
            return self._make(path, draws)
        try:
            self._limits.check_size(header.height, header.width)
            where = self._transforms.geometry(header.height, header.width, draws)
        except BrokenImage as error:
            return error
        return Sample(TensorCPU(data), where)

    def _make(self, path: str, draws: NDArray[np.float64]) -> torch.Tensor | BrokenImage:
        """An image made on this thread, as the CPU engine makes it."""
        if not hasattr(self._local, "maker"):
            self._local.maker = ImageMaker(
                self._transforms, self._output.kind, self._limits, self._fast
            )
        array, tensor = self._buffers.batch(1)
        try:
            self._local.maker.make(path, draws, array[0])
        except BrokenImage as error:
            return error
        return tensor[0]

    # ---- DALI, on the caller's thread

    def _start(self) -> None:
        """Make the pipeline, and run it until it does one batch for one call of schedule_run."""
        self._fed = 0
        on_gpu = self._device_id is not None
        self._pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=self._depth,
        )
        with self._pipeline:
            self._pipeline.set_outputs(define(self._transforms, self._output, on_gpu, self._fast))
        self._pipeline.build()
        # The first call runs as many batches as the pipeline holds.
        rounds = self._pipeline.input_feed_count("jpeg")
        for _ in range(rounds):
            self._feed_one([self._placeholder])
        self._pipeline.schedule_run()
        for _ in range(rounds):
            self._pipeline.outputs()

    def _feed(self) -> None:
        """Give the pipeline the batches whose files have been read, up to ``depth``."""
        try:
            self._feed_all_read()
        except RuntimeError:  # the pipeline is of no more use
            self._start()
            self._feed_all_read()

    def _feed_all_read(self) -> None:
        while self._fed < min(self._depth, len(self._batches)):
            batch = self._batches[self._fed]
            if not batch.is_read():
                return
            samples = [p if isinstance(p, Sample) else self._placeholder for p in batch.pictures()]
            self._feed_one(samples)
            self._pipeline.schedule_run()
            self._fed += 1

    def _feed_one(self, samples: list[Sample]) -> None:
        self._pipeline.feed_input("jpeg", [sample.jpeg for sample in samples])
        for name, values in numbers(samples, self._transforms.rotation > 0).items():
            self._pipeline.feed_input(name, values)

    def _images(self) -> torch.Tensor:
        """The images of the oldest batch in the pipeline."""
        on_gpu = self._device_id is not None
        stream = torch.cuda.current_stream(self._device_id) if on_gpu else None
        # The memory is the tensor's: this kind of pipeline (exec_dynamic, DALI's default) does not
        # use it again.
        images = torch.from_dlpack(self._pipeline.outputs(stream)[0].as_tensor())
        if self._output.channels_last:
            images = images.permute(0, 3, 1, 2)
        return images.to(getattr(torch, self._output.kind))

    def _make_again(
        self, job: Job, made: dict[int, torch.Tensor | BrokenImage], error: RuntimeError
    ) -> torch.Tensor:
        """What DALI failed on goes into ``made`` as well; memory for the images of the batch."""
        n = len(job.paths)
        rest = [i for i in range(n) if i not in made]
        paths, draws = [job.paths[i] for i in rest], job.draws[rest]
        made.update(zip(rest, self._pool.map(self._make, paths, draws), strict=True))
        if not any(isinstance(made[i], BrokenImage) for i in rest):
            # No picture explains the failure: the pipeline itself may be of no more use.
            warnings.warn(f"DALI failed, a batch was made on the CPU: {error}", stacklevel=3)
            self._start()
        size = self._transforms.size
        layout = torch.channels_last if self._output.channels_last else torch.contiguous_format
        return torch.empty(
            (n, 3, size, size),
            dtype=getattr(torch, self._output.kind),
            device="cpu" if self._device_id is None else f"cuda:{self._device_id}",
            memory_format=layout,
        )
