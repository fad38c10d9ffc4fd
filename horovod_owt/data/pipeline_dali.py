"""Decode, crop, resize, mirror and normalise with DALI: on the GPU if there is one, else on CPU threads."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from nvidia.dali import Pipeline, backend, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from horovod_owt.data.feed import EncodedBatch, Feed
from horovod_owt.data.jpeg import find_fault
from horovod_owt.data.pipeline import MEAN, STD, Batch
from horovod_owt.errors import RunError

PREFETCH = 2  # batches that DALI decodes ahead


class DaliPipeline:
    """DALI pulls encoded batches from the feed and works on the next ones while the caller uses this one."""

    def __init__(self, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int) -> None:
        self._feed = feed
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._in_flight: deque[EncodedBatch] = deque()  # given to DALI, not yet taken from it
        self._fault: RunError | None = None  # from the feed; raised after the batches before it
        self._started = self._closed = False
        self._pipe = Pipeline(feed.batch, num_threads, device_id, prefetch_queue_depth=PREFETCH)
        with self._pipe:
            self._pipe.set_outputs(_graph(self._next_encoded, image_size, on_gpu=device_id is not None))
        self._pipe.build()

    def __iter__(self) -> DaliPipeline:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            if not self._started:
                self._pipe.schedule_run()  # the first time, this schedules PREFETCH batches
                self._started = True
            (decoded,) = self._pipe.share_outputs()
            images = self._copied(decoded.as_tensor())
            encoded = self._in_flight.popleft()
            self._pipe.release_outputs()
            self._pipe.schedule_run()
        except StopIteration:  # from share_outputs: nothing is scheduled any more
            if self._fault:
                raise self._fault from None
            raise
        except RuntimeError as trouble:
            raise self._culprit(trouble) from trouble
        return Batch(
            images=images.permute(0, 3, 1, 2),  # a view: the memory stays channels_last
            labels=torch.from_numpy(encoded.labels).to(self._device, non_blocking=True),
            valid=torch.from_numpy(encoded.valid).to(self._device, non_blocking=True),
            indices=encoded.indices,
        )

    def __enter__(self) -> DaliPipeline:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self._feed.close()
        self._pipe = None

    def _next_encoded(self) -> tuple:
        """Called by DALI for each batch it schedules."""
        try:
            encoded = next(self._feed)
        except RunError as fault:  # let DALI finish what it has; __next__ raises the fault then
            self._fault = fault
            raise StopIteration from None
        self._in_flight.append(encoded)
        anchors, shapes = np.split(encoded.windows, 2, axis=1)
        return (
            encoded.jpegs,
            np.ascontiguousarray(anchors),
            np.ascontiguousarray(shapes),
            encoded.flips.astype(np.int32),
        )

    def _copied(self, tensor) -> torch.Tensor:
        """DALI reuses its buffers, so the batch moves to a tensor of torch's, on torch's stream."""
        images = torch.empty(tensor.shape(), dtype=torch.float32, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        return feed_ndarray(tensor, images, cuda_stream=stream)

    def _culprit(self, trouble: RuntimeError) -> RunError:
        """DALI says that a decode failed, not which, and cannot go on: try the batches it had with Pillow."""
        for encoded in self._in_flight:
            for jpeg, index in zip(encoded.jpegs, encoded.indices, strict=True):
                if fault := find_fault(jpeg.tobytes()):
                    return self._feed.bad_image(index, fault)
        suspects = {self._feed.store.path(index) for encoded in self._in_flight for index in encoded.indices}
        return RunError(
            f"DALI stopped on one of {len(suspects)} images that Pillow can read, {min(suspects)} first: "
            + " ".join(str(trouble).split())[:300],
            fix="set pipeline=torchvision",
        )


def _graph(source, image_size: int, *, on_gpu: bool):
    """The one path of training and validation, CPU and GPU: (b, S, S, 3) float32."""
    jpegs, anchors, shapes, mirror = fn.external_source(
        source,
        num_outputs=4,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
        ndim=[1, 1, 1, 0],
    )
    images = fn.decoders.image_slice(
        jpegs,
        start=anchors,
        shape=shapes,
        axes=[0, 1],  # height, width
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # chroma as libjpeg and Pillow do it, on the GPU too
        **_keep_stored_orientation(),
    )
    images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * mean for mean in MEAN],
        std=[255 * std for std in STD],
    )


def _keep_stored_orientation() -> dict:
    """Windows are in stored pixels: leave EXIF rotation alone (older decoders never look at it)."""
    options = backend.GetSchema("decoders__ImageSlice").GetArgumentNames()
    return {"adjust_orientation": False} if "adjust_orientation" in options else {}
