"""resample and rotate against torchvision and Pillow, on every kernel: windows, regions, layouts.

The references work on the whole image and crop afterwards; ours sees only the region it asked for.
"""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from genkl_ext import _native

KERNELS = _native.build_info()["simd_supported"]
KINDS = ["uint8", "float32", "float16", "bfloat16"]
LAYOUTS = ["planar", "interleaved"]
SCALE = np.array([1 / 255 / 0.229, 1 / 255 / 0.224, -3.0], np.float32)
SHIFT = np.array([-0.485 / 0.229, 0.0, 1e-6], np.float32)
# Elsewhere torch resizes bytes by way of floats, or rounds by other instructions.
TOLERANCE = 0 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 1


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 3 == 1:  # black and white: the largest steps
        image = image // 128 * np.uint8(255)
    return image


def by_torchvision(image, resized, window, flip=False):
    result = F.resize(torch.from_numpy(image).permute(2, 0, 1), list(resized), antialias=True)
    result = F.crop(result, *window)
    return (F.horizontal_flip(result) if flip else result).numpy()


def empty(kind, layout, height, width):
    dtype = np.dtype("uint16" if "16" in kind else kind)
    if layout == "planar":
        return np.empty((3, height, width), dtype)
    return np.empty((height, width, 3), dtype).transpose(2, 0, 1)


def support(full, resized, window):
    """The region (top, left, bottom, right) of the full image that a window is computed from."""
    top, bottom = _native.resample_support(full[0], resized[0], window[0], window[2])
    left, right = _native.resample_support(full[1], resized[1], window[1], window[3])
    return top, left, bottom, right


def resample(
    image, resized, window, *, flip=False, kind="uint8", layout="planar", kernel="",
    margin=(0, 0, 0, 0), out=None,
):  # fmt: skip
    """Resample from the smallest region, widened by a margin on every side, in its own memory."""
    full = image.shape[:2]
    top, left, bottom, right = support(full, resized, window)
    top, left = max(top - margin[0], 0), max(left - margin[1], 0)
    source = image[top : bottom + margin[2], left : right + margin[3]].copy()
    if out is None:
        out = empty(kind, layout, *window[2:])
    _native.resample(
        source, (top, left), full, resized, window, flip, out, kind, SCALE, SHIFT, kernel
    )
    return out


def same(got, wanted):
    if TOLERANCE == 0:
        np.testing.assert_array_equal(got, wanted)
    else:
        np.testing.assert_allclose(got.astype(int), wanted.astype(int), atol=TOLERANCE)


@st.composite
def cases(draw):
    side = st.one_of(st.integers(1, 9), st.integers(1, 70), st.integers(1, 600))
    full = draw(side), draw(side)
    # Sides that stay as they are take part often.
    resized = tuple(draw(st.one_of(side, st.just(length))) for length in full)
    size = [draw(st.integers(1, length)) for length in resized]
    at = [draw(st.integers(0, length - part)) for length, part in zip(resized, size, strict=True)]
    return {
        "image": picture(*full, seed=draw(st.integers(0, 99))),
        "resized": resized,
        "window": (*at, *size),
        "flip": draw(st.booleans()),
        "margin": tuple(draw(st.integers(0, 3)) for _ in range(4)),
    }


