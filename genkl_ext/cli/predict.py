"""``genkl predict``: images and a trained network in, a file of softmax outputs out."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import UsageError
from .progress import Progress

if TYPE_CHECKING:
    from ..data import Manifest, Transforms
    from ..training.predict import Predicted

_SHOWN = 5  # broken images that are named


def predict(
    source: str,
    *,
    weights: Path,
    out: Path,
    network: str = "resnet50",
    options: dict[str, Any] = {},  # noqa: B006 (never changed)
    num_classes: int | None = None,
    split: Literal["train", "clean", "val", "test"] = "train",
    transforms: Literal["clothing1m", "food101n", "webvision"] | None = None,
    size: int | None = None,
    resize: int | None = None,
    ledger: Path | None = None,
    batch_size: int = 128,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    dtype: Literal["float32", "float16"] = "float32",
    threads: int | None = None,
    fast: bool = False,
    begin_anew: bool = False,
) -> None:
    """Write the softmax outputs of a trained network for all images of a split, as (N, k) .npy.

    Row i is the i-th image of the split; rows of broken images are NaN. A job that was stopped goes
    on where it was when it is started again. Under torchrun or srun the processes share the images.

    Args:
        source: the data set: a folder, table or manifest
        weights: .safetensors, or a checkpoint of torch.save, of which no code is run
        out: file to write, .npy
        network: of torchvision, timm/NAME, or package.module:function
        options: arguments of the network's constructor, as '{"aux_logits": false}'
        num_classes: k; by default that of the data set. WebVision: keep labels below it
        split: whose images; train are the noisy ones
        transforms: published ones; by default those of the data set, if it is one of them
        size: instead: height and width of the network's input, cut out of the middle
        resize: instead: length of the shorter side before; by default 8/7 of the size
        ledger: what genkl scan wrote: these images are not read
        batch_size: images that are computed together
        precision: of the computation
        accelerator: what computes; auto takes a GPU if there is one
        dtype: of the file
        threads: of each process, that read, decode and, on a CPU, compute; by default its share of
            the processors
        fast: trade exact pixels for speed of decoding
        begin_anew: throw away an unfinished file, which is otherwise continued, or refused if it is
            of other weights, images or settings

    Example:
        genkl predict /data/clothing1m --weights best.safetensors -o probs.npy
        torchrun --nproc-per-node 8 -m genkl_ext.cli.main predict /data/webvision --num-classes 50 \
--network inception_resnet:build --weights 0.pth -o probs.npy
    """
    if transforms is not None and (size is not None or resize is not None):
        raise UsageError("--transforms must be left out with --size or --resize")
    for name, value in (("batch-size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1")

    import numpy as np

    from ..data import Ledger
    from ..ranks import join
    from ..training import networks, settings
    from ..training.loop import read_manifest
    from ..training.predict import predict as predict_images

    engine = settings.Engine(accelerator, precision, predict_batch_size=batch_size)
    ranks = join(engine.accelerator)
    manifest = read_manifest(settings.Data(root=source, num_classes=num_classes))
    images = manifest.split(split)
    if not len(images):
        there = ", ".join(manifest.split_sizes()) or "none"
        raise ValueError(f"predict: split must be one that {source} has, {there}, got {split}")
    seen = _transforms(manifest.dataset, transforms, size, resize)
    module = networks.build(
        settings.Network(network, options=options), num_classes or manifest.num_classes, seed=0
    )
    networks.load_into(module, weights)
    unusable = np.zeros(len(images), bool)
    if ledger is not None:
        unusable[Ledger.load(ledger).rows_in(images)] = True
    start = time.perf_counter()
    with Progress("predicting", "images") as progress:
        made = predict_images(
            module,
            images,
            out,
            data=settings.Data(root=source, eval=seen, threads=threads, fast=fast),
            engine=engine,
            ranks=ranks,
            unusable=unusable,
            dtype=dtype,
            begin_anew=begin_anew,
            progress=progress if ranks.first else None,
        )
    if ranks.first:
        seconds = time.perf_counter() - start
        print(summary(images, made, seen, int(unusable.sum()), ranks.size, seconds))


def _transforms(dataset: str, name: str | None, size: int | None, resize: int | None) -> Transforms:
    from ..data import Transforms

    if size is not None or resize is not None:
        size = size or Transforms().size
        return Transforms(size=size, resize=resize or round(size * 8 / 7))
    name = name or dataset
    published = ("clothing1m", "food101n", "webvision")
    return Transforms.preset(name, "eval") if name in published else Transforms()


def summary(
    images: Manifest,
    made: Predicted,
    seen: Transforms,
    known: int,
    processes: int,
    seconds: float,
) -> str:
    """What was predicted and how fast, for one screen."""
    from ..training.predict import accuracy

    broken = known + len(made.broken)
    reasons = Counter(failure.reason for failure in made.broken)
    rate = (made.rows - made.resumed) / max(seconds, 1e-9)
    of_processes = f", {processes} processes" if processes > 1 else ""
    lines = [
        ("predicted", f"{made.rows:,} images of {images.dataset}, {made.num_classes} classes"),
        ("seen as", f"{seen.size} x {seen.size} of the middle, shorter side {seen.resize}"),
        ("broken", f"{broken:,}, their rows are NaN" if broken else "none"),
        *([("  in the ledger", f"{known:,}")] if known else []),
        *((f"  {reason}", f"{count:,}") for reason, count in reasons.most_common()),
        *(
            ("first" if i == 0 else "", f"{it.path}: {it.reason}, {it.detail}")
            for i, it in enumerate(made.broken[:_SHOWN])
        ),
        ("speed", f"{rate:,.1f} img/s{of_processes}"),
        ("time", f"{seconds:.2f} s"),
        ("predictions", str(made.path)),
    ]
    if made.num_classes == images.num_classes:
        given = accuracy(made.path, images.labels)
        shares = f"top-1 {100 * given.top1:.2f} %, top-5 {100 * given.top5:.2f} %"
        lines.insert(-3, ("given labels", f"{shares} of {given.images:,}"))
    if made.resumed:
        lines.insert(-1, ("resumed", f"{made.resumed:,} images had been predicted before"))
    return "\n".join(f"{name:<18}{text}" for name, text in lines)
