"""What does training with GenKL cost, against plain training?

step     one step of the objective against one of plain cross-entropy: the same network, images and
         optimiser. The GenKL side makes its targets and its mixup within the time. Its parts are
         timed alone, too.
files    JPEG files to steps, in the same plain loop: our batches against torch's DataLoader with
         torchvision's transforms of PIL pictures, both with all processors. The wait is the share
         of the time until the next batch is there, from the second batch of an epoch on.
memory   what such steps, and such epochs of files, need in the end, each in a process of its own,
         with its workers; pages that processes share count once.
engine   engine.fit against a bare loop, over the same batch again and again. Two lengths are timed:
         their difference is steps, the rest is what a training costs once.

On a GPU, files and engine are of a ResNet-50 in bf16 with channels_last, compiled and not, at 224
pixels; without one, of smaller networks on the CPU.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import record
import torch
import torch.nn.functional as F
from clock import Candidate, significant, take_turns
from loading import Files, photographs, pil_load
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from genkl_ext.data import Manifest, Transforms
from genkl_ext.objective import CLEAN, NC, NNC, Objective
from genkl_ext.ranks import Ranks
from genkl_ext.relabel import Targets
from genkl_ext.training import engine, networks
from genkl_ext.training.batches import grouped, labelled
from genkl_ext.training.settings import Compatibility, Data, Engine, Fit, Network, Training
from genkl_ext.training.steps import GenKLStep, PlainStep

K = 14
SHARES = {NC: 0.1, CLEAN: 0.5}  # of a batch; the rest conforms and is relabelled
Batch = dict[str, Any]
Step = Callable[[nn.Module, Batch], dict[str, Tensor]]


class Case(NamedTuple):
    """A network and what it is trained on."""

    network: str
    size: int  #: pixels
    batch: int  #: images
    compile: bool = False

    def build(self) -> nn.Module:
        return networks.build(Network(self.network, compile=self.compile), K, seed=0)

    def facts(self) -> dict[str, Any]:
        return self._asdict()


# ---- sides ---------------------------------------------------------------------------------------


class Rows:
    """Relabelled images: their targets, and the groups that they are in."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        draws = rng.random(count)
        self.groups = np.full(count, NNC)
        self.groups[draws < SHARES[NC] + SHARES[CLEAN]] = CLEAN
        self.groups[draws < SHARES[NC]] = NC
        label, top = rng.integers(0, K, (2, count)).astype(np.int32)
        is_clean = self.groups == CLEAN
        self.targets = Targets(
            top_class=np.where(is_clean, label, top),
            top_prob=np.where(is_clean, 1, rng.uniform(0.2, 1.0, count)).astype(np.float32),
            label=label,
            prior=np.where(is_clean, 0, 1 / K).astype(np.float32),
            nc=self.groups == NC,
            num_classes=K,
        )

    def describe(self, rows: np.ndarray, objective: Objective, rng: np.random.Generator) -> Batch:
        """Groups, targets and mixup of a batch, as ``batches.grouped`` makes them."""
        targets = self.targets[rows]
        group = torch.from_numpy(self.groups[rows])
        batch = {"group": group, "target": torch.from_numpy(targets.dense())}
        mixup = objective.draw_mixup(group, rng)
        if mixup is None:
            return batch
        partners = targets[mixup.partner.numpy()].dense()
        return {**batch, "mixup": mixup, "partner_target": torch.from_numpy(partners)}


class Trainee:
    """A network and its optimiser, on a device."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device)
        self.device = device
        self.optimiser = torch.optim.SGD(self.network.parameters(), 1e-4, 0.9, nesterov=True)

    def learn(self, step: Step, batch: Batch) -> None:
        with mixed_precision(self.device):
            loss = step(self.network, batch)["loss"]
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 on a GPU, float32 on a CPU."""
    on_gpu = device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()


