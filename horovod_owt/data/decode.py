"""Pillow's decoding to 8-bit RGB: the same pixels as DALI's, for every format that both can decode."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from horovod_owt.data.png import SIGNATURE, pixels_only

_OUT_OF_MEMORY = "out of memory"  # in Pillow's message of an OSError, where its C code fails to allocate


def decoded(data: bytes, *, keep_grey: bool = False) -> Image.Image:
    """The image as RGB, alpha ignored; with `keep_grey` a grey one as L.

    ValueError with the fault if Pillow cannot decode it. MemoryError passes: it says nothing about the image.
    """
    if data[:8] == SIGNATURE:
        data = pixels_only(data)
    with _faults_as_value_errors(), Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.mode.startswith("I"):
            grey = _from_16_bits(image)
            return grey if keep_grey else grey.convert("RGB")
        if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
            # Adobe's programs store ink inverted and leave a marker. Pillow takes every file for one of
            # theirs; DALI and browsers look at the marker.
            return ImageChops.invert(image).convert("RGB")
        return image.convert("L" if keep_grey and image.mode in ("1", "L") else "RGB")


def pillow_fault(data: bytes) -> str | None:
    """Pillow's error when it decodes the whole image, or None."""
    try:
        decoded(data)
    except ValueError as error:
        return str(error)
    return None


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 0 to 65535, scaled: Pillow's own conversion clips at 255."""
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


@contextmanager
def _faults_as_value_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its message contains only a memory address
        raise ValueError("unknown image format") from None
    except Exception as error:  # Pillow's decoders may raise anything on malformed bytes
        if _OUT_OF_MEMORY in str(error):
            raise MemoryError(str(error)) from error
        raise ValueError(str(error) or type(error).__name__) from error
