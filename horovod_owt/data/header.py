"""Size and format of an image file, from its first bytes."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from horovod_owt.data.jpeg import SOI, read_frame
from horovod_owt.data.png import SIGNATURE, read_png_header

_ORIENTATION = 0x0112  # the tag of EXIF and TIFF; 1: as stored


class Header(NamedTuple):
    """The header fields of an image file."""

    height: int  # as stored, without EXIF rotation
    width: int
    kind: str  # Pillow's name: JPEG, PNG, ...
    components: int  # per stored pixel; 4 in a JPEG mean CMYK
    pixels_from: int  # offset after which an end marker is the image's; 0 if unknown
    mode: str = ""  # Pillow's name of the pixel format, for kinds other than JPEG and PNG
    turned: bool = False  # a TIFF with an orientation: Pillow turns it, and no other kind


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as stored (no EXIF rotation); ValueError with the fault of a bad file."""
    header = read_header(data)
    return header.height, header.width


def read_header(data: bytes) -> Header:
    """Size and format; ValueError with the fault of a bad file."""
    if data[:2] == SOI:
        frame = read_frame(data)
        header = Header(frame.height, frame.width, "JPEG", frame.components, frame.at)
    elif data[:8] == SIGNATURE:
        png = read_png_header(data)
        header = Header(png.height, png.width, "PNG", png.channels, 0)
    else:
        header = _other_header(data)
    if not (header.height and header.width):
        raise ValueError(f"impossible size {header.width} x {header.height}")
    return header


def _other_header(data: bytes) -> Header:
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            bands, kind = len(image.getbands()), image.format or ""
            turned = kind == "TIFF" and image.getexif().get(_ORIENTATION, 1) in range(2, 9)
            return Header(image.height, image.width, kind, bands, 0, image.mode, turned)
    except Image.DecompressionBombError:
        raise ValueError("impossible size") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers may raise anything on malformed bytes
        raise ValueError(f"not an image: {_looks_like(data)}") from error


def _looks_like(data: bytes) -> str:
    """A hint at what the file contains instead of an image."""
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes"
    kind = "HTML or XML, " if data.lstrip().startswith(b"<") else ""
    return f"{kind}begins with {data[:16]!r}"
