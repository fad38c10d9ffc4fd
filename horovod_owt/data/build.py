"""Write a data set to disk from stores: a folder or shards, original size or downscaled, on all cores.

What was written before a kill is kept: a shard or image that has its final name is complete (see Staging).
The bytes depend only on the source and the form, not on the number of workers or on interruptions.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horovod_owt.data import tarball
from horovod_owt.data.arrays import UNREADABLE, Names, read_arrays, write_arrays
from horovod_owt.data.machine import is_of_the_file, machine_error, reason_of
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.resize import shrunk
from horovod_owt.data.shards import INDEX, Index, shard_name
from horovod_owt.data.staging import Staging, check_room
from horovod_owt.data.store import SPLITS, Store, first_few
from horovod_owt.data.workers import in_processes, tick
from horovod_owt.errors import DataError, fix_of
from horovod_owt.files import atomic_file

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int, str], None]  # (activity, done, total, unit)

CHUNK = 250  # images of a folder that a worker writes before it reports back
PROBES = 100  # images that are downscaled to estimate the size of all
DISK_BLOCK = 4096  # bytes, the smallest allocation on most file systems
MEMBERS_BYTES = 3 * tarball.BLOCK + tarball.BLOCK // 2  # of a sample: two headers, the label, half a block


@dataclass(frozen=True)
class Form:
    """What the bytes of a data set depend on, besides its images."""

    format: str = "shards"  # or folder
    shard_mb: int = 256  # megabytes (10**6) of a shard, about
    short_side: int | None = None  # pixels, at most; None: unchanged

    def check(self) -> None:
        if self.shard_mb < 1:
            raise DataError(f"--shard-mb {self.shard_mb}", wanted="at least 1")
        if self.short_side is not None and not 1 <= self.short_side <= 10_000:
            raise DataError(f"--short-side {self.short_side}", wanted="1 to 10000 pixels")

    def spec(self) -> dict:
        shards = {"shard_mb": self.shard_mb} if self.format == "shards" else {}
        return {"format": self.format, "short_side": self.short_side, **shards}


@dataclass(frozen=True)
class _Split:
    store: Store
    sizes: np.ndarray  # bytes of each image in the source
    shards: int


def make(
    place: Staging, stores: dict[str, Store], form: Form, *, workers: int, progress: Progress | None
) -> dict:
    """Write both splits and publish them; returns the totals `images`, `classes` and `bytes`."""
    facts = place.recall("facts.json")
    if facts is None:
        if form.format == "shards":
            for store in stores.values():
                check_keys(store)
        splits = _plan(place, stores, form)
        facts = {
            "images": sum(map(len, stores.values())),
            "classes": len(stores["train"].classes),
            "bytes": _write_all(place, splits, form, workers, progress),
        }
        if form.format == "shards":
            for split in SPLITS:
                _write_index(place, split, splits[split])
        os.sync()  # before the folder is marked complete
        place.remember("facts.json", facts)
    place.finish(facts)
    return facts


def _plan(place: Staging, stores: dict[str, Store], form: Form) -> dict[str, _Split]:
    """The number of shards of each split; DataError if the disk has no room for what is left to write."""
    kept = place.recall("plan.json") or {}
    splits, needed, files = {}, 0, 0
    for split, store in stores.items():
        sizes, _ = store.sizes_and_times()
        share = kept.get(f"{split}_share") or _share_left(store, sizes, form)
        total = int(sizes.sum() * share) + len(store) * MEMBERS_BYTES
        splits[split] = _Split(store, sizes, max(1, round(total / (form.shard_mb * 10**6))))
        if form.format == "folder":
            total = int((sizes * share / DISK_BLOCK + 1).sum()) * DISK_BLOCK
        kept[f"{split}_share"] = share
        there, count = _there(place.folder / split)
        needed, files = needed + max(0, total - there), files + len(store) - count
    check_room(place.out, needed, files if form.format == "folder" else 0)
    place.remember("plan.json", kept)
    return splits


def _share_left(store: Store, sizes: np.ndarray, form: Form) -> float:
    """The share of bytes that downscaling leaves, from a fixed sample."""
    if form.short_side is None:
        return 1.0
    _, indices = SampleOrder(len(store), 0).at(0, min(PROBES, len(store)))
    left = sum(len(_image(store, index, form)[0]) for index in indices.tolist())
    return left / max(1, int(sizes[indices].sum()))


def _there(folder: Path) -> tuple[int, int]:
    """Bytes and files that a killed command left below a folder."""
    sizes = [os.stat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names]
    return sum(sizes), len(sizes)


def _write_all(
    place: Staging, splits: dict[str, _Split], form: Form, workers: int, progress: Progress | None
) -> int:
    """Write everything but the indices; returns the bytes of all files."""
    work, tasks = (_write_shard, _shard_tasks) if form.format == "shards" else (_write_images, _image_tasks)
    total, size = sum(len(split.store) for split in splits.values()), 0
    (place.folder / "parts").mkdir(exist_ok=True)
    for name, split in splits.items():
        (place.folder / name).mkdir(exist_ok=True)
        for folder in split.store.classes if form.format == "folder" else ():
            (place.folder / name / folder).mkdir(exist_ok=True)

    def ticked(count: int) -> None:
        if progress:
            progress("writing", count, total, "image")

    results = in_processes(
        work,
        [(name, *task) for name, split in splits.items() for task in tasks(split)],
        workers,
        begin=_begin,
        begin_args=(splits, form, place.folder),
        ticked=ticked,
    )
    with closing(results):
        for written, faults in results:
            size += written
            for fault in faults:
                log.warning("copied unchanged: %s", fault)
    ticked(total)
    return size


# ---- in the workers ----


def _begin(splits: dict[str, _Split], form: Form, folder: Path) -> None:
    global _splits, _form, _folder
    _splits, _form, _folder = splits, form, folder


def _image(store: Store, index: int, form: Form) -> tuple[bytes, str | None]:
    """An image as it is to be written, and the reason if it could not be downscaled."""
    try:
        data = store.read(index)
    except OSError as error:
        saw = f"cannot read {store.path(index)}: {reason_of(error)}"
        fix = "restore or remove the file" if is_of_the_file(error) else fix_of(error)
        raise DataError(saw, fix=fix) from error
    if fault := store.check(index, data):
        raise DataError(f"{store.path(index)} is damaged: {fault}", fix="download or copy the file again")
    if form.short_side is None:
        return data, None
    try:
        return shrunk(data, form.short_side, png=store.name(index).lower().endswith(b".png")), None
    except ValueError as error:
        return data, f"{store.path(index)}: {error}"
    except MemoryError as error:
        raise machine_error(error, f"cannot downscale {store.path(index)}") from error


def _image_tasks(split: _Split) -> list[tuple[int, int]]:
    count = len(split.store)
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _write_images(task: tuple[str, int, int]) -> tuple[int, list[str]]:
    """Write some images of a folder. An existing one is kept: files are renamed when complete."""
    name, start, stop = task
    store, sizes = _splits[name].store, _splits[name].sizes
    written, faults = 0, []
    for index in range(start, stop):
        path = _folder / name / store.classes[store.labels[index]] / os.fsdecode(store.name(index))
        there = os.stat(path).st_size if path.exists() else 0
        if there and (_form.short_side or there == sizes[index]):
            written += there
        else:
            data, fault = _image(store, index, _form)
            faults += [fault] if fault else []
            with atomic_file(path, folder=_folder / "scratch") as file:
                file.write(data)
            written += len(data)
        tick()
    return written, faults


def _shard_tasks(split: _Split) -> list[tuple[int]]:
    return [(number,) for number in range(split.shards)]


def _write_shard(task: tuple[str, int]) -> tuple[int, list[str]]:
    """Write one shard, and in parts/ its rows of the index."""
    name, number = task
    store, shards = _splits[name].store, _splits[name].shards
    path, rows = _folder / name / shard_name(number), _rows_file(_folder, name, number)
    start, stop = (len(store) * (number + k) // shards for k in (0, 1))
    if (size := _whole_shard(path, rows)) is not None:
        tick(stop - start)
        return size, []
    # Shuffled, so that reading shards sequentially also mixes the classes.
    _, indices = SampleOrder(len(store), 0).at(start, stop - start)
    offsets, lengths, sums, faults = [], [], [], []
    with atomic_file(path, durable=True, folder=_folder / "scratch") as file:
        for index in indices.tolist():
            data, fault = _image(store, index, _form)
            faults += [fault] if fault else []
            label = str(store.labels[index]).encode()
            member = os.path.join(
                os.fsencode(store.classes[store.labels[index]]), member_name(store.name(index))
            )
            file.write(tarball.header(member, len(data)))
            offsets.append(file.tell())
            lengths.append(len(data))
            sums.append(zlib.crc32(data))
            file.write(data + tarball.padding(len(data)))
            file.write(tarball.header(os.path.splitext(member)[0] + b".cls", len(label)))
            file.write(label + tarball.padding(len(label)))
            tick()
        file.write(tarball.END)
        size = file.tell()
        columns = {"index": indices, "offset": np.array(offsets), "length": np.array(lengths)}
        columns |= {"crc32": np.array(sums, np.uint32), "bytes": np.int64(size)}
        write_arrays(rows, columns, durable=True)  # before the shard has its name
    return size, faults


def _rows_file(folder: Path, split: str, number: int) -> Path:
    return folder / "parts" / f"{split}-{number:06d}.npz"


def _whole_shard(path: Path, rows: Path) -> int | None:
    """Bytes of a shard that an earlier command finished; None if it did not."""
    try:
        size = path.stat().st_size
        return size if size == int(read_arrays(rows)["bytes"]) else None
    except UNREADABLE:
        return None


def _write_index(place: Staging, name: str, split: _Split) -> None:
    """Join the rows of all shards, in the order of the source."""
    count = len(split.store)
    shard, length, crc32 = np.zeros(count, np.uint32), np.zeros(count, np.uint32), np.zeros(count, np.uint32)
    offset, shard_bytes = np.full(count, -1), np.zeros(split.shards, np.int64)
    for number in range(split.shards):
        rows = read_arrays(_rows_file(place.folder, name, number))
        at = rows["index"]
        shard[at], shard_bytes[number] = number, rows["bytes"]
        offset[at], length[at], crc32[at] = rows["offset"], rows["length"], rows["crc32"]
    assert (offset >= 0).all()
    names = Names.joined(member_name(split.store.name(index)) for index in range(count))
    classes = [os.fsencode(each) for each in split.store.classes]
    index = Index(classes, shard_bytes, shard, offset, length, split.store.labels, crc32, names)
    index.write(place.folder / name / INDEX)


# ---- names in shards ----


def member_name(name: bytes) -> bytes:
    """A file's name in a shard: KEY.jpg or KEY.png, without a dot in KEY.

    WebDataset takes everything before the first dot as the key, the rest as the type of the member.
    """
    stem, _, suffix = name.rpartition(b".")
    return stem.replace(b".", b"_") + (b".png" if suffix.lower() == b"png" else b".jpg")


def check_keys(store: Store) -> None:
    """DataError if two files of a class would get the same key: a.jpg and a.png, a.b.jpg and a_b.jpg."""
    seen: dict[bytes, int] = {}
    label = None
    for index in range(len(store)):
        if store.labels[index] != label:
            label, seen = store.labels[index], {}
        key = member_name(store.name(index))[:-4]
        if key in seen:
            both = [store.path(seen[key]), os.fsdecode(store.name(index))]
            saw = f"{first_few(both)} would both be {os.fsdecode(key)} in a shard"
            raise DataError(saw, wanted="names that differ before the last dot", fix="rename one of them")
        seen[key] = index
