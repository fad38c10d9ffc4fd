"""The three files of ILSVRC2012 as published: verified, and read in place.

The training set is a tar of 1000 tars, one per synset; the validation set is one flat tar; the devkit labels
the validation images. Nothing is unpacked: one sequential pass computes the md5 and records the offset of
each image.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from horovod_owt.data.arrays import Names
from horovod_owt.data.machine import reason_of
from horovod_owt.data.prefetch import Prefetched
from horovod_owt.data.shards import Index, ShardStore
from horovod_owt.data.store import first_few
from horovod_owt.data.tarball import TarError, members
from horovod_owt.errors import DataError, fix_of

BLOCK = 4 << 20  # bytes per read
VAL_NAME = re.compile(rb"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


@dataclass(frozen=True)
class Published:
    md5: str
    size: int | None = None  # bytes; None: unknown


# Sizes as downloaded; md5 as in torchvision/datasets/imagenet.py.
OFFICIAL = {
    "ILSVRC2012_img_train.tar": Published("1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
    "ILSVRC2012_img_val.tar": Published("29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
    "ILSVRC2012_devkit_t12.tar.gz": Published("fa75699e90414af021442c21a62c3abf", 2_568_634),
}


def read_checksums(path: Path) -> dict[str, Published]:
    """Read md5sum's format, `md5  name` per line; raises DataError."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for line in filter(str.strip, lines):
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](.+)", line.rstrip())
        if not match:
            raise DataError(f"{path}: {line[:60]!r}", wanted="md5sum's format: `md5  name`")
        found[os.path.basename(match[2])] = Published(match[1].lower())
    return found


def open_checked(path: Path, published: Published) -> BinaryIO:
    """Open the file if it exists and has the right size; raises DataError."""
    try:
        file = open(path, "rb", buffering=0)
    except OSError as error:
        missing = error.errno == errno.ENOENT
        fix = "download it from image-net.org (needs an account)" if missing else fix_of(error)
        raise DataError(f"{path} cannot be read: {error.strerror}", fix=fix) from error
    size = os.fstat(file.fileno()).st_size
    if published.size not in (None, size):
        file.close()
        fix = "download it again; for another release pass --checksums"
        raise DataError(f"{path} has {size} bytes", wanted=f"{published.size}", fix=fix)
    return file


class HashedStream:
    """A file read once, sequentially, by a thread; its md5 is computed while reading."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self.at, self.size = 0, os.fstat(file.fileno()).st_size
        self._md5, self._progress = hashlib.md5(usedforsecurity=False), progress
        self._blocks = Prefetched(iter(lambda: file.read(BLOCK), b""), 4, "read-tar")
        self._block, self._used = b"", 0

    def read(self, length: int) -> bytes:
        taken = b""
        while len(taken) < length and self._more():
            part = self._block[self._used : self._used + length - len(taken)]
            taken, self._used = taken + part, self._used + len(part)
        self.at += len(taken)
        return taken

    def skip(self, length: int) -> None:
        while length and self._more():
            step = min(length, len(self._block) - self._used)
            self._used, self.at, length = self._used + step, self.at + step, length - step

    def md5(self) -> str:
        """md5 of the whole file; reads the rest of it."""
        self.skip(self.size)
        return self._md5.hexdigest()

    def close(self) -> None:
        self._blocks.close()

    def _more(self) -> bool:
        """Whether there are bytes left to read."""
        if self._used == len(self._block):
            self._block, self._used = next(self._blocks, b""), 0
            self._md5.update(self._block)
            if self._progress:
                self._progress(len(self._block))
        return self._used < len(self._block)


@dataclass
class Contents:
    """The images of an archive: the offset, length and name of each."""

    classes: list[bytes]  # of the training set, in archive order; the validation set has none
    label: np.ndarray  # (n,) int64, into `classes`; 0 without classes
    offset: np.ndarray  # (n,) int64
    length: np.ndarray  # (n,) int64
    names: Names

    def to_arrays(self) -> dict[str, np.ndarray]:
        columns = {"label": self.label, "offset": self.offset, "length": self.length}
        return columns | Names.joined(self.classes).to_arrays("class") | self.names.to_arrays("name")

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Contents:
        classes, names = Names.from_arrays(arrays, "class"), Names.from_arrays(arrays, "name")
        return cls(list(classes), arrays["label"], arrays["offset"], arrays["length"], names)


def walk(stream: HashedStream, nested: bool, where: str) -> Contents:
    """The contents of the training tar (`nested`) or of the validation tar; raises TarError."""
    classes, rows, names = [], [], []
    for name, length in members(stream, stream.size, where):
        if not nested:
            rows.append((0, stream.at, length))
            names.append(os.path.basename(name))
            continue
        if not name.endswith(b".tar"):
            raise TarError(f"{where} contains {name.decode(errors='replace')}, which is no tar of a synset")
        inner, end = f"{name.decode(errors='replace')} in {where}", stream.at + length
        for image, size in members(stream, end, inner):
            rows.append((len(classes), stream.at, size))
            names.append(os.path.basename(image))
        classes.append(os.path.basename(name)[: -len(b".tar")])
    label, offset, length = np.array(rows, np.int64).reshape(-1, 3).T
    return Contents(classes, label, offset, length, Names.joined(names))


def take_md5(
    file: BinaryIO, path: Path, published: Published, progress, *, nested: bool | None
) -> Contents | None:
    """Verify the file's md5 and return its contents; None if `nested` is None (not an archive of images)."""
    stream, contents, tar_error = HashedStream(file, progress), None, None
    try:
        try:
            contents = walk(stream, nested, path.name) if nested is not None else None
        except TarError as error:  # a wrong md5 explains more, so it is reported first
            tar_error = error
        if (found := stream.md5()) != published.md5:
            fix = "download it again; for another release pass --checksums"
            raise DataError(f"{path} has md5 {found}", wanted=published.md5, fix=fix)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason_of(error)}", fix=fix_of(error)) from error
    finally:
        stream.close()
    if tar_error:
        raise DataError(str(tar_error), wanted="the archives of ILSVRC2012 as published")
    return contents


