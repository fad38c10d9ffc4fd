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
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from horovod_owt.data.arrays import UNREADABLE, Names, read_arrays, write_arrays
from horovod_owt.data.machine import is_of_the_file
from horovod_owt.errors import DataError, fix_of
from horovod_owt.private import open_trusted, private_folder

log = logging.getLogger(__name__)

SUFFIXES = (b".jpeg", b".jpg", b".png")
# Suffixes of images that are not read. These, and files without a suffix, are never left out without a word.
OTHER_SUFFIXES = (
    b".webp .bmp .tif .tiff .gif .jp2 .j2k .jfif .jpe .ppm .pgm .pbm .pnm .avif .heic .heif .jxl .tga".split()
)
# Folders of file systems, file servers and archivers: no classes, and nothing in them is an image of one.
FOREIGN_FOLDERS = {
    *(b"lost+found", b"__MACOSX", b"@eaDir", b"#recycle", b"#snapshot", b"$RECYCLE.BIN"),
    b"System Volume Information",
}
DANGLING, BELOW_CLASS = "dangling link", "in a folder below its class"
LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"
CACHE_FROM = 20_000  # images; fewer are listed in no time
VERSION = 2  # of the cache format
# A folder that changed this shortly before it was listed may change again without a new mtime, because file
# systems have a time resolution of up to 2 s: its cached names are not used the next time.
SETTLED_NS = 2_000_000_000
_UNSETTLED = (-1, -1)


class LeftOut(NamedTuple):
    """What looks like images below a split folder, but is not part of the data set."""

    path: str
    reason: str
    images: int  # more than one for a folder


@dataclass
class Listing:
    """Class folders in order, and the images of each in order."""

    classes: list[bytes]
    stamps: list[tuple[int, int]]  # (mtime_ns, ctime_ns) of each class folder before it was listed
    counts: np.ndarray  # (classes,) int64: images of each
    names: Names  # of all images, class after class
    left_counts: np.ndarray  # (classes,) int64: entries of each that were left out
    left: Names  # of these: name, number of images and reason, separated by zero bytes
    left_in_split: list[LeftOut] = field(default_factory=list)  # beside the class folders; not cached

    def of_each_class(self) -> Iterator[tuple[bytes, tuple[int, int], Names, Names]]:
        start = left = 0
        columns = (self.counts.tolist(), self.left_counts.tolist())
        for name, stamp, count, left_count in zip(self.classes, self.stamps, *columns, strict=True):
            images = self.names.part(start, start + count)
            yield name, stamp, images, self.left.part(left, left + left_count)
            start, left = start + count, left + left_count

    def left_out(self, folder: bytes) -> list[LeftOut]:
        """What was left out of the split in `folder`."""
        found = list(self.left_in_split)
        for name, _, _, left in self.of_each_class():
            for entry in left:
                path, images, reason = entry.split(b"\0")
                path = os.fsdecode(os.path.join(folder, name, path))
                found.append(LeftOut(path, reason.decode(), int(images)))
        return found


def list_split(folder: Path) -> Listing:
    """The listing of a split folder, from the cache where it is still valid; raises DataError."""
    split = os.fsencode(folder)
    known = _read_cached(folder)
    classes, left_in_split = _classes(split)
    # before the listing: a change meanwhile is noticed the next time
    found = [_stamp(os.path.join(split, name)) for name in classes]
    mended = _mended_classes(split, known) if known else set()
    if known is not None and not mended and (known.classes, known.stamps) == (classes, found):
        known.left_in_split = left_in_split  # as it is: its names may be mapped, and many
        return known
    remembered = {name: contents for name, *contents in known.of_each_class()} if known else {}
    stamps, parts, left = [], [], []
    for name, stamp in zip(classes, found, strict=True):
        path = os.path.join(split, name)
        old_stamp, images, left_out = remembered.get(name, (_UNSETTLED, None, None))
        if images is None or stamp != old_stamp or name in mended:
            settled = max(stamp) < time.time_ns() - SETTLED_NS
            images, left_out = map(Names.joined, _contents(path))
            stamp = stamp if settled else _UNSETTLED
        stamps.append(stamp)
        parts.append(images)
        left.append(left_out)
    counts, left_counts = (np.array([len(part) for part in each], np.int64) for each in (parts, left))
    listing = Listing(
        classes, stamps, counts, Names.chained(parts), left_counts, Names.chained(left), left_in_split
    )
    same = known is not None and not mended and (known.classes, known.stamps) == (classes, stamps)
    if len(listing.names) >= CACHE_FROM and not same:
        _write_cached(folder, listing)
    return listing


def left_out_text(left: Iterable[LeftOut]) -> str:
    """`left out: 3 (.webp is not read), 2 (dangling link)`."""
    counts: Counter[str] = Counter()
    for each in left:
        counts[each.reason] += each.images
    return "left out: " + ", ".join(f"{count} ({reason})" for reason, count in counts.most_common())


