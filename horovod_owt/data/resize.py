"""Images made smaller once, so that every epoch decodes less."""

from __future__ import annotations

import io
import warnings

from PIL import Image

QUALITY = 90  # of JPEG


def shrunk(data: bytes, short_side: int, *, png: bool = False) -> bytes:
    """The image with its shorter side at `short_side` pixels; the very same bytes if it is no longer.

    The result is a PNG if `png`, else a JPEG: grey if it was grey, else RGB (from CMYK by Pillow's rule, as
    our pipelines see it). EXIF and colour profile are dropped: nothing here reads them.
    Raises ValueError for what Pillow cannot decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some files of ILSVRC2012 have broken EXIF blocks
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if min(width, height) <= short_side:
                    image.load()  # the caller wants to hear of a broken image, small or not
                    return data
                scale = short_side / min(width, height)
                size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
                pixels = image.convert("L" if image.mode in ("L", "1") else "RGB")
                small = pixels.resize(size, Image.Resampling.BICUBIC)
    except Exception as trouble:  # Pillow's parsers raise nearly anything on hostile bytes
        raise ValueError(str(trouble) or type(trouble).__name__) from trouble
    out = io.BytesIO()
    small.save(out, "PNG") if png else small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
