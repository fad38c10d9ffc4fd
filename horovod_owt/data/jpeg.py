"""Read the header of an image file, without decoding it."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

# Huffman tables, a reserved code, arithmetic coding: in the range of the SOF markers, but not frames
_NO_FRAME = {0xC4, 0xC8, 0xCC}


class Header(NamedTuple):
    """The header fields of an image file."""

    height: int  # as stored, without EXIF rotation
    width: int
    kind: str  # Pillow's name: JPEG, PNG, ...
    components: int  # per stored pixel; 4 in a JPEG mean CMYK
    pixels_from: int  # offset of the image's data in the file; 0 if unknown


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as stored (no EXIF rotation); ValueError with the fault of a bad file."""
    header = read_header(data)
    return header.height, header.width


def read_header(data: bytes) -> Header:
    """Size and format; ValueError with the fault of a bad file."""
    header = _jpeg_header(data) if data[:2] == b"\xff\xd8" else _other_header(data)
    if not (header.height and header.width):
        raise ValueError(f"impossible size {header.width} x {header.height}")
    return header


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers up to the start of frame (SOF), ITU T.81 annex B."""
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("broken JPEG header")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # a marker without contents
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            return Header(height, width, "JPEG", data[at + 9], at)
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame
            raise ValueError("JPEG without a frame header")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("truncated JPEG header")


def _other_header(data: bytes) -> Header:
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Header(image.height, image.width, image.format or "", len(image.getbands()), 0)
    except Image.DecompressionBombError:
        raise ValueError("impossible size") from None
    except Exception as error:  # Pillow's parsers may raise anything on malformed bytes
        raise ValueError(f"not an image: {_looks_like(data)}") from error


def _looks_like(data: bytes) -> str:
    """A hint at what the file contains instead of an image."""
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes"
    start = data.lstrip()[:16]
    kind = "HTML or XML, " if start.startswith(b"<") else ""
    return f"{kind}begins with {start!r}"
