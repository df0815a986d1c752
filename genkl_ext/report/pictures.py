"""Thumbnails as data URIs, of pictures in whatever state they are."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence

from PIL import Image

from ..data.decode import BrokenImage, Decoder, read

SIDE = 192  # pixels of the longer side
_QUALITY = 75


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A small picture, or why there is none."""

    uri: str  #: "data:image/jpeg;base64,..."; empty for a picture that cannot be shown
    width: int
    height: int
    why: str


def thumbnails(paths: Sequence[str]) -> list[Thumbnail]:
    """One for each path or URL; upright, in RGB, decoded as for training."""
    if not paths:
        return []
    decoder = Decoder()
    return [_thumbnail(decoder, path) for path in paths]


def _thumbnail(decoder: Decoder, path: str) -> Thumbnail:
    try:
        picture = decoder.open(read(path))
        # From twice the size on: less to decode, and still something to average.
        shrinking = max(picture.height, picture.width) // (2 * SIDE)
        factor = next((factor for factor in (8, 4, 2) if factor <= shrinking), None)
        pixels = None if factor is None else picture.reduced(factor)
        if pixels is None:
            pixels, _ = picture.region(0, 0, picture.height, picture.width)
    except BrokenImage as broken:
        return Thumbnail("", SIDE, SIDE, str(broken))
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(uri, image.width, image.height, "")
