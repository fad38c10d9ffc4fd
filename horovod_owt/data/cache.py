"""Images kept on the host across epochs: files' bytes, or decoded and reduced, in memory or on a local disk.

One folder per data set and form, which all ranks and jobs of a user on the host share. It is locked while it
is in use. In memory the last one to leave removes it; what a killed job left, the next one takes over or
removes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from horovod_owt.data.decode import decoded
from horovod_owt.data.faults import check_image
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.room import room_in
from horovod_owt.data.slots import BLOCK, REGION, Slots
from horovod_owt.data.staging import size_text
from horovod_owt.data.store import SPLITS, DataSet, Store
from horovod_owt.errors import ConfigError
from horovod_owt.files import remove_folder
from horovod_owt.filesystem import locked, remove_permissions
from horovod_owt.private import private_folder

log = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
FORM = 1  # version of what entries hold
PROBES = 32  # images whose size is looked at to estimate that of all
TRIES, PAUSE_S = 200, 0.05  # to lock a folder that is being removed


class CachedFiles:
    """A store that keeps the bytes of files that it has read."""

    def __init__(self, store: Store, slots: Slots) -> None:
        self._store, self._slots = store, slots

    def __len__(self) -> int:
        return len(self._store)

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def read(self, index: int) -> bytes:
        stamp = self._stamp(index)
        if stamp is not None and (entry := self._get(index, stamp)):
            return bytes(entry.data)
        data = self._store.read(index)
        self._put(index, stamp, memoryview(data), (0, 0, 0, 0))
        return data

    def _stamp(self, index: int) -> int | None:
        """None if the file is gone: reading it then says so, after retries."""
        with suppress(OSError):
            return self._store.stamp(index)
        return None

    def _get(self, index: int, stamp: int):
        with self._errors():
            return self._slots.get(index, stamp)

    def _put(self, index: int, stamp: int | None, data: memoryview, numbers) -> None:
        if stamp is None or self._slots.full:
            return
        with self._errors():
            if not self._slots.put(index, stamp, data, numbers):
                log.info("the cache is full: other images are read again in each epoch")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A disk that fails costs time, but no run."""
        try:
            yield
        except OSError as error:
            if not self._slots.full:
                self._slots.full = True
                log.warning("the cache fails, nothing more is stored: %s", error.strerror)


