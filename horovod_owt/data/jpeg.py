"""The segments of a JPEG before its pixels: size, colours, and what no decoder accepts.

Source: ITU T.81 annex B; for the colours T.872 and libjpeg's jdapimin.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

SOI = b"\xff\xd8"
EOI = b"\xff\xd9"  # in the pixel data each 0xFF is followed by 0, so it cannot occur there
_EOI, _SOS, _DQT, _DHT, _APP14 = 0xD9, 0xDA, 0xDB, 0xC4, 0xEE
_ADOBE = b"Adobe"  # in APP14, before a version, flags, and how the colours are transformed
_NO_FRAME = {_DHT, 0xC8, 0xCC}  # a reserved code and arithmetic tables, in the range of the SOF markers
_SEQUENTIAL = {0xC0, 0xC1}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}  # frames without quantisation tables
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # amid pixel data
_STANDARD = {0x00, 0x01, 0x10, 0x11}  # Huffman tables of a file without any, such as a frame of Motion JPEG


class Frame(NamedTuple):
    """The start of frame (SOF)."""

    height: int  # as stored, without EXIF rotation
    width: int
    components: int
    at: int  # offset of its marker in the file
    odd_colours: bool  # not grey or YCbCr: RGB by Adobe's marker or the channels' names, CMYK, YCCK


def read_frame(data: bytes) -> Frame:
    """The frame of a JPEG; ValueError with the fault if there is none."""
    transform = 1  # to YCbCr
    for marker, start, end in _segments(data):
        if marker == _APP14 and data.startswith(_ADOBE, start) and end >= start + 12:
            transform = data[start + 11]
        if _is_frame(marker):
            height, width = (int.from_bytes(data[start + k : start + k + 2], "big") for k in (1, 3))
            components = data[start + 5]
            names = data[start + 6 : start + 6 + 3 * components : 3]
            is_ycbcr = components == 3 and names != b"RGB" and transform == 1
            return Frame(height, width, components, start - 4, not (is_ycbcr or components == 1))
        if marker in (_EOI, _SOS):
            break
    raise ValueError("JPEG without a frame header")


def table_fault(data: bytes) -> str | None:
    """Why every decoder rejects the segments between the pixels, or None.

    One bad image fails a whole batch in DALI, and its pipeline must be rebuilt: what can be seen in 20 us
    must not reach it. (Progressive files are searched to their end.)
    """
    tables: set[int] = set()  # class and number of a Huffman table; 0x100 and number of a quantisation table
    frame: dict[int, int] = {}  # component -> its quantisation table
    kind = scans = 0
    try:
        for marker, start, end in _segments(data):
            body = data[start:end]
            if marker == _EOI or end > len(data):
                return None if scans else "no pixels"
            if marker == _DQT:
                tables |= _quantisation_tables(body)
            elif marker == _DHT:
                tables |= _huffman_tables(body)
            elif _is_frame(marker):
                if frame:
                    return "two frame headers"
                kind, frame = marker, _components(body)
            elif marker == _SOS:
                fault = _scan_fault(body, kind, frame, tables)
                if fault or kind not in _PROGRESSIVE:
                    return fault
                scans += 1
    except (ValueError, IndexError) as error:
        return str(error) if isinstance(error, ValueError) else "segment too short"
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, and start and end of the contents, of each segment, with pixel data skipped; ValueError."""
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("broken JPEG header")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # a marker without contents
            at += 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            yield marker, at + 4, end
            if marker == _SOS:
                yield from _later_segments(data, end)
                return
            at = end
    raise ValueError("truncated JPEG header")


def _later_segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    while found := _MARKER.search(data, at):
        at, marker = found.start(), data[found.end() - 1]
        end = at + 2 if marker == _EOI else at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        at = end


def _is_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME


@lru_cache(1000)  # most files have the same few
def _quantisation_tables(body: bytes) -> set[int]:
    found, at = set(), 0
    while at < len(body):
        wide, number = divmod(body[at], 16)
        at += 1 + (128 if wide else 64)
        if number > 3 or at > len(body):
            raise ValueError("broken quantisation table")
        found.add(0x100 + number)
    return found


@lru_cache(1000)
def _huffman_tables(body: bytes) -> set[int]:
    found, at = set(), 0
    while at < len(body):
        kind, number = divmod(body[at], 16)
        counts = body[at + 1 : at + 17]
        at += 17 + sum(counts)
        room = 1  # codes left of the length so far
        for count in counts:
            room = 2 * room - count
            if room < 0:
                raise ValueError("broken Huffman table")
        if kind > 1 or number > 3 or len(counts) < 16 or at > len(body):
            raise ValueError("broken Huffman table")
        found.add(16 * kind + number)
    return found


@lru_cache(1000)
def _components(body: bytes) -> dict[int, int]:
    """Component -> quantisation table."""
    if body[0] != 8:
        raise ValueError(f"{body[0]} bits per channel, not 8")
    if body[5] not in (1, 3, 4):
        raise ValueError(f"{body[5]} channels, not 1, 3 or 4")
    rows = [body[at : at + 3] for at in range(6, 6 + 3 * body[5], 3)]
    if len(body) != 6 + 3 * body[5] or len({row[0] for row in rows}) != len(rows):
        raise ValueError("broken frame header")
    if any(not 1 <= part <= 4 for row in rows for part in divmod(row[1], 16)):
        raise ValueError("impossible chroma subsampling")
    return {row[0]: row[2] for row in rows}


def _scan_fault(body: bytes, kind: int, frame: dict[int, int], tables: set[int]) -> str | None:
    count = body[0]
    if not frame or not 1 <= count <= 4 or len(body) != 4 + 2 * count:
        return "broken scan header"
    for at in range(1, 1 + 2 * count, 2):
        component, (dc, ac) = body[at], divmod(body[at + 1], 16)
        if component not in frame:
            return "scan of an unknown channel"
        if kind not in _LOSSLESS and 0x100 + frame[component] not in tables:
            return "no quantisation table"
        huffman = {table for table in tables if table < 0x100} or _STANDARD
        if kind in _SEQUENTIAL and not {dc, 0x10 + ac} <= huffman:
            return "no Huffman table"
    return None
