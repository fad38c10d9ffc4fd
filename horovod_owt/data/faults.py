"""The definition of a bad image, for training, `owt data verify` and both decoders."""

from __future__ import annotations

from contextlib import suppress

from horovod_owt.data.decode import pillow_fault
from horovod_owt.data.header import Header, read_header
from horovod_owt.data.jpeg import EOI, table_fault
from horovod_owt.data.png import END, chunk_fault

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs; ILSVRC2012 stays below half of it
UNREADABLE = "unreadable"  # prefix of the fault of a file that is gone

# Pixel formats (Pillow's names) that Pillow and DALI show alike; those of JPEG and PNG all are. The tests
# compare them; docs/data.md has the table.
MODES = {
    "BMP": {"1", "L", "P", "RGB"},
    "WEBP": {"RGB", "RGBA"},
    "TIFF": {"L", "P", "RGB", "RGBA", "I;16", "I;16B"},  # DALI 1.34 takes CMYK and YCbCr for RGB
    "JPEG2000": {"L", "RGB", "RGBA", "I;16"},
}


def check_image(data: bytes) -> Header:
    """The header of an image that looks complete and decodable; ValueError with the fault otherwise.

    Cheap, about 30 us: only a file without an end marker is decoded. So a truncated file is found whichever
    window of it is used, by any decoder, and what the decoders would show differently is refused by all.
    """
    header = read_header(data)
    if header.height * header.width > MAX_PIXELS:
        raise ValueError(f"impossible size {header.width} x {header.height}")
    if not _has_end(data, header):
        if fault := pillow_fault(data):
            raise ValueError(f"truncated: no end marker, Pillow: {fault}")
        if header.kind == "PNG":  # with all of its pixels: Pillow shows it, DALI does not
            raise ValueError("truncated: no end marker")
    if fault := _format_fault(data, header):
        raise ValueError(fault)
    return header


def _format_fault(data: bytes, header: Header) -> str | None:
    if header.kind == "JPEG":
        fault = table_fault(data)
        return f"undecodable: {fault}" if fault else None
    if header.kind == "PNG":
        return chunk_fault(data)
    if header.kind not in MODES:
        return f"unsupported format {header.kind}"
    if header.mode not in MODES[header.kind]:
        return f"unsupported pixel format {header.mode} of a {header.kind}"
    if header.turned:  # Pillow shows it upright, DALI as stored
        return f"unsupported orientation of a {header.kind}"
    return None


def _has_end(data: bytes, header: Header) -> bool:
    """Whether the image's data has an end marker; that of an EXIF thumbnail comes before the data."""
    if header.kind == "JPEG":
        return data.endswith(EOI) or data.find(EOI, header.pixels_from) >= 0
    return header.kind != "PNG" or END in data[-64:] or END in data


def read_fault(error: OSError) -> str:
    """The fault of a file that is not there, or no file (machine.is_of_the_file)."""
    return f"{UNREADABLE}: {error.strerror or error}"


class BadImages:
    """The bad images of a store that this rank knows of. Feeds and pipelines add to it from their threads.

    A known bad image is not read again. An unreadable file is: it may be there again by the next epoch.
    """

    def __init__(self) -> None:
        self._faults: dict[int, str] = {}
        self.distrusted: set[str] = set()  # kinds, but for JPEG, of which a decoder has refused one
        self.named: set[int] = set()  # those that have been announced to all ranks

    def fault(self, index: int) -> str | None:
        return self._faults.get(index)

    def distrust(self, data: bytes) -> None:
        """Have feeds decode images of this one's kind, which passed check_image but not a decoder."""
        with suppress(ValueError):
            if (kind := check_image(data).kind) != "JPEG":
                self.distrusted.add(kind)

    def add(self, index: int, fault: str) -> None:
        """Record a fault; an image keeps its first one."""
        if not fault.startswith(UNREADABLE):
            self._faults.setdefault(index, fault)
