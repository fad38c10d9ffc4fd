"""Encoded batches for a pipeline: the samples' bytes and crop windows, prefetched by a thread."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

import numpy as np
from PIL import Image

from horovod_owt.data import augment
from horovod_owt.data.cache import DecodedImages
from horovod_owt.data.decode import pillow_fault
from horovod_owt.data.faults import BadImages, check_image, read_fault
from horovod_owt.data.header import Header
from horovod_owt.data.machine import is_of_the_file, machine_error
from horovod_owt.data.order import SampleOrder, batch_positions, validation_slice
from horovod_owt.data.prefetch import Prefetched
from horovod_owt.data.store import Store
from horovod_owt.data.workers import usable_cores
from horovod_owt.errors import RunError

READERS = 4  # I/O threads
READ_AHEAD = 2  # batches
# A batch is read by one thread until it has taken this long for n images: PATIENCE_S + n * PROMPT_S.
PATIENCE_S, PROMPT_S = 5e-3, 5e-5

IGNORED = -100  # label of a row that must not count: the ignore_index of torch's cross_entropy

Windows = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # (n, 2) sizes -> windows and flips


class Sample(NamedTuple):
    image: np.ndarray = np.empty(0, np.uint8)  # as in EncodedBatch
    size: tuple[int, int] = (1, 1)  # height and width as stored
    odd_colours: bool = False
    fault: str = ""  # of a bad image, which has no more than that


@dataclass(frozen=True)
class EncodedBatch:
    """One batch before decoding; it always has the feed's `batch` rows."""

    images: list[np.ndarray]  # uint8: the files' bytes (n,), or of a decoded cache pixels (h, w, 3)
    windows: np.ndarray  # (b, 4) int32: top, left, height, width, in pixels of the images
    flips: np.ndarray  # (b,) bool
    labels: np.ndarray  # (b,) int64; IGNORED where not valid
    indices: np.ndarray  # (b,) int64, into the store
    valid: np.ndarray  # (b,) bool; False for padding and placeholders of bad images, which must not count
    # (b,) bool: a JPEG of RGB, CMYK or YCCK. No manual says what nvJPEG makes of it: it is for the CPU.
    odd_colours: np.ndarray
    faults: Mapping[int, str] = field(default_factory=dict)  # row -> fault, for bad images

    def without(self, faults: Mapping[int, str]) -> EncodedBatch:
        """The same batch with the rows of bad images (row -> fault) replaced by a good image, not counted."""
        valid = self.valid.copy()
        valid[list(faults)] = False
        found = {row: fault for row, fault in faults.items() if self.valid[row]}
        batch = replace(
            self,
            labels=np.where(valid, self.labels, IGNORED),
            valid=valid,
            faults={**self.faults, **found},
        )
        if not valid.any():
            jpeg, window = _placeholder()
            windows, odd_colours = np.tile(window, (len(valid), 1)), np.zeros_like(valid)
            return replace(batch, images=[jpeg] * len(valid), windows=windows, odd_colours=odd_colours)
        rows = np.where(valid, np.arange(len(valid)), np.argmax(valid))
        return batch._with_images(rows)

    def padded(self, batch: int) -> EncodedBatch:
        """The same with `batch` rows: the last one is repeated, not counted."""
        rows = np.minimum(np.arange(batch), len(self.valid) - 1)
        valid = self.valid[rows] & (np.arange(batch) < len(self.valid))
        return replace(
            self._with_images(rows),
            labels=np.where(valid, self.labels[rows], IGNORED),
            indices=self.indices[rows],
            valid=valid,
        )

    def _with_images(self, rows: np.ndarray) -> EncodedBatch:
        """The same batch with the images of these rows."""
        return replace(
            self,
            images=[self.images[row] for row in rows],
            windows=self.windows[rows],
            flips=self.flips[rows],
            odd_colours=self.odd_colours[rows],
        )


@cache
def _placeholder() -> tuple[np.ndarray, np.ndarray]:
    """A grey image and its full window, for a batch without a good image."""
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16), (124, 116, 104)).save(jpeg, "JPEG")
    return np.frombuffer(jpeg.getvalue(), np.uint8), np.array([0, 0, 16, 16], np.int32)


