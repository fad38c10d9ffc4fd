"""The plain reference: Pillow decodes, torchvision's functions crop and resize, a few threads at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import resized_crop

from horovod_owt.data.feed import EncodedBatch, Feed
from horovod_owt.data.pipeline import MEAN, STD, Batch
from horovod_owt.data.prefetch import Prefetched

PREFETCH = 2  # batches decoded ahead


class TorchvisionPipeline:
    """Works on the next batches in threads while the caller uses this one."""

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
        return Batch(
            images=images.permute(0, 3, 1, 2),  # a view: the memory stays channels_last
            labels=torch.from_numpy(encoded.labels).to(self._device),
            valid=torch.from_numpy(encoded.valid).to(self._device),
            indices=encoded.indices,
        )

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
            rows = zip(encoded.jpegs, encoded.windows.tolist(), encoded.flips, encoded.indices, strict=True)
            yield encoded, np.stack(list(self._decoders.map(self._decode, rows)))

    def _decode(self, row: tuple) -> np.ndarray:
        """(S, S, 3) uint8."""
        jpeg, window, flip, index = row
        try:
            with Image.open(io.BytesIO(jpeg)) as stored:
                image = stored.convert("RGB")
        except Exception as trouble:  # Pillow's decoders raise nearly anything on hostile bytes
            raise self._feed.bad_image(index, str(trouble) or type(trouble).__name__) from trouble
        pixels = np.asarray(resized_crop(image, *window, size=[self._image_size] * 2))
        return pixels[:, ::-1] if flip else pixels
