"""A file of numbered entries that all ranks of a host read and write, without a lock but for its growth.

    header    magic and number of slots; written last when the file is made
    slots     a word each: where the entry begins, and its length, both in blocks; 0 while there is none
    entries   a head with number, stamp, length and checksum, then the data; padded to whole blocks

A process appends to regions of its own: it extends the file by one under a lock. It writes an entry first and
its slot last. Readers trust nothing: an entry counts if its head and its checksum are right. So after a kill,
a power cut, or a write by another host that is not seen here, entries may be missing, but none is wrong.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from horovod_owt.filesystem import NO_LINK, extend, locked

BLOCK = 64  # bytes; places and lengths are multiples of it
REGION = 8 << 20  # bytes that a process reserves at a time
MAGIC = b"owt-slots 1\0\0\0\0\0"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}

_HEADER = struct.Struct("<16sQ40x")
_HEAD = struct.Struct("<8sQQQQ4I8x")
_ENTRY = b"owtentry"
_SLOT = struct.Struct("<Q")
_LENGTH_BITS = 24


class Entry(NamedTuple):
    """What `put` was given."""

    data: memoryview
    numbers: tuple[int, int, int, int]


class Slots:
    """`count` slots in the file at `path`, which is made if it is missing, below a folder of this user's.

    `may_grow(bytes)` is asked before the file grows. When it says no, or the disk is full, nothing is stored
    any more. `mapped` reads without a copy: for files in memory, as a disk's error would be a signal.
    """

    def __init__(
        self, path: Path, count: int, may_grow: Callable[[int], bool], *, mapped: bool = False
    ) -> None:
        self._count, self._may_grow, self._mapped = count, may_grow, mapped
        self._map = memoryview(b"")  # of the file, as long as it was when last looked at
        self._lock_path = path.with_name(f"{path.name}.growing")
        self._lock = threading.Lock()
        self._next = self._end = 0  # of the region of this process
        self.full = False
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
        # not before the last thread is done: by its number, it would write to a file that is opened later
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        with locked(self._lock_path, wait=True):
            self._make()

    def get(self, number: int, stamp: int) -> Entry | None:
        """The entry that was put with this stamp; None if there is none, or it is damaged."""
        slot = os.pread(self._descriptor, _SLOT.size, self._place(number))
        place, blocks = divmod(int.from_bytes(slot, "little"), 1 << _LENGTH_BITS)
        if not blocks:
            return None
        found = self._read(BLOCK * place, BLOCK * blocks)
        if len(found) != BLOCK * blocks:
            return None
        magic, *known, length, checksum, a, b, c, d = _HEAD.unpack_from(found)
        if magic != _ENTRY or known != [number, stamp] or checksum != _checksum(found[BLOCK:]):
            return None
        return Entry(found[BLOCK : BLOCK + length], (a, b, c, d))

    def put(self, number: int, stamp: int, data: memoryview, numbers: tuple[int, int, int, int]) -> bool:
        """Store an entry, in place of an older one; False if there is no room. Raises OSError."""
        body = bytes(data) + bytes(-len(data) % BLOCK)
        size = BLOCK + len(body)
        place = self._reserve(size) if size < BLOCK << _LENGTH_BITS else None
        if place is None:
            return False
        head = _HEAD.pack(_ENTRY, number, stamp, len(data), _checksum(body), *numbers)
        try:
            _write(self._descriptor, head + body, place)
            slot = _SLOT.pack(place // BLOCK << _LENGTH_BITS | size // BLOCK)
            _write(self._descriptor, slot, self._place(number))
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.full = True  # where reserving space promises nothing, as with copy-on-write
            return False
        return True

    def _read(self, place: int, size: int) -> memoryview:
        if not self._mapped:
            return memoryview(os.pread(self._descriptor, size, place))
        if place + size > len(self._map):  # others have made the file longer
            self._map = memoryview(mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ))
        return self._map[place : place + size]

    def _place(self, number: int) -> int:
        return BLOCK + _SLOT.size * number

    def _make(self) -> None:
        """Write the header and reserve the slots, unless another process has."""
        header, size = _HEADER.pack(MAGIC, self._count), self._place(self._count)
        if os.pread(self._descriptor, BLOCK, 0) == header and os.fstat(self._descriptor).st_size >= size:
            return
        os.ftruncate(self._descriptor, 0)
        extend(self._descriptor, size)
        _write(self._descriptor, header, 0)

    def _reserve(self, size: int) -> int | None:
        """The place of `size` bytes in a region of this process; None if the file may not grow."""
        with self._lock:
            if self._next + size > self._end:
                if self.full or not self._extend(max(size, REGION)):
                    self.full = True
                    return None
            place, self._next = self._next, self._next + size
            return place

    def _extend(self, size: int) -> bool:
        try:
            with locked(self._lock_path, wait=True) as alone:
                if not alone or not self._may_grow(size):
                    return False
                # one block more: a process that was killed may have left a file of any length
                self._next = -(-extend(self._descriptor, size + BLOCK) // BLOCK) * BLOCK
                self._end = self._next + size
                return True
        except OSError as error:
            if error.errno not in FULL:
                raise
            return False


def _checksum(body: bytes | memoryview) -> int:
    """The sum of its words: finds blocks that were never written, in a fifth of the time of a CRC."""
    return int(np.frombuffer(body, np.uint64).sum())


def _write(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
