"""``verify`` and ``check``: whether a picture can be used, told without decoding most of them.

What passes both, :class:`~genkl_ext.data.decode.Decoder` decodes. Beyond what decoding would tell,
a JPEG file is broken when libjpeg-turbo has any complaint about its compressed data: damage there
leaves wrong pixels, mostly grey or shifted from some row on, and decoders pass over it. "Extraneous
bytes before a marker" is such a complaint: it is how most damage shows. Two kinds do not count,
because they say nothing about pixels: complaints about metadata (a torn colour profile, an unknown
JFIF version), and about the fixed parameters of a sequential scan, which some cameras fill in
wrongly and every decoder ignores.

JPEG files with sampling factors that libjpeg-turbo's interface for strict reading does not take
(4:1:0 and the like) are decoded as usual; damage inside these is not found.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

from .decode import (
    PROGRESSIVE,
    SEQUENTIAL,
    BrokenImage,
    Decoder,
    JpegHeader,
    Limits,
    complaint_reason,
    jpeg_header,
    read,
    verify_jpeg,
)

# What a decoder does to its own process.
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_UNKNOWN_SAMPLING = "Could not determine subsampling"


def verify(data: bytes, limits: Limits) -> bool:
    """Whether a picture is known to be sound without decoding it; False: only decoding tells.

    Raises:
        BrokenImage: it is a JPEG file and broken.
    """
    header = jpeg_header(data)
    # What is larger is refused by the decoder, which looks at the size first.
    if header is None or header.height * header.width > limits.max_pixels:
        return False
    return _verify_jpeg(data, header)


def may_decode(data: bytes, verified: bool) -> bool:
    """Whether :func:`check` may decode pixels; ``verified`` is what :func:`verify` said.

    Opening a picture that is to be turned decodes it.
    """
    header = jpeg_header(data) if verified else None
    return header is None or header.orientation != 1


def check(data: bytes, decoder: Decoder, verified: bool) -> None:
    """Return if the picture can be used; ``verified`` is what :func:`verify` said.

    Raises:
        BrokenImage: it cannot.
    """
    try:
        picture = decoder.open(data)
        if not verified:
            picture.region(0, 0, picture.height, picture.width)
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:  # what readers raise on bad data is no closed set
        raise BrokenImage("corrupt", f"{type(error).__name__}: {error}") from error


def check_apart(path: str, limits: Limits) -> None:
    """Check a file in a process of its own, which a decoder may bring down.

    Raises:
        BrokenImage: it cannot be used. ChildProcessError: the process was stopped from outside, by
            a batch system or for want of memory; that says nothing about the picture.
    """
    settings = json.dumps(dataclasses.asdict(limits))
    command = [sys.executable, "-m", __name__, path, settings]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode < 0:
        if -done.returncode not in _CRASHES:
            raise ChildProcessError(
                f"the process that checked {path} was stopped by signal {-done.returncode}"
            )
        name = signal.Signals(-done.returncode).name
        raise BrokenImage("corrupt", f"decoding it ends the process ({name})")
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    if (why := json.loads(done.stdout)) is not None:
        raise BrokenImage(*why)


def _verify_jpeg(data: bytes, header: JpegHeader) -> bool:
    if not header.complete:
        raise BrokenImage("truncated", "the end of the picture is missing")
    complaint = verify_jpeg(data)
    if complaint is not None:
        complaint = verify_jpeg(_bare(data, header))
    if complaint is None:
        return header.frame in (*SEQUENTIAL, PROGRESSIVE) and header.components in (1, 3)
    if _UNKNOWN_SAMPLING in complaint:
        return False
    raise BrokenImage(complaint_reason(complaint), complaint)


def _bare(data: bytes, header: JpegHeader) -> bytes:
    """A JPEG file without metadata, and with the scan parameters that a sequential one must have.

    Its header is sound: :func:`jpeg_header` has been through it.
    """
    parts = [data[:2]]
    position = 2
    while position < header.scan:
        marker = data[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # have no length
            position += 1 if marker == 0xFF else 2
            continue
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if not 0xE0 <= marker <= 0xEF and marker != 0xFE:
            parts.append(data[position : position + length])
        position += length
    rest = data[position:]
    if header.frame in SEQUENTIAL:
        after = 5 + 2 * int.from_bytes(rest[4:5], "big")
        rest = rest[:after] + b"\x00\x3f\x00" + rest[after + 3 :]
    return b"".join([*parts, rest])


def _main(path: str, settings: str) -> None:
    """The process of :func:`check_apart`: prints null, or the reason and the detail."""
    limits = Limits(**json.loads(settings))
    try:
        data = read(path, limits)
        check(data, Decoder(limits), verify(data, limits))
    except BrokenImage as error:
        print(json.dumps([error.reason, error.detail]))
    else:
        print("null")


if __name__ == "__main__":
    _main(*sys.argv[1:])
