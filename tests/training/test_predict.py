"""``predict``: what is in the file, and that it has the same bytes however it came about."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from genkl_ext import unfinished
from genkl_ext.data import ImageError, Manifest, Transforms
from genkl_ext.ranks import Ranks
from genkl_ext.training import predict as predict_module
from genkl_ext.training import stages
from genkl_ext.training.predict import Accuracy, accuracy, predict
from genkl_ext.training.settings import Data, Engine

CLASSES = 5
DATA = Data(eval=Transforms(size=16, resize=20), threads=2)
ENGINE = Engine(accelerator="cpu", predict_batch_size=12)  # cut into parts of 8 and 4

SMALL = dataclasses.replace(ENGINE, predict_batch_size=4)


def network(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """Convolutions, batch norm with statistics of its own, and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.Hardswish(),
            nn.Conv2d(24, 24, 5, padding=2, groups=24),
            nn.BatchNorm2d(24),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(24, classes),
        )
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.01, 0.1)
    return made.to(memory_format=torch.channels_last)


def pictures(folder: Path, count: int) -> Manifest:
    """A manifest of ``count`` JPEG pictures in ``folder``, of several sizes; labels 0, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        stream = np.random.default_rng(i)
        coarse = stream.integers(0, 256, (4, 4 + i % 3, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((24 + i % 5, 24 + i % 7), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03}.jpg", quality=95)
    names = [f"{i:03}.jpg" for i in range(count)]
    table = pa.table(
        {
            "key": names,
            "path": names,
            "given_label": pa.array([i % CLASSES for i in range(count)], pa.int32()),
            "split": ["train"] * count,
        }
    )
    return Manifest(table, tuple("abcde"), "test", str(folder))


def run(manifest: Manifest, out: Path, **changes: Any) -> predict_module.Predicted:
    arguments = {"data": DATA, "engine": ENGINE, "ranks": Ranks(), **changes}
    return predict(arguments.pop("network", None) or network(), manifest, out, **arguments)


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """43 pictures, the last batch of them with 7."""
    return pictures(tmp_path_factory.mktemp("shared") / "pictures", 43)


@pytest.fixture(scope="module")
def whole(shared: Manifest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of ``shared``, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "q.npy"
    run(shared, out)
    assert files(out.parent) == ["q.npy"]
    return out.read_bytes()


@pytest.fixture
def marked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "MARK_SECONDS", 0)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Pictures that a test may break."""
    return pictures(tmp_path / "pictures", 30)


class Stop(Exception):
    """What ``stop_after`` raises."""


def stop_after(rows: int) -> Any:
    def progress(done: int, _: int) -> None:
        if done >= rows:
            raise Stop

    return progress


def test_equals_plain_torch(shared: Manifest, whole: bytes) -> None:
    q = np.load(io.BytesIO(whole))
    assert q.dtype == np.float32 and q.shape == (43, CLASSES)
    pipeline, module = DATA.eval.torchvision(), network().double().eval()
    for row, path in enumerate(shared.paths()):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            expected = module(pipeline(image)[None].double()).softmax(1)[0]
        np.testing.assert_allclose(q[row], expected.numpy(), atol=2e-5)
    assert len(np.unique(q, axis=0)) == 43


def test_what_is_said(shared: Manifest, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = run(shared, tmp_path / "q.npy", progress=lambda *call: calls.append(call))
    assert (made.path, made.rows, made.num_classes) == (tmp_path / "q.npy", 43, CLASSES)
    assert (made.broken, made.resumed) == ([], 0)
    assert calls == [(12, 43), (24, 43), (36, 43), (43, 43)]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("torch_threads", [1, 2, 4])
def test_threads_change_nothing(
    shared: Manifest, whole: bytes, tmp_path: Path, threads: int, torch_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        run(shared, tmp_path / "q.npy", data=dataclasses.replace(DATA, threads=threads))
        assert torch.get_num_threads() == torch_threads
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "q.npy").read_bytes() == whole


def test_a_network_in_training_mode_and_another_memory_format(
    shared: Manifest, whole: bytes, tmp_path: Path
) -> None:
    module = network().to(memory_format=torch.contiguous_format).train()
    run(shared, tmp_path / "q.npy", network=module)
    assert not module.training
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), np.load(io.BytesIO(whole)), atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_networks_are_not_called_by_threads(
    shared: Manifest, whole: bytes, tmp_path: Path, in_place: bool
) -> None:
    def backend(*_: Any) -> None:
        pytest.fail("it was compiled")

    module = network()
    if in_place:
        module.compile(backend=backend)
    else:
        module = torch.compile(module, backend=backend)
    run(shared, tmp_path / "q.npy", network=module)
    assert (tmp_path / "q.npy").read_bytes() == whole


