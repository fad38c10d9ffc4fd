"""The reference pipeline: Pillow decodes, torchvision crops and resizes, in a thread pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.transforms.functional import resized_crop

from horovod_owt.data.batch import MEAN, STD, Batch
from horovod_owt.data.decode import decoded
from horovod_owt.data.feed import EncodedBatch, Feed
from horovod_owt.data.machine import machine_error
from horovod_owt.data.prefetch import Prefetched

PREFETCH = 2  # batches decoded ahead


class TorchvisionPipeline:
    """Prepares the next batches in threads while the caller uses this one."""

    def __init__(self, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int) -> None:
        self._feed, self._image_size = feed, image_size
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._mean = torch.tensor(MEAN, device=self._device) * 255
        self._std = torch.tensor(STD, device=self._device) * 255
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode-image")
        self._decoded = Prefetched(self._decode_batches(), PREFETCH, "decode-batches")

    def __iter__(self) -> TorchvisionPipeline:
        return self

    def __next__(self) -> Batch:
        encoded, pixels = next(self._decoded)
        images = torch.from_numpy(pixels).to(self._device, torch.float32)
        images = images.sub_(self._mean).div_(self._std)
        return Batch.of(encoded, images)

    def __enter__(self) -> TorchvisionPipeline:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        self._feed.close()
        self._decoded.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _decode_batches(self) -> Iterator[tuple[EncodedBatch, np.ndarray]]:
        for encoded in self._feed:
            pixels = np.empty((len(encoded.jpegs), self._image_size, self._image_size, 3), np.uint8)
            rows = range(len(encoded.jpegs))
            while faults := self._decode_rows(encoded, rows, pixels):
                encoded = self._feed.without(encoded, faults)
                rows = np.flatnonzero(~encoded.valid).tolist()  # these now repeat a good image
            yield encoded, pixels

    def _decode_rows(self, encoded: EncodedBatch, rows: Sequence[int], out: np.ndarray) -> dict[int, str]:
        """Decode these rows into `out`; row -> fault for those that cannot be decoded."""
        faults: dict[int, str] = {}

        def decode(row: int) -> None:
            try:
                image = decoded(encoded.jpegs[row].tobytes())
            except ValueError as error:
                faults[row] = f"undecodable: {error}"
                return
            except MemoryError as error:
                path = self._feed.store.path(int(encoded.indices[row]))
                raise machine_error(error, f"cannot decode {path}") from error
            window = encoded.windows[row].tolist()
            pixels = np.asarray(resized_crop(image, *window, size=[self._image_size] * 2))
            out[row] = pixels[:, ::-1] if encoded.flips[row] else pixels

        list(self._decoders.map(decode, rows))
        return dict(sorted(faults.items()))
