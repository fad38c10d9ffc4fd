"""Samples on disk: an image folder ROOT/SPLIT/CLASS/*.JPEG, read by index."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from horovod_owt.errors import DataError

SPLITS = ("train", "val")
SUFFIXES = (b".jpeg", b".jpg", b".png")
LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"


class Store(Protocol):
    """What a feed asks of a data set: anything with these reads as one."""

    classes: tuple[str, ...]  # label -> class name
    labels: np.ndarray  # index -> label, int64

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def path(self, index: int) -> str: ...  # for messages


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


@dataclass(frozen=True)
class ImageFolder:
    """A data set with the same classes on both sides."""

    train: FolderStore
    val: FolderStore

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def open_image_folder(root: Path) -> ImageFolder:
    """List both splits of `root` and check that they fit together; raises DataError."""
    root = Path(root)
    _check_root(root)
    train, val = (_open_split(root / split) for split in SPLITS)
    if train.classes != val.classes:
        only_train, only_val = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
        raise DataError(
            f"{root}: train has {len(train.classes)} classes ({first_few(only_train) or 'none'} only there), "
            f"val has {len(val.classes)} ({first_few(only_val) or 'none'} only there)",
            wanted="the same class folders in both",
            fix="move or remove the odd ones",
        )
    return ImageFolder(train, val)


def _check_root(root: Path) -> None:
    if not os.path.lexists(root):
        saw = f"{root} does not exist"
        raise DataError(saw, wanted=f"a folder with {LAYOUT}", fix="give the path of the data set")
    entries = _scan(os.fsencode(root))
    folders = {os.fsdecode(entry.name) for entry in entries if entry.is_dir()}
    if missing := [split for split in SPLITS if split not in folders]:
        names = [os.fsdecode(entry.name) for entry in entries]
        holds = f"holds {first_few(names)}" if names else "is empty"
        raise DataError(
            f"{root} {holds}: no folder {' nor '.join(missing)}",
            wanted=f"{LAYOUT} below it",
            fix="give the folder above train and val, or make one with `owt data synth`",
        )


def _open_split(folder: Path) -> FolderStore:
    store = FolderStore(folder)
    if not store.classes:
        raise DataError(f"{folder} has no class folders", wanted=LAYOUT)
    if empty := store.empty_classes():
        raise DataError(
            f"{folder}: no image in class {first_few(empty)} ({len(empty)} of {len(store.classes)} empty)",
            wanted="at least one .JPEG, .jpg or .png in each class",
            fix="fill or remove the folder, in train and in val",
        )
    return store


def _class_folders(folder: bytes) -> list[bytes]:
    return sorted(entry.name for entry in _scan(folder) if entry.is_dir())


def _image_names(folder: bytes) -> list[bytes]:
    images = (entry for entry in _scan(folder) if entry.name.lower().endswith(SUFFIXES))
    return sorted(entry.name for entry in images if entry.is_file())


def _scan(folder: bytes) -> list[os.DirEntry[bytes]]:
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


def first_few(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