@settings(max_examples=400)
@given(case=cases(), layout=st.sampled_from(LAYOUTS))
def test_any_window_is_that_of_the_whole_image(case, layout):
    wanted = by_torchvision(case["image"], case["resized"], case["window"], case["flip"])
    results = [resample(**case, layout=layout, kernel=kernel) for kernel in KERNELS]
    same(results[0], wanted)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize(
    ("full", "resized"),
    [
        ((400, 533), (256, 341)),
        ((533, 400), (341, 256)),
        ((32, 32), (224, 224)),  # every pixel becomes seven
        ((500, 500), (250, 250)),  # the weights of the ends decide the precision or not, around 2
        ((473, 487), (256, 256)),
        ((1, 1), (5, 7)),
        ((1, 300), (1, 224)),
        ((300, 1), (224, 3)),
        ((2, 3), (1, 1)),
        ((224, 224), (224, 224)),
        ((224, 300), (224, 100)),
        ((900, 2000), (20, 9)),  # more than a hundred taps
        ((3, 20000), (3, 2)),  # the precision reaches its limit
        ((7000, 4), (1, 4)),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_whole_images(full, resized, flip, kernel):
    image = picture(*full)
    window = (0, 0, *resized)
    same(resample(image, resized, window, flip=flip, kernel=kernel),
         by_torchvision(image, resized, window, flip))  # fmt: skip


def test_a_precision_for_every_scale(kernel):
    # The largest weight of a dimension is found without trying all: hold it against torch across
    # the scales, dense where the ends stop to decide.
    image = picture(2, 1000, seed=1)
    for width in [*range(1, 60), *range(240, 260), *range(480, 570), *range(900, 1100, 7)]:
        window = (0, width // 3, 2, width - width // 3)
        same(resample(image, (2, width), window, kernel=kernel),
             by_torchvision(image, (2, width), window))  # fmt: skip


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 224])
@pytest.mark.parametrize("corner", ["first", "last"])
def test_windows_at_the_borders(width, corner, kernel):
    image, resized = picture(90, 300), (70, 240)
    size = (min(width, 70), width)
    at = (0, 0) if corner == "first" else (resized[0] - size[0], resized[1] - size[1])
    window = (*at, *size)
    for flip in (False, True):
        same(resample(image, resized, window, flip=flip, kernel=kernel),
             by_torchvision(image, resized, window, flip))  # fmt: skip


def in_kind(pixels, kind):
    """Bytes (3, h, w) as they must come out: v * scale + shift, rounded after each step."""
    if kind == "uint8":
        return pixels
    values = pixels.astype(np.float32) * SCALE[:, None, None] + SHIFT[:, None, None]
    if kind == "float32":
        return values
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16)
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 16, 23, 64])
def test_kinds_and_layouts(kind, layout, width, kernel):
    image = np.arange(12 * width * 3, dtype=np.uint32).reshape(12, width, 3).astype(np.uint8)
    window = (0, 0, 12, width)
    got = resample(image, (12, width), window, kind=kind, layout=layout, kernel=kernel)
    np.testing.assert_array_equal(got, in_kind(image.transpose(2, 0, 1), kind))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-9, 3e-8, 1e-7, 1e-4, 0.1, 1.0, 257.0, 300.0, 1e30, 3e38])
def test_rounding_to_16_bits(kind, scale, kernel):
    # Subnormals, ties, and what lies beyond the largest number of a kind.
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    out = empty(kind, "planar", 1, 256)
    scales, shifts = np.float32([scale, -scale, scale / 3]), np.float32([0, scale / 2, -scale])
    sizes = (1, 256)
    _native.resample(
        image, (0, 0), sizes, sizes, (0, 0, *sizes), False, out, kind, scales, shifts, kernel
    )
    with np.errstate(over="ignore"):
        values = image.transpose(2, 0, 1) * scales[:, None, None] + shifts[:, None, None]
        if kind == "float16":
            wanted = values.astype(np.float16).view(np.uint16)
        else:
            wanted = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_into_part_of_a_larger_array(kind, layout, kernel):
    # Rows and planes of `out` may be apart; what lies between stays untouched.
    image, window = picture(50, 70), (3, 5, 20, 21)
    whole = empty(kind, layout, 24, 30)
    whole[...] = 77
    resample(image, (40, 56), window, kind=kind, kernel=kernel, out=whole[:, 2:22, 4:25])
    wanted = np.full_like(whole, 77)
    wanted[:, 2:22, 4:25] = in_kind(resample(image, (40, 56), window, kernel=kernel), kind)
    np.testing.assert_array_equal(whole, wanted)


def test_rows_of_the_source_may_be_apart(kernel):
    image, resized, window = picture(60, 80), (33, 44), (4, 6, 20, 24)
    top, left, bottom, right = support(image.shape[:2], resized, window)
    out = np.empty((3, 20, 24), np.uint8)
    _native.resample(
        image[top:bottom, left:right], (top, left), (60, 80), resized, window, False, out,
        "uint8", SCALE, SHIFT, kernel,
    )  # fmt: skip
    same(out, by_torchvision(image, resized, window))


