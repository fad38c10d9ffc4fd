"""The definition of a bad image, for training, `owt data verify` and both decoders."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from horovod_owt.data.jpeg import Header, read_header

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs; ILSVRC2012 stays below half of it
UNREADABLE = "unreadable"  # prefix of the fault of a file that the file system fails to read

_JPEG_END = b"\xff\xd9"  # EOI; in the image's data each 0xFF is followed by 0, so it cannot occur there
_PNG_END = b"IEND"


def check_image(data: bytes) -> Header:
    """The header of an image that looks complete; ValueError with the fault otherwise.

    Cheap, about 10 us: only a file without an end marker is decoded. So a truncated file is found whichever
    window of it is used, by any decoder.
    """
    header = read_header(data)
    if header.height * header.width > MAX_PIXELS:
        raise ValueError(f"impossible size {header.width} x {header.height}")
    if not _has_end(data, header) and (fault := pillow_fault(data)):
        raise ValueError(f"truncated: no end marker, Pillow: {fault}")
    return header


def pillow_fault(data: bytes) -> str | None:
    """Pillow's error when it decodes the whole image, or None."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    except Exception as error:  # its decoders may raise anything on malformed bytes
        return pillow_message(error)
    return None


def pillow_message(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message contains only a memory address
        return "unknown image format"
    return str(error) or type(error).__name__


def _has_end(data: bytes, header: Header) -> bool:
    """Whether the image's data has an end marker; that of an EXIF thumbnail comes before the data."""
    if header.kind == "JPEG":
        return data.endswith(_JPEG_END) or data.find(_JPEG_END, header.pixels_from) >= 0
    return header.kind != "PNG" or _PNG_END in data[-64:] or _PNG_END in data


def read_fault(error: OSError) -> str:
    """The fault of a file that cannot be read."""
    return f"{UNREADABLE}: {error.strerror or error}"


class BadImages:
    """The bad images of a store that this rank knows of. Feeds and pipelines add to it from their threads.

    A known bad image is not read again. An unreadable file is: by the next epoch its disk may have recovered.
    """

    def __init__(self) -> None:
        self._faults: dict[int, str] = {}
        self.named: set[int] = set()  # those that have been announced to all ranks

    def fault(self, index: int) -> str | None:
        return self._faults.get(index)

    def add(self, index: int, fault: str) -> None:
        """Record a fault; an image keeps its first one."""
        if not fault.startswith(UNREADABLE):
            self._faults.setdefault(index, fault)