class Feed:
    """An iterator of encoded batches over a store, prefetched by a thread until closed.

    With `bad_images` a bad image is replaced by another one, not counted, and listed in the batch's faults;
    without, it is a RunError. Pipelines report images that they cannot decode to `without`. An error of the
    machine is a RunError in any case: a good image must not be left out for it.
    `view` tells pipelines what to show of each window. With a cache of decoded images its threads decode
    what is not in there, whatever the pipeline.
    """

    def __init__(
        self,
        store: Store,
        batch: int,
        bad_images: BadImages | None = None,
        view: augment.View = augment.whole_window,
    ) -> None:
        assert batch > 0
        self.store, self.batch, self.view = store, batch, view
        self.decoded = isinstance(store, DecodedImages)  # images are pixels
        self._bad_images = bad_images
        self._parts = max(READERS, usable_cores()) if self.decoded else READERS
        self._readers = ThreadPoolExecutor(self._parts, thread_name_prefix="read-image")
        self._batches = Prefetched(self._read_batches(), READ_AHEAD, "read-batches")

    def __iter__(self) -> Iterator[EncodedBatch]:
        return self

    def __next__(self) -> EncodedBatch:
        return next(self._batches)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def without(self, batch: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
        """`batch` with these rows (row -> fault) replaced and recorded; RunError without `bad_images`."""
        for row, fault in faults.items():
            if not batch.valid[row]:
                continue  # a placeholder: the bad image has a row of its own
            index = int(batch.indices[row])
            if self._bad_images is None:
                fix = "replace or remove the file"
                raise RunError(f"bad image {self.store.path(index)}: {fault}", fix=fix)
            self._bad_images.add(index, fault)
            self._bad_images.distrust(batch.images[row].tobytes())
        return batch.without(faults)

    def close(self) -> None:
        self._batches.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _read_batches(self) -> Iterator[EncodedBatch]:
        raise NotImplementedError

    def _read(self, indices: np.ndarray, windows_of: Windows) -> EncodedBatch:
        samples = self._read_samples(indices)
        sizes = np.array([sample.size for sample in samples], np.int64)
        windows, flips = windows_of(sizes)
        images, valid = [sample.image for sample in samples], np.ones(len(indices), bool)
        odd_colours = np.array([sample.odd_colours for sample in samples], bool)
        if self.decoded:
            shapes = [image.shape[:2] if image.ndim == 3 else (1, 1) for image in images]
            windows = augment.scaled(windows, sizes, np.array(shapes, np.int64))
        labels = self.store.labels[indices]
        batch = EncodedBatch(images, windows, flips, labels, indices, valid, odd_colours)
        faults = {row: sample.fault for row, sample in enumerate(samples) if sample.fault}
        return self.without(batch, faults) if faults else batch

    def _read_samples(self, indices: np.ndarray) -> list[Sample]:
        """By this thread what a cache has decoded, or a disk or the page cache delivers promptly.

        The readers do the rest. Where nothing waits for a disk or a server they would wait for each other: a
        file is a handful of system calls, and after each a thread queues for Python's lock. Four threads
        read half as many cached files per second as one.
        """
        found = list(map(self._cached, indices.tolist())) if self.decoded else self._read_promptly(indices)
        samples: list[Sample | None] = found + [None] * (len(indices) - len(found))
        missing = np.array([row for row, sample in enumerate(samples) if sample is None], np.int64)
        if len(missing):
            parts = np.array_split(missing, min(self._parts, len(missing)))
            read = self._readers.map(self._read_part, (indices[part] for part in parts))
            for row, sample in zip(missing.tolist(), chain.from_iterable(read), strict=True):
                samples[row] = sample
        return samples

    def _read_promptly(self, indices: np.ndarray) -> list[Sample]:
        """The first samples of a batch, up to one that took long."""
        samples, patience_ends = [], time.perf_counter() + PATIENCE_S
        for index in indices.tolist():
            samples.append(self._read_one(index))
            patience_ends += PROMPT_S
            if time.perf_counter() > patience_ends:
                break
        return samples

    def _cached(self, index: int) -> Sample | None:
        found = self.store.cached(index)
        return Sample(*found) if found else None

    def _read_part(self, indices: np.ndarray) -> list[Sample]:
        return [self._read_one(index) for index in indices.tolist()]

    def _distrusted_fault(self, data: bytes, header: Header) -> str:
        """The fault of an image of a kind that a decoder has refused before: decoded here, to be sure of it.

        A refusal costs DALI a new pipeline. JPEGs are not decoded twice: check_image finds most of
        the bad ones.
        """
        if self._bad_images is None or header.kind not in self._bad_images.distrusted:
            return ""
        fault = pillow_fault(data)
        return f"undecodable: {fault}" if fault else ""

    def _read_image(self, index: int) -> Sample:
        """The file's bytes or its pixels; ValueError with the fault of a bad one."""
        if self.decoded:
            return Sample(*self.store.pixels(index))
        data = self.store.read(index)
        header = check_image(data)
        if fault := self._distrusted_fault(data, header):
            raise ValueError(fault)
        return Sample(np.frombuffer(data, np.uint8), (header.height, header.width), header.odd_colours)

    def _read_one(self, index: int) -> Sample:
        """The image, or its fault."""
        fault = self._bad_images.fault(index) if self._bad_images else None
        if not fault:
            try:
                return self._read_image(index)
            except (OSError, MemoryError) as error:
                if not is_of_the_file(error):
                    raise machine_error(error, f"cannot read {self.store.path(index)}") from error
                fault = read_fault(error)
            except ValueError as error:
                fault = str(error)
        return Sample(fault=fault)


class TrainFeed(Feed):
    """One rank's part of the endless training stream, from `position` (samples consumed by all ranks) on."""

    def __init__(
        self,
        store: Store,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        accum_steps: int = 1,
        position: int = 0,
        scale: tuple[float, float] = augment.SCALE,
        bad_images: BadImages | None = None,
    ) -> None:
        self._scale = scale
        self.order = SampleOrder(len(store), seed)
        self._positions = batch_positions(
            position, rank=rank, world_size=world_size, batch=batch, accum_steps=accum_steps
        )
        super().__init__(store, batch, bad_images)

    def _read_batches(self) -> Iterator[EncodedBatch]:
        for position in self._positions:
            epochs, indices = self.order.at(position, self.batch)
            of = dict(seed=self.order.seed, epochs=epochs, indices=indices, scale=self._scale)
            yield self._read(indices, partial(augment.training_windows, **of))


class ValidationFeed(Feed):
    """This rank's slice of the validation set, once; the last batch is padded with invalid rows."""

    def __init__(
        self,
        store: Store,
        *,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        bad_images: BadImages | None = None,
        view: augment.View = augment.centre_crop,
    ) -> None:
        self._slice = validation_slice(len(store), rank, world_size)
        super().__init__(store, batch, bad_images, view)

    def _read_batches(self) -> Iterator[EncodedBatch]:
        for start in range(self._slice.start, self._slice.stop, self.batch):
            indices = np.arange(start, min(start + self.batch, self._slice.stop))
            yield self._read(indices, augment.validation_windows).padded(self.batch)
