"""Downscale images once, so that every epoch decodes fewer pixels."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from horovod_owt.data.decode import decoded
from horovod_owt.data.header import image_size

QUALITY = 90  # of JPEG


def shrunk(data: bytes, short_side: int, *, png: bool = False) -> bytes:
    """The image downscaled to a shorter side of `short_side` pixels; unchanged bytes if it is not longer.

    The result is a PNG if `png`, else a JPEG, with 8 bits per channel: greyscale if the image was, else RGB
    (CMYK converted as in our pipelines). EXIF and colour profile are dropped: nothing here reads them.
    Raises ValueError if Pillow cannot decode the image.
    """
    height, width = image_size(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some files of ILSVRC2012 have broken EXIF blocks
        image = decoded(data, keep_grey=True)  # a broken image is an error, small or not
    if min(width, height) <= short_side:
        return data
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, "PNG") if png else small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
