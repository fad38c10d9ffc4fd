import io
import re
import struct

import numpy as np
import pytest
from PIL import Image

from horovod_owt.data.decode import decoded, pillow_fault
from horovod_owt.data.header import image_size, read_header


def encoded(kind="JPEG", mode="RGB", size=(61, 37), **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(noise[..., :3]).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90 degrees; we want the stored size


@pytest.mark.parametrize(
    "data",
    [
        encoded(),
        encoded(progressive=True),
        encoded(subsampling=0, quality=95),
        encoded(mode="L"),
        encoded(mode="CMYK"),
        encoded(exif=EXIF),
        encoded(comment=b"\xff\xc0 looks like a frame"),
        encoded(icc_profile=b"\xff\xc2" * 40_000),  # two segments
        encoded("PNG"),
        encoded("PNG", mode="RGBA"),
        encoded("BMP"),
        encoded().replace(b"\xff\xc0", b"\xff\xff\xff\xc0"),  # fill bytes before a marker
        encoded()[:700],  # the header is all there
    ],
)
def test_the_header_has_height_and_width(data):
    assert image_size(data) == (37, 61)


def renamed(jpeg: bytes, names: bytes) -> bytes:
    """Its channels by other names: libjpeg writes RGB in letters, Adobe's programs 1, 2, 3."""
    out, frame, scan = bytearray(jpeg), read_header(jpeg).pixels_from, jpeg.index(b"\xff\xda")
    out[frame + 10 : frame + 19 : 3] = out[scan + 5 : scan + 11 : 2] = names
    return bytes(out)


def adobe(jpeg: bytes, transform: int) -> bytes:
    """With the segment of Adobe's programs; 0: not transformed, 1: to YCbCr, 2: to YCCK."""
    return jpeg[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + jpeg[2:]


AS_RGB = encoded(keep_rgb=True)
WITHOUT_MARKER = AS_RGB.replace(AS_RGB[2:18], b"")


@pytest.mark.parametrize(
    ("data", "is_odd"),
    [
        (encoded(), False),
        (encoded(progressive=True), False),
        (adobe(encoded(), 1), False),
        (encoded(comment=b"Adobe"), False),
        (encoded(mode="L"), False),
        (adobe(encoded(mode="L"), 0), False),
        (AS_RGB, True),
        (WITHOUT_MARKER, True),
        (renamed(AS_RGB, b"\1\2\3"), True),
        (adobe(encoded(), 0), True),  # with a segment of JFIF, which says YCbCr
        (adobe(encoded(), 2), True),
        (encoded(mode="CMYK"), True),
        (adobe(encoded(mode="CMYK"), 2), True),
        (encoded("PNG"), False),
    ],
)
def test_colours_other_than_grey_and_ycbcr_are_known_from_the_header(data, is_odd):
    assert read_header(data).odd_colours == is_odd


@pytest.mark.parametrize("data", [WITHOUT_MARKER, renamed(AS_RGB, b"\1\2\3")])
def test_what_is_taken_for_rgb_is_rgb_to_pillow(data):
    assert (np.asarray(decoded(data)) == np.asarray(decoded(AS_RGB))).all()


def test_a_real_size_needs_two_bytes():
    assert image_size(encoded(size=(1000, 300))) == (300, 1000)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "empty file"),
        (b"\0" * 1000, "not an image"),
        (b"<html>503</html>", "not an image"),
        (encoded("PNG")[:12], "truncated PNG header"),
        (encoded()[:100], "truncated JPEG header"),
        (b"\xff\xd8", "truncated JPEG header"),
        (encoded()[:20] + b"\0" * 500, "broken JPEG header"),
        (b"\xff\xd8\xff\xd9" + b"\0" * 20, "without a frame header"),
        (b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x00\x00\x10" + b"\0" * 9, "impossible size 16 x 0"),
        (b"\xff\xd8" + b"\xff\xe0\x00\x00" * 50, "broken JPEG header"),  # a length that leads nowhere
    ],
)
def test_a_broken_header_is_a_value_error(data, fault):
    with pytest.raises(ValueError, match=fault):
        image_size(data)
    assert pillow_fault(data)


def test_random_bytes_after_the_magic_end_in_a_size_that_a_frame_gives_or_in_a_value_error():
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(2000):
        data = (
            b"\xff\xd8"
            + rng.choice([0, 0, 2, 0xFF, 0xC0, 0xD0, 0xE1], rng.integers(0, 60)).astype(np.uint8).tobytes()
        )
        try:
            height, width = image_size(data)
        except ValueError:
            continue
        frames = [data[found.start() + 5 : found.start() + 9] for found in re.finditer(b"\xff(?=\xc0)", data)]
        assert struct.pack(">HH", height, width) in frames and height and width, data
        accepted += 1
    assert accepted > 20  # 45 with this seed


def test_whatever_segments_come_before_the_frame_its_size_is_found():
    rng = np.random.default_rng(1)
    good = encoded()
    for _ in range(200):
        before = b""
        for _ in range(rng.integers(1, 6)):
            length = int(rng.integers(2, 300))
            contents = rng.choice([0, 0xFF, 0xC0, 0xD8, 0xD9], length - 2).astype(np.uint8).tobytes()
            marker = rng.choice([0xE1, 0xE2, 0xEF, 0xFE, 0xDD, 0xC4])  # application, comment, tables
            before += (
                b"\xff" * int(rng.integers(1, 4)) + bytes([marker]) + struct.pack(">H", length) + contents
            )
        data = good[:2] + before + good[2:]
        assert read_header(data)[:4] == (37, 61, "JPEG", 3), data
        assert data[read_header(data).pixels_from :][:2] == b"\xff\xc0"


def test_pillow_fault_decodes():
    assert pillow_fault(encoded()) is None and pillow_fault(encoded(mode="CMYK")) is None
    assert "truncated" in pillow_fault(encoded(size=(300, 300))[:-2000])
