import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_owt.data.augment import RATIO, SCALE, TRIES, training_windows, validation_windows
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


def test_validation_windows_are_centred_squares_of_seven_eighths():
    windows, flips = validation_windows(np.array([[256, 256], [256, 512], [500, 375], [1, 1]]))
    assert windows.tolist() == [[16, 16, 224, 224], [16, 144, 224, 224], [86, 23, 328, 328], [0, 0, 1, 1]]
    assert not flips.any()
