"""Samples in tar shards with an index: SPLIT/shard-000000.tar, ..., SPLIT/index.npz.

The index is in folder order (class, then file name), whatever the order in the shards. So a packed data set
and the folder that it was made from give the same batches.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horovod_owt.data.arrays import BLOCK, UNREADABLE, Names, read_arrays, write_arrays
from horovod_owt.data.folder import stamp_of
from horovod_owt.data.listing import LeftOut, images_below, scan
from horovod_owt.data.machine import EXHAUSTED, is_of_the_file, machine_error
from horovod_owt.data.retry import TRANSIENT, with_retries
from horovod_owt.errors import DataError

INDEX = "index.npz"
VERSION = 1
OPEN_FILES = 256  # shards open at a time, at most
OPEN_SHARE = 4  # and a quarter of what the process may open: sockets, libraries and checkpoints need the rest


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


@dataclass
class Index:
    """The location of each sample. One row per sample, in folder order."""

    classes: list[bytes]
    shard_bytes: np.ndarray  # (shards,) int64: file sizes, to detect a replaced shard
    shard: np.ndarray  # (n,) uint32
    offset: np.ndarray  # (n,) int64: of the image, not of its header
    length: np.ndarray  # (n,) int64
    label: np.ndarray  # (n,) int64
    crc32: np.ndarray | None  # (n,) uint32 of the image; None: unknown
    names: Names  # of the members, without the class folder

    def write(self, path: Path) -> None:
        columns = {"shard": self.shard, "offset": self.offset, "length": self.length, "label": self.label}
        columns |= {"crc32": self.crc32} if self.crc32 is not None else {}
        columns |= Names.joined(self.classes).to_arrays("class") | self.names.to_arrays("name")
        arrays = {"version": np.int64(VERSION), "shard_bytes": self.shard_bytes, **columns}
        write_arrays(path, arrays, durable=True)

    @classmethod
    def read(cls, path: Path) -> Index:
        """Raises one of arrays.UNREADABLE, or TypeError."""
        arrays = read_arrays(path)
        if int(arrays["version"]) != VERSION:
            raise ValueError(f"version {arrays['version']}, supported is {VERSION}")
        classes, names = list(Names.from_arrays(arrays, "class")), Names.from_arrays(arrays, "name")
        columns = [arrays[name] for name in ("shard", "offset", "length", "label")]
        crc32 = arrays.get("crc32")
        index = cls(classes, arrays["shard_bytes"], *columns, crc32, names)
        index._check()
        return index

    def _check(self) -> None:
        known = [self.shard, self.offset, self.length, self.label] + [self.crc32] * (self.crc32 is not None)
        if any(column.shape != (len(self.names),) or column.dtype.kind not in "iu" for column in known):
            raise ValueError("columns of different lengths")
        if not len(self.names):
            raise ValueError("no samples")
        for start in range(0, len(self.names), BLOCK):
            self._check_rows(slice(start, start + BLOCK))

    def _check_rows(self, rows: slice) -> None:
        shard, offset, length, label = (
            column[rows] for column in (self.shard, self.offset, self.length, self.label)
        )
        if shard.max() >= len(self.shard_bytes) or label.max() >= len(self.classes):
            raise ValueError("a sample without a shard or a class")
        if min(offset.min(), length.min(), label.min()) < 0:
            raise ValueError("a sample with a negative offset, length or label")
        if (offset + length > self.shard_bytes[shard]).any():
            raise ValueError("a sample beyond the end of its shard")


class ShardStore:
    """Samples as byte ranges of a few large files. Thread-safe; a read is one pread."""

    left_out: Sequence[LeftOut] = ()
    _folder: Path | None = None  # with the index in it

    def __init__(self, files: list[Path], index: Index) -> None:
        self._paths, self._index = files, index
        self.classes = tuple(os.fsdecode(name) for name in index.classes)
        self.labels, self.names = index.label.astype(np.int64, copy=False), index.names
        self._files = _Files(files, index.shard_bytes)

    @classmethod
    def open(cls, folder: Path) -> ShardStore:
        """The shards of one split; DataError if the index is damaged or a shard is missing."""
        path = folder / INDEX
        again = "rebuild the data set with `owt data pack` or `owt data prepare`"
        try:
            index = Index.read(path)
        except (*UNREADABLE, TypeError) as error:
            if isinstance(error, OSError) and error.errno and not is_of_the_file(error):
                raise machine_error(error, f"cannot read {path}") from error
            raise DataError(f"{path} cannot be used: {error}", fix=again) from error
        files = [folder / shard_name(number) for number in range(len(index.shard_bytes))]
        for file, wanted in zip(files, index.shard_bytes.tolist(), strict=True):
            try:
                saw = os.stat(file).st_size
            except OSError as error:
                if not is_of_the_file(error):
                    raise machine_error(error, f"cannot read {file}") from error
                raise DataError(f"{file} cannot be read: {error.strerror}", fix=again) from error
            if saw != wanted:
                raise DataError(f"{file} has {saw} bytes", wanted=f"{wanted}, as in {path.name}", fix=again)
        store = cls(files, index)
        store._folder = folder
        store.left_out = _beside(folder, {os.fsencode(file.name) for file in files})
        return store

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """`SHARD: CLASS/NAME`, for messages."""
        member = os.path.join(self.classes[self.labels[index]], os.fsdecode(self.name(index)))
        return f"{self._paths[self._index.shard[index]]}: {member}"

    def name(self, index: int) -> bytes:
        return self.names[index]

    def read(self, index: int) -> bytes:
        return with_retries(self._read_once, index, self.path)

    def check(self, index: int, data: bytes) -> str | None:
        """Compare bytes read with the crc32 in the index: None if they match or it is unknown."""
        if self._index.crc32 is None or zlib.crc32(data) == self._index.crc32[index]:
            return None
        return f"crc32 {zlib.crc32(data):08x}, in {INDEX} {self._index.crc32[index]:08x}"

    def sizes_and_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of each sample, and its checksum in place of an mtime (0 if unknown)."""
        crc32 = self._index.crc32
        return self._index.length, np.zeros(len(self), np.int64) if crc32 is None else crc32.astype(np.int64)

    def stamp(self, index: int) -> int:
        """64 bits that change with the image: its checksum and length; if unknown, those of its shard."""
        row = self._index
        if row.crc32 is not None:
            return int(row.crc32[index]) << 32 | int(row.length[index]) & 0xFFFFFFFF
        return stamp_of(os.stat(self._paths[row.shard[index]]), int(row.offset[index]))

    def empty_classes(self) -> list[str]:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    def _read_once(self, index: int) -> bytes:
        row = self._index
        shard, offset, length = int(row.shard[index]), int(row.offset[index]), int(row.length[index])
        with self._files.opened(shard) as descriptor:
            data = os.pread(descriptor, length, offset)
            while (
                len(data) < length
            ):  # a network file system may return less; a truncated file returns nothing
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    missing = length - len(data)
                    raise OSError(errno.EIO, f"the shard ends within the sample, {missing} bytes missing")
                data += more
        return data

    def __reduce__(self):
        """Another process opens the folder itself: a mapped index would be copied into it."""
        if self._folder is not None:
            return ShardStore.open, (self._folder,)
        return ShardStore, (self._paths, self._index)


