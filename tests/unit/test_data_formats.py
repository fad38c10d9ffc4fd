"""Every pixel format looks the same wherever an image is decoded, or is refused everywhere."""

import io
import json
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from horovod_owt.cli import cli
from horovod_owt.data.batch import MEAN, STD
from horovod_owt.data.decode import decoded
from horovod_owt.data.faults import BadImages, check_image
from horovod_owt.data.feed import ValidationFeed
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.resize import shrunk
from horovod_owt.data.stats import data_stats
from horovod_owt.data.store import open_data_set

pytestmark = pytest.mark.timeout(60)
KINDS = ["torchvision", *(["dali"] if find_spec("nvidia.dali") else [])]


def dali_version() -> str:
    import nvidia.dali

    return nvidia.dali.__version__


H, W = 96, 128
Y, X = np.mgrid[0:H, 0:W]
LEVELS = X * 255 / (W - 1)  # a ramp from black to white
GREY = LEVELS.astype(np.uint8)
RGB = np.stack([LEVELS, Y * 255 / (H - 1), (X + Y) * 255 / (W + H - 2)], -1).astype(np.uint8)
ALPHA = np.where((X // 8 + Y // 8) % 2, 0, 255).astype(np.uint8)
GREY16, RGB16, ALPHA16 = (LEVELS * 257).astype(np.uint16), RGB.astype(np.uint16) * 257, ALPHA * np.uint16(257)


def encoded(pixels, kind: str, mode: str | None = None, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def png(pixels: np.ndarray, bits: int, color: int, extra: bytes = b"", wrong: int = 0) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, color, 0, 0, 0))
    body = header + extra + chunk(b"IDAT", zlib.compress(rows), wrong)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def png16(*channels: np.ndarray, color: int) -> bytes:
    return png(np.dstack(channels).astype(">u2"), 16, color)


def without_marker(jpeg: bytes) -> bytes:
    """Without the segment of Adobe's programs: then the inks are not inverted."""
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


PALETTE = Image.fromarray(RGB).quantize(64)
CMYK = Image.fromarray(RGB).convert("CMYK")
NEGATIVE = Image.fromarray(255 - np.asarray(CMYK), "CMYK")
DEEP_TEXT = chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(3 << 20)))

# name -> the file, and what is to be seen (None: whatever the decoders agree on)
SAME = {
    "png 1": (encoded(GREY, "PNG", "1"), None),
    "png L": (encoded(GREY, "PNG"), GREY),
    "png LA": (encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"), GREY),
    "png L, one level transparent": (encoded(GREY, "PNG", transparency=100), GREY),
    "png I;16": (png16(GREY16, color=0), GREY),
    "png LA of 16 bits": (png16(GREY16, ALPHA16, color=4), GREY),
    "png P": (encoded(PALETTE, "PNG"), None),
    "png P, one colour transparent": (encoded(PALETTE, "PNG", transparency=3), None),
    "png P with alpha": (encoded(PALETTE, "PNG", transparency=bytes(range(64))), None),
    "png RGB": (encoded(RGB, "PNG"), RGB),
    "png RGBA": (encoded(np.dstack([RGB, ALPHA]), "PNG"), RGB),
    "png RGB of 16 bits": (png16(RGB16, color=2), RGB),
    "png RGBA of 16 bits": (png16(RGB16, ALPHA16, color=6), RGB),
    "png with gamma": (png(RGB, 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))), RGB),
    "png with much text": (png(RGB, 8, 2, DEEP_TEXT), RGB),
    "png with damaged text": (png(RGB, 8, 2, chunk(b"tEXt", b"c\0hello", wrong=1)), RGB),
    "apng": (encoded(RGB, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB),
    "jpeg L": (encoded(GREY, "JPEG", quality=95), GREY),
    "jpeg YCbCr": (encoded(RGB, "JPEG", quality=95), RGB),
    "jpeg RGB": (encoded(RGB, "JPEG", quality=95, keep_rgb=True), RGB),
    "jpeg CMYK, Adobe's": (encoded(CMYK, "JPEG", quality=95), RGB),
    "jpeg CMYK, others'": (without_marker(encoded(NEGATIVE, "JPEG", quality=95)), RGB),
    "bmp 1": (encoded(GREY, "BMP", "1"), None),
    "bmp L": (encoded(GREY, "BMP"), GREY),
    "bmp P": (encoded(PALETTE, "BMP"), None),
    "bmp RGB": (encoded(RGB, "BMP"), RGB),
    "bmp RGBA": (encoded(np.dstack([RGB, ALPHA]), "BMP"), RGB),
    "webp RGB": (encoded(RGB, "WEBP", lossless=True), RGB),
    "webp RGBA": (encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), RGB),
    "webp animated": (encoded(RGB, "WEBP", save_all=True, append_images=[PALETTE], lossless=True), RGB),
    "tiff L": (encoded(GREY, "TIFF"), GREY),
    "tiff P": (encoded(PALETTE, "TIFF"), None),
    "tiff I;16": (encoded(GREY16, "TIFF"), GREY),
    "tiff RGB": (encoded(RGB, "TIFF"), RGB),
    "tiff RGB, deflated": (encoded(RGB, "TIFF", compression="tiff_deflate"), RGB),
    "tiff RGB, as it stands": (encoded(RGB, "TIFF", tiffinfo={0x0112: 1}), RGB),
    "tiff RGBA": (encoded(np.dstack([RGB, ALPHA]), "TIFF"), RGB),
    "jp2 L": (encoded(GREY, "JPEG2000"), GREY),
    "jp2 I;16": (encoded(GREY16, "JPEG2000"), GREY),
    "jp2 RGB": (encoded(RGB, "JPEG2000"), RGB),
    "jp2 RGBA": (encoded(np.dstack([RGB, ALPHA]), "JPEG2000"), RGB),
}
if "dali" in KINDS and dali_version().startswith("1."):
    del SAME["webp animated"]  # 1.34 sees no picture in it, and verify says so
