"""The chunks of a PNG: its size, and the part of it that pixels come from.

Source: W3C, Portable Network Graphics (third edition), sections 5 and 11.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"IEND"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


class PngHeader(NamedTuple):
    """The header chunk (IHDR)."""

    height: int
    width: int
    bits: int  # per channel
    channels: int  # as stored: 1 with a palette


def read_png_header(data: bytes) -> PngHeader:
    """Raises ValueError with the fault of a bad one."""
    body = data[16:33]
    if data[12:16] != b"IHDR" or len(body) < 17:
        raise ValueError("truncated PNG header" if len(data) < 33 else "broken PNG header")
    width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
    if body[9] not in _CHANNELS:
        raise ValueError(f"PNG of unknown colour type {body[9]}")
    return PngHeader(height, width, body[8], _CHANNELS[body[9]])


def chunk_fault(data: bytes) -> str | None:
    """The fault of a chunk that pixels come from, or None. Other chunks may be damaged."""
    for kind, start, end in _chunks(data):
        if _is_critical(kind):
            if end > len(data):
                return None  # truncated: Pillow decides whether pixels are missing
            if zlib.crc32(memoryview(data)[start + 4 : end - 4]) != int.from_bytes(
                data[end - 4 : end], "big"
            ):
                return f"broken PNG: wrong checksum of chunk {kind.decode(errors='backslashreplace')}"
    return None


def pixels_only(data: bytes) -> bytes:
    """The PNG without its ancillary chunks: text, profiles, dates, transparency.

    Pillow rejects an image for a large or damaged one of these; libpng, and so DALI, does not.
    """
    kept = [data[start:end] for kind, start, end in _chunks(data) if _is_critical(kind)]
    return SIGNATURE + b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk, up to the end chunk or the end of the file."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at, end
        if kind == END:
            return
        at = end


def _is_critical(kind: bytes) -> bool:
    return not kind[0] & 0x20  # upper case
