"""Downscale images once, so that every epoch decodes fewer pixels."""

from __future__ import annotations

import io
import warnings

from PIL import Image

QUALITY = 90  # of JPEG


def shrunk(data: bytes, short_side: int, *, png: bool = False) -> bytes:
    """The image downscaled to a shorter side of `short_side` pixels; unchanged bytes if it is not longer.

    The result is a PNG if `png`, else a JPEG: greyscale if the image was, else RGB (CMYK converted by
    Pillow, as in our pipelines). EXIF and colour profile are dropped: nothing here reads them.
    Raises ValueError if Pillow cannot decode the image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some files of ILSVRC2012 have broken EXIF blocks
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if min(width, height) <= short_side:
                    image.load()  # a broken image is an error, small or not
                    return data
                scale = short_side / min(width, height)
                size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
                pixels = image.convert("L" if image.mode in ("L", "1") else "RGB")
                small = pixels.resize(size, Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow's parsers may raise anything on malformed bytes
        raise ValueError(str(error) or type(error).__name__) from error
    out = io.BytesIO()
    small.save(out, "PNG") if png else small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
