"""DALI's decoder options, and the images that it fails on."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from nvidia.dali import Pipeline, backend, fn, types

from horovod_owt.data.decode import decoded, pillow_fault

T = TypeVar("T")

# In DALI's messages, when the host or the GPU is short of memory or threads.
_MACHINES = re.compile(
    r"bad_alloc|out of memory|MemoryAllocation|can(?:'|no)t allocate|temporarily unavailable", re.I
)


def decoder_options(*, on_gpu: bool) -> dict:
    """Options of DALI's decoders, for whole images and windows."""
    options = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        # Chroma as in libjpeg and Pillow. nvJPEG before CUDA 13.3 cannot do that in a window: DALI would
        # decode all training images on the CPU, with thousands of warnings.
        "jpeg_fancy_upsampling": not on_gpu,
    }
    # Windows are in stored pixels: do not apply EXIF rotation (older decoders never do).
    if "adjust_orientation" in backend.GetSchema("decoders__ImageSlice").GetArgumentNames():
        options["adjust_orientation"] = False
    return options


def bitmap(file: np.ndarray) -> np.ndarray:
    """The image as a file that DALI decodes on the CPU always; the file itself if Pillow refuses it."""
    out = io.BytesIO()
    try:
        decoded(file.tobytes()).save(out, "BMP")
    except ValueError:
        return file
    return np.frombuffer(out.getvalue(), np.uint8)


def find_refused(build: Callable[[Callable[[], T]], Pipeline], inputs: Iterable[T]) -> list[int]:
    """Positions of the inputs that a pipeline fails to decode; `build` makes a pipeline over a source."""
    refused, pipe, current = [], None, deque(maxlen=1)
    for number, one in enumerate(inputs):
        pipe = pipe or build(lambda: current.pop())  # DALI requires a Python function
        current.append(one)
        try:
            pipe.run()
        except RuntimeError as error:
            check_machine(error)
            refused.append(number)
            pipe = None  # unusable after a failure
    return refused


def check_machine(error: RuntimeError) -> None:
    """Raise MemoryError if DALI failed for want of memory or threads, which says nothing about an image."""
    if found := _MACHINES.search(str(error)):
        raise MemoryError(found[0]) from error


def undecodable(data: bytes) -> str:
    """The fault of an image that DALI fails to decode; Pillow's message, if it fails too."""
    fault = pillow_fault(data)
    return f"undecodable: {fault}" if fault else "undecodable by DALI, but not by Pillow"


class DaliDecoder:
    """Decodes whole images, to find those that cannot be decoded."""

    def __init__(self, threads: int, device_id: int | None, batch: int) -> None:
        self._threads, self._device_id, self._batch = threads, device_id, batch
        self._images: list[np.ndarray] = []
        self._pipe: Pipeline | None = None

    def faults(self, images: Sequence[bytes]) -> dict[int, str]:
        """position in `images` -> fault, for those that DALI fails to decode; at most `batch` images."""
        self._pipe = self._pipe or self._build(lambda: self._images, self._batch)
        self._images = [np.frombuffer(data, np.uint8) for data in images]
        try:
            self._pipe.run()
            return {}
        except RuntimeError as error:
            check_machine(error)
            self._pipe = None  # unusable after a failure, and does not say which image it was
        alone = ([image] for image in self._images)
        refused = find_refused(lambda source: self._build(source, 1), alone)
        return {number: undecodable(images[number]) for number in refused}

    def _build(self, source: Callable[[], list[np.ndarray]], batch: int) -> Pipeline:
        pipe = Pipeline(batch, self._threads, self._device_id, prefetch_queue_depth=1)
        with pipe:
            images = fn.external_source(source, dtype=types.UINT8, ndim=1)
            pipe.set_outputs(fn.decoders.image(images, **decoder_options(on_gpu=self._device_id is not None)))
        pipe.build()
        return pipe
