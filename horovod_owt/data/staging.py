"""An output folder that a long command fills; killed and started again, the command continues.

Everything is written to OUT/.unfinished and moved to its place at the very end, so that a partial data set is
never taken for a complete one. A note records what is being made; a command with other options is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from horovod_owt.data.machine import reason_of
from horovod_owt.data.store import SPLITS, UNFINISHED, first_few
from horovod_owt.errors import DataError, fix_of
from horovod_owt.files import real_path, write_text
from horovod_owt.filesystem import free_space, locked, remove_tree, rename_folder, sync

log = logging.getLogger(__name__)

NOTE = "owt-data.json"  # in a finished data set: what it was made from


class Staging:
    """OUT, locked for writing; made by `opened`."""

    def __init__(self, out: Path, spec: dict) -> None:
        self.out, self.spec = out, spec
        self.folder = out / UNFINISHED
        self.scratch = self.folder / "scratch"  # for files being written; emptied at each start

    @property
    def finished(self) -> dict | None:
        """The note, if the data set is complete."""
        return read_json(self.out / NOTE)

    def split_is_done(self, split: str) -> bool:
        """Whether this split has been moved to its place, all of it."""
        return (self.out / split).is_dir() and not (self.folder / split).exists()

    def recall(self, name: str) -> dict | None:
        return read_json(self.folder / name)

    def remember(self, name: str, what: dict) -> None:
        write_json(self.folder / name, what)

    def finish(self, facts: dict) -> None:
        """Move the splits to their places and write the note, with `facts`."""
        for split in SPLITS:
            if not self.split_is_done(split):
                rename_folder(self.folder / split, self.out / split, merge=True)
        sync(self.out)
        write_json(self.out / NOTE, {**self.spec, **facts})

    def clean(self) -> None:
        """Remove the folder, which a finished data set does not need."""
        try:
            remove_tree(self.folder)
        except OSError as error:
            log.warning("%s is not needed any more, but stays: %s", self.folder, error.strerror)


@contextmanager
def opened(out: Path, spec: dict) -> Iterator[Staging]:
    """The staging folder for `spec` (plain JSON), new or as a killed command left it.

    Raises DataError if OUT contains anything else, and for any OSError within the block.
    """
    out = real_path(out)
    place = Staging(out, spec)
    try:
        _check(out)
        if place.finished:
            _check_same(place, place.finished)
            _check_complete(out)
            yield place
        else:
            place.folder.mkdir(parents=True, exist_ok=True)
            with _alone(place.folder, out):
                _claim(place)
                yield place
        if place.finished:
            place.clean()  # with the lock closed: NFS and FUSE keep deleted files while they are open
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if error.filename else out
        own = not file.is_absolute() or out in (file, *file.parents) or file in out.parents
        saw = f"cannot write to {out}" if own else f"cannot read {file}"
        raise DataError(f"{saw}: {reason_of(error)}", fix=fix_of(error)) from error


def _check(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file", wanted="a new or empty folder", fix="choose another name")
    found = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if NOTE in found:  # a finished set; other files next to it do not matter
        return
    visible = {name for name in found if not name.startswith(".")} - {"lost+found"}  # of a whole disk
    if foreign := visible - set(SPLITS) if UNFINISHED in found else visible:
        raise DataError(
            f"{out} is not empty: it contains {first_few(foreign)}",
            wanted="a new or empty folder",
            fix="choose another name, or remove it",
        )


def _claim(place: Staging) -> None:
    if place.finished:  # by another command, since it was checked
        return _check_same(place, place.finished)
    begun = place.recall("spec.json")
    if begun is not None:
        _check_same(place, begun)
    elif (place.out / NOTE).exists() or any((place.out / split).exists() for split in SPLITS):
        raise DataError(f"unreadable {place.out / NOTE}", fix="choose another name, or remove the folder")
    else:
        place.remember("spec.json", place.spec)
    shutil.rmtree(place.scratch, ignore_errors=True)
    place.scratch.mkdir(exist_ok=True)  # it stays where a killed command's open files linger


def _check_same(place: Staging, begun: dict) -> None:
    """Raise DataError if the folder belongs to another command."""
    if differ := [key for key in place.spec if begun.get(key) != place.spec[key]]:
        shown = ", ".join(f"{key} {_short(begun.get(key))}, not {_short(place.spec[key])}" for key in differ)
        state = "contains" if place.finished else "is unfinished and belongs to"
        raise DataError(
            f"{place.out} {state} another data set ({shown})",
            wanted="the same command, unchanged, or a new folder",
            fix="choose another name, or remove it",
        )


def _check_complete(out: Path) -> None:
    """Raise DataError if a finished data set has lost a split."""
    if lost := [split for split in SPLITS if not (out / split).is_dir()]:
        fix = "remove it: the same command makes it again"
        raise DataError(f"{out} was complete, and has no folder {lost[0]} now", wanted="both", fix=fix)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}...{text[-4:]}"


@contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """Lock the folder against a second command."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(locked(folder / "lock"))
        except BlockingIOError:
            raise DataError(f"{out} is being written by another command", fix="wait until it ends") from None
        if not held:
            log.warning("%s is on a file system without locks: run one command at a time on it", out)
        yield


def read_json(path: Path) -> dict | None:
    """None if the file is missing or holds no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, what: dict) -> None:
    write_text(path, json.dumps(what, indent=2) + "\n")


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_room(out: Path, needed_bytes: int, needed_files: int) -> None:
    """Raise DataError if the disk has no room for that."""
    free_bytes, free_files = free_space(out)
    fix = "free some space, or choose a folder on another disk"
    if free_bytes is not None and needed_bytes > free_bytes:
        saw = f"{out} is on a disk with {size_text(free_bytes)} free"
        raise DataError(saw, wanted=size_text(needed_bytes), fix=fix)
    if free_files is not None and needed_files > free_files:
        saw = f"{out} is on a disk with room for {free_files} more files"
        raise DataError(saw, wanted=f"{needed_files} files", fix=f"{fix}, or use --format shards")
