"""Image files that a decoder refuses, each with another kind of exception."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(picture: Image.Image, form: str = "png", **options) -> bytes:
    """A picture as the bytes of a file."""
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def _truncated() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    whole = encoded(Image.fromarray(pixels))
    return whole[: len(whole) // 2]


def _broken_exif() -> bytes:
    """The image is to be turned, and has a width of -1: EXIF that can be read but not written again."""
    entries = struct.pack("<HHIi", 256, 9, 1, -1) + struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    return encoded(Image.new("RGB", (8, 6)), "jpeg", exif=exif)


def _unknown_dds() -> bytes:
    head = struct.pack("<IIII", 124, 0x1007, 6, 8) + bytes(4 * 14) + struct.pack("<II", 32, 4)
    return b"DDS " + head + b"ABCD" + bytes(40)


def _bomb() -> bytes:
    """60,000 x 60,000 pixels in a file of a few bytes."""
    content = bytearray(encoded(Image.new("RGB", (8, 6))))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _floats(*values: float) -> bytes:
    return encoded(Image.fromarray(np.full((6, 8), values, np.float32)), "tiff")


BROKEN = {
    "OSError": _truncated(),
    "no image": b"no picture",
    "nothing": b"",
    "struct.error": _broken_exif(),
    "NotImplementedError": _unknown_dds(),
    "DecompressionBombError": _bomb(),
    "floats to 255": _floats(*range(0, 256, 34)),
    "NaN": _floats(float("nan")),
    "null": None,
}
"""What is wrong -> the bytes of the file, or None."""