@dataclass(frozen=True)
class Devkit:
    synsets: dict[int, str]  # ILSVRC2012_ID -> WordNet id, classes only
    ground_truth: list[int]  # ILSVRC2012_ID of each validation image, from number 1 on


def read_devkit(path: Path) -> Devkit:
    """Read the classes and the validation labels from the devkit; raises DataError."""
    wanted = f"ILSVRC2012_devkit_t12.tar.gz, with {META} and {GROUND_TRUTH}"
    try:
        with tarfile.open(path, "r:*") as archive:
            files = {name: _member(archive, name) for name in (META, GROUND_TRUTH)}
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"cannot read {path}: {error.strerror}", fix=fix_of(error)) from error
        raise DataError(f"{path} is not a devkit: {_first_line(error)}", wanted=wanted) from error
    from scipy.io import loadmat  # slow to import

    try:
        rows = np.atleast_1d(loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"])
        # synsets with children are not classes but groups of them, such as "dog"
        synsets = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if not int(row["num_children"])
        }
        ground_truth = [int(line) for line in files[GROUND_TRUTH].split()]
    except Exception as error:  # scipy's reader may raise anything on malformed bytes
        raise DataError(f"{path} cannot be parsed: {_first_line(error)}", wanted=wanted) from error
    if strange := sorted(set(ground_truth) - synsets.keys()):
        raise DataError(
            f"{path}: validation images of class id {strange[0]}, which is unknown", wanted=wanted
        )
    return Devkit(synsets, ground_truth)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    for member in archive:
        if member.isfile() and f"/{member.name}".endswith(f"/{ending}"):
            return archive.extractfile(member).read()
    raise KeyError(ending)


def make_stores(
    train_tar: Path, train: Contents, val_tar: Path, val: Contents, devkit: Devkit
) -> dict[str, ShardStore]:
    """Both splits as stores over the original tars; DataError if they do not match the devkit."""
    found, known = {os.fsdecode(name) for name in train.classes}, set(devkit.synsets.values())
    if found != known:
        raise DataError(
            f"{train_tar} has {len(found)} synsets ({first_few(found - known) or 'none'} only there), "
            f"the devkit {len(known)} ({first_few(known - found) or 'none'} only there)",
            wanted="archive and devkit of one release",
        )
    if len(val.names) != len(devkit.ground_truth):
        saw = f"{val_tar} has {len(val.names)} images, the devkit labels {len(devkit.ground_truth)}"
        raise DataError(saw, wanted="archive and devkit of one release")
    classes = sorted(train.classes)
    label_of = {os.fsdecode(name): label for label, name in enumerate(classes)}
    train_labels = np.array([label_of[os.fsdecode(name)] for name in train.classes], np.int64)[train.label]
    val_labels = [label_of[devkit.synsets[_synset(name, devkit, val_tar)]] for name in val.names]
    return {
        "train": _store(train_tar, train, classes, train_labels),
        "val": _store(val_tar, val, classes, np.array(val_labels, np.int64)),
    }


def _synset(name: bytes, devkit: Devkit, where: Path) -> int:
    """The class id of a validation image; number 1 is on the first line of the ground truth."""
    match = VAL_NAME.fullmatch(name)
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(devkit.ground_truth):
        saw = f"{where} contains {os.fsdecode(name)}"
        raise DataError(saw, wanted="ILSVRC2012_val_00000001.JPEG and so on, one per label of the devkit")
    return devkit.ground_truth[number - 1]


def _store(tar: Path, contents: Contents, classes: list[bytes], labels: np.ndarray) -> ShardStore:
    """A store in folder order (class, then name), with the archive as its only shard."""
    names = list(contents.names)
    order = sorted(range(len(names)), key=lambda row: (labels[row], names[row]))
    labels = labels[order]
    twice = [
        i
        for i in range(1, len(order))
        if labels[i] == labels[i - 1] and names[order[i]] == names[order[i - 1]]
    ]
    if twice:
        raise DataError(f"{tar} contains {os.fsdecode(names[order[twice[0]]])} twice")
    index = Index(
        classes,
        np.array([os.stat(tar).st_size]),
        np.zeros(len(order), np.uint32),
        contents.offset[order],
        contents.length[order],
        labels,
        None,
        Names.joined(names[row] for row in order),
    )
    return ShardStore([tar], index)
