from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_owt.data.hashing import mix
from horovod_owt.data.order import SampleOrder, batch_positions, validation_slice


def one_epoch(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    epochs, indices = SampleOrder(num_samples, seed).at(epoch * num_samples, num_samples)
    assert (epochs == epoch).all()
    return indices


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    assert (np.sort(one_epoch(num_samples, seed, epoch)) == np.arange(num_samples)).all()


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 255, 256, 257, 65536, 100_003])
def test_an_epoch_is_a_permutation_at_awkward_sizes(num_samples):
    assert (np.sort(one_epoch(num_samples, 0, 0)) == np.arange(num_samples)).all()


def test_a_billion_samples_cost_no_memory_and_do_not_repeat():
    num_samples = 1_300_000_000
    order = SampleOrder(num_samples, 3)
    epochs, indices = order.at(5 * num_samples - 1000, 100_000)
    assert epochs.tolist() == [4] * 1000 + [5] * 99_000
    assert len(set(indices[1000:].tolist())) == 99_000
    assert 0 <= indices.min() and indices.max() < num_samples


@given(st.integers(1, 200), st.integers(0, 10**9), st.integers(0, 300), st.integers(0, 300))
def test_the_stream_does_not_depend_on_how_it_is_cut(num_samples, position, first, second):
    order = SampleOrder(num_samples, 1)
    whole = np.stack(order.at(position, first + second))
    parts = np.concatenate([order.at(position, first), order.at(position + first, second)], axis=1)
    assert (whole == parts).all() and whole.dtype == np.int64


def test_epochs_and_seeds_differ_and_look_shuffled():
    first, second, other = one_epoch(10_000, 0, 0), one_epoch(10_000, 0, 1), one_epoch(10_000, 1, 0)
    for a, b in [(first, second), (first, other), (first, np.arange(10_000))]:
        assert (a == b).sum() < 10  # 1 is expected
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # sd 0.01
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert abs(np.diff(first % 2).mean()) < 0.05 and 0.45 < (np.diff(first % 2) != 0).mean() < 0.55


def test_every_order_of_three_samples_is_about_as_frequent():
    orders, counts = np.unique([one_epoch(3, 0, epoch) for epoch in range(3000)], axis=0, return_counts=True)
    assert len(orders) == 6 and (abs(counts - 500) < 100).all()  # sd 20


def test_every_sample_comes_first_about_as_often():
    order = SampleOrder(10, 0)
    firsts = np.array([order.at(10 * epoch, 1)[1][0] for epoch in range(2000)])
    assert (abs(np.bincount(firsts, minlength=10) - 200) < 70).all()  # sd 13


def test_the_order_is_pinned():
    """A change here would reshuffle resumed runs: it needs a line in the changelog."""
    assert SampleOrder(1_281_167, 0).at(1_281_165, 5)[1].tolist() == [215456, 874605, 1170392, 904702, 431709]
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's first


# ---- who reads what ----


def plain_stream(num_samples: int, seed: int, count: int) -> list[tuple[int, int]]:
    order = SampleOrder(num_samples, seed)
    return [(position // num_samples, int(order.at(position, 1)[1][0])) for position in range(count)]


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 100))
def test_ranks_together_read_the_stream_in_order(num_samples, world_size, batch, accum_steps, start):
    steps = 4
    order = SampleOrder(num_samples, 0)
    ranks = [
        batch_positions(start, rank=rank, world_size=world_size, batch=batch, accum_steps=accum_steps)
        for rank in range(world_size)
    ]
    seen = []
    for _ in range(steps):
        for positions in ranks:  # one global step: rank after rank, each its micro-batches
            for position in islice(positions, accum_steps):
                seen += zip(*(column.tolist() for column in order.at(position, batch)), strict=True)
    global_batch = world_size * batch * accum_steps
    assert seen == plain_stream(num_samples, 0, start + steps * global_batch)[start:]


@settings(max_examples=50)
@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5),
)
def test_each_sample_is_seen_once_an_epoch_whatever_the_ranks_and_restarts(num_samples, attempts):
    """An attempt is (world size, batch, steps); the next one, with other ranks, goes on at its end."""
    order, position, seen = SampleOrder(num_samples, 9), 0, []
    for world_size, batch, steps in attempts:
        for rank in range(world_size):
            mine = batch_positions(position, rank=rank, world_size=world_size, batch=batch)
            for start in islice(mine, steps):
                seen += zip(*(column.tolist() for column in order.at(start, batch)), strict=True)
        position += world_size * batch * steps
    assert len(seen) == position == len(set(seen))
    for epoch in range(position // num_samples):
        assert sorted(index for e, index in seen if e == epoch) == list(range(num_samples))


@given(st.integers(0, 1000), st.integers(1, 50))
def test_validation_slices_cover_each_sample_once(num_samples, world_size):
    slices = [validation_slice(num_samples, rank, world_size) for rank in range(world_size)]
    assert [index for part in slices for index in part] == list(range(num_samples))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