def test_precision_and_dtype(shared: Manifest, whole: bytes, tmp_path: Path) -> None:
    expected = np.load(io.BytesIO(whole))
    run(shared, tmp_path / "half.npy", dtype="float16")
    half = np.load(tmp_path / "half.npy")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, expected.astype(np.float16))
    run(shared, tmp_path / "bf16.npy", engine=dataclasses.replace(ENGINE, precision="bf16-mixed"))
    bf16 = np.load(tmp_path / "bf16.npy")
    assert bf16.dtype == np.float32
    np.testing.assert_allclose(bf16.sum(1), 1, atol=1e-6)  # the softmax is taken in float32
    assert 1e-5 < np.abs(bf16 - expected).max() < 0.05


def test_no_images_and_one(tmp_path: Path) -> None:
    for count in (0, 1):
        made = run(
            pictures(tmp_path / str(count), count), tmp_path / "q.npy", network=network(0, 2)
        )
        assert np.load(tmp_path / "q.npy").shape == (count, 2) == (made.rows, made.num_classes)
    assert files(tmp_path) == ["0", "1", "q.npy"]


def test_a_link_is_followed(shared: Manifest, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real.npy").write_text("old")
    (tmp_path / "q.npy").symlink_to(tmp_path / "elsewhere" / "real.npy")
    run(shared, tmp_path / "q.npy")
    assert (tmp_path / "q.npy").is_symlink()
    assert (tmp_path / "elsewhere" / "real.npy").read_bytes() == whole
    assert files(tmp_path / "elsewhere") == ["real.npy"]


def test_broken_images_are_nan_and_the_others_as_before(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path / "healthy.npy")
    expected = np.load(tmp_path / "healthy.npy")
    broken = [0, 13, 24, 29]
    paths = [Path(path) for path in manifest.paths(broken)]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:300])
    paths[3].write_text("<html>")
    made = run(manifest, tmp_path / "q.npy")
    assert [failure.row for failure in made.broken] == broken
    assert [failure.key for failure in made.broken] == manifest.keys(broken)
    assert [failure.path for failure in made.broken] == manifest.paths(broken)
    assert [failure.reason for failure in made.broken] == [
        "missing",
        "empty",
        "truncated",
        "not an image",
    ]
    expected[broken] = np.nan
    np.testing.assert_array_equal(np.load(tmp_path / "q.npy"), expected)


