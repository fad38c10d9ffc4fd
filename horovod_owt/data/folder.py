"""Samples in a folder of class folders: SPLIT/CLASS/*.JPEG, one file each."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from horovod_owt.errors import DataError

SUFFIXES = (b".jpeg", b".jpg", b".png")
LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"


class FolderStore:
    """The images under one split: classes in sorted order, files in sorted order within a class.

    File names live in one blob, so a sample costs its name, an offset and a label: about 40 bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.fsencode(folder)
        self._class_names = _class_folders(self._folder)
        self.classes = tuple(os.fsdecode(name) for name in self._class_names)
        pieces, lengths, counts = [], [], []
        for name in self._class_names:
            images = _image_names(os.path.join(self._folder, name))
            pieces.append(b"".join(images))
            lengths.append(np.fromiter(map(len, images), np.int64, len(images)))
            counts.append(len(images))
        self._names = b"".join(pieces)
        self._ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        self._counts = counts
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def read(self, index: int) -> bytes:
        with open(self._path(index), "rb", buffering=0) as file:
            return file.read()

    def empty_classes(self) -> list[str]:
        return [name for name, count in zip(self.classes, self._counts, strict=True) if not count]

    def _path(self, index: int) -> bytes:
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return os.path.join(self._folder, self._class_names[self.labels[index]], name)


def _class_folders(folder: bytes) -> list[bytes]:
    return sorted(entry.name for entry in scan(folder) if entry.is_dir())


def _image_names(folder: bytes) -> list[bytes]:
    images = (entry for entry in scan(folder) if entry.name.lower().endswith(SUFFIXES))
    return sorted(entry.name for entry in images if entry.is_file())


def scan(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What is in a folder, without hidden entries (._n01440764_18.JPEG, .snapshot, ...)."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(b".")]
        if not os.access(folder, os.X_OK):  # listed, but nothing in it can be opened
            raise PermissionError
    except PermissionError:
        raise DataError(
            f"{os.fsdecode(folder)} may not be read by user {os.geteuid()}",
            fix=f"chmod -R a+rX {os.fsdecode(folder)}, or run as its owner",
        ) from None
    except NotADirectoryError:
        raise DataError(f"{os.fsdecode(folder)} is not a folder", wanted=f"a folder with {LAYOUT}") from None
    except OSError as trouble:  # a dangling link, a stale NFS handle
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {trouble.strerror}") from trouble
    return found