def _beside(folder: Path, shards: set[bytes]) -> list[LeftOut]:
    """Other shards than those of the index, and folders of images."""
    found = []
    for entry in scan(os.fsencode(folder)):
        other_shard = entry.name.endswith(b".tar") and entry.name not in shards
        images = images_below(entry.path) if entry.is_dir() else int(other_shard)
        if images:
            found.append(LeftOut(os.fsdecode(entry.path), f"not in {INDEX}", images))
    return sorted(found)


def open_files_limit() -> int:
    """Shards that may be open at a time."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // OPEN_SHARE))


class _Files:
    """Open files by number: opened on first use; over the limit the least recently used is closed."""

    def __init__(self, paths: list[Path], sizes: np.ndarray) -> None:
        self._paths, self._sizes = paths, sizes
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _File] = OrderedDict()  # least recently used first

    @contextmanager
    def opened(self, number: int) -> Iterator[int]:
        """A descriptor that stays open within the block; after a transient error the file is reopened."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = self._newly_opened(number)
            self._open.move_to_end(number)
            file.users += 1
        failed = False
        try:
            yield file.descriptor
        except OSError as error:
            failed = error.errno in TRANSIENT or error.errno == errno.EBADF
            raise
        finally:
            with self._lock:
                file.users -= 1
                if failed and self._open.get(number) is file:
                    del self._open[number]
                if file.users == 0 and self._open.get(number) is not file:
                    file.close()

    def _newly_opened(self, number: int) -> _File:
        while len(self._open) >= open_files_limit():
            self._close_oldest()
        try:
            return _File(self._paths[number], int(self._sizes[number]))
        except OSError as error:
            if error.errno not in EXHAUSTED or not self._open:
                raise
        while self._open:  # something else has taken all that the process may open
            self._close_oldest()
        return _File(self._paths[number], int(self._sizes[number]))

    def _close_oldest(self) -> None:
        _, file = self._open.popitem(last=False)
        if file.users == 0:  # otherwise its last user closes it
            file.close()

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()


class _File:
    def __init__(self, path: Path, size: int) -> None:
        self.users = 0
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if is_of_the_file(error):  # of the shard, that is: no fault of the one image that is read
                raise OSError(errno.ESTALE, f"{path.name}: {error.strerror}") from None
            raise
        if (saw := os.fstat(self.descriptor).st_size) != size:
            self.close()
            raise OSError(errno.ESTALE, f"the file has {saw} bytes, {size} in {INDEX}")

    def close(self) -> None:
        os.close(self.descriptor)
