"""Tar archives at the level of 512-byte blocks: reproducible headers, and the offsets of members.

Python's tarfile is far too slow for a million members, and its headers differ between versions.
Source: POSIX.1-2008 pax, "ustar interchange format"; the GNU tar manual, "basic tar format".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

BLOCK = 512
END = bytes(2 * BLOCK)
LONGEST_NAME = 100  # bytes that fit into a header; a longer name precedes it as a member of its own
_MAX_SIZE = 8**11 - 1  # the largest size in eleven octal digits


class TarError(ValueError):
    """The bytes are not a tar archive of plain files."""


def padding(length: int) -> bytes:
    return bytes(-length % BLOCK)


def header(name: bytes, length: int) -> bytes:
    """The header of a file of `length` bytes: GNU format, owner 0, mode 644, date 0."""
    assert 0 <= length <= _MAX_SIZE and name and b"\0" not in name
    if len(name) <= LONGEST_NAME:
        return _block(name, length, b"0")
    named = name + b"\0"
    long_name = _block(b"././@LongLink", len(named), b"L") + named + padding(len(named))
    return long_name + _block(name[:LONGEST_NAME], length, b"0")


def _block(name: bytes, length: int, kind: bytes) -> bytes:
    fields = [
        name.ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,  # mode, user, group
        b"%011o\0" % length,
        b"00000000000\0",  # modified
        b" " * 8,  # checksum: counted as spaces
        kind + bytes(100),  # target of a link
        b"ustar  \0" + bytes(32 + 32 + 8 + 8),  # names of user and group, device numbers
    ]
    block = b"".join(fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


class Stream(Protocol):
    """A file read sequentially."""

    at: int  # bytes read so far

    def read(self, length: int) -> bytes: ...  # fewer at the end of the file
    def skip(self, length: int) -> None: ...


def members(stream: Stream, end: int, where: str) -> Iterator[tuple[bytes, int]]:
    """Name and length of each file in the archive that ends at byte `end`, with the stream at its contents.

    The caller may read some of the contents; the rest is skipped. Links, devices and extended headers are
    rejected: ILSVRC2012 has none. Raises TarError.
    """
    while stream.at < end:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise TarError(f"{where} is truncated")
        if not any(block):
            stream.skip(end - stream.at)
            return
        name, length, kind = _parse(block, where)
        after = stream.at + length + -length % BLOCK
        if after > end:
            raise TarError(f"{where} is truncated within {name.decode(errors='replace')}")
        if kind in b"0\0":
            yield name, length
        elif kind != b"5":  # a folder
            saw = f"{where}: {name.decode(errors='replace')} is neither a file nor a folder"
            raise TarError(f"{saw} (type {kind.decode(errors='replace')})")
        stream.skip(after - stream.at)
    raise TarError(f"{where} has no end marker")


def _parse(block: bytes, where: str) -> tuple[bytes, int, bytes]:
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        length = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        checksum = length = -1
    if length < 0 or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise TarError(f"{where} is not a tar archive, or is damaged")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name, length, block[156:157]
