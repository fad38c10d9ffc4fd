"""The window of an image that is cropped, and whether it is mirrored.

Training draws are a function of (seed, epoch, index), so a sample looks the same whichever rank decodes it.
Training and validation then share one path: crop the window, resize it to a square, mirror, normalise.
A window is a row (top, left, height, width), in pixels of the stored image.
"""

from __future__ import annotations

import numpy as np

from horovod_owt.data.hashing import hashed, uniforms

SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10

VALIDATION_CROP = 224 / 256  # of the shorter side

_AUGMENT = 1  # separates these draws from those of the sample order


def training_windows(
    sizes: np.ndarray, seed: int, epochs: np.ndarray, indices: np.ndarray, *, scale=SCALE, ratio=RATIO
) -> tuple[np.ndarray, np.ndarray]:
    """Random windows (n, 4) int32 and flips (n,) bool for images of `sizes` (n, 2), height and width.

    torchvision's RandomResizedCrop: draw area and aspect ratio up to ten times until the window fits; if none
    does, the largest centred window of an allowed ratio.
    """
    heights, widths = np.asarray(sizes, np.int64).T
    draws = uniforms(hashed(_AUGMENT, seed, epochs, indices), 2 * TRIES + 3)
    areas = (heights * widths)[:, None] * (scale[0] + draws[:, :TRIES] * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    ratios = np.exp(low + draws[:, TRIES : 2 * TRIES] * (high - low))
    tried_w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= widths[:, None]) & (tried_h > 0) & (tried_h <= heights[:, None])
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    w, h = tried_w[rows, first], tried_h[rows, first]
    u_top, u_left, u_flip = draws[:, -3:].T
    top, left = np.floor(u_top * (heights - h + 1)), np.floor(u_left * (widths - w + 1))
    drawn = np.stack([top, left, h, w], axis=1)
    windows = np.where(fits.any(axis=1)[:, None], drawn, _largest_centred(heights, widths, ratio))
    return windows.astype(np.int32), u_flip < 0.5


def _largest_centred(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    w = np.minimum(widths, np.rint(heights * ratio[1])).clip(1)
    h = np.minimum(heights, np.rint(widths / ratio[0])).clip(1)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def validation_windows(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows of "resize the shorter side to 256, crop the centre 224 x 224"; no flips."""
    sizes = np.asarray(sizes, np.int64)
    side = np.rint(sizes.min(axis=1) * VALIDATION_CROP).clip(1)
    top, left = ((sizes - side[:, None]) // 2).T
    return np.stack([top, left, side, side], axis=1).astype(np.int32), np.zeros(len(sizes), bool)
