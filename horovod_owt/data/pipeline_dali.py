"""Decode, crop, resize, mirror and normalise with DALI, on the GPU or on CPU threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, tensors, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from horovod_owt.data.batch import MEAN, STD, Batch
from horovod_owt.data.dali_decoder import bitmap, check_machine, decoder_options, find_refused, undecodable
from horovod_owt.data.feed import EncodedBatch, Feed
from horovod_owt.data.machine import machine_error
from horovod_owt.data.prefetch import Prefetched
from horovod_owt.errors import RunError

PREFETCH = 2  # batches that DALI decodes ahead

# bytes; anchors and shapes of windows; sizes to resize to; places of crops, 0 to 1; mirror
Inputs = tuple[tensors.TensorListCPU, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# DALI 1 copies tensors to make a list of them; that is in the inputs' thread too
_VIEWS = {"contiguous": False} if "contiguous" in tensors.TensorListCPU.__init__.__doc__ else {}


class DaliPipeline:
    """DALI pulls encoded batches from the feed and decodes the next ones while the caller uses this one.

    A DALI pipeline is unusable after a failed decode, and does not report which image failed. So the images
    in flight are decoded one by one, those that fail are replaced, and a new pipeline starts with the same
    batches.
    """

    def __init__(self, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int) -> None:
        self._feed, self._image_size = feed, image_size
        self._device_id, self._num_threads = device_id, num_threads
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        # passed to DALI, which reads the inputs where they are; result not taken yet
        self._in_flight: deque[tuple[EncodedBatch, Inputs]] = deque()
        self._retry: deque[EncodedBatch] = deque()  # to be passed to DALI again, before the feed's next
        # made by a thread: the training thread would take 1 to 2 ms for 256 images
        batches = feed if device_id is None else map(without_odd_colours, feed)
        self._ready = Prefetched(((e, self._inputs(e, slice(None))) for e in batches), 1, "dali-inputs")
        self._fault: RunError | None = None  # from the feed; raised after the batches before it
        self._closed = False
        self._begin()

    def __iter__(self) -> DaliPipeline:
        return self

    def __next__(self) -> Batch:
        try:
            return self._next_batch()
        except MemoryError as error:
            raise machine_error(error, "DALI cannot decode a batch") from error

    def _next_batch(self) -> Batch:
        while not self._closed:
            try:
                if not self._started:
                    self._pipe.schedule_run()  # the first time, this schedules PREFETCH batches
                    self._started = True
                decoded = self._pipe.share_outputs()
            except StopIteration:  # from share_outputs: nothing is scheduled
                if self._fault:
                    raise self._fault from None
                raise
            except RuntimeError as error:
                self._recover(error)
                continue
            images = self._copied([crop.as_tensor() for crop in decoded])
            encoded, _ = self._in_flight.popleft()
            try:
                self._pipe.release_outputs()
                self._pipe.schedule_run()
            except RuntimeError as error:  # in a later batch: this one is complete
                self._recover(error)
            return Batch.of(encoded, images)
        raise StopIteration

    def __enter__(self) -> DaliPipeline:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self._feed.close()
        self._ready.close()
        self._pipe = None

    def _begin(self) -> None:
        self._pipe = self._build(self._next_inputs, batch=self._feed.batch, prefetch=PREFETCH)
        self._started = False

    def _build(self, source: Callable[[], Inputs], *, batch: int, prefetch: int = 1) -> Pipeline:
        pipe = Pipeline(batch, self._num_threads, self._device_id, prefetch_queue_depth=prefetch)
        with pipe:
            crops = self._feed.view(np.ones((1, 2), np.int64), self._image_size)[1].shape[1]
            pipe.set_outputs(*_graph(source, self._image_size, crops, on_gpu=self._device_id is not None))
        pipe.build()
        return pipe

    def _next_inputs(self) -> Inputs:
        """Called by DALI for each batch it schedules."""
        try:
            if self._retry:
                encoded = self._retry.popleft()
                inputs = self._inputs(encoded, slice(None))
            else:
                encoded, inputs = next(self._ready)
        except RunError as fault:  # DALI finishes what is scheduled, then __next__ raises the fault
            self._fault = fault
            raise StopIteration from None
        self._in_flight.append((encoded, inputs))
        return inputs

    def _copied(self, crops: list) -> torch.Tensor:
        """Copy the batch, crop after crop, to a torch tensor, on torch's stream: DALI reuses its buffers."""
        images = torch.empty([len(crops), *crops[0].shape()], dtype=torch.float32, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        for crop, copy in zip(crops, images, strict=True):
            feed_ndarray(crop, copy, cuda_stream=stream)
        return images.flatten(0, 1)

    def _recover(self, error: RuntimeError) -> None:
        """Start a new pipeline with the batches in flight, without the images that DALI fails to decode.

        RunError if it decodes each of them alone, or none at all, or if bad images are not to be skipped.
        """
        check_machine(error)
        self._pipe = None  # ends its threads, before the memory that they read is freed
        in_flight = [*(encoded for encoded, _ in self._in_flight), *self._retry]
        self._in_flight.clear()
        # With DALI 2 it is the first one, and the others need no test; older ones may fail when scheduling.
        refused = [self._refused(in_flight[0]), *[{}] * (len(in_flight) - 1)]
        if not refused[0]:
            refused[1:] = map(self._refused, in_flight[1:])
        pairs = zip(in_flight, refused, strict=True)
        if not any(encoded.valid[row] for encoded, rows in pairs for row in rows):
            paths = [self._feed.store.path(index) for encoded in in_flight for index in encoded.indices]
            saw = f"DALI failed on {len(paths)} images, each of which it decodes alone, {min(paths)} first"
            saw = "DALI fails on the JPEG too that stands in for bad images" if any(refused) else saw
            said = " ".join(str(error).split())[:300]
            raise RunError(f"{saw}: {said}", fix="--set pipeline=torchvision") from error
        self._retry = deque(map(self._feed.without, in_flight, refused))
        self._begin()

    def _refused(self, encoded: EncodedBatch) -> dict[int, str]:
        """row -> fault, for the rows that DALI fails to decode."""
        whole = self._inputs(encoded, slice(None))
        if not find_refused(partial(self._build, batch=self._feed.batch), [whole]):
            return {}
        alone = (self._inputs(encoded, slice(row, row + 1)) for row in range(len(encoded.images)))
        refused = find_refused(partial(self._build, batch=1), alone)
        return {row: undecodable(encoded.images[row].tobytes()) for row in refused}

    def _inputs(self, encoded: EncodedBatch, rows: slice) -> Inputs:
        anchors, shapes = np.split(encoded.windows[rows], 2, axis=1)
        sizes, corners = self._feed.view(shapes, self._image_size)
        room = sizes[:, None] - self._image_size
        return (
            # one list: of 256 tensors the training thread would look at each
            tensors.TensorListCPU([tensors.TensorCPU(jpeg) for jpeg in encoded.images[rows]], **_VIEWS),
            np.ascontiguousarray(anchors),
            np.ascontiguousarray(shapes),
            sizes.astype(np.float32),
            (corners / np.maximum(room, 1)).astype(np.float32),
            encoded.flips[rows].astype(np.int32),
        )


def without_odd_colours(encoded: EncodedBatch) -> EncodedBatch:
    """The batch for a GPU, where DALI hands JPEGs to nvJPEG, those of three channels as YCbCr."""
    rows = np.flatnonzero(encoded.odd_colours)
    if not len(rows):
        return encoded
    images = list(encoded.images)
    for row in rows:
        images[row] = bitmap(images[row])
    return replace(encoded, images=images, odd_colours=np.zeros_like(encoded.odd_colours))


def _graph(source, image_size: int, crops: int, *, on_gpu: bool):
    """The graph of training and validation, CPU and GPU: for each crop (b, S, S, 3) float32."""
    jpegs, anchors, shapes, sizes, places, mirror = fn.external_source(
        source,
        num_outputs=6,
        no_copy=True,  # a copy of 256 JPEGs would take the training thread some 5 ms
        dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.INT32],
        ndim=[1, 1, 1, 1, 2, 0],
    )
    images = fn.decoders.image_slice(
        jpegs,
        start=anchors,
        shape=shapes,
        axes=[0, 1],  # height, width
        **decoder_options(on_gpu=on_gpu),
    )
    images = fn.resize(images, size=sizes, interp_type=types.INTERP_LINEAR, antialias=True)
    return [
        fn.crop_mirror_normalize(
            images,
            crop=(image_size, image_size),
            crop_pos_y=places[crop, 0],
            crop_pos_x=places[crop, 1],
            mirror=mirror,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * mean for mean in MEAN],
            std=[255 * std for std in STD],
        )
        for crop in range(crops)
    ]
