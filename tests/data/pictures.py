"""Pictures made for tests: smooth enough for JPEG, uneven enough that every pixel matters."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def drawing(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves of several lengths and directions, another in each channel, with some noise."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[:height, :width]
    channels = []
    for _ in range(3):
        waves = sum(
            np.sin(fy * y + fx * x + phase)
            for fy, fx, phase in rng.uniform((-0.3, -0.3, 0), (0.3, 0.3, 6), (4, 3))
        )
        channels.append(127 + 28 * waves + rng.normal(0, 6, (height, width)))
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(height: int, width: int, seed: int = 0, **options: Any) -> bytes:
    return encoded(drawing(height, width, seed), **{"quality": 90, **options})


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    """A JPEG file with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, quality=90, exif=exif)


def exif_block(orientation: int) -> bytes:
    """TIFF header and a directory with nothing but the orientation."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """The JPEG file with more segments, (marker, content), at its start."""
    added = (
        bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        for marker, content in segments
    )
    return jpeg[:2] + b"".join(added) + jpeg[2:]


def with_png_exif(png: bytes, *orientations: int) -> bytes:
    """The PNG file with an eXIf chunk for each orientation, before its pixels."""
    at = png.index(b"IDAT") - 4
    chunks = b""
    for orientation in orientations:
        body = b"eXIf" + exif_block(orientation)
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:at] + chunks + png[at:]


def damaged(data: bytes, seed: int = 0) -> bytes:
    """Some bytes in the second half of the compressed data are others."""
    rng = np.random.default_rng(seed)
    content = bytearray(data)
    start = int(rng.integers(len(content) // 2, len(content) - 100))
    for i in range(start, start + 12):
        content[i] = int(rng.integers(0, 255))  # no 255: that would begin a marker
    return bytes(content)


def forged(data: bytes, height: int, width: int) -> bytes:
    """A JPEG file whose frame header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