def test_images_known_to_be_broken_are_not_read(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genkl_ext.data import cpu

    unusable = np.zeros(30, bool)
    unusable[[3, 12, 13, 14, 29]] = True
    Path(manifest.path(20)).unlink()
    read, seen = cpu.read, []
    monkeypatch.setattr(
        cpu, "read", lambda path, limits: (seen.append(path), read(path, limits))[1]
    )
    made = run(manifest, tmp_path / "q.npy", unusable=unusable)
    assert sorted(set(seen) & set(manifest.paths())) == manifest.paths(np.flatnonzero(~unusable))
    assert [failure.row for failure in made.broken] == [20]
    missing = np.isnan(np.load(tmp_path / "q.npy"))
    assert (missing.all(1) == missing.any(1)).all()
    np.testing.assert_array_equal(missing.all(1), unusable | (np.arange(30) == 20))


def test_on_error_raise(manifest: Manifest, tmp_path: Path) -> None:
    unusable = np.arange(30) == 2  # known, so no reason to stop
    Path(manifest.path(2)).write_bytes(b"")
    Path(manifest.path(17)).write_bytes(b"")
    data = dataclasses.replace(DATA, on_error="raise")
    with pytest.raises(ImageError, match=r"row 17, .*/017\.jpg: empty") as caught:
        run(manifest, tmp_path / "q.npy", data=data, unusable=unusable)
    assert (caught.value.failure.row, caught.value.failure.key) == (17, "017.jpg")
    assert not (tmp_path / "q.npy").exists()


class Odd(nn.Module):
    """Gives NaN for a white or a blank picture, the number of torch's threads, or no logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: torch.Tensor) -> Any:
        logits = images.mean((2, 3))
        if self.kind == "nan":
            return logits.masked_fill((logits > 2) | (logits == 0), torch.inf)
        if self.kind == "threads":
            return torch.full_like(logits, 0).index_fill(
                1, torch.tensor(0), torch.get_num_threads()
            )
        return {"tuple": (logits,), "flat": logits.flatten(), "four": images}[self.kind]


def test_what_is_not_finite_is_named(manifest: Manifest, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "white").save(manifest.path(19), quality=95)
    message = r"^predict: the network's softmax must be finite, got NaN for row 19, '019\.jpg'$"
    with pytest.raises(ValueError, match=message):
        run(manifest, tmp_path / "a.npy", network=Odd("nan"))
    assert not (tmp_path / "a.npy").exists()
    # The blank picture in the place of one that is left out may give what it likes.
    run(manifest, tmp_path / "b.npy", network=Odd("nan"), unusable=np.arange(30) == 19)


def test_torch_computes_on_one_thread(shared: Manifest, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(shared, tmp_path / "q.npy", network=Odd("threads"))
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)
    one = torch.tensor([1.0, 0, 0]).softmax(0).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), np.tile(one, (43, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "got"), [("tuple", "tuple"), ("flat", r"\(3,\)"), ("four", r"\(1, 3, 16, 16\)")]
)
def test_what_is_no_logits(shared: Manifest, tmp_path: Path, kind: str, got: str) -> None:
    message = rf"^predict: the network must give \(1, k\) logits, got {got}$"
    with pytest.raises(ValueError, match=message):
        run(shared, tmp_path / "q.npy", network=Odd(kind))
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "q.txt"}, r"^predict: out must be an \.npy file, got .*q\.txt$"),
        ({"dtype": "float64"}, r"^predict: dtype must be 'float32' or 'float16', got 'float64'$"),
        ({"unusable": np.zeros(9, bool)}, r"unusable must be \(43,\) booleans, got \(9,\) bool$"),
        ({"unusable": np.zeros(43, int)}, r"must be \(43,\) booleans, got \(43,\) int64$"),
        ({"out": "none/q.npy"}, r"^cannot write .*none/q\.npy: .* does not exist$"),
    ],
)
def test_arguments(shared: Manifest, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    out = tmp_path / changes.pop("out", "q.npy")
    with pytest.raises((OSError, ValueError), match=message):
        run(shared, out, **changes)
    assert files(tmp_path) == []


def test_another_job_at_work_on_it(shared: Manifest, tmp_path: Path, marked_at_once: None) -> None:
    def second(done: int, _: int) -> None:
        if done == 24:
            with pytest.raises(OSError, match=r"in use by another process"):
                run(shared, tmp_path / "q.npy")

    run(shared, tmp_path / "q.npy", progress=second)
    assert files(tmp_path) == ["q.npy"]


def test_a_full_disk_shows_at_once(
    shared: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "q.npy").write_text("old")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"^cannot write .*/q\.npy: No space left on device$"):
        run(shared, tmp_path / "q.npy")
    assert (tmp_path / "q.npy").read_text() == "old"
    monkeypatch.undo()
    run(shared, tmp_path / "q.npy")
    assert files(tmp_path) == ["q.npy"]


def test_a_stopped_job_goes_on(
    manifest: Manifest, tmp_path: Path, marked_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genkl_ext.data import cpu

    for row in (5, 26):
        Path(manifest.path(row)).write_bytes(b"")
    expected = run(manifest, tmp_path / "one.npy")
    (tmp_path / "q.npy").write_text("old")
    with pytest.raises(Stop):
        run(manifest, tmp_path / "q.npy", progress=stop_after(12))
    assert (tmp_path / "q.npy").read_text() == "old"
    read, seen = cpu.read, []
    monkeypatch.setattr(
        cpu, "read", lambda path, limits: (seen.append(path), read(path, limits))[1]
    )
    calls: list[tuple[int, int]] = []
    made = run(manifest, tmp_path / "q.npy", progress=lambda *call: calls.append(call))
    assert sorted(seen) == manifest.paths(range(12, 30))  # and no image twice
    assert calls == [(24, 30), (30, 30)]
    assert made == dataclasses.replace(expected, path=tmp_path / "q.npy", resumed=12)
    assert [failure.row for failure in made.broken] == [5, 26]  # the first met by the other job
    assert (tmp_path / "q.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()
    assert files(tmp_path) == ["one.npy", "pictures", "q.npy"]


def test_the_row_of_a_broken_image_in_the_rest_of_a_job(
    manifest: Manifest, tmp_path: Path, marked_at_once: None
) -> None:
    with pytest.raises(Stop):
        run(manifest, tmp_path / "q.npy", progress=stop_after(12))
    Path(manifest.path(25)).write_bytes(b"")
    data = dataclasses.replace(DATA, on_error="raise")
    with pytest.raises(ImageError) as caught:
        run(manifest, tmp_path / "q.npy", data=data)
    assert caught.value.failure.row == 25


OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"network": network(1)},
    "layers": {"network": nn.Sequential(*network()[:-1], nn.Identity(), network()[-1])},
    "memory format": {"network": network().to(memory_format=torch.contiguous_format)},
    "transforms": {"data": dataclasses.replace(DATA, eval=Transforms(size=16, resize=24))},
    "fast": {"data": dataclasses.replace(DATA, fast=True)},
    "batch size": {"engine": dataclasses.replace(ENGINE, predict_batch_size=13)},
    "precision": {"engine": dataclasses.replace(ENGINE, precision="bf16-mixed")},
    "dtype": {"dtype": "float16"},
    "unusable": {"unusable": np.arange(43) == 40},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_another_job_left_is_not_used(
    shared: Manifest, whole: bytes, tmp_path: Path, marked_at_once: None, other: str
) -> None:
    begin_anew = True if other == "weights" else "if other"
    with pytest.raises(Stop):
        run(shared, tmp_path / "q.npy", progress=stop_after(24), **OTHERS[other])
    left = files(tmp_path)
    assert left == [".q.npy.journal-0", ".q.npy.partial"]
    message = (
        r"^predict: an unfinished q\.npy, of which \d batches are done, is of other inputs or "
    )
    with pytest.raises(ValueError, match=message):
        run(shared, tmp_path / "q.npy")
    assert files(tmp_path) == left
    with pytest.warns(UserWarning, match=r"^predict: an unfinished q\.npy was of other ") as caught:
        made = run(shared, tmp_path / "q.npy", begin_anew=begin_anew)
    assert caught[0].filename == __file__  # whoever called predict
    assert made.resumed == 0
    assert (tmp_path / "q.npy").read_bytes() == whole
    assert files(tmp_path) == ["q.npy"]


@pytest.mark.parametrize(("begin_anew", "resumed"), [("if other", 12), (True, 0)])
def test_what_the_same_job_left(
    shared: Manifest,
    whole: bytes,
    tmp_path: Path,
    marked_at_once: None,
    begin_anew: Any,
    resumed: int,
) -> None:
    with pytest.raises(Stop):
        run(shared, tmp_path / "q.npy", progress=stop_after(12))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = run(shared, tmp_path / "q.npy", begin_anew=begin_anew)
    said = [str(one.message) for one in caught if one.filename == __file__]
    message = "predict: an unfinished q.npy was thrown away; begun anew"
    assert said == ([] if resumed else [message])
    assert made.resumed == resumed
    assert (tmp_path / "q.npy").read_bytes() == whole
    assert files(tmp_path) == ["q.npy"]


def test_the_stage_of_a_run_goes_on_or_begins_anew(
    shared: Manifest, whole: bytes, tmp_path: Path, marked_at_once: None
) -> None:
    """A recipe may have been changed, and nobody is there to say what shall become of the rows."""

    def predicted(seed: int, progress: Any) -> list[int]:
        calls: list[int] = []
        compatibility = types.SimpleNamespace(float16_predictions=False)
        job: Any = types.SimpleNamespace(
            network=lambda *_: network(seed),
            manifest=shared,
            data=DATA,
            recipe=types.SimpleNamespace(engine=ENGINE, compatibility=compatibility),
            ranks=Ranks(),
            unusable=np.zeros(43, bool),
            progress=lambda _: lambda done, n: (calls.append(done), progress(done, n)),
        )
        stages.predict(job, tmp_path / "weights", np.arange(43), tmp_path / "q.npy")
        return calls

    for seed in (0, 1):
        with pytest.raises(Stop):
            predicted(seed, stop_after(12))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calls = predicted(0, stop_after(44))
        said = [str(one.message) for one in caught if "begun anew" in str(one.message)]
        message = "predict: an unfinished q.npy was of other inputs or settings; begun anew"
        assert (calls[0], said) == ((24, []) if seed == 0 else (12, [message]))
        assert (tmp_path / "q.npy").read_bytes() == whole
        assert files(tmp_path) == ["q.npy"]


@pytest.mark.parametrize("which", ["in another folder", "in another order"])
def test_other_images_are_not_mixed(
    shared: Manifest, whole: bytes, tmp_path: Path, marked_at_once: None, which: str
) -> None:
    if which == "in another folder":
        other = pictures(tmp_path / "copy", 43)
        assert other.fingerprint == shared.fingerprint
    else:
        other = shared.select(np.arange(43)[::-1])
    with pytest.raises(Stop):
        run(other, tmp_path / "q.npy", progress=stop_after(24))
    with pytest.raises(ValueError, match=r"inputs or settings \((images|root) '.*', not '.*'\): "):
        run(shared, tmp_path / "q.npy")
    with pytest.warns(UserWarning, match="begun anew"):
        run(shared, tmp_path / "q.npy", begin_anew=True)
    assert (tmp_path / "q.npy").read_bytes() == whole


@pytest.mark.parametrize("what", ["no file", "another size", "no journal", "torn journal"])
def test_half_of_what_was_left(
    shared: Manifest, whole: bytes, tmp_path: Path, marked_at_once: None, what: str
) -> None:
    with pytest.raises(Stop):
        run(shared, tmp_path / "q.npy", progress=stop_after(24))
    partial, journal = tmp_path / ".q.npy.partial", tmp_path / ".q.npy.journal-0"
    if what == "no file":
        partial.unlink()
    elif what == "another size":
        os.truncate(partial, 500)
    elif what == "no journal":
        journal.unlink()
    else:
        os.truncate(journal, journal.stat().st_size - 5)
    with pytest.raises(Stop):  # what is found at the third start is of the second
        run(shared, tmp_path / "q.npy", progress=stop_after(12))
    made = run(shared, tmp_path / "q.npy")
    assert made.resumed == (12 if what != "torn journal" else 24)
    assert (tmp_path / "q.npy").read_bytes() == whole
    assert files(tmp_path) == ["q.npy"]


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """The peak grows by a fraction of N x k x 4 bytes."""
    program = """
import sys
import numpy as np
from torch import nn
import test_predict as t

folder, n, k = t.Path(sys.argv[1]), 20_000, 2500
small = t.pictures(folder / "pictures", 16)
settings = {
    "network": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, k)),
    "engine": t.dataclasses.replace(t.ENGINE, predict_batch_size=64),
}
t.run(small, folder / "small.npy", **settings)
# Not getrusage: its peak begins with that of the process which started this one.
status = t.Path("/proc/self/status")
peak = lambda: int(status.read_text().partition("VmHWM:")[2].split()[0]) << 10
before = peak()
large = small.select(np.arange(n) % 16)
unusable = np.arange(n) % 1000 >= 16  # most, which is faster
t.run(large, folder / "q.npy", unusable=unusable, **settings)
assert t.os.path.getsize(folder / "q.npy") > 4 * n * k
print(peak() - before)
"""
    assert int(run_program(program, tmp_path)) < 50 << 20  # of 200 MB


FORKS = """
import os, random, signal, sys, time
import test_predict as t
from genkl_ext.data import cpu
from genkl_ext import unfinished

