"""Decoding: the same pixels as Pillow, whole and in part, and a reason for every broken file."""

import errno
import io
import os
import pickle
import struct

import numpy as np
import pytest
from pictures import (
    damaged,
    drawing,
    encoded,
    exif_block,
    forged,
    jpeg,
    with_orientation,
    with_png_exif,
    with_segments,
)
from PIL import Image, ImageOps

from genkl_ext.data.decode import BrokenImage, Decoder, Limits, jpeg_header, read, verify_jpeg


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


def whole(decoder: Decoder, data: bytes) -> np.ndarray:
    picture = decoder.open(data)
    pixels, origin = picture.region(0, 0, picture.height, picture.width)
    assert origin == (0, 0)
    assert pixels.shape == (picture.height, picture.width, 3)
    assert pixels.dtype == np.uint8
    return pixels.copy()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


PICTURE = drawing(61, 83)
ALPHA = PICTURE.copy()
ALPHA.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
FILES = {
    "jpeg": encoded(PICTURE),
    "jpeg 4:4:4": encoded(PICTURE, subsampling=0),
    "jpeg 4:2:2": encoded(PICTURE, subsampling=1),
    "jpeg progressive": encoded(PICTURE, progressive=True),
    "jpeg restart": encoded(PICTURE, restart_marker_blocks=2),
    "jpeg grey": encoded(PICTURE.convert("L")),
    "jpeg cmyk": encoded(PICTURE.convert("CMYK")),
    "png": encoded(PICTURE, "PNG"),
    "png grey": encoded(PICTURE.convert("L"), "PNG"),
    "png palette": encoded(PICTURE.convert("P"), "PNG"),
    "png alpha": encoded(ALPHA, "PNG"),
    "png bits": encoded(PICTURE.convert("1"), "PNG"),
    "webp": encoded(PICTURE, "WEBP"),
    "webp alpha": encoded(ALPHA, "WEBP"),
    "gif": encoded(PICTURE.convert("P"), "GIF"),
    "bmp": encoded(PICTURE, "BMP"),
    "tiff": encoded(PICTURE, "TIFF"),
    "1 x 1": encoded(drawing(1, 1)),
    "1 x 40": encoded(drawing(1, 40)),
    "40 x 1": encoded(drawing(40, 1)),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(decoder, name):
    np.testing.assert_array_equal(whole(decoder, FILES[name]), by_pillow(FILES[name]))


def test_16_bit_png_is_scaled_and_not_clipped(decoder):
    # Pillow clips: everything above 255 becomes white.
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = whole(decoder, encoded(Image.fromarray(values), "PNG"))
    expected = np.repeat(np.rint(values / 257).astype(int)[..., None], 3, axis=2)
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(9))
def test_pictures_are_turned_as_exif_says(decoder, orientation):
    data = with_orientation(PICTURE, orientation)
    header = jpeg_header(data)
    assert header is not None
    assert header.orientation == (orientation or 1)
    np.testing.assert_array_equal(whole(decoder, data), by_pillow(data))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_found_in_either_byte_order(order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = [(0x010F, 2, 4, b"me\0\0"), (0x0112, 3, 1, struct.pack(order + "HH", 6, 0))]
    tiff = mark + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        tiff += struct.pack(order + "HHI", tag, kind, count) + value
    block = b"Exif\0\0" + tiff
    data = encoded(PICTURE)
    header = jpeg_header(
        data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    )
    assert header is not None
    assert header.orientation == 6


@pytest.mark.parametrize("cut", range(14, 31, 3))
def test_a_broken_exif_block_is_passed_over(decoder, cut):
    data = with_orientation(PICTURE, 6)
    start = data.index(b"Exif\0\0")
    content = bytearray(data)
    content[start + cut : start + cut + 2] = b"\xff\xfe"
    assert whole(decoder, bytes(content)).ndim == 3


@pytest.mark.parametrize("kind", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_a_part_has_the_pixels_of_the_whole(decoder, kind):
    rng = np.random.default_rng(0)
    for height, width in ((203, 155), (64, 64), (17, 300)):
        data = jpeg(height, width, **kind)
        all_ = whole(decoder, data)
        for _ in range(40):
            top, bottom = np.sort(rng.choice(height + 1, 2, replace=False)).tolist()
            left, right = np.sort(rng.choice(width + 1, 2, replace=False)).tolist()
            pixels, (y, x) = decoder.open(data).region(top, left, bottom, right)
            assert y <= top
            assert x <= left
            part = pixels[top - y : bottom - y, left - x : right - x]
            np.testing.assert_array_equal(part, all_[top:bottom, left:right])


def test_parts_of_photographs(decoder, shared_data):
    rng = np.random.default_rng(0)
    for path in sorted((shared_data / "clothing" / "images").glob("*.jpg"))[:60]:
        data = read(path)
        all_ = whole(decoder, data)
        np.testing.assert_array_equal(all_, by_pillow(data))
        height, width = all_.shape[:2]
        top, left = int(rng.integers(height - 50)), int(rng.integers(width - 50))
        bottom, right = int(rng.integers(top + 1, height)), int(rng.integers(left + 1, width))
        pixels, (y, x) = decoder.open(data).region(top, left, bottom, right)
        part = pixels[top - y : bottom - y, left - x : right - x]
        np.testing.assert_array_equal(part, all_[top:bottom, left:right])


def test_photographs_in_every_orientation(decoder, shared_data):
    files = sorted((shared_data / "jpeg" / "exif").glob("*.jpg"))
    assert len(files) == 18
    for path in files:
        np.testing.assert_array_equal(whole(decoder, read(path)), by_pillow(read(path)))


@pytest.mark.parametrize("orientations", [(1, 6), (6, 1), (8, 3), (6, 6)])
@pytest.mark.parametrize("size", [(900, 40), (40, 900)])
def test_of_several_exif_blocks_the_first_counts(decoder, orientations, size):
    # nvImageCodec would size its output by one and turn by another.
    drawn = drawing(*size)
    blocks = [(0xE1, b"Exif\0\0" + exif_block(orientation)) for orientation in orientations]
    twice = with_segments(encoded(drawn), *blocks)
    once = with_segments(encoded(drawn), blocks[0])
    np.testing.assert_array_equal(whole(decoder, twice), by_pillow(once))
    png = encoded(drawn, "PNG")
    once = whole(decoder, with_png_exif(png, orientations[0]))
    np.testing.assert_array_equal(whole(decoder, with_png_exif(png, *orientations)), once)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_png_webp_and_tiff_are_turned_as_exif_says(decoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP", "TIFF"):
        data = encoded(drawing(30, 50), kind, exif=exif)
        np.testing.assert_array_equal(whole(decoder, data), by_pillow(data), err_msg=kind)


GOOD = jpeg(120, 160)
GOOD_SCANS = jpeg(120, 160, progressive=True)
HTML = b"<!DOCTYPE html><html><body>404</body></html>"
BROKEN = {
    "html": (HTML, "not an image"),
    "one byte": (b"\xff", "not an image"),
    "start only": (GOOD[:2], "truncated"),
    "half a header": (GOOD[:100], "truncated"),
    "half": (GOOD[: len(GOOD) // 2], "truncated"),
    "without its end": (GOOD[:-2], "truncated"),
    "no frame": (GOOD[:2] + b"\xff\xda\x00\x02", "corrupt"),
    "no marker": (GOOD[:2] + b"junk" + GOOD[2:], "corrupt"),
    "zero height": (forged(GOOD, 0, 160), "corrupt"),
    "forged size": (forged(GOOD, 65500, 65500), "too many pixels"),
    "scan bomb": (
        GOOD_SCANS[:-2] + 200 * b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\xff\xd9",
        "corrupt",
    ),
    "many segments": (with_segments(GOOD, *[(0xFE, b"")] * 5000), "corrupt"),
    "padding": (GOOD[:2] + b"\xff" * 5000 + GOOD[2:], "corrupt"),
    "half a png": (FILES["png"][: len(FILES["png"]) // 2], "truncated"),
    "half a gif": (FILES["gif"][: len(FILES["gif"]) // 2], "truncated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_a_reason(decoder, name):
    data, reason = BROKEN[name]
    with pytest.raises(BrokenImage) as caught:
        whole(decoder, data)
    assert caught.value.reason == reason
    assert caught.value.detail
    # The decoder goes on.
    np.testing.assert_array_equal(whole(decoder, GOOD), by_pillow(GOOD))


@pytest.mark.parametrize("cut", range(3, len(GOOD) - 1, 211))
def test_a_file_cut_anywhere_is_broken_even_where_the_part_wanted_is_there(decoder, cut):
    with pytest.raises(BrokenImage):
        decoder.open(GOOD[:cut]).region(0, 0, 8, 8)


def test_limits_are_checked_before_decoding():
    small = Decoder(Limits(max_pixels=120 * 160 - 1))
    for data in (GOOD, encoded(drawing(120, 160), "PNG"), encoded(drawing(120, 160), "GIF")):
        with pytest.raises(BrokenImage, match="too many pixels: 160 x 120"):
            small.open(data)
    Decoder(Limits(max_pixels=120 * 160)).open(GOOD)
    with pytest.raises(BrokenImage, match="too small: 160 x 120, a side below 121"):
        Decoder(Limits(min_side=121)).open(GOOD)


def test_damage_in_the_compressed_data_is_found():
    assert verify_jpeg(GOOD) is None
    complaints = [verify_jpeg(damaged(GOOD, seed)) for seed in range(40)]
    # Some damage makes another valid stream: no decoder could tell.
    assert sum(complaint is not None for complaint in complaints) >= 15
    assert verify_jpeg(GOOD[:-40]) is not None
    assert verify_jpeg(FILES["jpeg cmyk"]) is None


def test_read(tmp_path):
    path = tmp_path / "a b ü.jpg"
    path.write_bytes(GOOD)
    assert read(path) == GOOD
    assert read(path, Limits(max_bytes=len(GOOD))) == GOOD
    with pytest.raises(BrokenImage, match=f"too many bytes: {len(GOOD):,} bytes"):
        read(path, Limits(max_bytes=len(GOOD) - 1))
    empty = tmp_path / "empty.jpg"
    empty.touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    for name, reason in {
        "empty.jpg": "empty",
        "none.jpg": "missing",
        "a b ü.jpg/none.jpg": "missing",
        ".": "not an image",
        "pipe.jpg": "not an image",
        "loop.jpg": "unreadable",
        "x" * 300: "unreadable",
        "nul\0.jpg": "unreadable",
    }.items():
        with pytest.raises(BrokenImage) as caught:
            read(tmp_path / name)
        assert caught.value.reason == reason, name


def test_faults_of_the_process_are_not_the_files(tmp_path, monkeypatch):
    def no_descriptor(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_descriptor)
    with pytest.raises(OSError, match="Too many open files"):
        read(tmp_path / "a.jpg")


def test_reasons_travel_between_processes():
    broken = pickle.loads(pickle.dumps(BrokenImage("corrupt", "why")))
    assert (broken.reason, broken.detail, str(broken)) == ("corrupt", "why", "corrupt: why")


def test_read_from_a_store():
    import fsspec

    fsspec.filesystem("memory").pipe("/pictures/a.jpg", GOOD)
    assert read("memory://pictures/a.jpg") == GOOD
    with pytest.raises(BrokenImage, match="missing"):
        read("memory://pictures/b.jpg")
    with pytest.raises(BrokenImage, match="unreadable: ValueError"):
        read("nostore://pictures/b.jpg")
