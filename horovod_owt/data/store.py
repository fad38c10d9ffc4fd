"""A data set on disk: what a feed asks of it, and how it is opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from horovod_owt.data.folder import FolderStore
from horovod_owt.data.listing import LAYOUT, scan
from horovod_owt.data.shards import INDEX, ShardStore, shard_name
from horovod_owt.errors import DataError

SPLITS = ("train", "val")
UNFINISHED = ".unfinished"  # the folder in which prepare and pack work until all is there


class Store(Protocol):
    """What a feed asks of a data set: anything with these reads as one."""

    classes: tuple[str, ...]  # label -> class name
    labels: np.ndarray  # index -> label, int64

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...  # OSError; trouble in passing is waited for
    def check(self, index: int, data: bytes) -> str | None: ...  # what is wrong with bytes read, if known
    def path(self, index: int) -> str: ...  # for messages
    def name(self, index: int) -> bytes: ...  # the file's, without its class
    def empty_classes(self) -> list[str]: ...

    def sizes_and_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 of each sample: its bytes, and a number that changes when it does."""
        ...


@dataclass(frozen=True)
class DataSet:
    """A data set with the same classes on both sides."""

    train: Store
    val: Store

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def fingerprint(self) -> str:
        """What two copies of a data set have in common, in whatever form: counts, names and labels."""
        return self._fingerprint

    @cached_property  # a million names take a second
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for store in (self.train, self.val):
            digest.update("\0".join(store.classes).encode(errors="surrogateescape"))
            digest.update(store.labels.tobytes())
            digest.update(b"\0".join(map(store.name, range(len(store)))))
        counts = f"{len(self.train)} + {len(self.val)} images of {len(self.classes)} classes"
        return f"{counts}, sha256 {digest.hexdigest()[:12]}"

    def identity(self) -> dict[str, Any]:
        """The fingerprint, and what tells in which way another one differs: for the state of checkpoints."""
        return {
            "fingerprint": self.fingerprint(),
            "train_images": len(self.train),
            "val_images": len(self.val),
            "classes": list(self.classes),
        }


def open_data_set(root: Path) -> DataSet:
    """Open both splits of `root`, each a folder of class folders or packed; raises DataError.

    They must have the same classes.
    """
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
    return DataSet(train, val)


def _check_root(root: Path) -> None:
    if not os.path.lexists(root):
        saw = f"{root} does not exist"
        raise DataError(saw, wanted=f"a folder with {LAYOUT}", fix="give the path of the data set")
    entries = scan(os.fsencode(root))
    folders = {os.fsdecode(entry.name) for entry in entries if entry.is_dir()}
    if missing := [split for split in SPLITS if split not in folders]:
        if (root / UNFINISHED).is_dir():
            fix = "run the command that makes it again: it goes on where it stopped"
            raise DataError(f"{root} is not finished", wanted="a whole data set", fix=fix)
        names = [os.fsdecode(entry.name) for entry in entries]
        holds = f"holds {first_few(names)}" if names else "is empty"
        raise DataError(
            f"{root} {holds}: no folder {' nor '.join(missing)}",
            wanted=f"{LAYOUT} below it",
            fix="give the folder above train and val, or make one with `owt data synth`",
        )


def _open_split(folder: Path) -> Store:
    store = ShardStore.open(folder) if os.path.exists(folder / INDEX) else FolderStore(folder)
    if not store.classes:
        if os.path.exists(folder / shard_name(0)):
            fix = "copy the index too, or unpack the shards: `tar x`"
            raise DataError(f"{folder} has shards, but no {INDEX}", wanted="both", fix=fix)
        raise DataError(f"{folder} has no class folders", wanted=LAYOUT)
    if empty := store.empty_classes():
        raise DataError(
            f"{folder}: no image in class {first_few(empty)} ({len(empty)} of {len(store.classes)} empty)",
            wanted="at least one .JPEG, .jpg or .png in each class",
            fix="fill or remove the folder, in train and in val",
        )
    return store


def first_few(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
