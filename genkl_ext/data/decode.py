"""From bytes to pixels on the CPU, with a reason for every picture that has none.

    decoder = Decoder()                       # one per thread
    picture = decoder.open(read(path))        # header only, where the format allows
    picture.height, picture.width             # as the picture is seen (EXIF orientation)
    pixels, (y, x) = picture.region(100, 50, 300, 250)   # (h, w, 3) uint8 and its position

nvImageCodec decodes: libjpeg-turbo for JPEG, and PNG, WebP, TIFF, BMP, JPEG 2000; Pillow the
formats it does not know (GIF, AVIF ...). Everything comes out as 8-bit RGB: grey, CMYK, YCCK and
palettes converted, 16 bits scaled to 8, alpha dropped, turned as EXIF says. Of an upright baseline
or progressive JPEG only the rows and columns asked for are reconstructed, with the same pixels as
when all are.

What no decoder tells: damage inside a JPEG's compressed data leaves wrong pixels without an error.
:func:`verify_jpeg` finds it, at a third of the price of decoding; ``genkl scan`` calls it.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import stat
import struct
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Reason = Literal[
    "missing", "unreadable", "empty", "not an image", "truncated", "corrupt",
    "too many bytes", "too many pixels", "too small",
]  # fmt: skip
Pixels = NDArray[np.uint8]

# nvImageCodec 0.9 crashes on some of these.
_JPEG_2000 = (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")
# Of the formats that Pillow knows. Not EPS: it would be handed to Ghostscript.
_PILLOW_FORMATS = (
    "AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip


class BrokenImage(Exception):
    """A picture that cannot be used.

    Attributes:
        reason: one of the words of ``Reason``.
        detail: what exactly, for people.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)  # what unpickling calls it with
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a picture may cost; larger ones are refused from their header, before decoding."""

    max_bytes: int = 1 << 29  #: of the file
    max_pixels: int = 178_956_970  #: height x width, Pillow's limit for an error
    min_side: int = 1  #: of the shorter side, in pixels

    def check_size(self, height: int, width: int) -> None:
        """Raise ``BrokenImage`` for too many pixels, or a side too small."""
        if height * width > self.max_pixels:
            limit = self.max_pixels
            raise BrokenImage("too many pixels", f"{width} x {height}, more than {limit:,} pixels")
        if min(height, width) < self.min_side:
            side = self.min_side
            raise BrokenImage("too small", f"{width} x {height}, a side below {side}")


def read(path: str | os.PathLike[str], limits: Limits = Limits()) -> bytes:
    """The bytes of a file, or of an object of a store that fsspec knows (``s3://...``).

    Raises:
        BrokenImage: missing, unreadable, empty or too many bytes. What is no regular file (a pipe
            would block for ever) is "not an image".
        OSError: this process has no more memory or file descriptors; no fault of the file.
        ImportError: the store's package is not installed.
    """
    if "://" in str(path):
        return _read_remote(str(path), limits)
    try:
        # O_NONBLOCK: opening a pipe without a writer returns.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise BrokenImage("not an image", "it is no regular file")
            _check_bytes(facts.st_size, limits)
            parts = []
            while part := os.read(descriptor, facts.st_size + 1):
                parts.append(part)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenImage("missing", "there is no such file") from None
    except OSError as error:
        if error.errno in _OWN_FAULTS:
            raise
        raise BrokenImage("unreadable", os.strerror(error.errno or 0)) from error
    except ValueError as error:  # a NUL in the path
        raise BrokenImage("unreadable", str(error)) from error
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    _check_bytes(len(data), limits)
    return data


def _read_remote(url: str, limits: Limits) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            data: bytes = file.read(limits.max_bytes + 1)
    except FileNotFoundError:
        raise BrokenImage("missing", "there is no such object") from None
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # every store has errors of its own
        if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
            raise
        raise BrokenImage("unreadable", f"{type(error).__name__}: {error}") from error
    _check_bytes(len(data), limits)
    return data


def _check_bytes(size: int, limits: Limits) -> None:
    if size == 0:
        raise BrokenImage("empty", "the file has no bytes")
    if size > limits.max_bytes:
        raise BrokenImage("too many bytes", f"{size:,} bytes, more than {limits.max_bytes:,}")


SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), 0xC2  # markers of frame headers

# Encoders write some ten scans. A file can hold millions, each of which costs a pass over all
# coefficients: hours of work in a megabyte. The largest pictures get the fewest, and take seconds.
MAX_SCANS = 100
_LARGE_MAX_SCANS = 20
_MAX_SCANNED_PIXELS = 400_000_000
_MAX_MARKERS = 4096  # before the first scan; real files have some ten to a hundred

_OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MAX_KEPT_BYTES = 1 << 26  # of the buffer that a decoder uses again
_TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}


@dataclasses.dataclass(frozen=True)
class JpegHeader:
    """What the markers before a JPEG's compressed data say. Sizes are those in the file."""

    height: int
    width: int
    orientation: int  #: EXIF, 1 to 8; 1 is upright, and stands for none or an invalid one
    complete: bool  #: the end-of-image marker is there
    frame: int  #: marker of the frame header: 0xC0, 0xC1 sequential, 0xC2 progressive, others rare
    components: int  #: 1 grey, 3 colour, 4 CMYK or YCCK
    scan: int  #: position of the first start-of-scan marker


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG file; None if ``data`` is of another kind.

    Raises:
        BrokenImage: it begins like a JPEG file and then ends too early or makes no sense.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position, orientation, frame = 2, None, None
    try:
        for _ in range(_MAX_MARKERS):
            if data[position] != 0xFF:
                raise BrokenImage("corrupt", f"no JPEG marker at byte {position}")
            marker = data[position + 1]
            if marker == 0xFF:  # padding
                position += 1
                continue
            position += 2
            if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # stand alone
                continue
            length = data[position] << 8 | data[position + 1]
            if marker == 0xDA:
                break
            if length < 2 or marker in (0xD8, 0xD9, 0x00):
                raise BrokenImage("corrupt", f"JPEG marker {marker:#04x} at byte {position - 2}")
            if marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
                if orientation is None:  # the first block counts
                    orientation = _orientation(data[position + 8 : position + length])
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                frame = marker, *struct.unpack_from(">HHB", data, position + 3)
            position += length
        else:
            raise BrokenImage("corrupt", f"more than {_MAX_MARKERS:,} markers before the picture")
    except (IndexError, struct.error):
        raise BrokenImage("truncated", f"the JPEG header ends at byte {len(data)}") from None
    if frame is None:
        raise BrokenImage("corrupt", "a JPEG file without a frame header")
    kind, height, width, components = frame
    if not height or not width:
        raise BrokenImage("corrupt", f"the JPEG header says {width} x {height} pixels")
    if kind not in SEQUENTIAL or data[position + 2 : position + 3] != bytes([components]):
        scans = data.count(b"\xff\xda", position - 2)
        most = max(_LARGE_MAX_SCANS, min(MAX_SCANS, _MAX_SCANNED_PIXELS // (height * width)))
        if scans > most:
            raise BrokenImage("corrupt", f"{scans:,} scans, more than {most}")
    complete = data.rfind(b"\xff\xd9", position) >= 0
    return JpegHeader(height, width, orientation or 1, complete, kind, components, position - 2)


def _exif_orientation(data: bytes) -> int:
    """EXIF orientation of a PNG, WebP or TIFF file; 1 for other kinds."""
    if data[:4] in _TIFF_ORDERS:
        return _orientation(data)
    if data.startswith(b"\x89PNG"):
        block = data[start + 4 :] if (start := data.find(b"eXIf")) >= 0 else b""
    elif data[8:12] == b"WEBP":
        block = data[start + 8 :] if (start := data.find(b"EXIF")) >= 0 else b""
    else:
        return 1
    return _orientation(block.removeprefix(b"Exif\0\0"))


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """The picture upright; a copy, unless it is so already."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 if there is none or it is invalid."""
    order = _TIFF_ORDERS.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 0x0112 and kind == 3:
                (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # a broken EXIF block does not make a broken picture: it is taken as it lies
    return 1


class Picture:
    """An opened picture: its size, and pixels on demand. Valid until its decoder opens another."""

    def __init__(
        self, height: int, width: int, pixels: Pixels | None, stream: Any, owner: Decoder
    ) -> None:
        self.height = height
        self.width = width
        self._pixels = pixels
        self._stream = stream
        self._owner = owner

    def region(
        self, top: int, left: int, bottom: int, right: int
    ) -> tuple[Pixels, tuple[int, int]]:
        """Pixels that hold at least rows ``top`` to ``bottom`` and columns ``left`` to ``right``.

        Returns:
            (h, w, 3) uint8, which the decoder overwrites when it decodes again, and the row and
            column of its first pixel.

        Raises:
            BrokenImage: truncated or corrupt.
        """
        if self._pixels is not None:
            return self._pixels, (0, 0)
        return self._owner._decode_region(self._stream, top, left, bottom, right), (top, left)

    def reduced(self, factor: int) -> Pixels | None:
        """All of the picture at 1 / ``factor`` (2, 4 or 8) of its size, sides rounded up.

        libjpeg-turbo computes the small picture straight from the frequencies. None where that
        cannot be had: not an upright JPEG file, CMYK, or broken, which :meth:`region` then tells.
        """
        if self._pixels is not None:
            return None
        sides = -(-self.height // factor), -(-self.width // factor)
        return self._owner._decode_reduced(factor, *sides)


class Decoder:
    """Decodes one picture at a time, on the calling thread.

    Args:
        limits: sizes from which a picture is refused.
        fast_idct: take libjpeg-turbo's less exact inverse transform: a tenth less time, pixels off
            by 1 grey level on average and 4 at most (200 photographs).
    """

    def __init__(self, limits: Limits = Limits(), fast_idct: bool = False) -> None:
        # nvImageCodec reports through logs what it also reports by returning None.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        import nvidia.nvimgcodec as nvimgcodec

        self._codec = nvimgcodec
        self._limits = limits
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            options="libjpeg_turbo_decoder:fast_idct=1" if fast_idct else "",
        )
        # Pictures are turned here: with several EXIF blocks, nvImageCodec sizes the output by one
        # and turns by another, past the end of its memory.
        self._params = nvimgcodec.DecodeParams(
            color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=False
        )
        self._buffer: Any = None
        self._data = b""

    def open(self, data: bytes) -> Picture:
        """Look at a picture; upright JPEG files are not decoded yet.

        Raises:
            BrokenImage: not an image, too many pixels, too small, or whatever decoding met.
        """
        self._data = data
        header = jpeg_header(data)
        if header is not None:
            self._limits.check_size(header.height, header.width)
        stream = self._codec.CodeStream(data)
        try:
            size = stream.height, stream.width
        except RuntimeError:  # nvImageCodec does not know the format, or the file is broken
            size = None
        if size is None or data.startswith(_JPEG_2000):
            pixels = self._decode_with_pillow(data)
        else:
            self._limits.check_size(*size)
            if (
                header is not None
                and header.orientation == 1
                and header.complete
                and size == (header.height, header.width)
            ):
                return Picture(*size, None, stream, self)
            try:
                orientation = _exif_orientation(data) if header is None else header.orientation
                pixels = _turned(self._decode(stream), orientation)
            except BrokenImage:  # or a variant of PNG, BMP, TIFF that Pillow knows
                pixels = self._decode_with_pillow(data)
        return Picture(pixels.shape[0], pixels.shape[1], pixels, None, self)

    def _decode_region(self, stream: Any, top: int, left: int, bottom: int, right: int) -> Pixels:
        region = self._codec.Region(top, left, bottom, right)
        return self._decode(stream.get_sub_code_stream(region=region))

    def _decode_reduced(self, factor: int, height: int, width: int) -> Pixels | None:
        import simplejpeg

        try:
            if simplejpeg.decode_jpeg_header(self._data)[2] in ("CMYK", "YCCK"):
                return None
            pixels: Pixels = simplejpeg.decode_jpeg(
                self._data, min_height=height, min_width=width, min_factor=factor, strict=False
            )
        except ValueError:  # broken, or a sampling or a profile that its interface does not take
            return None
        return pixels if pixels.shape[:2] == (height, width) else None

    def _decode(self, stream: Any) -> Pixels:
        image = self._decoder.decode(stream, image=self._buffer, params=self._params)
        if image is None:
            raise why_broken(self._data)
        pixels = np.asarray(image)
        self._buffer = image if pixels.nbytes <= _MAX_KEPT_BYTES else None
        return pixels

    def _decode_with_pillow(self, data: bytes) -> Pixels:
        from PIL import Image, ImageOps

        Image.init()
        formats = [name for name in _PILLOW_FORMATS if name in Image.OPEN]
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                self._limits.check_size(image.height, image.width)
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (BrokenImage, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise BrokenImage("too many pixels", str(error)) from None
        except Exception as error:  # what Pillow's readers raise on bad data is no closed set
            raise why_broken(data, error) from None


def verify_jpeg(data: bytes) -> str | None:
    """libjpeg-turbo's complaint about a JPEG file, or None.

    All of the compressed data is read, but pixels are made at an eighth of the size and in grey
    only.
    """
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(
            data, colorspace="GRAY", min_height=1, min_width=1, min_factor=8, strict=True
        )
    except ValueError as error:
        return str(error)
    return None


def why_broken(data: bytes, error: Exception | None = None) -> BrokenImage:
    """Why a file cannot be decoded; ``error`` is what Pillow raised, if it tried."""
    from PIL import UnidentifiedImageError

    try:
        complaint = verify_jpeg(data) if jpeg_header(data) is not None else None
    except BrokenImage as broken:
        return broken
    if complaint is not None:
        return BrokenImage(complaint_reason(complaint), complaint)
    if isinstance(error, UnidentifiedImageError):
        return BrokenImage("not an image", f"it begins with {data[:8]!r}")
    text = "no decoder can read it" if error is None else f"{type(error).__name__}: {error}"
    return BrokenImage("truncated" if "truncated" in text.lower() else "corrupt", text)


def complaint_reason(complaint: str) -> Reason:
    """The reason behind what libjpeg-turbo says."""
    return "truncated" if "premature end of jpeg" in complaint.lower() else "corrupt"
