"""Samples in a folder of class folders: SPLIT/CLASS/*.JPEG, one file per sample."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from horovod_owt.data.listing import list_split
from horovod_owt.data.retry import with_retries

STATTERS = 8  # threads that stat files on a file server


class FolderStore:
    """The images under one split: classes in sorted order, files in sorted order within a class.

    A sample costs its file name, an offset and a label: about 40 bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.fsencode(folder)
        listing = list_split(Path(folder))
        self._class_names, self.names, self._counts = listing.classes, listing.names, listing.counts
        self.left_out = listing.left_out(self._folder)
        self.classes = tuple(os.fsdecode(name) for name in self._class_names)
        self.labels = np.repeat(np.arange(len(self.classes), dtype=np.int64), self._counts)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def name(self, index: int) -> bytes:
        """The file's name in its class folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        return with_retries(self._read_once, index, self.path)

    def check(self, index: int, data: bytes) -> str | None:
        """Always None: a folder has no checksums."""
        return None

    def sizes_and_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and mtime_ns of each file, both int64: one stat per file; OSError if one is missing."""

        def stat(part: range) -> np.ndarray:
            found = map(os.stat, map(self._path, part))
            return np.array([(each.st_size, each.st_mtime_ns) for each in found], np.int64)

        parts = [range(start, min(start + 10_000, len(self))) for start in range(0, len(self), 10_000)]
        with ThreadPoolExecutor(STATTERS) as pool:
            rows = [np.empty((0, 2), np.int64), *pool.map(stat, parts)]
        sizes, times = np.concatenate(rows).T
        return sizes, times

    def stamp(self, index: int) -> int:
        """64 bits that change when the file does; OSError if it is missing."""
        return stamp_of(os.stat(self._path(index)))

    def empty_classes(self) -> list[str]:
        return [name for name, count in zip(self.classes, self._counts, strict=True) if not count]

    def _read_once(self, index: int) -> bytes:
        with open(self._path(index), "rb", buffering=0) as file:
            return file.read()

    def _path(self, index: int) -> bytes:
        return os.path.join(self._folder, self._class_names[self.labels[index]], self.names[index])


def stamp_of(found: os.stat_result, *more: int) -> int:
    """A hash of a file's size and times; of the ctime too, which nothing restores."""
    values = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, *more)
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")