# name -> the file, and its fault
REFUSED = {
    "png without its end": (encoded(RGB, "PNG")[:-12], "truncated: no end marker"),
    "jpeg after a blank line": (b"\n\n" + encoded(RGB, "JPEG"), r"not an image: begins with b'\n\n\xff\xd8"),
    "gif": (encoded(RGB, "GIF"), "unsupported format GIF"),
    "ppm": (encoded(RGB, "PPM"), "unsupported format PPM"),
    "tga": (encoded(RGB, "TGA"), "unsupported format TGA"),
    "tiff 1": (encoded(GREY, "TIFF", "1"), "unsupported pixel format 1 of a TIFF"),
    "tiff LA": (
        encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "TIFF"),
        "unsupported pixel format LA of a TIFF",
    ),
    "tiff I": (encoded(GREY16.astype(np.int32), "TIFF"), "unsupported pixel format I of a TIFF"),
    "tiff F": (encoded(LEVELS.astype(np.float32), "TIFF"), "unsupported pixel format F of a TIFF"),
    "tiff LAB": (encoded(Image.new("LAB", (W, H)), "TIFF"), "unsupported pixel format LAB of a TIFF"),
    "tiff CMYK": (encoded(CMYK, "TIFF"), "unsupported pixel format CMYK of a TIFF"),
    "tiff YCbCr": (encoded(RGB, "TIFF", "YCbCr"), "unsupported pixel format YCbCr of a TIFF"),
    "tiff on its side": (encoded(RGB, "TIFF", tiffinfo={0x0112: 6}), "unsupported orientation of a TIFF"),
    "tiff upside down": (encoded(RGB, "TIFF", tiffinfo={0x0112: 3}), "unsupported orientation of a TIFF"),
    "jpeg of 12 bits": (
        encoded(RGB, "JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "12 bits",
    ),
    "png of damaged pixels": (png(RGB, 8, 2, wrong=1), "wrong checksum of chunk IDAT"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Each file as a class of its own, in order."""
    root = tmp_path_factory.mktemp("formats")
    for number, (data, _) in enumerate([*SAME.values(), *REFUSED.values()]):
        for split in ("train", "val"):
            (root / split / f"{number:03}").mkdir(parents=True)
            (root / split / f"{number:03}" / "image.jpg").write_bytes(data)
    return root


def expected(name: str) -> np.ndarray:
    data, truth = SAME[name]
    truth = np.asarray(decoded(data)) if truth is None else truth
    return np.dstack([truth] * 3) if truth.ndim == 2 else truth


@pytest.mark.parametrize("name", SAME)
def test_pillow_sees_what_was_drawn(name):
    data, _ = SAME[name]
    assert check_image(data)[:2] == (H, W)
    seen = np.asarray(decoded(data)).astype(int)
    assert np.abs(seen - expected(name)).max() < (12 if "jpeg" in name else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_both_pipelines_see_what_was_drawn_and_refuse_the_same_files(root, kind):
    store, count = open_data_set(root).val, len(SAME) + len(REFUSED)
    feed = ValidationFeed(store, batch=count, bad_images=BadImages())
    with make_pipeline(kind, feed, image_size=84, device_id=None, num_threads=2) as pipe:
        (batch,) = pipe
    levels = 255 * (batch.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    top, left = (H - 84) // 2, (W - 84) // 2  # validation takes 84 of 96 pixels: no resize
    for row, name in enumerate(SAME):
        wanted = expected(name)[top : top + 84, left : left + 84]
        difference = np.abs(levels[row].permute(1, 2, 0).numpy() - wanted)
        assert difference.max() < (12 if "jpeg" in name else 4), (name, difference.max())
        plain = np.asarray(decoded(SAME[name][0]))[top : top + 84, left : left + 84]
        assert np.abs(levels[row].permute(1, 2, 0).numpy() - plain).max() < 2.1, name
    for row, (name, (_, fault)) in enumerate(REFUSED.items(), len(SAME)):
        assert fault in batch.faults[row], name
    assert len(batch.faults) == len(REFUSED)


@pytest.mark.parametrize("pipeline", KINDS)
def test_verify_names_what_training_refuses(root, pipeline):
    argv = ["data", "verify", str(root), "--split", "val", "--pipeline", pipeline, "--json"]
    report = json.loads(CliRunner().invoke(cli, argv).stdout)
    faults = {int(Path(bad["path"]).parent.name): bad["fault"] for bad in report["bad"]}
    wanted = {row: fault for row, (_, fault) in enumerate(REFUSED.values(), len(SAME))}
    assert faults.keys() == wanted.keys()
    assert all(fault in faults[row] for row, fault in wanted.items())


@pytest.mark.parametrize(
    "name", ["png I;16", "tiff I;16", "png LA", "jpeg CMYK, others'", "png with much text"]
)
def test_downscaled_images_keep_their_levels(name):
    small = np.asarray(Image.open(io.BytesIO(shrunk(SAME[name][0], 48, png=True))).convert("RGB"))
    assert small.shape[0] == 48
    assert np.abs(small.mean(axis=(0, 1)) - expected(name).mean(axis=(0, 1))).max() < 2


def test_statistics_see_the_levels(root, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "image.png").write_bytes(SAME["png I;16"][0])
    report = data_stats(open_data_set(tmp_path), sample=10)
    assert report["mean"] == pytest.approx([GREY.mean() / 255] * 3, abs=0.003)
