"""Window arithmetic against torchvision, and the random numbers behind it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from genkl_ext.data.transforms import DRAWS, Transforms, uniforms

PRESETS = [
    (name, mode) for name in ("clothing1m", "food101n", "webvision") for mode in ("train", "eval")
]
SIDES = st.integers(1, 3000)  # 3,000 x 1 at 320 is just below the longest side


@pytest.mark.parametrize(("name", "mode"), PRESETS)
def test_presets_are_the_published_transforms(name, mode):
    t = Transforms.preset(name, mode)
    # Section 8 of the reference: hyper-parameters.
    assert (t.resize, t.size) == ((320, 299) if name == "webvision" else (256, 224))
    assert t.flip == (0.5 if mode == "train" else 0)
    assert t.rotation == (30 if (name, mode) == ("food101n", "train") else 0)
    crop = {"clothing1m": "random", "food101n": "random", "webvision": "random_resized"}[name]
    assert t.crop == (crop if mode == "train" else "center")
    assert t.is_random == (mode == "train")


@given(height=SIDES, width=SIDES)
def test_resized_size_and_centre_window_are_those_of_torchvision(height, width):
    t = Transforms()
    g = t.geometry(height, width, np.zeros(DRAWS))
    marked = torch.empty(1, height, width, device="meta")
    assert g.resized == tuple(F.resize(marked, [256]).shape[1:])
    # The window's position, from a picture whose values are their positions.
    rows = torch.arange(g.resized[0])[:, None].expand(g.resized)[None]
    columns = torch.arange(g.resized[1])[None].expand(g.resized)[None]
    corner = tuple(int(F.center_crop(axis, [224, 224])[0, 0, 0]) for axis in (rows, columns))
    assert g.window == (*corner, 224, 224)
    assert g.size == (224, 224)
    assert not g.flip
    assert g.angle == 0


@given(height=SIDES, width=SIDES, numbers=st.integers(0, 2**32))
def test_windows_lie_inside_the_resized_picture(height, width, numbers):
    draws = np.random.default_rng(numbers).random(DRAWS)
    for t in (
        Transforms(crop="random", flip=0.5),
        Transforms(size=299, resize=320, crop="random_resized"),
        Transforms(size=32, resize=None, crop="random_resized", ratio=(0.2, 9.0)),
    ):
        g = t.geometry(height, width, draws)
        top, left, h, w = g.window
        assert 0 <= top <= top + h <= g.resized[0]
        assert 0 <= left <= left + w <= g.resized[1]
        assert min(h, w) >= 1


def test_random_resized_windows_are_distributed_as_in_torchvision():
    t = Transforms(size=64, resize=None, crop="random_resized")
    n, height, width = 4000, 300, 400
    draws = uniforms(0, 0, np.arange(n))
    ours = np.array([t.geometry(height, width, u).window for u in draws], float)
    torch.manual_seed(0)
    random_crop = v2.RandomResizedCrop(64, t.scale, t.ratio)
    marked = torch.empty(3, height, width, device="meta")
    params = [random_crop.make_params([marked]) for _ in range(n)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params], float)
    for column in range(4):
        assert _kolmogorov_smirnov(ours[:, column], theirs[:, column]) < 1.95 * math.sqrt(2 / n)
    shape = [np.log(windows[:, 3] / windows[:, 2]) for windows in (ours, theirs)]
    assert _kolmogorov_smirnov(*shape) < 1.95 * math.sqrt(2 / n)


def test_random_windows_flips_and_angles_are_uniform():
    t = Transforms(size=8, resize=12, crop="random", flip=0.25, rotation=30)
    n = 8000
    all_ = [t.geometry(12, 20, u) for u in uniforms(5, 1, np.arange(n))]
    corners = np.array([g.window[:2] for g in all_])
    counts = np.zeros((5, 13))
    np.add.at(counts, tuple(corners.T), 1)
    expected = n / counts.size
    # Chi-squared with 64 degrees of freedom: 120 has a probability below 3e-5.
    assert ((counts - expected) ** 2 / expected).sum() < 120
    assert abs(np.mean([g.flip for g in all_]) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    angles = np.array([g.angle for g in all_])
    assert _kolmogorov_smirnov(angles, np.linspace(-30, 30, n)) < 1.95 * math.sqrt(2 / n)
    # Independent of each other.
    numbers = np.column_stack([corners, [g.flip for g in all_], angles])
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 5 / math.sqrt(n)


def test_random_numbers_depend_on_seed_epoch_and_row_alone():
    rows = np.array([5, 900, 2])
    numbers = uniforms(7, 3, rows)
    assert numbers.shape == (3, DRAWS)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_array_equal(numbers[1:], uniforms(7, 3, rows[1:]))
    many = np.concatenate([uniforms(s, e, np.arange(100)) for s in range(4) for e in range(4)])
    assert len(np.unique(many)) == many.size
    # Any two rows, seeds or epochs are uncorrelated.
    correlation = np.corrcoef(uniforms(0, 0, np.arange(50), 20000))
    assert np.abs(correlation - np.eye(50)).max() < 5 / math.sqrt(20000)


def test_normalisation_is_that_of_torchvision():
    t = Transforms()
    scale, shift = t.affine()
    values = np.arange(256, dtype=np.float32)
    ours = values[:, None] * scale + shift
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    theirs = F.normalize(F.to_dtype(pixels, torch.float32, scale=True), t.mean, t.std)
    np.testing.assert_allclose(ours.T[:, None], theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"resize": 200}, "resize must be an integer of at least 224, got 200"),
        ({"resize": None}, "resize must be given for crop='center', got None"),
        ({"crop": "middle"}, "crop must be .*, got 'middle'"),
        ({"flip": 1.5}, "flip must be a probability, got 1.5"),
        ({"rotation": -1}, "rotation must be from 0 to 180 degrees, got -1"),
        ({"scale": (0, 1)}, "scale must be"),
        ({"ratio": (2, 1)}, "ratio must be"),
        ({"std": (1, 0, 1)}, "std must be"),
        ({"mean": (1, 0)}, "mean must be"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Transforms(**settings)


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="name must be one of clothing1m, .*, got 'cifar'"):
        Transforms.preset("cifar", "train")
    with pytest.raises(ValueError, match="mode must be 'train' or 'eval', got 'test'"):
        Transforms.preset("webvision", "test")


def _kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between two empirical distributions; 1.95 sqrt(2 / n) is p = 0.001."""
    points = np.sort(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())
