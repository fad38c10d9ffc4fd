"""The names of all images of a split, cached between runs.

Listing a million files takes seconds on a local disk and minutes on a file server. So the names are cached in
a file; the next run stats each class folder and lists again only those whose mtime or ctime has changed.
Both times are compared, because `rsync -a` and `tar x` restore the mtime; nothing restores the ctime.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horovod_owt.data.arrays import UNREADABLE, Names, read_arrays, write_arrays
from horovod_owt.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = (b".jpeg", b".jpg", b".png")
LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"
CACHE_FROM = 20_000  # images; fewer are listed in no time
VERSION = 1  # of the cache format
# A folder that changed this shortly before it was listed may change again without a new mtime, because file
# systems have a time resolution of up to 2 s: its cached names are not used the next time.
SETTLED_NS = 2_000_000_000
_UNSETTLED = (-1, -1)


@dataclass
class Listing:
    """Class folders in order, and the images of each in order."""

    classes: list[bytes]
    stamps: list[tuple[int, int]]  # (mtime_ns, ctime_ns) of each class folder before it was listed
    counts: np.ndarray  # (classes,) int64: images of each
    names: Names  # of all images, class after class

    def of_each_class(self) -> Iterator[tuple[bytes, tuple[int, int], Names]]:
        start = 0
        for name, stamp, count in zip(self.classes, self.stamps, self.counts.tolist(), strict=True):
            yield name, stamp, self.names.part(start, start + count)
            start += count


def list_split(folder: Path) -> Listing:
    """The listing of a split folder, from the cache where it is still valid; raises DataError."""
    split = os.fsencode(folder)
    known = _read_cached(folder)
    remembered = {name: (stamp, images) for name, stamp, images in known.of_each_class()} if known else {}
    classes, stamps, parts = sorted(entry.name for entry in scan(split) if entry.is_dir()), [], []
    for name in classes:
        path = os.path.join(split, name)
        stamp = _stamp(path)  # before the listing: a change meanwhile is noticed the next time
        old_stamp, images = remembered.get(name, (_UNSETTLED, None))
        if images is None or stamp != old_stamp:
            settled = max(stamp) < time.time_ns() - SETTLED_NS
            images, stamp = Names.joined(_image_names(path)), stamp if settled else _UNSETTLED
        stamps.append(stamp)
        parts.append(images)
    counts = np.array([len(part) for part in parts], np.int64)
    listing = Listing(classes, stamps, counts, Names.chained(parts))
    fresh = known is not None and (known.classes, known.stamps) == (classes, stamps)
    if len(listing.names) >= CACHE_FROM and not fresh:
        _write_cached(folder, listing)
    return listing


def _stamp(folder: bytes) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {error.strerror}") from error
    return found.st_mtime_ns, found.st_ctime_ns


def _image_names(folder: bytes) -> list[bytes]:
    images = (entry for entry in scan(folder) if entry.name.lower().endswith(SUFFIXES))
    return sorted(entry.name for entry in images if entry.is_file())


def scan(folder: bytes) -> list[os.DirEntry[bytes]]:
    """The entries of a folder, without hidden ones (._n01440764_18.JPEG, .snapshot, ...)."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(b".")]
        if not os.access(folder, os.X_OK):  # readable, but its files cannot be opened
            raise PermissionError
    except PermissionError:
        raise DataError(
            f"{os.fsdecode(folder)} is not readable by user {os.geteuid()}",
            fix=f"chmod -R a+rX {os.fsdecode(folder)}, or run as its owner",
        ) from None
    except NotADirectoryError:
        raise DataError(f"{os.fsdecode(folder)} is not a folder", wanted=f"a folder with {LAYOUT}") from None
    except OSError as error:  # a dangling link, a stale NFS handle
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {error.strerror}") from error
    return found


# ---- the cache file ----


def cache_files(folder: Path) -> list[Path]:
    """Places for the cache: next to the split folder, else below the user's cache folder, if there is one."""
    beside = folder.parent / f".owt-index-{folder.name}.npz"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # no HOME, and no passwd entry either
        return [beside]
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return [beside, Path(cache, "horovod_owt", "listings", f"{key}.npz")]


def _read_cached(folder: Path) -> Listing | None:
    """The first valid cache file; a damaged one or one of another version is ignored."""
    for path in cache_files(folder):
        try:
            arrays = read_arrays(path)
            if int(arrays["version"]) != VERSION:
                continue
            classes, names = list(Names.from_arrays(arrays, "class")), Names.from_arrays(arrays, "image")
            stamps, counts = arrays["stamps"], arrays["counts"]
            if stamps.shape != (len(classes), 2) or counts.shape != (len(classes),):
                raise ValueError("columns of different lengths")
            if (counts < 0).any() or counts.sum() != len(names):
                raise ValueError("counts that do not add up")
            return Listing(classes, [tuple(stamp) for stamp in stamps.tolist()], counts, names)
        except FileNotFoundError:
            continue
        except (*UNREADABLE, TypeError) as error:
            log.debug("ignoring %s: %s", path, error)
    return None


def _write_cached(folder: Path, listing: Listing) -> None:
    arrays = {"version": np.int64(VERSION), "counts": listing.counts}
    arrays |= {"stamps": np.array(listing.stamps, np.int64).reshape(-1, 2)}
    arrays |= Names.joined(listing.classes).to_arrays("class") | listing.names.to_arrays("image")
    for path in cache_files(folder):
        try:
            if path.parent != folder.parent:
                path.parent.mkdir(parents=True, exist_ok=True)
            return write_arrays(path, arrays)
        except OSError as error:  # read-only or full: try the next place, else every run lists again
            log.debug("cannot write %s: %s", path, error)
