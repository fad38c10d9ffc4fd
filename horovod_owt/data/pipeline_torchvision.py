"""The reference pipeline: Pillow or nvJPEG decodes, torchvision crops and resizes, in threads.

It also serves what a cache has decoded, for either setting of `pipeline`: torch resizes 8-bit pixels in a
fifth of the CPU time that Pillow or DALI take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import resized_crop

from horovod_owt.data.batch import MEAN, STD, Batch
from horovod_owt.data.copies import host_buffer, upload
from horovod_owt.data.decode import decoded
from horovod_owt.data.feed import EncodedBatch, Feed
from horovod_owt.data.machine import machine_error
from horovod_owt.data.nvjpeg import GpuDecoder, nvjpeg_decoder
from horovod_owt.data.prefetch import Prefetched

PREFETCH = 2  # batches decoded ahead
RESIZES_BYTES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 1)  # torch does; that for a K80 not
PARTS = 4  # of a batch, for each thread
GRAIN = 32_768  # elements up to which torch starts no threads of its own for an operation


class TorchvisionPipeline:
    """Prepares the next batches in threads while the caller uses this one.

    On a GPU nvJPEG decodes, on a stream of its own; Pillow decodes what it refuses.
    """

    def __init__(self, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int) -> None:
        self._feed, self._image_size = feed, image_size
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._mean, self._std = (255 * torch.tensor(each, device=self._device) for each in (MEAN, STD))
        self._mean_of_row, self._std_of_row = (
            each.cpu().repeat(image_size).numpy() for each in (self._mean, self._std)
        )
        self._gpu_decoder, self._stream = None, None
        if device_id is not None and not feed.decoded and (decode := nvjpeg_decoder(self._device)):
            self._gpu_decoder = GpuDecoder(decode, image_size=image_size, view=feed.view)
            self._stream = torch.cuda.Stream(self._device)
        self._num_threads = num_threads
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
        if pixels.is_floating_point():
            return Batch.of(encoded, pixels.flatten(0, 1))
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
        """Batches with their pixels (K, b, S, S, 3): uint8, for a GPU; on a CPU float32, normalised."""
        for encoded in self._feed:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                batch = self._decode_batch(encoded)
            yield batch

    def _decode_batch(self, encoded: EncodedBatch) -> tuple[EncodedBatch, Tensor]:
        _, corners = self._feed.view(encoded.windows[:, 2:], self._image_size)
        shape = (corners.shape[1], len(encoded.images), self._image_size, self._image_size, 3)
        on_gpu, rows = None, list(range(shape[1]))
        if self._gpu_decoder:
            on_gpu = torch.empty(shape, dtype=torch.uint8, device=self._device)
            rows = self._gpu_decoder.decode_rows(encoded, on_gpu)
        if on_gpu is not None and not rows:
            return encoded, on_gpu
        kind = torch.float32 if self._device.type == "cpu" and on_gpu is None else torch.uint8
        pixels, by_cpu = host_buffer(shape, kind, self._device), set(rows)
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
                pixels = _resized(encoded.images[row], encoded.windows[row].tolist(), sizes[row])
            except ValueError as error:
                faults[row] = f"undecodable: {error}"
                return
            except MemoryError as error:
                path = self._feed.store.path(int(encoded.indices[row]))
                raise machine_error(error, f"cannot decode {path}") from error
            for crop, (top, left) in enumerate(corners[row]):
                cut = pixels[top : top + side, left : left + side]
                self._write(cut, out[crop, row], mirrored=encoded.flips[row])

        def decode_some(first: int) -> None:
            for row in rows[first::parts]:
                decode(row)

        # not a task for each image, which would take a tenth of a cached one's time
        parts = PARTS * self._num_threads
        list(self._decoders.map(decode_some, range(min(parts, len(rows)))))
        return dict(sorted(faults.items()))

    def _write(self, cut: np.ndarray, out: np.ndarray, *, mirrored: bool) -> None:
        """Copy a crop; for a CPU normalise it.

        In few and large operations: threads wait for each other at the end of each.
        """
        if mirrored:
            cut = _mirrored(cut)
        if out.dtype == np.uint8:
            out[:] = cut
            return
        rows = out.reshape(self._image_size, -1)
        rows[:] = cut.reshape(rows.shape)
        rows -= self._mean_of_row
        rows /= self._std_of_row


def _mirrored(pixels: np.ndarray) -> np.ndarray:
    """By torch, as NumPy takes five times as long; some rows at a time, lest torch start threads."""
    step = max(1, GRAIN // pixels[0].size)
    parts = (pixels[top : top + step] for top in range(0, len(pixels), step))
    return np.concatenate([torch.from_numpy(part).flip(1).numpy() for part in parts])


def _resized(image: np.ndarray, window: list[int], size: list[int]) -> np.ndarray:
    """The window of a file, or of pixels, at another size: (height, width, 3) uint8.

    Raises ValueError with the fault of a file.
    """
    if image.ndim == 1 or not RESIZES_BYTES:
        whole = decoded(image.tobytes()) if image.ndim == 1 else Image.fromarray(image)
        return np.array(resized_crop(whole, *window, size=size))
    top, left, height, width = window
    part = image[None, top : top + height, left : left + width].copy()  # resized whole: the copy is small
    if [height, width] == size:
        return part[0]
    nchw = torch.from_numpy(part).permute(0, 3, 1, 2)
    return interpolate(nchw, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)[0].numpy()
