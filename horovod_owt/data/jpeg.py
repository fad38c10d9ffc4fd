"""What can be told of an image file: its size, from the header alone, and what is wrong with it."""

from __future__ import annotations

import io

from PIL import Image

_NO_FRAME = {
    0xC4,
    0xC8,
    0xCC,
}  # Huffman tables, a reserved code, arithmetic coding: in the range of SOF markers


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as stored (no EXIF rotation); ValueError says what is wrong with the file."""
    height, width = _jpeg_size(data) if data[:2] == b"\xff\xd8" else _other_size(data)
    if not (height and width):
        raise ValueError(f"impossible size {width} x {height}")
    return height, width


def find_fault(data: bytes) -> str | None:
    """What keeps Pillow from decoding the image, or None. Slow: it decodes."""
    try:
        image_size(data)
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    except Exception as trouble:  # as below
        return str(trouble) or type(trouble).__name__
    return None


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk from marker to marker up to the start of the frame (SOF), ITU T.81 annex B."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("broken JPEG header")
        marker = data[at + 1]
        if (
            marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7
        ):  # fill byte, or a marker without contents
            at += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame
            raise ValueError("JPEG without a frame header")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("JPEG cut short within its header")


def _other_size(data: bytes) -> tuple[int, int]:
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception as trouble:  # Pillow's parsers raise nearly anything on hostile bytes
        raise ValueError("not an image") from trouble
    return height, width