def test_support_is_the_reach_of_the_filter():
    rng = np.random.default_rng(0)
    for _ in range(200):
        full, resized = (int(n) for n in rng.integers(1, 90, 2))
        count = int(rng.integers(1, resized + 1))
        first = int(rng.integers(0, resized - count + 1))
        start, stop = _native.resample_support(full, resized, first, count)
        assert 0 <= start < stop <= full
        half = max(full / resized, 1.0)  # the triangle's half-width
        assert start >= (first + 0.5) * full / resized - half - 1
        assert stop <= (first + count - 0.5) * full / resized + half + 1
        if full == resized:
            assert (start, stop) == (first, first + count)


def test_pictures(shared_data: Path, kernel):
    files = sorted((shared_data / "clothing" / "images").glob("*.jpg"))[:6]
    assert files
    for file in files:
        image = np.array(Image.open(file).convert("RGB"))
        short = min(image.shape[:2])
        resized = tuple(int(256 * side / short) for side in image.shape[:2])
        window = ((resized[0] - 224) // 2, (resized[1] - 224) // 2, 224, 224)
        wanted = by_torchvision(image, resized, window)
        same(resample(image, resized, window, kernel=kernel), wanted)
        as_floats = resample(image, resized, window, kind="float32", kernel=kernel)
        if TOLERANCE == 0:
            np.testing.assert_array_equal(as_floats, in_kind(wanted, "float32"))
        # Pillow weighs with more bits.
        box = Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR)
        crop = np.asarray(box.crop((window[1], window[0], window[1] + 224, window[0] + 224)))
        assert np.abs(crop.transpose(2, 0, 1).astype(int) - wanted).max() <= 2


def test_threads_share_nothing():
    jobs = [
        (picture(40 + 7 * i, 60 + 11 * i, seed=i), (30 + i, 50), (i, 3, 20, 31)) for i in range(8)
    ]
    wanted = [resample(*job) for job in jobs]
    wrong = []

    def work(start):
        for i in range(200):
            k = (start + i) % len(jobs)
            if not np.array_equal(resample(*jobs[k]), wanted[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# What a call takes; each case below spoils one of them.
RIGHT = {
    "source": picture(40, 50), "origin": (0, 0), "full": (40, 50), "resized": (20, 25),
    "window": (0, 0, 20, 25), "flip": False, "out": np.empty((3, 20, 25), np.float32),
    "kind": "float32", "scale": SCALE, "shift": SHIFT,
}  # fmt: skip


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"source": picture(40, 50).transpose(1, 0, 2)}, "source must be a .h, w, 3. uint8"),
        ({"source": picture(40, 50)[:, ::2]}, "source must be .* strides .150, 6, 1."),
        ({"source": picture(40, 50)[::-1]}, "source must be"),
        ({"source": picture(40, 50)[:0]}, "source must be .* got shape .0, 50, 3."),
        ({"source": picture(40, 50).astype(np.int8)}, "source must be .* int8"),
        ({"source": np.zeros((40, 50), np.uint8)}, "source must be .* got shape .40, 50."),
        ({"full": (0, 50)}, "full must be .* got .0, 50."),
        ({"resized": (20, 1 << 21)}, "resized must be .* got .20, 2097152."),
        ({"window": (1, 0, 20, 25)}, "window .* in resized .20, 25., got .1, 0, 20, 25."),
        ({"window": (-1, 0, 20, 25)}, "window"),
        ({"window": (0, 0, 20, 0)}, "window"),
        ({"window": (0, 1 << 62, 20, 25)}, "window"),
        ({"origin": (1, 0)}, "source must lie in the full image .40, 50., got .* .1, 0, 40, 50."),
        ({"origin": (-1, 0)}, "source must lie in the full image"),
        ({"source": picture(39, 50)}, "source must cover .* .0, 0, 40, 50. .* got .0, 0, 39, 50."),
        ({"source": picture(39, 50), "origin": (1, 0)}, "source must cover"),
        ({"source": picture(40, 49), "origin": (0, 1)}, "source must cover"),
        ({"source": picture(40, 49)}, "source must cover"),
        ({"out": np.empty((3, 20, 24), np.float32)}, "out must be .* got shape .3, 20, 24."),
        ({"out": np.empty((3, 20, 25), np.float64)}, "out must be a writable float32 .*float64"),
        ({"out": np.empty((3, 25, 20), np.float32).transpose(0, 2, 1)}, "planar or interleaved"),
        ({"out": np.empty((3, 20, 50), np.float32)[:, :, ::2]}, "planar or interleaved"),
        ({"out": np.broadcast_to(np.float32(0), (3, 20, 25))}, "out must be a writable"),
        ({"kind": "float64"}, "kind must be .* got float64"),
        ({"kind": "bfloat16"}, "out must be a writable bfloat16 array .* 16 bits as uint16"),
        ({"scale": (1.0, float("nan"), 1.0)}, "scale and shift must be finite"),
        ({"shift": (1.0, 1.0, float("inf"))}, "scale and shift must be finite"),
        ({"simd": "sse9"}, "no kernel for sse9"),
    ],
)  # fmt: skip
def test_errors(spoiled, message):
    _native.resample(**RIGHT)
    with pytest.raises(ValueError, match=f"^resample: .*{message}"):
        _native.resample(**{**RIGHT, **spoiled})


