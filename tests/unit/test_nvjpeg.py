"""Decoding by nvJPEG, with a stand-in that refuses as it does: a whole batch, without saying which image."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from horovod_owt.data import nvjpeg
from horovod_owt.data.augment import centre_crop, ten_crops
from horovod_owt.data.feed import EncodedBatch, ValidationFeed
from horovod_owt.data.header import read_header
from horovod_owt.data.nvjpeg import GpuDecoder, nvjpeg_decoder
from horovod_owt.data.pipeline_torchvision import TorchvisionPipeline
from horovod_owt.data.store import open_data_set

SIDE = 32
pytestmark = pytest.mark.timeout(60)


def picture(seed: int) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(rough).resize((100, 80), Image.Resampling.BICUBIC)


def file(seed: int, mode: str = "RGB", kind: str = "JPEG", **options) -> np.ndarray:
    out = io.BytesIO()
    options |= {"quality": 95} if kind == "JPEG" else {}
    picture(seed).convert(mode).save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


REFUSED = b"nvJPEG finds a fault in this"


def encoded(*files: np.ndarray) -> EncodedBatch:
    rows = len(files)
    windows = np.tile(np.array([5, 10, 60, 70], np.int32), (rows, 1))
    flips = np.arange(rows) % 2 == 1
    odd = np.array([read_header(file.tobytes()).odd_colours for file in files])
    return EncodedBatch(
        list(files), windows, flips, np.zeros(rows, np.int64), np.arange(rows), np.ones(rows, bool), odd
    )


class PretendedNvjpeg:
    """libjpeg, but it refuses a batch with REFUSED in it, and takes all channels for those of YCbCr."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, files):
        self.batches.append(len(files))
        return [self._decoded(data) for data in files]

    def _decoded(self, data):
        file = data.numpy().tobytes()
        if REFUSED in file:
            raise RuntimeError("nvjpegDecodeBatched failed: 8")
        pixels = decode_jpeg(data, mode=ImageReadMode.RGB)
        return 255 - pixels if read_header(file).odd_colours else pixels


def by_pillow(batch: EncodedBatch, row: int) -> np.ndarray:
    top, left, height, width = batch.windows[row].tolist()
    image = Image.open(io.BytesIO(batch.images[row].tobytes())).convert("RGB")
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if batch.flips[row] else pixels


def test_a_batch_is_decoded_at_once_to_what_pillow_gives():
    batch, decode = encoded(*map(file, range(4))), PretendedNvjpeg()
    out = torch.empty((1, 4, SIDE, SIDE, 3), dtype=torch.uint8)
    assert GpuDecoder(decode, image_size=SIDE).decode_rows(batch, out) == []
    assert decode.batches == [4]
    for row in range(4):
        assert np.abs(out[0, row].numpy().astype(int) - by_pillow(batch, row)).max() <= 2


def test_what_is_refused_is_left_to_the_cpu_and_the_rest_is_not():
    batch = encoded(file(0), file(1, kind="PNG"), file(2, comment=REFUSED), file(3))
    decode, out = PretendedNvjpeg(), torch.empty((1, 4, SIDE, SIDE, 3), dtype=torch.uint8)
    assert GpuDecoder(decode, image_size=SIDE).decode_rows(batch, out) == [1, 2]
    assert decode.batches == [3, 1, 1, 1]  # the PNG is never offered
    assert np.abs(out[0, 3].numpy().astype(int) - by_pillow(batch, 3)).max() <= 2


def test_a_jpeg_of_other_colours_than_ycbcr_is_never_offered():
    """It would not be refused, but shown in false colours."""
    batch = encoded(file(0), file(1, mode="CMYK"), file(2, keep_rgb=True), file(3, mode="L"))
    decode, out = PretendedNvjpeg(), torch.empty((1, 4, SIDE, SIDE, 3), dtype=torch.uint8)
    assert GpuDecoder(decode, image_size=SIDE).decode_rows(batch, out) == [1, 2]
    assert decode.batches == [2]


def test_large_images_are_decoded_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(nvjpeg, "GROUP_PIXELS", 2 * 80 * 100)
    files = [*map(file, range(5)), file(5, kind="PNG")]
    batch, decode = encoded(*files), PretendedNvjpeg()
    out = torch.empty((1, 6, SIDE, SIDE, 3), dtype=torch.uint8)
    assert GpuDecoder(decode, image_size=SIDE).decode_rows(batch, out) == [5]
    assert decode.batches == [2, 2, 1]
    for row in range(5):
        assert np.abs(out[0, row].numpy().astype(int) - by_pillow(batch, row)).max() <= 2


def test_nvjpeg_writes_when_nothing_is_queued_that_may_read_the_memory(monkeypatch):
    """On a stream of its own, into memory that was freed on this one."""
    done = []
    stream = SimpleNamespace(synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(nvjpeg, "decode_jpeg", lambda files, **_: done.append("decode"))
    decode = nvjpeg_decoder(torch.device("cuda:0"))  # decodes a sample
    decode([torch.zeros(1, dtype=torch.uint8)])
    assert done == ["wait", "decode", "wait", "decode"]


@pytest.mark.parametrize("view", [centre_crop, ten_crops])
def test_the_pipeline_fills_in_what_was_refused(tmp_path, view):
    for split in ("train", "val"):
        (tmp_path / split / "c").mkdir(parents=True)
        odd = [file(2, mode="CMYK"), file(3, keep_rgb=True), file(4, comment=REFUSED)]
        files = [file(0), file(1, kind="PNG"), *odd]
        for number, data in enumerate(files):
            (tmp_path / split / "c" / f"{number}.JPEG").write_bytes(data.tobytes())
    feed = ValidationFeed(open_data_set(tmp_path).val, batch=5, view=view)
    with TorchvisionPipeline(feed, image_size=SIDE, device_id=None, num_threads=1) as pipe:
        batch, pixels = next(pipe._decoded)
        pipe._gpu_decoder = GpuDecoder(PretendedNvjpeg(), image_size=SIDE, view=view)
        _, mixed = pipe._decode_batch(batch)
    assert (mixed - (pixels * pipe._std + pipe._mean)).abs().max() < 2.1


def test_without_a_gpu_there_is_no_decoder_but_a_warning(caplog):
    assert nvjpeg_decoder(torch.device("cuda:0")) is None
    assert "JPEGs are decoded on the CPU" in caplog.text
