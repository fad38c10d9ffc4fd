"""Encoded batches for a pipeline: samples, their bytes, the window of each; read ahead by a thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from horovod_owt.data import augment
from horovod_owt.data.jpeg import image_size
from horovod_owt.data.order import SampleOrder, batch_positions, validation_slice
from horovod_owt.data.prefetch import Prefetched
from horovod_owt.data.store import Store
from horovod_owt.errors import RunError

READERS = 4  # threads that wait for the file system
READ_AHEAD = 2  # batches


@dataclass(frozen=True)
class EncodedBatch:
    """One batch before decoding; always as many rows as the feed's `batch`."""

    jpegs: list[np.ndarray]  # the files' bytes, uint8
    windows: np.ndarray  # (b, 4) int32: top, left, height, width
    flips: np.ndarray  # (b,) bool
    labels: np.ndarray  # (b,) int64
    indices: np.ndarray  # (b,) int64, into the store
    valid: np.ndarray  # (b,) bool; False is padding that must not count


class Feed:
    """An iterator of encoded batches over a store, read ahead by a thread until closed."""

    def __init__(self, store: Store, batch: int) -> None:
        assert batch > 0
        self.store, self.batch = store, batch
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read-image")
        self._batches = Prefetched(self._read_batches(), READ_AHEAD, "read-batches")

    def __iter__(self) -> Iterator[EncodedBatch]:
        return self

    def __next__(self) -> EncodedBatch:
        return next(self._batches)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def bad_image(self, index: int, fault: str) -> RunError:
        return RunError(f"bad image {self.store.path(index)}: {fault}", fix="replace the file or remove it")

    def close(self) -> None:
        self._batches.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _read_batches(self) -> Iterator[EncodedBatch]:
        raise NotImplementedError

    def _read(self, indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Bytes and (height, width) of each sample; RunError names a file that cannot be read."""
        parts = self._readers.map(self._read_part, np.array_split(indices, min(READERS, len(indices))))
        samples = [sample for part in parts for sample in part]
        return [data for data, _ in samples], np.array([size for _, size in samples], np.int64)

    def _read_part(self, indices: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
        return [self._read_one(index) for index in indices.tolist()]

    def _read_one(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            data = self.store.read(index)
            return np.frombuffer(data, np.uint8), image_size(data)
        except OSError as trouble:
            saw = f"cannot read {self.store.path(index)}: {trouble.strerror or trouble}"
            raise RunError(saw, fix="check the file and the disk it is on") from trouble
        except ValueError as trouble:
            raise self.bad_image(index, str(trouble)) from trouble


class TrainFeed(Feed):
    """The endless training stream from `position` on (samples consumed by all ranks), as one rank sees it."""

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
    ) -> None:
        self._scale = scale
        self.order = SampleOrder(len(store), seed)
        self._positions = batch_positions(
            position, rank=rank, world_size=world_size, batch=batch, accum_steps=accum_steps
        )
        super().__init__(store, batch)

    def _read_batches(self) -> Iterator[EncodedBatch]:
        for position in self._positions:
            epochs, indices = self.order.at(position, self.batch)
            jpegs, sizes = self._read(indices)
            seed, labels = self.order.seed, self.store.labels[indices]
            windows, flips = augment.training_windows(sizes, seed, epochs, indices, scale=self._scale)
            yield EncodedBatch(jpegs, windows, flips, labels, indices, np.ones(self.batch, bool))


class ValidationFeed(Feed):
    """This rank's slice of the validation set, once; the last batch is padded with rows not `valid`."""

    def __init__(self, store: Store, *, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self._slice = validation_slice(len(store), rank, world_size)
        super().__init__(store, batch)

    def _read_batches(self) -> Iterator[EncodedBatch]:
        for start in range(self._slice.start, self._slice.stop, self.batch):
            rows = np.arange(start, start + self.batch)
            valid = rows < self._slice.stop
            indices = rows[valid]
            jpegs, sizes = self._read(indices)
            last = np.minimum(np.arange(self.batch), len(indices) - 1)  # repeats the last sample
            indices, sizes, jpegs = indices[last], sizes[last], [jpegs[i] for i in last]
            windows, flips = augment.validation_windows(sizes)
            yield EncodedBatch(jpegs, windows, flips, self.store.labels[indices], indices, valid)