folder = t.Path(sys.argv[1])
manifest = t.pictures(folder / "pictures", 43)
t.Path(manifest.path(4)).write_bytes(b"")
t.Path(manifest.path(40)).write_bytes(b"")
unfinished.MARK_SECONDS = 0
random.seed(0)


def begin(out, prepare=lambda: None, **changes):
    # Children that share what was imported; before any of torch's threads was started.
    child = os.fork()
    if not child:
        status = 1
        try:
            prepare()
            made = t.run(manifest, folder / "out" / out, **changes)
            assert [failure.row for failure in made.broken] == [4, 40]
            status = 7 if made.resumed else 0
        finally:
            os._exit(status)
    return child


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


(folder / "out").mkdir()
"""

# Kills itself before the n-th of the calls that change what is on the disk.
AT_EACH_CALL = (
    FORKS
    + """
CALLS = (
    "open", "pwrite", "write", "fdatasync", "fsync", "replace", "unlink", "posix_fallocate",
    "ftruncate",
)


def killed_at(n):
    def prepare():
        count = 0
        real_open = os.open
        for name in CALLS:
            def call(*arguments, _real=getattr(os, name), **options):
                nonlocal count
                count += _real is not real_open or bool(arguments[1] & (os.O_WRONLY | os.O_RDWR))
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _real(*arguments, **options)
            setattr(os, name, call)
    return prepare


