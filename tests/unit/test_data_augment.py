import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, FiveCrop, Resize
from torchvision.transforms.functional import hflip

from horovod_owt.data.augment import (
    RATIO,
    SCALE,
    TRIES,
    centre_crop,
    scaled,
    ten_crops,
    training_windows,
    validation_windows,
    whole_window,
)
from horovod_owt.data.hashing import hashed, uniforms


def plain_window(height, width, draws):
    """torchvision's RandomResizedCrop.get_params, line by line, with our draws in the place of its own."""
    for attempt in range(TRIES):
        area = height * width * (SCALE[0] + draws[attempt] * (SCALE[1] - SCALE[0]))
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = math.exp(low + draws[TRIES + attempt] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-3] * (height - h + 1)), int(draws[-2] * (width - w + 1)), h, w
    if width / height < RATIO[0]:
        w, h = width, round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w, h = round(height * RATIO[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


sizes = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20)


@given(sizes, st.integers(0, 2**62), st.integers(0, 1000))
def test_windows_equal_torchvisions_rule(sizes, seed, epoch):
    indices = np.arange(len(sizes)) * 7
    epochs = np.full(len(sizes), epoch)
    windows, flips = training_windows(np.array(sizes), seed, epochs, indices)
    draws = uniforms(hashed(1, seed, epochs, indices), 2 * TRIES + 3)
    expected = [plain_window(*size, row) for size, row in zip(sizes, draws, strict=True)]
    inside = [
        h >= 1 and w >= 1 for _, _, h, w in expected
    ]  # torchvision may return an empty window for 1 x 3000
    assert [tuple(w) for w, ok in zip(windows.tolist(), inside, strict=True) if ok] == [
        e for e, ok in zip(expected, inside, strict=True) if ok
    ]
    assert windows.dtype == np.int32 and flips.dtype == bool


@given(sizes, st.integers(0, 2**62))
def test_windows_lie_inside_the_image(sizes, seed):
    sizes = np.array(sizes)
    training, _ = training_windows(sizes, seed, np.zeros(len(sizes), int), np.arange(len(sizes)))
    for windows in (training, validation_windows(sizes)[0]):
        assert (windows[:, :2] >= 0).all() and (windows[:, 2:] >= 1).all()
        assert (windows[:, :2] + windows[:, 2:] <= sizes).all()


def test_windows_of_reduced_images_lie_inside_them_and_are_of_the_same_share():
    """The last one begins in a pixel that rounds to the end of the reduced image."""
    sizes, shapes = np.array([[1000, 800], [1000, 800]]), np.array([[320, 256], [320, 256]])
    windows = np.array([[100, 200, 500, 400], [999, 799, 1, 1]])
    assert scaled(windows, sizes, shapes).tolist() == [[32, 64, 160, 128], [319, 255, 1, 1]]


def test_draws_belong_to_the_sample_and_not_to_its_batch():
    sizes = np.random.default_rng(0).integers(50, 500, (64, 2))
    epochs, indices = np.repeat([0, 1], 32), np.arange(64)
    windows, flips = training_windows(sizes, 5, epochs, indices)
    shuffled = np.random.default_rng(1).permutation(64)
    for rows in (shuffled, shuffled[:10], shuffled[40:41]):
        again = training_windows(sizes[rows], 5, epochs[rows], indices[rows])
        assert (again[0] == windows[rows]).all() and (again[1] == flips[rows]).all()


@pytest.mark.parametrize("other", [dict(seed=6), dict(epoch=1), dict(index=1)])
def test_seed_epoch_and_index_each_change_the_draw(other):
    def draw(seed=5, epoch=0, index=0):
        return training_windows(np.array([[375, 500]]), seed, np.array([epoch]), np.array([index]))[
            0
        ].tolist()

    assert draw() == draw() and draw() != draw(**other)


def test_the_draws_are_pinned():
    """A change here would change resumed runs: it needs a line in the changelog."""
    windows, flips = training_windows(
        np.array([[375, 500], [500, 375]]), 0, np.array([0, 90]), np.array([0, 1281166])
    )
    assert windows.tolist() == [[43, 200, 237, 212], [2, 9, 394, 365]] and flips.tolist() == [True, False]


def test_the_distribution_is_torchvisions():
    """Moments of area, log ratio, position and flip over 50 000 draws on a 1000 x 1000 image."""
    n, side = 50_000, 1000
    windows, flips = training_windows(np.full((n, 2), side), 0, np.zeros(n, int), np.arange(n))
    top, left, h, w = windows.T.astype(float)
    assert abs(flips.mean() - 0.5) < 0.01
    # by the rule itself, with NumPy's generator: a window too wide or too high for the image is drawn again
    rng = np.random.default_rng(0)
    area, ratio = rng.uniform(*SCALE, 4 * n), np.exp(rng.uniform(*np.log(RATIO), 4 * n))
    keep = (area * ratio <= 1) & (area / ratio <= 1)
    assert abs((h * w).mean() / side**2 - area[keep].mean()) < 0.005
    assert abs(np.log(w / h).std() - np.log(ratio[keep]).std()) < 0.005
    assert abs(np.log(w / h).mean()) < 0.005
    roomy = (h < 0.8 * side) & (w < 0.8 * side)
    places = [start[roomy] / (side - length[roomy]) for start, length in ((top, h), (left, w))]
    for place in places:
        assert abs(place.mean() - 0.5) < 0.01 and abs(place.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(*places)[0, 1]) < 0.02


def test_validation_windows_are_whole_images_but_for_the_ends_of_very_long_ones():
    windows, flips = validation_windows(np.array([[256, 512], [500, 375], [1, 1], [3, 100], [101, 6]]))
    assert windows.tolist() == [
        [0, 0, 256, 512],
        [0, 0, 500, 375],
        [0, 0, 1, 1],
        [0, 26, 3, 48],
        [2, 0, 96, 6],
    ]
    assert not flips.any()


def ten_cut(image):
    """Of torchvision's TenCrop what is not mirrored, and the centre of the mirrored image."""
    return [*FiveCrop(224)(image), CenterCrop(224)(hflip(image))]


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=3))
def test_crops_begin_where_torchvisions_do(sizes):
    """On pictures of coordinates: a crop's first pixel says where it begins."""
    for view, cut in ((centre_crop, lambda image: [CenterCrop(224)(image)]), (ten_crops, ten_cut)):
        windows, _ = validation_windows(np.array(sizes))
        resized, corners = view(windows[:, 2:], 224)
        for (_, _, height, width), size, ours in zip(windows, resized, corners, strict=True):
            usual = Resize(256)(Image.new("1", (int(width), int(height))))
            assert size.tolist() == [usual.height, usual.width]
            places = np.arange(usual.height * usual.width, dtype=np.int32).reshape(usual.height, usual.width)
            theirs = cut(Image.fromarray(places))
            firsts = [crop.getpixel((0, 0)) for crop in theirs[:5]]
            firsts += [crop.getpixel((223, 0)) for crop in theirs[5:]]  # mirrored back, its first pixel
            assert ours.tolist() == [list(divmod(first, usual.width)) for first in firsts]


def test_training_shows_the_whole_window():
    sizes, corners = whole_window(np.array([[10, 20], [300, 200]]), 64)
    assert sizes.tolist() == [[64, 64]] * 2 and corners.tolist() == [[[0, 0]]] * 2
