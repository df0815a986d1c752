"""Thumbnails of pictures of every kind."""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from genkl_ext.report.pictures import SIDE, Thumbnail, thumbnails

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from pictures import drawing, encoded, with_orientation


def opened(thumbnail: Thumbnail) -> Image.Image:
    head, _, data = thumbnail.uri.partition(",")
    assert head == "data:image/jpeg;base64" and thumbnail.why == ""
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (thumbnail.width, thumbnail.height)
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(60, 100), (1300, 900), (400, 3000)])
def test_they_are_upright(tmp_path: Path, orientation: int, height: int, width: int) -> None:
    quarters = np.array([[(255, 0, 0), (0, 160, 0)], [(0, 0, 255), (255, 255, 0)]], np.uint8)
    pixels = quarters.repeat(height // 2, axis=0).repeat(width // 2, axis=1)
    path = tmp_path / "a.jpg"
    path.write_bytes(with_orientation(Image.fromarray(pixels), orientation))
    image = opened(thumbnails([str(path)])[0])
    with Image.open(path) as original:
        expected = ImageOps.exif_transpose(original).convert("RGB")
    assert max(image.size) == min(SIDE, max(height, width))
    scale = max(expected.size) / max(image.size)
    assert abs(image.width * scale - expected.width) <= scale
    for x in (0.25, 0.75):
        for y in (0.25, 0.75):
            got, wanted = (
                np.array(i.getpixel((int(x * i.width), int(y * i.height))))
                for i in (image, expected)
            )
            assert abs(got - wanted).max() < 20


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK"])
def test_all_kinds_become_rgb(tmp_path: Path, kind: str, mode: str) -> None:
    if (kind, mode) in {("PNG", "CMYK"), ("GIF", "CMYK"), ("WEBP", "CMYK"), ("BMP", "CMYK")}:
        kind = "JPEG"
    path = tmp_path / "a.jpg"  # whatever it says
    path.write_bytes(encoded(drawing(40, 30).convert(mode), kind))
    image = opened(thumbnails([str(path)])[0])
    assert (image.mode, image.size) == ("RGB", (30, 40))


def test_one_that_cannot_be_shown_says_why(tmp_path: Path) -> None:
    whole = encoded(drawing(64, 64))
    contents = {"empty": b"", "text": b"no picture", "cut": whole[: len(whole) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in ("empty", "text", "cut", "nowhere")]
    (tmp_path / "good").write_bytes(whole)
    made = thumbnails([*paths, str(tmp_path / "good")])
    assert [m.why.split(":")[0] for m in made] == [
        "empty", "not an image", "truncated", "missing", ""
    ]  # fmt: skip
    assert [bool(m.uri) for m in made] == [False, False, False, False, True]
    assert thumbnails([]) == []


def test_real_photographs(shared_data: Path) -> None:
    paths = sorted(str(path) for path in shared_data.glob("clothing/images/*.jpg"))[:5]
    assert paths
    for made in thumbnails(paths):
        assert max(opened(made).size) == SIDE and len(made.uri) < 30_000