settings = {"engine": t.dataclasses.replace(t.ENGINE, predict_batch_size=24)}  # two batches
assert end(begin("whole.npy", **settings)) == 0
n = resumed = 0
while True:
    n += 1
    out = f"{n}.npy"
    status = end(begin(out, killed_at(n), **settings))
    if status != -signal.SIGKILL:
        assert status == 0, status
        break
    status = end(begin(out, **settings))
    assert status in (0, 7), (n, status)
    resumed += status == 7
    assert (folder / "out" / out).read_bytes() == (folder / "out" / "whole.npy").read_bytes(), n
    left = [name for name in os.listdir(folder / "out") if name.startswith(".")]
    assert not left, (n, left)
print(n, resumed)
"""
)

AT_RANDOM = (
    FORKS
    + """
start = time.monotonic()
assert end(begin("whole.npy")) == 0
seconds = time.monotonic() - start
for _ in range(12):
    child = begin("q.npy")
    time.sleep(random.uniform(0, 0.7 * seconds))
    os.kill(child, signal.SIGKILL)
    end(child)
assert end(begin("q.npy")) in (0, 7)
assert (folder / "out" / "q.npy").read_bytes() == (folder / "out" / "whole.npy").read_bytes()
assert sorted(os.listdir(folder / "out")) == ["q.npy", "whole.npy"]
"""
)


def test_killed_before_each_change_of_the_disk(tmp_path: Path) -> None:
    calls, resumed = map(int, run_program(AT_EACH_CALL, tmp_path).split())
    assert calls > 12 and resumed > 5


def test_killed_at_random_moments(tmp_path: Path) -> None:
    run_program(AT_RANDOM, tmp_path)


JOB = """
import json, os, signal, sys
import test_predict as t
from genkl_ext import unfinished
from genkl_ext.ranks import join