def _classes(split: bytes) -> tuple[list[bytes], list[LeftOut]]:
    """The class folders, and what lies beside them and looks like a class or an image."""
    classes, left = [], []
    for entry in scan(split):
        kind = _kind(entry)
        if kind == "folder":
            classes.append(entry.name)
        elif kind != "file" or _is_image(entry.name, (*SUFFIXES, *OTHER_SUFFIXES)):
            reason = "outside a class folder" if kind == "file" else kind
            left.append(LeftOut(os.fsdecode(entry.path), reason, 1))
    return sorted(classes), sorted(left)


def _stamp(folder: bytes) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {error.strerror}") from error
    return found.st_mtime_ns, found.st_ctime_ns


def _mended_classes(split: bytes, known: Listing) -> set[bytes]:
    """The classes with a link that dangled and leads somewhere now: its folder's times do not show that."""
    end = b"\0" + DANGLING.encode()
    return {
        name
        for name, _, _, left in known.of_each_class()
        if any(entry.endswith(end) and _leads_somewhere(split, name, entry) for entry in left)
    }


def _leads_somewhere(split: bytes, name: bytes, entry: bytes) -> bool:
    return os.path.exists(os.path.join(split, name, entry.partition(b"\0")[0]))


def _contents(folder: bytes) -> tuple[list[bytes], list[bytes]]:
    """The images of a class folder, and what was left out, as in `Listing.left`; both sorted."""
    images, left = [], []
    for entry in scan(folder):
        kind = _kind(entry)
        if kind == "file" and _is_image(entry.name, SUFFIXES):
            images.append(entry.name)
        elif reason := _reason(entry, kind):
            count = images_below(entry.path) if kind == "folder" else 1
            left += [b"\0".join([entry.name, b"%d" % count, reason.encode()])] if count else []
    return sorted(images), sorted(left)


def _kind(entry: os.DirEntry[bytes]) -> str:
    """`file`, `folder`, or why it is neither; raises DataError."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        return DANGLING if entry.is_symlink() else "no regular file"
    except OSError as error:
        if is_of_the_file(error):  # a link to itself
            return DANGLING
        saw = f"{os.fsdecode(entry.path)} cannot be listed: {error.strerror}"
        raise DataError(saw, fix=fix_of(error)) from error


def _reason(entry: os.DirEntry[bytes], kind: str) -> str:
    """Why an entry of a class folder is no image of the data set; empty if it does not look like one."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if kind == "folder":
        return BELOW_CLASS
    if suffix and suffix not in (*SUFFIXES, *OTHER_SUFFIXES):
        return ""
    if kind != "file":
        return kind
    return f"{suffix.decode()} is not read" if suffix else "a name without suffix"


def _is_image(name: bytes, suffixes: tuple[bytes, ...]) -> bool:
    return name.lower().endswith(suffixes)


def images_below(folder: bytes) -> int:
    """The number of files with an image's suffix at any depth."""
    suffixes = (*SUFFIXES, *OTHER_SUFFIXES)
    return sum(_is_image(name, suffixes) for _, _, names in os.walk(folder) for name in names)


def _is_hidden(name: bytes) -> bool:
    return name.startswith(b".") or name in FOREIGN_FOLDERS


def scan(folder: bytes) -> list[os.DirEntry[bytes]]:
    """The entries of a folder, without hidden (._n01440764_18.JPEG, .snapshot, ...) and foreign ones."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not _is_hidden(entry.name)]
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
        fix = "" if is_of_the_file(error) else fix_of(error)
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {error.strerror}", fix=fix) from error
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
    """The first valid cache file; a damaged one, one of another version or of a stranger is ignored."""
    for path in cache_files(folder):
        try:
            with open_trusted(path, {0, os.geteuid(), folder.stat().st_uid}) as file:
                arrays = read_arrays(file)
            if int(arrays["version"]) != VERSION:
                continue
            classes, names = list(Names.from_arrays(arrays, "class")), Names.from_arrays(arrays, "image")
            left = Names.from_arrays(arrays, "left")
            stamps, counts, left_counts = arrays["stamps"], arrays["counts"], arrays["left_counts"]
            if stamps.shape != (len(classes), 2) or not (
                counts.shape == left_counts.shape == (len(classes),)
            ):
                raise ValueError("columns of different lengths")
            for column, entries in ((counts, names), (left_counts, left)):
                if (column < 0).any() or column.sum() != len(entries):
                    raise ValueError("counts that do not add up")
            stamps = [tuple(stamp) for stamp in stamps.tolist()]
            return Listing(classes, stamps, counts, names, left_counts, left)
        except FileNotFoundError:
            continue
        except (*UNREADABLE, TypeError) as error:
            log.debug("ignoring %s: %s", path, error)
    return None


def _write_cached(folder: Path, listing: Listing) -> None:
    arrays = {"version": np.int64(VERSION), "counts": listing.counts, "left_counts": listing.left_counts}
    arrays |= {"stamps": np.array(listing.stamps, np.int64).reshape(-1, 2)}
    arrays |= Names.joined(listing.classes).to_arrays("class") | listing.names.to_arrays("image")
    arrays |= listing.left.to_arrays("left")
    for path in cache_files(folder):
        try:
            if path.parent != folder.parent:
                private_folder(private_folder(path.parent.parent) / path.parent.name)
            return write_arrays(path, arrays)
        except OSError as error:  # read-only or full: try the next place, else every run lists again
            log.debug("cannot write %s: %s", path, error)
