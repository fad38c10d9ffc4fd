"""Images that are no data set: files, folders and lists that a user names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from horovod_owt.data.faults import read_fault
from horovod_owt.data.listing import OTHER_SUFFIXES, SUFFIXES, LeftOut
from horovod_owt.data.machine import EXHAUSTED
from horovod_owt.data.retry import with_retries

FROM_STDIN = "-"


class PathStore:
    """Images by path, as a store that feeds can read; all have label 0."""

    classes: tuple[str, ...] = ("",)
    left_out: Sequence[LeftOut] = ()

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self.labels = np.zeros(len(paths), np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        """Raises ValueError with the fault, whatever keeps a path from being read: the others count."""
        try:
            return with_retries(lambda index: Path(self._paths[index]).read_bytes(), index, self.path)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            raise ValueError(read_fault(error)) from error


def named_images(words: Iterable[str], stdin: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, fault) of each image that `words` name, in order: files, folders, `-` for lines of `stdin`.

    A folder stands for the files below it with the suffix of an image, also through links. A fault is a
    folder without images, or one that cannot be listed; whether a file is an image is not looked at.
    """
    for word in words:
        if word == FROM_STDIN:
            lines = (line.rstrip("\r\n") for line in stdin)
            yield from named_images((line for line in lines if line and line != FROM_STDIN), ())
        elif os.path.isdir(word):
            yield from _below(word)
        else:
            yield word, ""


def _below(folder: str) -> Iterator[tuple[str, str]]:
    faults: list[tuple[str, str]] = []
    images: list[str] = []
    suffixes = tuple(map(os.fsdecode, (*SUFFIXES, *OTHER_SUFFIXES)))
    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        """Not a link to a parent, which would have no end, nor another one to the same folder."""
        real = os.path.realpath(path)
        return not (real in seen or seen.add(real))

    walk = os.walk(
        folder,
        onerror=lambda error: faults.append((error.filename, f"cannot be listed: {error.strerror}")),
        followlinks=True,
    )
    for place, folders, names in walk:
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if is_new(os.path.join(place, name))]
        images += [
            os.path.join(place, name)
            for name in sorted(names)
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    yield from ((image, "") for image in images)
    yield from faults if images or faults else [(folder, "no image in this folder")]
