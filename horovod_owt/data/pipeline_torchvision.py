"""The reference pipeline: Pillow or nvJPEG decodes, torchvision crops and resizes, in threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import resized_crop

from horovod_owt.data.batch import MEAN, STD, Batch
from horovod_owt.data.copies import host_buffer, upload
from horovod_owt.data.decode import decoded
from horovod_owt.data.feed import EncodedBatch, Feed
from horovod_owt.data.machine import machine_error
from horovod_owt.data.nvjpeg import GpuDecoder, nvjpeg_decoder
from horovod_owt.data.prefetch import Prefetched

PREFETCH = 2  # batches decoded ahead


class TorchvisionPipeline:
    """Prepares the next batches in threads while the caller uses this one.

    On a GPU nvJPEG decodes, on a stream of its own; Pillow decodes what it refuses.
    """

    def __init__(self, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int) -> None:
        self._feed, self._image_size = feed, image_size
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._mean = torch.tensor(MEAN, device=self._device) * 255
        self._std = torch.tensor(STD, device=self._device) * 255
        self._gpu_decoder, self._stream = None, None
        if device_id is not None and (decode := nvjpeg_decoder(self._device)):
            self._gpu_decoder = GpuDecoder(decode, image_size=image_size, view=feed.view)
            self._stream = torch.cuda.Stream(self._device)
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode-image")
        self._decoded = Prefetched(self._decode_batches(), PREFETCH, "decode-batches")

    def __iter__(self) -> TorchvisionPipeline:
        return self

    def __next__(self) -> Batch:
        encoded, pixels = next(self._decoded)
        if pixels.is_cuda:  # written on the decoder's stream, read and freed on this one
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            pixels.record_stream(current)
        images = upload(pixels, self._device).float()  # 8 bits over the bus, a quarter of normalised ones
        return Batch.of(encoded, images.sub_(self._mean).div_(self._std).flatten(0, 1))

    def __enter__(self) -> TorchvisionPipeline:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        self._feed.close()
        self._decoded.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _decode_batches(self) -> Iterator[tuple[EncodedBatch, Tensor]]:
        """Batches with their pixels (K, b, S, S, 3) uint8, on the host or decoded on the device."""
        for encoded in self._feed:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                batch = self._decode_batch(encoded)
            yield batch

    def _decode_batch(self, encoded: EncodedBatch) -> tuple[EncodedBatch, Tensor]:
        _, corners = self._feed.view(encoded.windows[:, 2:], self._image_size)
        shape = (corners.shape[1], len(encoded.jpegs), self._image_size, self._image_size, 3)
        on_gpu, rows = None, list(range(shape[1]))
        if self._gpu_decoder:
            on_gpu = torch.empty(shape, dtype=torch.uint8, device=self._device)
            rows = self._gpu_decoder.decode_rows(encoded, on_gpu)
        if on_gpu is not None and not rows:
            return encoded, on_gpu
        pixels, by_cpu = host_buffer(shape, torch.uint8, self._device), set(rows)
        while faults := self._decode_rows(encoded, rows, pixels.numpy()):
            encoded = self._feed.without(encoded, faults)
            rows = np.flatnonzero(~encoded.valid).tolist()  # these now repeat a good image
            by_cpu |= set(rows)
        if on_gpu is None:
            return encoded, pixels
        for row in by_cpu:
            on_gpu[:, row].copy_(pixels[:, row], non_blocking=True)
        return encoded, on_gpu

    def _decode_rows(self, encoded: EncodedBatch, rows: Sequence[int], out: np.ndarray) -> dict[int, str]:
        """Decode these rows into `out`; row -> fault for those that cannot be decoded."""
        faults: dict[int, str] = {}
        side, sizes_and_corners = self._image_size, self._feed.view(encoded.windows[:, 2:], self._image_size)
        sizes, corners = (each.tolist() for each in sizes_and_corners)

        def decode(row: int) -> None:
            try:
                image = decoded(encoded.jpegs[row].tobytes())
            except ValueError as error:
                faults[row] = f"undecodable: {error}"
                return
            except MemoryError as error:
                path = self._feed.store.path(int(encoded.indices[row]))
                raise machine_error(error, f"cannot decode {path}") from error
            pixels = np.asarray(resized_crop(image, *encoded.windows[row].tolist(), size=sizes[row]))
            for crop, (top, left) in enumerate(corners[row]):
                cut = pixels[top : top + side, left : left + side]
                out[crop, row] = cut[:, ::-1] if encoded.flips[row] else cut

        list(self._decoders.map(decode, rows))
        return dict(sorted(faults.items()))