folder, kill_at = t.Path(sys.argv[1]), int(sys.argv[2])
unfinished.MARK_SECONDS = 0
ranks = join(t.ENGINE.accelerator)
manifest = t.Manifest.load(folder / "manifest.parquet")


def progress(done, n):
    if kill_at and ranks.rank == 1 and done >= kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


out, settings = folder / "out", {"ranks": ranks, "engine": t.SMALL}
made = t.run(manifest, out / "q.npy", progress=progress, **settings)
assert (out / "q.npy").exists()  # on every process
few = manifest.select(range(8))
fewer = t.run(few, out / "few.npy", **settings)  # two batches: none for the third process
rows = [[failure.row for failure in one.broken] for one in (made, fewer)]
(folder / f"{ranks.rank}.json").write_text(json.dumps([ranks.size, made.resumed, rows]))
"""


def launch(folder: Path, processes: int, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "job.py").write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*command, str(processes), str(folder / "job.py"), str(folder), str(kill_at)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_several_processes(manifest: Manifest, tmp_path: Path) -> None:
    """Three write what one writes; and so do two of which one is killed, and then three."""
    for row in (3, 14, 27):
        Path(manifest.path(row)).write_bytes(b"")
    manifest.save(tmp_path / "manifest.parquet")
    (tmp_path / "out").mkdir()
    run(manifest, tmp_path / "whole.npy", engine=SMALL)
    run(manifest.select(range(8)), tmp_path / "few_whole.npy", engine=SMALL)

    killed = launch(tmp_path, 2, kill_at=1)
    assert killed.returncode != 0 and not (tmp_path / "0.json").exists()
    assert ".q.npy.partial" in files(tmp_path / "out") and "q.npy" not in files(tmp_path / "out")
    done = launch(tmp_path, 3)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        size, resumed, rows = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (size, rows) == (3, [[3, 14, 27], [3]])
        assert 4 <= resumed <= 20  # one of the other's four batches, some of the first's
    assert (tmp_path / "out/q.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "out/few.npy").read_bytes() == (tmp_path / "few_whole.npy").read_bytes()
    assert files(tmp_path / "out") == ["few.npy", "q.npy"]


def run_program(program: str, *arguments: object) -> str:
    """Output of a program that can import this page as ``test_predict``."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("k", [2, 4, 5, 6, 14])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, dtype: str) -> None:
    stream = np.random.default_rng(k)
    q = (stream.integers(0, 6, (300, k)) / 8).astype(dtype)  # many ties
    labels = stream.integers(-1, k, 300)
    q[stream.choice(300, 40)] = np.nan
    places = []
    for p, y in zip(q.astype(float), labels, strict=True):
        if y >= 0 and not np.isnan(p).any():
            places.append(sorted(range(k), key=lambda c, p=p: (-p[c], c)).index(y))
    expected = Accuracy(
        top1=sum(place < 1 for place in places) / len(places),
        top5=sum(place < 5 for place in places) / len(places),
        images=len(places),
        unusable=int((np.isnan(q).any(1) & (labels >= 0)).sum()),
    )
    assert expected.unusable > 10 and 0 < expected.top1 < expected.top5
    np.save(tmp_path / "q.npy", q)
    for chunk_bytes in (1, 1000, 1 << 20):
        monkeypatch.setattr(predict_module, "CHUNK_BYTES", chunk_bytes)
        for given in (q, tmp_path / "q.npy", str(tmp_path / "q.npy"), np.asfortranarray(q)):
            got = accuracy(given, labels)
            assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(expected))