@pytest.mark.parametrize(
    "numbers", [(0, 5, 0, 5), (5, 0, 0, 1), (5, 5, 0, 6), (5, 5, 5, 1), (5, 5, -1, 2), (5, 5, 0, 0)]
)
def test_support_errors(numbers):
    with pytest.raises(ValueError, match="^resample_support: "):
        _native.resample_support(*numbers)


@pytest.mark.parametrize("name", KERNELS)
def test_environment_chooses_the_kernel(name, monkeypatch):
    monkeypatch.setenv("GENKL_SIMD", "none")
    with pytest.raises(ValueError, match="no kernel for GENKL_SIMD"):
        _native.resample(**RIGHT)
    monkeypatch.setenv("GENKL_SIMD", name)
    _native.resample(**RIGHT)


# ---- rotate --------------------------------------------------------------------------------------

ANGLES = st.one_of(
    st.sampled_from([0, 90, 180, 270, -90, 360, 450, 30, 45, 60, 120, -30, 1e-6, 1e-13, 1e-17]),
    st.floats(-30, 30),
    st.floats(-1000, 1000),
)


@settings(max_examples=400)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    square=st.booleans(),
    angle=ANGLES,
    data=st.data(),
)
def test_rotate_is_that_of_pillow(height, width, square, angle, data):
    width = height if square else width
    image = picture(height, width) // 2 + np.uint8(1)  # black is what lies outside
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows = data.draw(st.integers(1, height - top))
    columns = data.draw(st.integers(1, width - left))
    frame = np.full((rows + 2, columns + 2, 3), 200, np.uint8)
    _native.rotate(image, angle, (top, left, rows, columns), frame[1:-1, 1:-1])
    wanted = np.full_like(frame, 200)
    whole = np.asarray(Image.fromarray(image).rotate(angle))
    wanted[1:-1, 1:-1] = whole[top : top + rows, left : left + columns]
    np.testing.assert_array_equal(frame, wanted)


def test_rotate_a_jpeg():
    file = io.BytesIO()
    Image.fromarray(picture(400, 533)).save(file, "jpeg")
    with Image.open(file) as image:
        out = np.empty((300, 200, 3), np.uint8)
        _native.rotate(np.asarray(image), -17.25, (50, 60, 300, 200), out)
        np.testing.assert_array_equal(out, np.asarray(image.rotate(-17.25))[50:350, 60:260])


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"source": np.zeros((9, 9), np.uint8)}, "source must be"),
        ({"out": np.zeros((9, 8, 3), np.uint8)}, "out must be a writable array .9, 9, 3."),
        ({"window": (1, 0, 9, 9)}, "window .* source .9, 9., got .1, 0, 9, 9."),
        ({"angle": float("nan")}, "angle must be finite"),
        ({"source": np.zeros((1, 40000, 3), np.uint8), "window": (0, 0, 1, 9),
          "out": np.zeros((1, 9, 3), np.uint8)}, "source must stay within 32768 pixels"),
    ],
)  # fmt: skip
def test_rotate_errors(spoiled, message):
    right = {
        "source": picture(9, 9), "angle": 3.0, "window": (0, 0, 9, 9),
        "out": np.empty((9, 9, 3), np.uint8),
    }  # fmt: skip
    _native.rotate(**right)
    with pytest.raises(ValueError, match=f"^rotate: .*{message}"):
        _native.rotate(**{**right, **spoiled})
