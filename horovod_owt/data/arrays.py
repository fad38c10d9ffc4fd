"""Arrays and names in one .npz file, the format of data set indices. Nothing is pickled."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
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


class Names:
    """Many byte strings in one blob; a name costs its bytes plus eight."""

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends  # ends: (n + 1,) int64, from 0

    @classmethod
    def joined(cls, names: Iterable[bytes]) -> Names:
        names = list(names)
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        return cls(b"".join(names), ends_of(lengths))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.ends[index] : self.ends[index + 1]]

    def __iter__(self) -> Iterator[bytes]:
        ends = self.ends.tolist()
        return (self.blob[start:end] for start, end in zip(ends, ends[1:], strict=False))

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
        if not fit or ends[0] != 0 or ends[-1] != len(blob) or (np.diff(ends) < 0).any():
            raise ValueError(f"{name}: bytes and ends are inconsistent")
        return cls(blob.tobytes(), ends)


def ends_of(lengths: np.ndarray) -> np.ndarray:
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def write_arrays(path: Path, arrays: dict[str, np.ndarray], *, durable: bool = False) -> None:
    """Write an uncompressed .npz atomically; the same arrays give the same bytes, unlike np.savez."""
    with atomic_file(path, durable=durable) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def read_arrays(path: Path | BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of an .npz, with checksums verified; raises one of UNREADABLE."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