def test_accuracy_of_files(tmp_path: Path) -> None:
    path = tmp_path / "q.npy"
    np.save(path, np.empty((0, 3), np.float32))
    assert accuracy(path, []).images == 0
    np.save(path, np.ones((9, 3)))
    whole = path.read_bytes()
    np.save(path, np.array([{}, {}]))
    for content in (b"", whole[:-1], path.read_bytes(), b"PK\3\4" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^accuracy: .*q\.npy must be a whole \.npy file: "):
            accuracy(path, [0] * 9)
    with pytest.raises(FileNotFoundError):
        accuracy(tmp_path / "none.npy", [])


def test_accuracy_of_nothing() -> None:
    for q, labels in (
        (np.empty((0, 3), np.float32), []),
        (np.full((2, 3), np.nan, np.float32), [0, 1]),
        (np.ones((2, 3), np.float32), [-1, -1]),
    ):
        got = accuracy(q, labels)
        assert np.isnan(got.top1) and np.isnan(got.top5) and got.images == 0
        assert got.unusable == (2 if np.isnan(q).any() else 0)


@pytest.mark.parametrize(
    ("q", "labels", "message"),
    [
        (np.ones(3), [0, 0, 0], r"predictions must be \(N, k\) floats, got \(3,\) float64$"),
        (np.ones((2, 3), int), [0, 0], r"must be \(N, k\) floats, got \(2, 3\) int64$"),
        (np.ones((2, 3)), [0], r"labels must be \(2,\) integers, got \(1,\) int64$"),
        (np.ones((2, 3)), [0.0, 1.0], r"labels must be \(2,\) integers, got \(2,\) float64$"),
        (np.ones((2, 3)), [0, 3], r"labels must be from -1 to 2, got 3 at row 1$"),
        (np.ones((2, 3)), [-2, 0], r"labels must be from -1 to 2, got -2 at row 0$"),
        (np.array([[1, 2], [np.nan, 2]]), [0, 1], r"must not be NaN in part, as row 1 is$"),
    ],
)
def test_accuracy_of_what_is_wrong(q: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^accuracy: .*" + message):
        accuracy(q, labels)
