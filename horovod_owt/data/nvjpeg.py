"""Decoding of JPEGs on the GPU by torchvision, that is by nvJPEG; what it refuses is left to the CPU.

So are JPEGs of RGB, CMYK and YCCK: it may show them in false colours, without an error. Its manual says only
that conversion from CMYK is off by default, and torchvision does not turn it on.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import resized_crop

from horovod_owt.data.augment import View, whole_window
from horovod_owt.data.feed import EncodedBatch
from horovod_owt.data.header import image_size
from horovod_owt.data.jpeg import SOI

log = logging.getLogger(__name__)

GROUP_PIXELS = 2**27  # decoded together, at most, unless one image has more: 400 MB when decoded
Decode = Callable[[Sequence[Tensor]], list[Tensor]]  # files' bytes -> (3, height, width) uint8 on the GPU


def nvjpeg_decoder(device: torch.device) -> Decode | None:
    """torchvision's decoder for this GPU; None, with a warning, if this torchvision has none."""

    def decode(files: Sequence[Tensor]) -> list[Tensor]:
        # nvJPEG writes on a stream of its own, at once: into memory that was freed on this one, which may
        # still have kernels queued that read it.
        torch.cuda.current_stream(device).synchronize()
        return decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device)

    sample = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sample, "JPEG")
    try:
        decode([torch.frombuffer(bytearray(sample.getvalue()), dtype=torch.uint8)])
    except Exception as error:  # no nvJPEG, or an older torchvision that takes one file at a time
        reason = str(error).partition("\n")[0]
        log.warning("JPEGs are decoded on the CPU, nvJPEG fails: %s", reason)
        return None
    return decode


class GpuDecoder:
    """Decodes, crops, resizes and mirrors the rows of a batch on the GPU."""

    def __init__(self, decode: Decode, *, image_size: int, view: View = whole_window) -> None:
        self._decode, self._image_size, self._view = decode, image_size, view

    def decode_rows(self, encoded: EncodedBatch, out: Tensor) -> list[int]:
        """Fill rows of `out` (K, b, S, S, 3) uint8, on its device; returns the rows left to the CPU."""
        left = set(range(len(encoded.images)))
        for rows in _groups(encoded):
            decoded = self._decoded(encoded, rows)
            self._cut_out(encoded, decoded, out)
            left -= decoded.keys()
        return sorted(left)

    def _decoded(self, encoded: EncodedBatch, rows: Sequence[int]) -> dict[int, Tensor]:
        """The images of these rows, without those that nvJPEG refuses.

        It takes all of them or none, and does not say for which image.
        """
        decoded = self._try(encoded, rows)
        if decoded is None:
            alone = {row: self._try(encoded, [row]) for row in rows}
            decoded = {row: image[row] for row, image in alone.items() if image is not None}
        return decoded

    def _cut_out(self, encoded: EncodedBatch, decoded: dict[int, Tensor], out: Tensor) -> None:
        side, sizes_and_corners = self._image_size, self._view(encoded.windows[:, 2:], self._image_size)
        sizes, corners = (each.tolist() for each in sizes_and_corners)
        for row, image in decoded.items():
            window = encoded.windows[row].tolist()
            pixels = resized_crop(image, *window, size=sizes[row], antialias=True).permute(1, 2, 0)
            for crop, (top, left) in enumerate(corners[row]):
                cut = pixels[top : top + side, left : left + side]
                out[crop, row] = cut.flip(1) if encoded.flips[row] else cut

    def _try(self, encoded: EncodedBatch, rows: Sequence[int]) -> dict[int, Tensor] | None:
        files = [torch.from_numpy(np.require(encoded.images[row], requirements="W")) for row in rows]
        try:
            return dict(zip(rows, self._decode(files), strict=True))
        except RuntimeError:
            return None


def _groups(encoded: EncodedBatch) -> Iterator[list[int]]:
    """What nvJPEG is to decode, in groups that the GPU has memory for: a batch of photos may take 10 GB."""
    rows: list[int] = []
    pixels = 0
    for row, file in enumerate(encoded.images):
        if encoded.odd_colours[row] or file[:2].tobytes() != SOI:
            continue
        height, width = image_size(file.tobytes())
        if rows and pixels + height * width > GROUP_PIXELS:
            yield rows
            rows, pixels = [], 0
        rows.append(row)
        pixels += height * width
    if rows:
        yield rows
