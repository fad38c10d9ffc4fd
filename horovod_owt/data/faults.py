"""What is a bad image: one definition for training, for `owt data verify`, and for both decoders."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from horovod_owt.data.jpeg import Header, read_header

MAX_PIXELS = 178_956_970  # where Pillow takes an image for a decompression bomb; ILSVRC2012 stays below half
UNREADABLE = "unreadable"  # how the fault of a file begins that the file system does not give

_JPEG_END = b"\xff\xd9"  # EOI; in the image's data each 0xFF is followed by 0, so it cannot turn up there
_PNG_END = b"IEND"


def check_image(data: bytes) -> Header:
    """The header of an image that looks whole; ValueError says what is wrong.

    Cheap, some 10 us: nothing is decoded, but a file without its end is. So a file that is cut short is found
    whichever window of it is decoded, by any decoder.
    """
    header = read_header(data)
    if header.height * header.width > MAX_PIXELS:
        raise ValueError(f"impossible size {header.width} x {header.height}")
    if not _has_end(data, header) and (fault := pillow_fault(data)):
        raise ValueError(f"truncated: its end is missing, and Pillow says: {fault}")
    return header


def pillow_fault(data: bytes) -> str | None:
    """What keeps Pillow from decoding the whole image, or None."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    except Exception as trouble:  # its decoders raise nearly anything on hostile bytes
        return pillow_says(trouble)
    return None


def pillow_says(trouble: Exception) -> str:
    if isinstance(trouble, UnidentifiedImageError):  # its own text is an address in memory
        return "unknown kind of image"
    return str(trouble) or type(trouble).__name__


def _has_end(data: bytes, header: Header) -> bool:
    """Whether the image's data have an end; the one of an EXIF thumbnail lies before them."""
    if header.kind == "JPEG":
        return data.endswith(_JPEG_END) or data.find(_JPEG_END, header.pixels_from) >= 0
    return header.kind != "PNG" or _PNG_END in data[-64:] or _PNG_END in data


def read_fault(trouble: OSError) -> str:
    """The fault of a file that cannot be read."""
    return f"{UNREADABLE}: {trouble.strerror or trouble}"


class BadImages:
    """The bad images of a store: what one rank knows of them. Feeds and pipelines add, in their threads.

    What is known is not read again. An unreadable file is: the next epoch may find its disk well.
    """

    def __init__(self) -> None:
        self._faults: dict[int, str] = {}
        self.named: set[int] = set()  # those that all ranks have been told of

    def fault(self, index: int) -> str | None:
        return self._faults.get(index)

    def add(self, index: int, fault: str) -> None:
        """Remember a fault; the first one of an image stays."""
        if not fault.startswith(UNREADABLE):
            self._faults.setdefault(index, fault)
