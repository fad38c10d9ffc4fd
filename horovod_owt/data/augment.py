"""The window of an image that is decoded, what is cut out of it, and whether it is mirrored.

Training draws are a function of (seed, epoch, index), so a sample looks the same whichever rank decodes it.
Training and validation then share one path: decode the window, resize it, cut out square crops, mirror,
normalise. A window is a row (top, left, height, width), in pixels of the stored image. A view says to what
size windows are resized, and where the crops begin: training shows the whole window, validation its centre.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from horovod_owt.data.hashing import hashed, uniforms

SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10

SHORT_SIDE = 256 / 224  # of the resized image, in crops: torchvision's Resize(256), CenterCrop(224)
LONGEST = 16  # times the shorter side: more of an image is not resized, which would take gigabytes

# (n, 2) shapes of windows, side of crops -> (n, 2) sizes to resize them to, (n, K, 2) corners of crops there
View = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

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


def scaled(windows: np.ndarray, sizes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Windows of images of `sizes` (n, 2) as windows, in whole pixels, of the same reduced to `shapes`."""
    begins, ends = windows[:, :2], windows[:, :2] + windows[:, 2:]
    ratios = shapes / sizes
    starts = np.minimum(np.rint(begins * ratios).astype(np.int64), shapes - 1)
    stops = np.maximum(np.rint(ends * ratios).astype(np.int64), starts + 1)
    return np.concatenate([starts, stops - starts], axis=1).astype(np.int32)


def validation_windows(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows of whole images, but for the ends of very long ones; no flips."""
    sizes = np.asarray(sizes, np.int64)
    kept = np.minimum(sizes, LONGEST * sizes.min(axis=1, keepdims=True))
    return np.concatenate([(sizes - kept) // 2, kept], axis=1).astype(np.int32), np.zeros(len(sizes), bool)


def whole_window(shapes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The view of training: the window, squeezed into a square."""
    return np.full((len(shapes), 2), side, np.int64), np.zeros((len(shapes), 1, 2), np.int64)


def centre_crop(shapes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize(256), CenterCrop(224), for any side of the crop."""
    sizes = _short_side_resized(shapes, side)
    return sizes, _centre(sizes, side)[:, None]


def ten_crops(shapes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize(256), TenCrop(224), in six crops: the corners, the centre, that to be mirrored.

    With the mirror images of the corners and of the last one these are ten (Krizhevsky et al. 2012, section
    4.1). torchvision mirrors before it cuts: with an odd margin that centre is a pixel off.
    """
    sizes = _short_side_resized(shapes, side)
    bottom, right = (sizes - side).T
    zero = np.zeros_like(bottom)
    corners = (zero, zero), (zero, right), (bottom, zero), (bottom, right)
    centre = _centre(sizes, side)
    to_mirror = np.stack([centre[:, 0], right - centre[:, 1]], axis=1)
    return sizes, np.stack([*(np.stack(each, axis=1) for each in corners), centre, to_mirror], axis=1)


def _short_side_resized(shapes: np.ndarray, side: int) -> np.ndarray:
    shapes = np.asarray(shapes, np.int64)
    return round(side * SHORT_SIDE) * shapes // shapes.min(axis=1, keepdims=True)


def _centre(sizes: np.ndarray, side: int) -> np.ndarray:
    return np.rint((sizes - side) / 2).astype(np.int64)  # half a pixel to the even one, as torchvision does
