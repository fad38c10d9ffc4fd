"""One of each bad file, and of each that is odd but decodes."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
CLOUD = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (120, 90), **options) -> bytes:
    image = Image.fromarray(CLOUD).resize(size, Image.Resampling.BICUBIC).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def segment(jpeg: bytes, marker: int) -> tuple[int, int]:
    """Where the first segment of a kind begins and ends."""
    start = jpeg.index(bytes([0xFF, marker]))
    return start, start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")


def of_size(height: int, width: int) -> bytes:
    """A JPEG that claims to be so large."""
    jpeg = bytearray(encoded())
    start, _ = segment(jpeg, 0xC0)
    jpeg[start + 5 : start + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(jpeg)


def without_tables() -> bytes:
    """A JPEG without its quantisation tables: size and end are sound, no decoder takes it."""
    jpeg = encoded()
    while b"\xff\xdb" in jpeg:
        start, end = segment(jpeg, 0xDB)
        jpeg = jpeg[:start] + jpeg[end:]
    return jpeg


def undecodable() -> bytes:
    """A PNG of sound chunks whose compressed pixels are junk: only decoding shows it."""
    png = encoded("PNG")
    start = png.index(b"IDAT")
    body = b"IDAT" + b"\x78\x9c" + b"junk" * 200
    return b"".join(
        [
            png[: start - 4],
            (len(body) - 4).to_bytes(4, "big"),
            body,
            zlib.crc32(body).to_bytes(4, "big"),
            PNG_END,
        ]
    )


def with_stray_marker() -> bytes:
    """A marker of no sense amid the pixels: Pillow refuses it, DALI fills up with grey."""
    jpeg = encoded(size=(300, 240), quality=95)
    middle = len(jpeg) // 2
    return jpeg[:middle] + b"\xff\xc4\x00\x10" + jpeg[middle:]


# kind -> the file, and what its fault must say
BAD = {
    "empty": (b"", "empty file"),
    "html": (b"<html><body>503 Service Unavailable</body></html>", "not an image: HTML"),
    "text": (b"404: Not Found", "not an image: begins with b'404"),
    "zeros": (b"\0" * 5000, "not an image: 5000 zero bytes"),
    "header": (encoded()[:20] + b"\0" * 500, "broken JPEG header"),
    "cut in header": (encoded()[:100], "truncated JPEG header"),
    "truncated": (encoded()[:-700], "truncated"),
    "progressive truncated": (encoded(progressive=True)[:-700], "truncated"),
    "zero tail": (encoded()[:-700] + b"\0" * 700, "truncated"),
    "truncated png": (encoded("PNG")[:-200], "truncated"),
    "no height": (of_size(0, 120), "impossible size 120 x 0"),
    "bomb": (of_size(65000, 65000), "impossible size 65000 x 65000"),
    "no tables": (without_tables(), "undecodable: no quantisation table"),
    "junk in a png": (undecodable(), "undecodable"),
}
# they decode: kind -> the file, and what `owt data verify` remarks
ODD = {
    "png": (encoded("PNG"), "PNG named .JPEG"),
    "cmyk": (encoded(mode="CMYK"), "CMYK"),
}


def spoil(paths: list[str]) -> dict[str, str]:
    """Replace these files by one of each bad kind; path -> what its fault must say."""
    assert len(paths) == len(BAD)
    for path, (data, _) in zip(paths, BAD.values(), strict=True):
        Path(path).write_bytes(data)
    return {path: fault for path, (_, fault) in zip(paths, BAD.values(), strict=True)}
