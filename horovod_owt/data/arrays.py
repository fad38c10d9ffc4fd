"""Arrays and names in one .npz file, the format of data set indices. Nothing is pickled."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from horovod_owt.files import atomic_file

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
)  # what reading a damaged file raises
MAP_FROM = 64 << 20  # bytes of an array in a file that is mapped, not copied
BLOCK = 1 << 20  # bytes or rows that are worked on at a time


class Names:
    """Many byte strings in one blob; a name costs its bytes plus eight, and is an object only while used."""

    def __init__(self, blob: bytes | np.ndarray, ends: np.ndarray) -> None:
        """`blob` is bytes or a uint8 array; `ends` are (n + 1,) int64, from 0."""
        self.blob, self.ends = blob, ends

    @classmethod
    def joined(cls, names: Iterable[bytes]) -> Names:
        rest, blobs, lengths = iter(names), [], [np.empty(0, np.int64)]
        while block := list(islice(rest, BLOCK)):
            blobs.append(b"".join(block))
            lengths.append(np.fromiter(map(len, block), np.int64, len(block)))
        return cls(b"".join(blobs), ends_of(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return bytes(self.blob[self.ends[index] : self.ends[index + 1]])

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), BLOCK):
            ends = self.ends[start : start + BLOCK + 1].tolist()
            yield from (bytes(self.blob[start:end]) for start, end in zip(ends, ends[1:], strict=False))

    def separated(self) -> Iterator[np.ndarray]:
        """What b"\\0".join gives of all names, in pieces."""
        for start in range(0, len(self), BLOCK):
            part = self.part(start, min(start + BLOCK, len(self)))
            last = start + len(part) == len(self)
            yield np.insert(np.frombuffer(part.blob, np.uint8), part.ends[1 : -1 if last else None], 0)

    def part(self, start: int, stop: int) -> Names:
        ends = self.ends[start : stop + 1]
        return Names(self.blob[ends[0] : ends[-1]], ends - ends[0])

    @classmethod
    def chained(cls, parts: list[Names]) -> Names:
        lengths = [np.diff(part.ends) for part in parts]
        return cls(b"".join(part.blob for part in parts), ends_of(np.concatenate([*lengths, []])))

    def to_arrays(self, name: str) -> dict[str, np.ndarray]:
        return {f"{name}_bytes": np.frombuffer(self.blob, np.uint8), f"{name}_ends": self.ends}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str) -> Names:
        """Raises ValueError or KeyError if they are inconsistent."""
        blob, ends = arrays[f"{name}_bytes"], arrays[f"{name}_ends"]
        fit = ends.ndim == blob.ndim == 1 and ends.dtype == np.int64 and blob.dtype == np.uint8 and len(ends)
        if not fit or ends[0] != 0 or ends[-1] != len(blob) or not _is_ascending(ends):
            raise ValueError(f"{name}: bytes and ends are inconsistent")
        return cls(blob, ends)


def ends_of(lengths: np.ndarray) -> np.ndarray:
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def _is_ascending(values: np.ndarray) -> bool:
    return all(
        (np.diff(values[start : start + BLOCK + 1]) >= 0).all() for start in range(0, len(values), BLOCK)
    )


def write_arrays(path: Path, arrays: dict[str, np.ndarray], *, durable: bool = False) -> None:
    """Write an uncompressed .npz atomically; the same arrays give the same bytes, unlike np.savez."""
    with atomic_file(path, durable=durable) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def read_arrays(path: Path | BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of an .npz, with checksums verified; raises one of UNREADABLE.

    Those of MAP_FROM bytes or more are mapped read-only: the ranks of a host share one copy, in the page
    cache. Such a file must be replaced, never written in place, or the process gets a SIGBUS.
    """
    with zipfile.ZipFile(path) as archive:
        return {
            entry.filename.removesuffix(".npy"): _read_array(archive, entry) for entry in archive.infolist()
        }


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        if entry.file_size < MAP_FROM or entry.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member, allow_pickle=False)
        version = np.lib.format.read_magic(member)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        header_bytes = member.tell()
        if version != (1, 0) or fortran_order or dtype.hasobject:  # not as `write_arrays` writes
            raise ValueError(f"{entry.filename}: an array of another kind")
        while member.read(BLOCK):  # to the end: the checksum is compared there
            pass
    # the local header's own lengths of name and extra field, which may differ from the directory's
    local = os.pread(archive.fp.fileno(), 30, entry.header_offset)
    skipped = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return np.memmap(archive.fp, dtype, "r", entry.header_offset + skipped + header_bytes, shape)
