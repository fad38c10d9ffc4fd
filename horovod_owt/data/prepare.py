"""Make a data set from the published files of ILSVRC2012: owt data prepare."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.data import staging
from horovod_owt.data.arrays import UNREADABLE, read_arrays, write_arrays
from horovod_owt.data.build import Form, Progress, make
from horovod_owt.data.ilsvrc2012 import (
    OFFICIAL,
    Contents,
    Published,
    make_stores,
    open_checked,
    read_checksums,
    read_devkit,
    take_md5,
)
from horovod_owt.data.staging import Staging
from horovod_owt.data.workers import usable_cores
from horovod_owt.errors import DataError
from horovod_owt.files import real_path

KINDS = dict(zip(("train", "val", "devkit"), OFFICIAL, strict=True))  # official names
_NESTED = {"train": True, "val": False, "devkit": None}


@dataclass(frozen=True)
class Originals:
    """The three files and their published sizes and checksums."""

    train: Path
    val: Path
    devkit: Path
    published: dict[str, Published]  # by kind

    @classmethod
    def named(cls, train: Path, val: Path, devkit: Path, checksums: Path | None) -> Originals:
        """Raises DataError if `checksums` lacks one of them."""
        paths = {"train": Path(train), "val": Path(val), "devkit": Path(devkit)}
        if checksums is None:
            published = {kind: OFFICIAL[name] for kind, name in KINDS.items()}
        else:
            listed = read_checksums(Path(checksums))
            if missing := [path.name for path in paths.values() if path.name not in listed]:
                raise DataError(f"{checksums} has no line for {missing[0]}", wanted="a line for each file")
            published = {kind: listed[path.name] for kind, path in paths.items()}
        return cls(**{kind: real_path(path) for kind, path in paths.items()}, published=published)


def prepare(
    out: Path,
    originals: Originals,
    form: Form,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict, bool]:
    """Write the data set to `out`. Returns the totals, and False if it was complete already.

    After a kill the same call continues; a file whose checksum was verified is not verified again while its
    size and mtime are unchanged. Raises DataError.
    """
    form.check()
    with ExitStack() as stack:
        for (
            kind,
            published,
        ) in originals.published.items():  # before an hour is spent on one
            stack.enter_context(open_checked(getattr(originals, kind), published))
    md5 = {kind: published.md5 for kind, published in originals.published.items()}
    spec = {"made_by": "owt data prepare", "md5": md5, **form.spec()}
    with staging.opened(out, spec) as place:
        if done := place.finished:
            return done, False
        devkit = read_devkit(_checked(place, originals, "devkit", progress)[0])
        train_tar, train = _checked(place, originals, "train", progress)
        val_tar, val = _checked(place, originals, "val", progress)
        stores = make_stores(train_tar, train, val_tar, val, devkit)
        return make(place, stores, form, workers=workers or usable_cores(), progress=progress), True


def _checked(
    place: Staging, originals: Originals, kind: str, progress: Progress | None
) -> tuple[Path, Contents | None]:
    """The file and its contents, from a pass over it now or in an earlier run."""
    path, published, nested = getattr(originals, kind), originals.published[kind], _NESTED[kind]
    arrays, note = place.folder / f"{kind}.npz", f"{kind}.json"
    with open_checked(path, published) as file:
        found = os.fstat(file.fileno())
        seen = {"path": str(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns, "md5": published.md5}
        if place.recall(note) == seen:
            try:
                return path, None if nested is None else Contents.from_arrays(read_arrays(arrays))
            except UNREADABLE:
                pass  # a damaged record counts as none
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(f"checking {path.name}", done, found.st_size, "B")

        contents = take_md5(file, path, published, tell, nested=nested)
    if contents is not None:
        write_arrays(arrays, contents.to_arrays(), durable=True)
    place.remember(note, seen)
    return path, contents
