"""Statistics of a data set: images, classes, sizes, bytes, and channel mean and std."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from horovod_owt.data.decode import decoded
from horovod_owt.data.faults import check_image
from horovod_owt.data.machine import is_of_the_file, machine_error
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.store import DataSet, Store
from horovod_owt.data.workers import usable_cores
from horovod_owt.errors import DataError

LEVELS = np.arange(256) / 255


class _Seen(NamedTuple):
    """One image."""

    width: int
    height: int
    mean: np.ndarray  # (3,) RGB, 0..1
    square: np.ndarray  # (3,) mean of the squares


def data_stats(
    data: DataSet, *, sample: int, seed: int = 0, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Counts and bytes of all images; sizes and colours of `sample` training images drawn by `seed`.

    Each sampled image has the same weight in mean and std, whatever its size. Bad images are skipped and
    counted. DataError if a file is missing.
    """
    store = data.train
    _, indices = SampleOrder(len(store), seed).at(0, min(sample, len(store)))
    seen, bad = [], 0
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="measure-image") as threads:
        for one in threads.map(lambda index: _measure(store, index), indices.tolist()):
            progress(1)
            if one is None:
                bad += 1
            else:
                seen.append(one)
    report: dict[str, Any] = {
        "images": {"train": len(data.train), "val": len(data.val)},
        "bytes": {"train": _bytes(data.train), "val": _bytes(data.val)},
        "classes": _classes(store),
        "left_out": sum(each.images for each in data.left_out),
        "sampled": len(seen),
        "bad_in_sample": bad,
        "seed": seed,
    }
    if seen:
        report |= _figures(seen)
    return report


def _bytes(store: Store) -> int:
    try:
        sizes, _ = store.sizes_and_times()
    except OSError as error:
        path = os.fsdecode(error.filename or b"")
        if not is_of_the_file(error):
            raise machine_error(error, f"cannot read {path}") from error
        saw = f"{path} is listed but cannot be opened: {error.strerror}"
        raise DataError(saw, fix="`owt data verify` lists all bad images") from error
    return int(sizes.sum())


def _classes(store: Store) -> dict[str, Any]:
    counts = np.bincount(store.labels, minlength=len(store.classes))
    ends = {"smallest": int(counts.argmin()), "largest": int(counts.argmax())}
    named = {
        which: {"name": store.classes[label], "images": int(counts[label])} for which, label in ends.items()
    }
    return {"count": len(counts), **named}


def _figures(seen: list[_Seen]) -> dict[str, Any]:
    widths, heights, means, squares = map(np.array, zip(*seen, strict=True))
    mean = means.mean(axis=0)
    std = np.sqrt(np.maximum(squares.mean(axis=0) - mean**2, 0))
    return {
        "width": _spread(widths),
        "height": _spread(heights),
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _measure(store: Store, index: int) -> _Seen | None:
    """None for a bad image."""
    try:
        data = store.read(index)
        header = check_image(data)
        counts = np.reshape(decoded(data).histogram(), (3, 256))
    except ValueError:
        return None
    except (OSError, MemoryError) as error:
        if is_of_the_file(error):
            return None
        raise machine_error(error, f"cannot read {store.path(index)}") from error
    shares = counts / counts.sum(axis=1, keepdims=True)
    return _Seen(header.width, header.height, shares @ LEVELS, shares @ LEVELS**2)
