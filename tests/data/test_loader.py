"""``make_loader``: every row once, the oracle's pixels, the same batches whatever makes them."""

import gc
import json
import multiprocessing
import os
import pickle
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import drawing, encoded, jpeg, with_orientation, write_all
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from genkl_ext.data import ImageError, Ledger, Manifest, Transforms, make_loader
from genkl_ext.data.cpu import Buffers, Output
from genkl_ext.data.scan import scan
from genkl_ext.data.transforms import uniforms

SMALL = Transforms(size=24, resize=32)
RANDOM = Transforms(size=24, resize=32, crop="random", flip=0.5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """24 pictures of several sizes and kinds in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    sizes = np.random.default_rng(0).integers(20, 130, (24, 2)).tolist()
    files = {f"{i:02}.jpg": jpeg(h, w, i) for i, (h, w) in enumerate(sizes)}
    files["03.jpg"] = encoded(drawing(50, 70, 3), "PNG")
    files["07.jpg"] = with_orientation(drawing(50, 70, 7), 6)
    files["11.jpg"] = encoded(drawing(40, 90, 11).convert("CMYK"))
    files["15.jpg"] = encoded(drawing(40, 90, 15).convert("L"))
    write_all(root, files)
    return table(root, sorted(files))


def table(root, names: list[str]) -> Manifest:
    n = len(names)
    columns = {
        "key": names,
        "path": names,
        "given_label": pa.array([i % 2 if i % 5 else None for i in range(n)], pa.int32()),
        "split": ["val" if i % 4 == 3 else "train" for i in range(n)],
    }
    return Manifest(pa.table(columns), ("even", "odd"), "test", str(root))


def loader(manifest, transforms=SMALL, batch_size=5, split=None, **settings):
    return make_loader(manifest, split, transforms, batch_size, device="cpu", **settings)


def epoch(loader) -> tuple[np.ndarray, torch.Tensor]:
    """Rows and images of one epoch."""
    batches = list(loader)
    rows = [batch["row"].numpy() for batch in batches]
    return np.concatenate(rows), torch.cat([batch["image"] for batch in batches])


def pixels(path) -> torch.Tensor:
    with Image.open(path) as image:
        return F.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


def test_a_batch(manifest):
    batches = list(loader(manifest, split="train"))
    rows = torch.cat([batch["row"] for batch in batches])
    assert rows.tolist() == manifest.rows("train").tolist()
    assert [len(batch["row"]) for batch in batches] == [5, 5, 5, 3]
    for batch in batches:
        assert batch.keys() == {"image", "row", "label"}
        assert batch["image"].shape == (len(batch["row"]), 3, 24, 24)
        assert batch["image"].dtype == torch.float32
        assert batch["row"].dtype == batch["label"].dtype == torch.int64
        assert batch["label"].tolist() == manifest.labels[batch["row"].numpy()].tolist()
    assert -1 in torch.cat([batch["label"] for batch in batches])


@pytest.mark.parametrize("name", ["clothing1m", "food101n", "webvision"])
def test_eval_images_are_those_of_torchvision(manifest, name):
    transforms = Transforms.preset(name, "eval")
    rows, images = epoch(loader(manifest, transforms))
    oracle = transforms.torchvision()
    expected = torch.stack([oracle(pixels(path)) for path in manifest.paths(rows)])
    # The uint8 pixels are equal; normalising rounds in another order.
    torch.testing.assert_close(images, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["clothing1m", "food101n", "webvision"])
def test_train_images_are_those_of_torchvision_with_the_same_random_numbers(manifest, name):
    transforms = Transforms.preset(name, "train")
    load = loader(manifest, transforms, shuffle=True, seed=4, dtype=torch.uint8)
    rows, images = epoch(load)
    flips = []
    for row, image, draws in zip(rows, images, uniforms(4, 0, rows), strict=True):
        x = pixels(manifest.path(row))
        g = transforms.geometry(*x.shape[1:], draws)
        if g.angle:
            # The classic transforms rotate PIL images.
            turned = F.rotate(Image.fromarray(x.permute(1, 2, 0).numpy()), g.angle)
            x = F.pil_to_tensor(turned)
        x = F.resize(x, list(g.resized), InterpolationMode.BILINEAR, antialias=True)
        x = F.crop(x, *g.window)
        x = F.resize(x, list(g.size), InterpolationMode.BILINEAR, antialias=True)
        x = F.horizontal_flip(x) if g.flip else x
        assert torch.equal(image, x), (row, g)
        flips.append(g.flip)
    assert 0 < sum(flips) < len(flips)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_layouts(manifest, dtype, channels_last):
    _, raw = epoch(loader(manifest, dtype=torch.uint8))
    assert raw.dtype == torch.uint8
    _, images = epoch(loader(manifest, dtype=dtype, channels_last=channels_last))
    assert images.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    one = next(iter(loader(manifest, dtype=dtype, channels_last=channels_last)))["image"]
    assert one.is_contiguous(memory_format=layout)
    scale, shift = (torch.from_numpy(x).view(3, 1, 1) for x in SMALL.affine())
    torch.testing.assert_close(images, (raw * scale + shift).to(dtype), atol=0, rtol=0)


@settings(max_examples=25)
@given(
    ranks=st.integers(1, 5),
    batch_size=st.integers(2, 9),
    shuffle=st.booleans(),
    epochs=st.integers(1, 3),
)
def test_every_row_once_over_all_ranks(manifest, ranks, batch_size, shuffle, epochs):
    loaders = [
        loader(manifest, batch_size=batch_size, shuffle=shuffle, shard=(rank, ranks), threads=1)
        for rank in range(ranks)
    ]
    for _ in range(epochs):
        batches = [list(each) for each in loaders]
        assert [len(of_rank) for of_rank in batches] == [len(loaders[0])] * ranks
        rows = [row for of_rank in batches for batch in of_rank for row in batch["row"].tolist()]
        assert sorted(rows) == list(range(len(manifest)))
    for each in loaders:
        each.close()


def test_what_an_image_looks_like_depends_on_seed_epoch_and_row_alone(manifest):
    def by_row(**settings):
        load = loader(manifest, RANDOM, **settings)
        load.set_epoch(2)
        rows, images = epoch(load)
        return images[np.argsort(rows)]

    first = by_row(seed=1, batch_size=7, threads=1)
    assert torch.equal(first, by_row(seed=1, batch_size=3, threads=4, shuffle=True, prefetch=5))
    assert not torch.equal(first, by_row(seed=2))
    load = loader(manifest, RANDOM, seed=1)
    epochs = [epoch(load)[1] for _ in range(3)]
    assert torch.equal(epochs[2], first)
    assert not torch.equal(epochs[0], epochs[1])
    assert load.epoch == 2


def test_an_epoch_goes_on_where_it_was_left(manifest):
    make = lambda: loader(manifest, RANDOM, batch_size=4, shuffle=True, seed=3)  # noqa: E731
    whole = make()
    expected = [*whole, *whole]
    interrupted = make()
    for _ in interrupted:
        pass
    for number, _ in enumerate(interrupted):
        if number == 1:
            break
    state = json.loads(json.dumps(interrupted.state_dict()))  # plain enough for any checkpoint
    again = make()
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(whole) - 2
    for batch, wanted in zip(rest, expected[len(whole) + 2 :], strict=True):
        assert torch.equal(batch["row"], wanted["row"])
        assert torch.equal(batch["image"], wanted["image"])
    # The state at the end of an epoch is the start of the next one.
    again.load_state_dict(whole.state_dict())
    assert len(list(again)) == len(whole)
    assert again.epoch == 2


def test_a_position_that_was_set_is_the_state_at_once(manifest):
    load = loader(manifest, batch_size=4)
    load.set_epoch(5)
    assert (load.state_dict()["epoch"], load.state_dict()["batches"]) == (5, 0)
    iterator = iter(load)
    next(iterator)
    next(iterator)
    again = loader(manifest, batch_size=4)
    again.load_state_dict(load.state_dict())
    assert again.state_dict() == load.state_dict()
    assert again.state_dict()["batches"] == 2


def test_who_stops_at_the_length_has_had_the_whole_epoch(broken):
    load = loader(broken, batch_size=4, on_error="skip")
    with pytest.warns(UserWarning, match="4 images"):
        for _ in zip(range(len(load)), load, strict=False):
            pass
    threads = set(threading.enumerate())
    list(load)
    assert set(threading.enumerate()) == threads  # the same ones worked again


def test_a_forked_process_has_threads_of_its_own(manifest):
    load = loader(manifest)
    expected = epoch(load)[0].tolist()
    receiver, sender = multiprocessing.get_context("fork").Pipe()
    pid = os.fork()
    if pid == 0:
        sender.send(epoch(load)[0].tolist())
        os._exit(0)
    assert receiver.poll(60)
    assert receiver.recv() == expected
    os.waitpid(pid, 0)


def test_a_loader_can_be_sent_to_another_process(manifest):
    load = loader(manifest, RANDOM, seed=2)
    expected = epoch(load)[1]
    sent = pickle.loads(pickle.dumps(load))
    sent.set_epoch(0)
    assert torch.equal(epoch(sent)[1], expected)


def test_a_state_of_another_loader_is_refused(manifest):
    state = loader(manifest, seed=3).state_dict()
    with pytest.raises(ValueError, match="seed must be that of this loader, 4, got 3"):
        loader(manifest, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="manifest must be"):
        loader(manifest.split("val"), seed=3).load_state_dict(state)


def test_batches_that_are_kept_are_never_written_again(manifest):
    load = loader(manifest, RANDOM, batch_size=2)
    kept = [(batch["image"], batch["image"].clone()) for _ in range(3) for batch in load]
    parts = [images[:1] for images, _ in kept]
    copies = [copy for _, copy in kept]
    del kept
    gc.collect()
    list(load)
    for part, copy in zip(parts, copies, strict=True):
        assert torch.equal(part, copy[:1])


def test_memory_is_used_again_and_does_not_pile_up():
    buffers = Buffers(Output("uint8", channels_last=False), 8, spare=2)
    kept = [buffers.batch(3)[1] for _ in range(6)]
    places = {tensor.data_ptr() for tensor in kept}
    parts = [tensor[1:] for tensor in kept]
    del kept
    assert not buffers._free
    del parts
    assert len(buffers._free) == 2
    again = buffers.batch(2)[1]
    assert again.data_ptr() in places
    assert len(buffers._free) == 1


def test_fast_decoding_is_nearly_exact(tmp_path):
    """Large pictures are decoded smaller; PNG files as always."""
    drawn = drawing(50, 70).resize((700, 500))
    files = {
        "a.jpg": encoded(drawn, quality=90),
        "b.jpg": encoded(drawn.resize((60, 43)), quality=90),
        "c.jpg": encoded(drawn.convert("CMYK"), quality=90),
        "d.jpg": encoded(drawn, "PNG"),
        "e.jpg": with_orientation(drawn, 6),
    }
    write_all(tmp_path, files)
    pictures = table(tmp_path, sorted(files))
    for transforms in (SMALL, RANDOM, Transforms(size=24, resize=60, crop="random", rotation=20)):
        _, exact = epoch(loader(pictures, transforms, dtype=torch.uint8))
        _, fast = epoch(loader(pictures, transforms, dtype=torch.uint8, fast=True))
        gaps = (exact.float() - fast.float()).abs().mean((1, 2, 3)).tolist()
        assert 0 < gaps[0] < 8
        assert 0 < gaps[1] < 2
        assert 0 < gaps[2] < 2
        assert gaps[3] == 0


def test_fast_decoding_finds_broken_files(broken):
    with pytest.warns(UserWarning, match="4 images"):
        rows, _ = epoch(loader(broken, Transforms(size=8, resize=8), on_error="skip", fast=True))
    assert sorted(set(range(12)) - set(rows.tolist())) == sorted(BROKEN)


@pytest.fixture
def broken(tmp_path) -> Manifest:
    """Twelve pictures, of which four are broken."""
    files = {f"{i:02}.jpg": jpeg(40, 50, i) for i in range(12)}
    files["02.jpg"] = files["02.jpg"][:400]
    files["05.jpg"] = b"<html>"
    files["06.jpg"] = b""
    write_all(tmp_path, files)
    (tmp_path / "09.jpg").unlink()
    return table(tmp_path, sorted(files))


BROKEN = {2: "truncated", 5: "not an image", 6: "empty", 9: "missing"}


def test_raise_names_the_image(broken):
    load = loader(broken, batch_size=2)
    seen = []
    with pytest.raises(
        ImageError, match=r"row 2, .*02\.jpg: truncated .*on_error='skip'"
    ) as caught:
        for batch in load:
            seen += batch["row"].tolist()
    assert seen == [0, 1]
    assert (caught.value.failure.row, caught.value.failure.key) == (2, "02.jpg")


def test_skip_leaves_images_out_and_lists_them(broken):
    load = loader(broken, batch_size=4, on_error="skip")
    with pytest.warns(UserWarning, match="4 images could not be used .*first row 2, "):
        rows, images = epoch(load)
    assert rows.tolist() == [row for row in range(12) if row not in BROKEN]
    assert {failure.row: failure.reason for failure in load.failures} == BROKEN
    for row, image in zip(rows, images, strict=True):
        alone = epoch(loader(broken.select([row])))[1]
        assert torch.equal(image, alone[0])
    # Said once.
    assert len(list(load)) == 3
    assert len(load.failures) == 4


def test_ranks_stay_in_step_when_images_break(broken):
    loaders = [
        loader(broken.select([5, 1, 6, 3, 0]), batch_size=2, shard=(rank, 2), on_error="skip")
        for rank in range(2)
    ]
    with pytest.warns(UserWarning):
        sizes = [[len(batch["row"]) for batch in load] for load in loaders]
    assert [len(of_rank) for of_rank in sizes] == [len(load) for load in loaders] == [2, 2]
    assert sizes == [[0, 1], [1, 1]]


def test_skip_passes_over_a_batch_without_images(broken):
    load = loader(broken.select([5, 6, 0]), batch_size=2, on_error="skip")
    with pytest.warns(UserWarning, match="2 images"):
        assert [batch["row"].tolist() for batch in load] == [[2]]


def test_report_keeps_every_row_in_its_place(broken):
    load = loader(broken, batch_size=5, on_error="report")
    batches = list(load)
    assert torch.cat([batch["row"] for batch in batches]).tolist() == list(range(12))
    ok = torch.cat([batch["ok"] for batch in batches])
    assert ok.tolist() == [row not in BROKEN for row in range(12)]
    images = torch.cat([batch["image"] for batch in batches])
    assert (images[~ok] == 0).all()
    assert (images[ok].abs().amax((1, 2, 3)) > 0).all()
    assert {failure.row: failure.reason for failure in load.failures} == BROKEN


def test_a_picture_that_a_resize_would_stretch_beyond_measure(tmp_path):
    write_all(tmp_path, {"a.jpg": jpeg(1, 5000), "b.png": encoded(drawing(9000, 2), "PNG")})
    load = loader(table(tmp_path, ["a.jpg", "b.png"]), on_error="report", batch_size=2)
    (batch,) = load
    # 32 is the shorter side: the longer one stays below the limit here, but not at 256.
    assert batch["ok"].tolist() == [True, True]
    load = loader(load.manifest, Transforms(), on_error="report", batch_size=2)
    (batch,) = load
    assert batch["ok"].tolist() == [False, False]
    assert [failure.reason for failure in load.failures] == ["too small", "too small"]
    assert "5000 x 1, which a resize to 256 would stretch to 1,280,000 x 256" in str(
        load.failures[0]
    )


def test_a_picture_too_long_to_be_turned(tmp_path):
    write_all(tmp_path, {"a.jpg": jpeg(2, 30000), "b.jpg": jpeg(40, 40)})
    turning = Transforms(size=24, resize=32, rotation=30)
    for transforms, ok in ((turning, [False, True]), (SMALL, [True, True])):
        (batch,) = loader(table(tmp_path, ["a.jpg", "b.jpg"]), transforms, on_error="report")
        assert batch["ok"].tolist() == ok


def test_a_ledger_leaves_out_what_it_lists(broken, tmp_path):
    scan(broken, tmp_path / "ledger.parquet")
    for ledger in (tmp_path / "ledger.parquet", Ledger.load(tmp_path / "ledger.parquet")):
        load = loader(broken, batch_size=4, ledger=ledger)
        assert len(load) == 2
        rows, _ = epoch(load)
        assert rows.tolist() == [row for row in range(12) if row not in BROKEN]
    # "report" gives every row its place, known or not.
    rows, _ = epoch(loader(broken, ledger=tmp_path / "ledger.parquet", on_error="report"))
    assert rows.tolist() == list(range(12))


def test_a_file_that_breaks_between_epochs_costs_itself_only(broken, tmp_path):
    load = loader(broken.select([0, 1, 3, 4]), batch_size=2, on_error="skip")
    assert len(epoch(load)[0]) == 4
    (tmp_path / "03.jpg").write_bytes(b"overwritten")
    with pytest.warns(UserWarning, match="1 images"):
        assert epoch(load)[0].tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be one of .*, got 'ignore'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
        ({"shard": (2, 2)}, r"shard must be .*, got \(2, 2\)"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"split": "dev"}, "split must be one of train, clean, val, test, got 'dev'"),
        ({"batch_size": 1, "shard": (0, 5)}, "24 images in batches of 1 cannot be shared by 5"),
    ],
)
def test_bad_settings_are_named(manifest, settings, message):
    with pytest.raises(ValueError, match=message):
        loader(manifest, **settings)


def test_a_dtype_that_no_network_takes(manifest):
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch\.int8"):
        loader(manifest, dtype=torch.int8)


@pytest.mark.parametrize("device", ["tpu", "cuda:x"])
def test_unknown_devices_are_named(manifest, device):
    with pytest.raises(ValueError, match=f"device must be .*, got '{device}'"):
        make_loader(manifest, None, SMALL, 4, device=device)


def test_an_empty_split(manifest):
    load = loader(manifest, split="clean")
    assert len(load) == 0
    assert list(load) == []


def test_leaving_a_loop_ends_its_threads(manifest):
    before = set(threading.enumerate())
    for _ in loader(manifest, batch_size=1, threads=3, prefetch=4):
        assert set(threading.enumerate()) - before
        break
    gc.collect()
    assert not set(threading.enumerate()) - before
