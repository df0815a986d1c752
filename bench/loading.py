"""How fast do JPEG files become the batches of a network, against what people use instead?

Every candidate reads the same files and makes batches of 64 float32 tensors of 224 x 224,
normalised (resize 256, centre crop), unless its name says otherwise. "decode only" candidates stop
at the pixels. All use the same number of processors: threads, or DataLoader workers. DALI keeps two
batches ready between epochs, which are not in its time: 8 % of 1,536 files, in its favour.

Peers that are not installed (opencv-python-headless, torchcodec) are left out, and said to be.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import record
import torch
from clock import take_turns
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from genkl_ext.data import Manifest, Transforms, examples, make_loader
from genkl_ext.data.scan import scan

BATCH = 64
Batches = Iterator[torch.Tensor]


class Files(Dataset[Any]):
    """One file after another through a function, for torch's DataLoader."""

    def __init__(self, paths: list[str], load: Callable[[str], Any]) -> None:
        self.paths, self.load = paths, load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        return self.load(self.paths[i])


def pil_load(path: str, finish: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """What most training scripts do."""
    with Image.open(path) as image:
        return finish(image.convert("RGB"))


def torchvision_load(path: str, finish: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    return finish(decode_jpeg(_bytes_tensor(path), mode=ImageReadMode.RGB))


def torchcodec_load(path: str, finish: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    from torchcodec.decoders import decode_image

    return finish(decode_image(_bytes_tensor(path)))


def simplejpeg_load(path: str, finish: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(Path(path).read_bytes())
    return finish(torch.from_numpy(pixels).permute(2, 0, 1))


def opencv_load(path: str, finish: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    import cv2

    return finish(cv2.imread(path, cv2.IMREAD_COLOR_RGB))


def opencv_finish(pixels: Any) -> torch.Tensor:
    """OpenCV's fast resize, which does not antialias: other pixels than the oracle's."""
    import cv2

    h, w = pixels.shape[:2]
    size = (256, 256 * h // w) if w < h else (256 * w // h, 256)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    y, x = (round((side - 224) / 2) for side in small.shape[:2])
    scale, shift = Transforms().affine()
    crop = small[y : y + 224, x : x + 224].astype(np.float32) * scale + shift
    return torch.from_numpy(crop).permute(2, 0, 1)


def _bytes_tensor(path: str) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint8))


def finish_v2(dtype: torch.dtype = torch.float32) -> Callable[[Any], torch.Tensor]:
    """torchvision's v2 transforms of a uint8 tensor or a PIL image."""
    steps: list[Any] = [v2.ToImage(), v2.Resize(256, antialias=True), v2.CenterCrop(224)]
    if dtype != torch.uint8:
        t = Transforms()
        steps += [v2.ToDtype(dtype, scale=True), v2.Normalize(list(t.mean), list(t.std))]
    return v2.Compose([*steps, v2.ToPureTensor()])


def data_loader(
    paths: list[str], workers: int, load: Callable[[str], torch.Tensor]
) -> Callable[[], Batches]:
    """torch's DataLoader with processes, which live from call to call."""
    loader = DataLoader(
        Files(paths, load),
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=_one_thread,
    )
    return lambda: iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def in_threads(
    paths: list[str], workers: int, load: Callable[[str], torch.Tensor]
) -> Callable[[], Batches]:
    """Threads in place of processes: the decoders and torch leave Python's lock."""
    pool = ThreadPoolExecutor(workers)

    def batches() -> Batches:
        for start in range(0, len(paths), BATCH):
            yield torch.stack(list(pool.map(load, paths[start : start + BATCH])))

    return batches


def decode_only(
    paths: list[str], workers: int, load: Callable[..., Any]
) -> Callable[[], Iterator[Any]]:
    pool = ThreadPoolExecutor(workers)
    return lambda: pool.map(lambda path: load(path, lambda pixels: None), paths, chunksize=8)


def bare_dali(paths: list[str], workers: int) -> Callable[[], Batches]:
    """DALI's own file reader and the same operators on the CPU."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    t = Transforms()

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        data, _ = fn.readers.file(files=paths, name="files", pad_last_batch=True)
        pixels = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        pixels = fn.resize(pixels, resize_shorter=256, antialias=True)
        return fn.crop_mirror_normalize(
            pixels,
            crop=(224, 224),
            rounding="truncate",  # else the window lies a pixel beside torchvision's
            mean=[255 * m for m in t.mean],
            std=[255 * s for s in t.std],
            output_layout="CHW",
        )

    built = pipeline()
    built.build()
    iterator = DALIGenericIterator(
        built,
        ["image"],
        reader_name="files",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )
    return lambda: (part[0]["image"] for part in iterator)


def manifest_of(paths: list[str]) -> Manifest:
    columns = {"key": paths, "path": paths, "split": ["train"] * len(paths)}
    return Manifest(pa.table(columns), (), "photographs", "/")


def scanning(paths: list[str], workers: int) -> Callable[[], Iterator[Any]]:
    """Every file checked, and the ledger written."""
    manifest = manifest_of(paths)

    def check() -> Iterator[Any]:
        with tempfile.TemporaryDirectory() as folder:
            scan(manifest, Path(folder) / "ledger.parquet", threads=workers)
        return iter(())

    return check


def ours(paths: list[str], workers: int, **settings: Any) -> Callable[[], Batches]:
    loader = make_loader(
        manifest_of(paths), None, Transforms(), BATCH, device="cpu", threads=workers, **settings
    )
    return lambda: (batch["image"] for batch in loader)


def candidates(paths: list[str], workers: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Name -> function that begins an epoch."""
    both = functools.partial
    made: dict[str, Callable[[], Iterator[Any]]] = {
        "genkl_ext": ours(paths, workers),
        "genkl_ext, uint8": ours(paths, workers, dtype=torch.uint8),
        "genkl_ext, fast": ours(paths, workers, fast=True),
        "DALI pipeline": bare_dali(paths, workers),
        "DataLoader, PIL": data_loader(paths, workers, both(pil_load, finish=finish_v2())),
        "DataLoader, torchvision": data_loader(
            paths, workers, both(torchvision_load, finish=finish_v2())
        ),
        "DataLoader, torchvision, uint8": data_loader(
            paths, workers, both(torchvision_load, finish=finish_v2(torch.uint8))
        ),
        "threads, torchvision": in_threads(
            paths, workers, both(torchvision_load, finish=finish_v2())
        ),
        "threads, simplejpeg": in_threads(
            paths, workers, both(simplejpeg_load, finish=finish_v2())
        ),
    }
    decoders: dict[str, Callable[..., Any]] = {
        "torchvision": torchvision_load,
        "simplejpeg": simplejpeg_load,
    }
    if find_spec("torchcodec"):
        decoders["torchcodec"] = torchcodec_load
        made["threads, torchcodec"] = in_threads(
            paths, workers, both(torchcodec_load, finish=finish_v2())
        )
    if find_spec("cv2"):
        decoders["OpenCV"] = opencv_load
        made["threads, OpenCV without antialiasing"] = in_threads(
            paths, workers, both(opencv_load, finish=opencv_finish)
        )
    made["decode only, genkl scan"] = scanning(paths, workers)
    for name, load in decoders.items():
        made[f"decode only, {name}"] = decode_only(paths, workers, load)
    return made


def run_epoch(begin: Callable[[], Iterator[Any]], _: int) -> None:
    for _batch in begin():
        pass


def difference(begin: Callable[[], Iterator[Any]], oracle: list[torch.Tensor]) -> dict[str, float]:
    """Of the first batch from torchvision's, in grey levels."""
    images = next(iter(begin()))
    std = torch.tensor(Transforms().std).view(3, 1, 1) * 255
    mean = torch.tensor(Transforms().mean).view(3, 1, 1) * 255
    levels = images.float() if images.dtype == torch.uint8 else images * std + mean
    expected = torch.stack(oracle) * std + mean
    gap = (levels - expected).abs()
    return {"mean_levels": round(float(gap.mean()), 4), "max_levels": round(float(gap.max()), 2)}


def photographs(folder: Path | None, count: int, temporary: Path) -> list[str]:
    """JPEG files: of ``folder``, or drawn ones."""
    if folder is None:
        folder = temporary / "drawn"
        examples.make("folder", folder, count=count)
    paths = sorted(
        str(p.resolve()) for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")
    )
    if len(paths) < BATCH:
        raise ValueError(f"loading: --images must hold at least {BATCH} JPEG files, got {folder}")
    return paths[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; by default drawn ones")
    parser.add_argument("--count", type=int, default=1536, help="files to use (default: 1536)")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all processors")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="candidates with it in the name")
    options = parser.parse_args(arguments)
    count = BATCH + 1 if options.quick else options.count
    cores = len(os.sched_getaffinity(0))
    cells: list[dict[str, Any]] = []
    torch.set_num_threads(1)  # each worker of every candidate is one thread
    with tempfile.TemporaryDirectory() as temporary:
        paths = photographs(options.images, count, Path(temporary))
        oracle = [pil_load(path, finish_v2()) for path in paths[:BATCH]]
        for workers in options.threads or sorted({1, cores}):
            todo = {
                name: begin
                for name, begin in candidates(paths, workers).items()
                if not options.only or any(word in name for word in options.only)
            }
            times = take_turns(
                {name: functools.partial(run_epoch, begin) for name, begin in todo.items()},
                seconds=0.0,
                rounds=(2, 2) if options.quick else (3, 3),
            )
            for name, taken in times.items():
                rate = len(paths) / taken.median
                cell: dict[str, Any] = {
                    "candidate": name,
                    "workers": workers,
                    "images_per_second": round(rate, 1),
                }
                if not name.startswith("decode only"):
                    cell |= difference(todo[name], oracle)
                cells.append(cell | taken.as_json())
                print(f"{workers} x {name:40} {rate:8.0f} img/s", flush=True)
    sizes = [os.path.getsize(path) for path in paths] if options.images else []
    settings = {
        "images": str(options.images.name) if options.images else "drawn",
        "count": len(paths),
        "mean_bytes": round(float(np.mean(sizes))) if sizes else None,
        "batch_size": BATCH,
        "quick": options.quick,
        "missing": [name for name in ("cv2", "torchcodec") if not find_spec(name)],
    }
    partial = options.quick or options.only
    record.write("loading", settings, cells, options.out or (None if partial else record.RESULTS))


if __name__ == "__main__":
    main()