class DecodedImages(CachedFiles):
    """A store whose images are decoded, reduced to a shorter side of `side`, and then kept.

    All of them are, so that pixels do not depend on what is in the cache.
    """

    def __init__(self, store: Store, slots: Slots, side: int) -> None:
        super().__init__(store, slots)
        self._side = side

    def read(self, index: int) -> bytes:
        return self._store.read(index)

    def pixels(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """(height, width, 3) uint8, not writable, and the stored image's own height and width.

        Raises what reading raises, and ValueError with the fault of a bad image.
        """
        if found := self.cached(index):
            return found
        stamp = self._stamp(index)  # before the file is read: if it changes meanwhile, it is read again
        data = self._store.read(index)
        header = check_image(data)
        pixels, size = reduced(data, self._side), (header.height, header.width)
        self._put(index, stamp, memoryview(pixels).cast("B"), (*pixels.shape[:2], *size))
        return pixels, size

    def cached(self, index: int) -> tuple[np.ndarray, tuple[int, int]] | None:
        """The same if it is in the cache."""
        stamp = self._stamp(index)
        if stamp is None or not (entry := self._get(index, stamp)):
            return None
        height, width, *size = entry.numbers
        return np.frombuffer(entry.data, np.uint8).reshape(height, width, 3), tuple(size)


def reduced(data: bytes, side: int) -> np.ndarray:
    """The image as RGB, its shorter side reduced to `side` as validation does: (height, width, 3) uint8."""
    try:
        image = decoded(data)
    except ValueError as error:
        raise ValueError(f"undecodable: {error}") from error
    size = reduced_size(image.height, image.width, side)
    if size != (image.height, image.width):
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def reduced_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Unchanged if the shorter side is not longer; else by the rule of torchvision's Resize."""
    short = min(height, width)
    return (height, width) if short <= side else (side * height // short, side * width // short)


@contextmanager
def cached(data: DataSet, place: str, side: int, *, speaks: bool = True) -> Iterator[DataSet]:
    """`data` with a cache at `place`: none, ram or a folder. `side` 0 keeps files as they are.

    Raises ConfigError for a folder that cannot be used. What does not fit is not cached; a process that
    `speaks` says so.
    """
    if place == "none":
        yield data
        return
    with ExitStack() as stack:
        try:
            cache = stack.enter_context(_opened(data, place, side))
            stores = [cache.of(split, getattr(data, split), speaks) for split in SPLITS]
        except OSError as error:
            raise _unusable(place, error) from error
        yield data.through(*stores)


@dataclass
class _Cache:
    folder: Path
    memory: bool
    side: int
    promised: int = 0  # bytes, to splits that are not read yet

    def of(self, split: str, store: Store, speaks: bool) -> Store:
        """The store through the cache, if that has room for it. Raises OSError."""
        if not self.fits(split, store, speaks):
            return store
        slots = Slots(self.folder / split, len(store), self.may_grow, mapped=self.memory)
        return DecodedImages(store, slots, self.side) if self.side else CachedFiles(store, slots)

    def may_grow(self, size: int) -> bool:
        return size <= room_in(self.folder, memory=self.memory)

    def fits(self, split: str, store: Store, speaks: bool) -> bool:
        """Whether there is room for what the split still needs. Of files as they are, a part may be kept."""
        needed = expected_bytes(store, self.side)
        with suppress(FileNotFoundError):
            needed -= (self.folder / split).stat().st_size
        room = self._make_room(needed + self.promised) - self.promised
        self.promised += max(0, needed) if needed <= room or not self.side else 0
        if needed <= room:
            if speaks:
                form = f"decoded, {self.side} px" if self.side else "files"
                log.info("cache: %s in %s (%s), %s more", split, self.folder, form, size_text(max(0, needed)))
            return True
        what = f"cache: {split} needs {size_text(needed)} more in {self.folder.parent}, which has room for"
        if speaks:
            rest = "not cached; a smaller cache_side needs less" if self.side else "only a part is cached"
            log.warning("%s %s: %s", what, size_text(max(0, room)), rest)
        return not self.side and room > 0

    def _make_room(self, needed: int) -> int:
        """The room there is; on a disk, after removing caches of other data, the oldest first.

        None is removed where all of them would be too little: of decoded images no part is kept.
        """
        folders = [] if self.memory else sorted(self.folder.parent.iterdir(), key=_last_use)
        others = [folder for folder in folders if folder != self.folder]
        if not self.side or needed <= room_in(self.folder, memory=self.memory) + sum(map(_bytes_in, others)):
            for other in others:
                if needed > room_in(self.folder, memory=False):
                    _remove_unused(other)
        return room_in(self.folder, memory=self.memory)


@contextmanager
def _opened(data: DataSet, place: str, side: int) -> Iterator[_Cache]:
    memory = place == "ram"
    parent = MEMORY if memory else Path(place)
    if not memory:
        parent.mkdir(exist_ok=True)
    elif not parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(parent))
    versions = f"{FORM} pillow {PIL.__version__}" if side else f"{FORM}"
    key = hashlib.sha256(f"{data.fingerprint()} {side} {versions}".encode()).hexdigest()[:16]
    base = parent / f"horovod_owt-{os.geteuid()}"
    folder = base / key
    try:
        with _held(folder):
            for other in base.iterdir() if memory else ():
                if other != folder:
                    _remove_unused(other)
            yield _Cache(folder, memory, side)
    finally:
        if memory:
            _remove_unused(folder)
            with suppress(OSError):  # others are in there
                base.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, made if it is missing, and in use until the block ends."""
    with ExitStack() as stack:
        for _ in range(TRIES):
            try:
                remove_permissions(private_folder(folder.parent), 0o077)
                folder.mkdir(mode=0o700, exist_ok=True)
                if not stack.enter_context(locked(folder / "lock", shared=True)):
                    raise OSError(errno.ENOLCK, "a file system without locks", str(folder))
                break
            except (FileNotFoundError, BlockingIOError):  # the last user is removing it
                time.sleep(PAUSE_S)
        else:
            raise OSError(errno.EBUSY, "another process holds its lock", str(folder))
        yield


def _remove_unused(folder: Path) -> None:
    """Remove a cache that no process uses, or what is left of one."""
    with suppress(OSError), locked(folder / "lock"):
        remove_folder(folder)


def _bytes_in(folder: Path) -> int:
    """Bytes that a cache takes on its disk."""
    with suppress(OSError), os.scandir(folder) as files:
        return sum(512 * file.stat().st_blocks for file in files)
    return 0


def _last_use(folder: Path) -> float:
    """When its training images were written last."""
    with suppress(OSError):
        return (folder / SPLITS[0]).stat().st_mtime
    return 0.0


def expected_bytes(store: Store, side: int) -> int:
    """Bytes that a cache of the whole split takes, estimated from a few images."""
    _, indices = SampleOrder(len(store), 0).at(0, min(PROBES, len(store)))
    sizes = []
    for index in indices.tolist():
        with suppress(OSError, ValueError):
            data = store.read(index)
            header = check_image(data)
            height, width = reduced_size(header.height, header.width, side)
            sizes.append(2 * BLOCK + (3 * height * width if side else len(data)))
    return int(len(store) * np.mean(sizes)) + REGION if sizes else 0


def _unusable(place: str, error: OSError) -> ConfigError:
    where = error.filename or place
    saw = f"cache={place}: {os.fsdecode(where)}: {error.strerror}"
    fix = "use another folder, or --set cache=none"
    return ConfigError(saw, wanted="a folder of this user on a local disk", fix=fix)