def cross_entropy(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What anybody would write."""
    return {"loss": F.cross_entropy(network(batch["image"]), batch["label"])}


def random_batch(case: Case, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    labels = torch.randint(0, K, (case.batch,), generator=generator)
    images = images.to(memory_format=torch.channels_last)
    batch = {"image": images, "label": labels, "row": torch.arange(case.batch)}
    return {name: value.to(device) for name, value in batch.items()}


def require_same_loss(case: Case) -> None:
    """On clean images without mixup the objective is cross-entropy: both sides do the same."""
    batch = random_batch(case, torch.device("cpu"))
    one_hot = F.one_hot(batch["label"], K).float()
    clean = {**batch, "group": torch.full((case.batch,), CLEAN), "target": one_hot}
    step = GenKLStep(Training(loss_scale=1.0, mixup_alpha=0), Compatibility())
    ours = step(case.build(), clean)["loss"].item()
    theirs = cross_entropy(case.build(), batch)["loss"].item()
    if not np.isclose(ours, theirs, rtol=1e-5):
        raise RuntimeError(f"training: both losses must be equal, got {ours} and {theirs}")


# ---- step ----------------------------------------------------------------------------------------


def step_sides(case: Case) -> dict[str, Callable[[], Candidate]]:
    """Name -> what makes the function that takes one step."""
    device = torch.device("cpu")
    batch = random_batch(case, device)

    def plain() -> Candidate:
        trainee = Trainee(case.build(), device)
        return lambda _: trainee.learn(cross_entropy, batch)

    def genkl(mixup_alpha: float = 0.5, **training: Any) -> Candidate:
        trainee = Trainee(case.build(), device)
        rows, rng = Rows(case.batch), np.random.default_rng(0)
        numbers = batch["row"].numpy()
        objective = Objective(mixup_alpha=mixup_alpha)
        settings = Training(batch_size=case.batch, mixup_alpha=mixup_alpha, **training)
        step = GenKLStep(settings, Compatibility())

        def learn(_: int) -> None:
            trainee.learn(step, {**batch, **rows.describe(numbers, objective, rng)})

        return learn

    return {
        "cross-entropy": plain,
        "GenKL": genkl,
        "GenKL without mixup": functools.partial(genkl, mixup_alpha=0),
        "GenKL, dynamic": functools.partial(genkl, clean="dynamic"),
    }


def part_candidates(case: Case) -> dict[str, Candidate]:
    """Name -> function that does one part of a step; forward and backward for losses."""
    batch = random_batch(case, torch.device("cpu"))
    rows, numbers = Rows(case.batch), batch["row"].numpy()
    objective, rng = Objective(batch_size=case.batch), np.random.default_rng(0)
    described = rows.describe(numbers, objective, rng)
    logits = torch.randn(case.batch, K, requires_grad=True)
    names = ("target", "group", "mixup", "partner_target")
    known = [described[name] for name in names]
    return {
        "cross-entropy": lambda _: F.cross_entropy(logits, batch["label"]).backward(),
        "objective": lambda _: objective(logits, *known).total.backward(),
        "targets and mixup": lambda _: rows.describe(numbers, objective, rng),
        "images mixed": lambda _: described["mixup"].mix(batch["image"]),
    }


def step_cells(case: Case, seconds: float, rounds: tuple[int, int]) -> list[dict[str, Any]]:
    require_same_loss(case)
    candidates = {name: make() for name, make in step_sides(case).items()}
    times = take_turns(candidates, seconds=seconds, rounds=rounds)
    plain = times["cross-entropy"].median
    cells = []
    for name, taken in times.items():
        ratio = taken.median / plain
        cells.append({"section": "step", **case.facts(), "candidate": name, **taken.as_json(),
                      "ratio": significant(ratio)})  # fmt: skip
        print(f"step {label(case)} {name:24} {1e3 * taken.median:9.2f} ms {ratio:7.3f}", flush=True)
    parts = take_turns(part_candidates(case), seconds=seconds / 10, rounds=(rounds[0], 1000))
    for name, taken in parts.items():
        share = taken.median / plain
        cells.append({"section": "parts", **case.facts(), "candidate": name, **taken.as_json(),
                      "share": significant(share)})  # fmt: skip
        print(f"part {label(case)} {name:24} {1e3 * taken.median:9.3f} ms {share:7.4f}", flush=True)
    return cells


# ---- files ---------------------------------------------------------------------------------------


def file_sides(
    case: Case, paths: list[str], device: torch.device, waits: dict[str, list[float]]
) -> dict[str, Callable[[], Candidate]]:
    """Name -> what makes the function that trains for an epoch, and notes how much it waited."""
    workers = len(os.sched_getaffinity(0))
    manifest = manifest_of(paths)
    transforms = Transforms(size=case.size, resize=case.size * 8 // 7, crop="random", flip=0.5)
    data = Data(train=transforms, threads=workers, on_error="raise")
    how: dict[str, Any] = {"device": device, "channels_last": True}
    noisy = manifest.rows("train")
    targets = dataclasses.replace(Rows(len(noisy)).targets, label=manifest.labels[noisy])
    training = Training(batch_size=case.batch, clean="joint")

    def epochs(name: str, make: Callable[[], Iterable[Batch]], step: Step) -> Candidate:
        trainee, batches = Trainee(case.build(), device), make()
        return lambda _: waits[name].append(train_for_an_epoch(trainee, batches, step))

    def theirs() -> Iterable[Batch]:
        return data_loader(paths, manifest.labels, transforms, case.batch, workers, device)

    def ours() -> Iterable[Batch]:
        return labelled(manifest, np.arange(len(manifest)), data, case.batch, 0, **how)

    def relabelled() -> Iterable[Batch]:
        used = np.ones(len(noisy), bool)
        clean = manifest.rows("clean")
        return grouped(manifest, targets, used, clean, data, training, 0, **how)

    sides: dict[str, tuple[Callable[[], Iterable[Batch]], Step]] = {
        "DataLoader, cross-entropy": (theirs, cross_entropy),
        "genkl_ext, cross-entropy": (ours, PlainStep()),
        "genkl_ext, GenKL": (relabelled, GenKLStep(training, Compatibility())),
    }
    return {name: functools.partial(epochs, name, *side) for name, side in sides.items()}


def train_for_an_epoch(trainee: Trainee, batches: Iterable[Batch], step: Step) -> float:
    """The share of the time after the first batch that was spent until the next was there."""
    iterator = iter(batches)
    batch = next(iterator, None)
    start, waited = time.perf_counter(), 0.0
    while batch is not None:
        trainee.learn(step, batch)
        before = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - before
    if trainee.device.type == "cuda":
        torch.cuda.synchronize()
    return waited / (time.perf_counter() - start)


def manifest_of(paths: list[str]) -> Manifest:
    """Half of the files noisy, half clean, with random labels."""
    rng = np.random.default_rng(0)
    columns = {
        "key": paths,
        "path": paths,
        "given_label": rng.integers(0, K, len(paths)),
        "split": ["train", "clean"] * (len(paths) // 2) + ["train"] * (len(paths) % 2),
    }
    return Manifest(pa.table(columns), tuple(map(str, range(K))), "photographs", "/")


class DataLoaderBatches:
    """torch's DataLoader with torchvision's transforms of PIL pictures, in processes."""

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self._loader:
            images = images.to(self._device, memory_format=torch.channels_last, non_blocking=True)
            yield {"image": images, "label": labels.to(self._device, non_blocking=True)}


def data_loader(
    paths: list[str],
    labels: np.ndarray,
    transforms: Transforms,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> DataLoaderBatches:
    finish = v2.Compose([v2.PILToTensor(), transforms.torchvision(), v2.ToPureTensor()])
    load = functools.partial(
        load_labelled, finish=finish, label_of=dict(zip(paths, labels.tolist(), strict=True))
    )
    loader = DataLoader(
        Files(paths, load),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
    )
    return DataLoaderBatches(loader, device)


def load_labelled(
    path: str, finish: Callable[[Any], Tensor], label_of: dict[str, int]
) -> tuple[Tensor, int]:
    return pil_load(path, finish), label_of[path]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def file_cells(
    case: Case, paths: list[str], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    waits: dict[str, list[float]] = collections.defaultdict(list)
    candidates = {name: make() for name, make in file_sides(case, paths, device, waits).items()}
    times = take_turns(candidates, seconds=0.0, rounds=(rounds, rounds))
    images = len(paths) // case.batch * case.batch
    cells = []
    for name, taken in times.items():
        rate, wait = images / taken.median, statistics.median(waits[name][1:])
        cells.append({"section": "files", **case.facts(), "candidate": name, **taken.as_json(),
                      "images": images, "images_per_second": significant(rate),
                      "wait": significant(wait)})  # fmt: skip
        print(f"files {label(case)} {name:26} {rate:8.1f} img/s, waits {wait:6.2%}", flush=True)
    return cells


# ---- memory --------------------------------------------------------------------------------------


def print_memory(case: Case, name: str, paths: list[str], device: torch.device) -> None:
    """Take three steps, or train for an epoch, and print what memory that needs, in MiB."""
    steps = step_sides(case)
    sides = steps | file_sides(case, paths, device, collections.defaultdict(list))
    candidate = sides[name]()
    for turn in range(3 if name in steps else 1):
        candidate(turn)
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    shares = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes)
    print(sum(int(share.partition("\nPss:")[2].split()[0]) for share in shares) / 1024)


def memory_cells(case: Case, names: Iterable[str], folder: Path) -> list[dict[str, Any]]:
    """Of these sides; torch and the rest of the program included."""
    cells = []
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--cases", text_of(case)]
        command += ["--images", str(folder), "--count", str(4 * case.batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"training: {' '.join(command)} failed: {done.stderr.strip()}")
        cells.append({"section": "memory", **case.facts(), "candidate": name,
                      "mib": significant(float(done.stdout))})  # fmt: skip
        print(f"memory {label(case)} {name:26} {float(done.stdout):8.1f} MiB", flush=True)
    return cells


# ---- engine --------------------------------------------------------------------------------------


class Repeated:
    """The same batch again and again, as ``engine.fit`` asks for batches."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self._batch = batch
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        return iter([self._batch] * self._steps)

    def set_epoch(self, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def engine_candidates(case: Case, device: torch.device, steps: Sequence[int]) -> dict[str, Any]:
    """(name, steps) -> function that takes so many."""
    batch = random_batch(case, device)
    described = Rows(case.batch).describe(
        batch["row"].cpu().numpy(), Objective(), np.random.default_rng(0)
    )
    grouped_batch = {**batch, **{name: value.to(device) for name, value in described.items()}}
    on_gpu = device.type == "cuda"
    settings = Engine(
        accelerator="gpu" if on_gpu else "cpu",
        precision="bf16-mixed" if on_gpu else "32-true",
        loggers=[],
    )

    def bare(trainee: Trainee, count: int, _: int) -> None:
        for _step in range(count):
            trainee.learn(cross_entropy, batch)
        if on_gpu:
            torch.cuda.synchronize()

    def fitted(network: nn.Module, made: Batch, step: Step, count: int, _: int) -> None:
        fit = Fit(epochs=1, batch_size=case.batch)
        with tempfile.TemporaryDirectory() as folder:
            engine.fit(
                network, Repeated(made, count), step, Path(folder), fit, settings,
                seed=0, ranks=Ranks(), say=lambda line: None,
            )  # fmt: skip

    trainee = Trainee(case.build(), device)
    networks_of = {name: case.build() for name in ("plain", "GenKL")}
    found: dict[str, Any] = {}
    for count in steps:
        found |= {
            ("bare loop", count): functools.partial(bare, trainee, count),
            ("fit, cross-entropy", count): functools.partial(
                fitted, networks_of["plain"], batch, PlainStep(), count
            ),
            ("fit, GenKL", count): functools.partial(
                fitted,
                networks_of["GenKL"],
                grouped_batch,
                GenKLStep(Training(batch_size=case.batch), Compatibility()),
                count,
            ),
        }
    return found


def engine_cells(
    case: Case, device: torch.device, steps: tuple[int, int], rounds: int
) -> list[dict[str, Any]]:
    few, many = steps
    times = take_turns(engine_candidates(case, device, steps), seconds=0.0, rounds=(rounds, rounds))
    cells: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for name, _ in times):
        short, long = times[name, few].median, times[name, many].median
        per_step = (long - short) / (many - few)
        cells.append({
            "section": "engine",
            **case.facts(),
            "candidate": name,
            "device": device.type,
            "steps": [few, many],
            "step_ms": significant(1e3 * per_step),
            "once_ms": significant(1e3 * (short - few * per_step)),
            "images_per_second": significant(case.batch / per_step),
            "samples": times[name, few].samples,
        })  # fmt: skip
        print(
            f"engine {label(case)} {name:20} {1e3 * per_step:9.3f} ms a step, "
            f"{1e3 * (short - few * per_step):9.1f} ms once",
            flush=True,
        )
    return cells


# ---- all -----------------------------------------------------------------------------------------


def label(case: Case) -> str:
    name = case.network.rpartition(":")[2]
    return f"{name}, {case.size} px, {case.batch}{', compiled' if case.compile else ''}"


def text_of(case: Case) -> str:
    return f"{case.network}@{case.size}x{case.batch}"


def read_case(text: str) -> Case:
    """ "resnet18@64x32": a network, pixels, images."""
    network, _, numbers = text.rpartition("@")
    size, _, batch = numbers.partition("x")
    try:
        return Case(network, int(size), int(batch))
    except ValueError:
        raise ValueError(f"training: --cases must be NETWORK@PIXELSxIMAGES, got {text}") from None


SMALL = "genkl_ext.demo.network:small"  # a step takes so little that the engine's cost shows
CASES = ["resnet18@64x32", "resnet50@64x32", "resnet18@224x32", "resnet50@224x32"]
SECTIONS = ("step", "files", "memory", "engine")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; by default drawn ones")
    parser.add_argument("--count", type=int, default=512, help="files to use (default: 512)")
    parser.add_argument(
        "--cases", nargs="+", metavar="NETWORK@PIXELSxIMAGES", help=f"default: {' '.join(CASES)}"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--memory-of", metavar="NAME", help="used by the benchmark itself")
    options = parser.parse_args(arguments)
    quick = options.quick
    cases = [read_case(text) for text in options.cases or ([f"{SMALL}@16x8"] if quick else CASES)]
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    large = Case("resnet50", 224, 128)
    if options.memory_of:
        paths = photographs(options.images, options.count, Path())
        return print_memory(cases[0], options.memory_of, paths, torch.device("cpu"))

    cells: list[dict[str, Any]] = []
    if "step" in options.only:
        for case in cases:
            rounds = (2, 2) if quick else (7, 200)
            cells += step_cells(case, seconds=0.0 if quick else 40.0, rounds=rounds)
    if "engine" in options.only:
        ways = [large, large._replace(compile=True)] if gpu else [Case(SMALL, 16, 32)]
        steps = (2, 4) if quick else (20, 100) if gpu else (100, 600)
        for case in ways:
            cells += engine_cells(case, device, steps, rounds=2 if quick else 7)
    with tempfile.TemporaryDirectory() as temporary:
        paths = photographs(options.images, 64 if quick else options.count, Path(temporary))
        if "files" in options.only:
            case = large if gpu else cases[0]
            cells += file_cells(case, paths, device, rounds=2 if quick else 5)
        if "memory" in options.only:
            names = ("DataLoader, cross-entropy", "genkl_ext, GenKL", "cross-entropy", "GenKL")
            folder = options.images or Path(temporary)
            cells += memory_cells(cases[0], names[:2] if quick else names, folder)
    settings = {
        "classes": K,
        "images": str(options.images.name) if options.images else "drawn",
        "count": options.count,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "quick": quick,
    }
    partial = quick or options.cases or options.only != SECTIONS
    record.write("training", settings, cells, options.out or (None if partial else record.RESULTS))


if __name__ == "__main__":
    main()
