"""A data set on disk: the interface that feeds use, and how it is opened."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from horovod_owt.data.arrays import Names
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.listing import BELOW_CLASS, LAYOUT, LeftOut, left_out_text, scan
from horovod_owt.data.shards import INDEX, ShardStore, shard_name
from horovod_owt.errors import DataError

SPLITS = ("train", "val")
UNFINISHED = ".unfinished"  # the folder in which prepare and pack work until all is complete


class Store(Protocol):
    """The interface of one split of a data set."""

    classes: tuple[str, ...]  # label -> class name
    labels: np.ndarray  # index -> label, int64
    names: Names  # index -> file name, without its class folder
    left_out: Sequence[LeftOut]  # what looks like images but is not read

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...  # OSError, after retries of transient errors
    def check(self, index: int, data: bytes) -> str | None: ...  # the fault of bytes that were read
    def path(self, index: int) -> str: ...  # for messages
    def stamp(self, index: int) -> int: ...  # 64 bits that change with the image; OSError
    def name(self, index: int) -> bytes: ...  # file name, without its class folder
    def empty_classes(self) -> list[str]: ...

    def sizes_and_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 arrays: the bytes of each sample, and a number that changes with its content."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Both splits of a data set, with the same classes."""

    train: Store
    val: Store

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def left_out(self) -> list[LeftOut]:
        """What looks like images but is not read, of both splits."""
        return [*self.train.left_out, *self.val.left_out]

    def fingerprint(self) -> str:
        """Counts, and a hash of names and labels: equal for all copies; packed ones have other names."""
        return self._fingerprint

    @cached_property  # takes 0.1 s for a million names
    def _fingerprint(self) -> str:
        return fingerprint(self.train, self.val)

    def through(self, train: Store, val: Store) -> DataSet:
        """The same images, read through other stores."""
        other = replace(self, train=train, val=val)
        other.__dict__["_fingerprint"] = self._fingerprint
        return other

    def identity(self) -> dict[str, Any]:
        """The fingerprint, and details that show how another data set differs; stored in checkpoints."""
        return {
            "fingerprint": self.fingerprint(),
            "train_images": len(self.train),
            "val_images": len(self.val),
            "classes": list(self.classes),
        }


def fingerprint(*splits: Store) -> str:
    """Counts, and a hash of names and labels."""
    digest = hashlib.sha256()
    for store in splits:
        digest.update(os.fsencode("\0".join(store.classes)))
        digest.update(np.ascontiguousarray(store.labels))
        for names in store.names.separated():
            digest.update(names)
    counts = f"{' + '.join(str(len(store)) for store in splits)} images of {len(splits[0].classes)} classes"
    return f"{counts}, sha256 {digest.hexdigest()[:12]}"


def open_validation_set(root: Path) -> Store:
    """Open `root`'s split `val`; `train` may be missing. Raises DataError."""
    root = Path(root)
    _check_root(root, ("val",))
    return _open_split(root / "val")


def open_data_set(root: Path) -> DataSet:
    """Open both splits of `root`, each a folder of class folders or packed; raises DataError.

    They must have the same classes.
    """
    root = Path(root)
    _check_root(root, SPLITS)
    train, val = (_open_split(root / split) for split in SPLITS)
    if train.classes != val.classes:
        only_train, only_val = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
        raise DataError(
            f"{root}: train has {len(train.classes)} classes ({first_few(only_train) or 'none'} only there), "
            f"val has {len(val.classes)} ({first_few(only_val) or 'none'} only there)",
            wanted="the same class folders in both",
            fix=_twins(only_train, only_val) or "move or remove the extra folders",
        )
    return DataSet(train, val)


def _twins(only_train: Iterable[str], only_val: Iterable[str]) -> str:
    """The fix for two names that look alike; empty if there are none.

    Macs decompose accents, other systems ignore case, and a blank at the end is not seen.
    """

    def looks(name: str) -> str:
        return unicodedata.normalize("NFKC", name).casefold().strip()

    in_train = {looks(name): name for name in sorted(only_train)}
    for name in sorted(only_val):
        if twin := in_train.get(looks(name)):
            return f"rename {ascii(name)} in val to {ascii(twin)}, as it is in train"
    return ""


def _check_root(root: Path, wanted: Sequence[str]) -> None:
    if not os.path.lexists(root):
        saw = f"{root} does not exist"
        raise DataError(saw, wanted=f"a folder with {LAYOUT}", fix="pass the path of the data set")
    entries = scan(os.fsencode(root))
    # of these alone: a link beside them may lead to where this user must not look
    folders = {name for entry in entries if (name := os.fsdecode(entry.name)) in wanted and entry.is_dir()}
    if missing := [split for split in wanted if split not in folders]:
        if (root / UNFINISHED).is_dir():
            fix = "run the command that makes it again: it continues"
            raise DataError(f"{root} is not finished", wanted="a complete data set", fix=fix)
        names = [os.fsdecode(entry.name) for entry in entries]
        content = f"contains {first_few(names)}" if names else "is empty"
        raise DataError(
            f"{root} {content}: no folder {' nor '.join(missing)}",
            wanted=f"{LAYOUT} below it",
            fix=f"pass the folder that contains {' and '.join(wanted)}, or make one with `owt data synth`",
        )


def _open_split(folder: Path) -> Store:
    store = ShardStore.open(folder) if os.path.exists(folder / INDEX) else FolderStore(folder)
    if not store.classes:
        if os.path.exists(folder / shard_name(0)):
            fix = "copy the index too, or unpack the shards: `tar x`"
            raise DataError(f"{folder} has shards, but no {INDEX}", wanted="both", fix=fix)
        raise _no_classes(folder, store)
    if empty := store.empty_classes():
        left_out = f"; {left_out_text(store.left_out)}" if store.left_out else ""
        counts = f"{len(empty)} of {len(store.classes)} empty"
        deeper = any(each.reason == BELOW_CLASS for each in store.left_out)  # as in Tiny ImageNet
        raise DataError(
            f"{folder}: no image in class {first_few(empty)} ({counts}){left_out}",
            wanted="at least one .JPEG, .jpg or .png in each class",
            fix="move the images up, directly into the folder of their class"
            if deeper
            else "fill or remove the folder, in train and in val",
        )
    return store


def _no_classes(folder: Path, store: Store) -> DataError:
    """The error for a split without class folders, as unpacking ILSVRC2012's archives leaves it."""
    names = [os.fsdecode(entry.name) for entry in scan(os.fsencode(folder))]
    archives = [name for name in names if name.endswith(".tar")]
    saw = f"{folder} has no class folders"
    if images := sum(each.images for each in store.left_out):
        saw += f", but {images} images outside of one"
    elif archives:
        saw += f", but archives: {first_few(archives)}"
    else:
        return DataError(saw, wanted=LAYOUT)
    fix = "make a folder for each class; for ILSVRC2012, `owt data prepare` does from the archives"
    return DataError(saw, wanted=LAYOUT, fix=fix)


def first_few(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
