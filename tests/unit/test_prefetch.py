"""Items that are fetched before they are taken."""

from types import SimpleNamespace

import pytest
import torch

from horovod_owt.bench import boston
from horovod_owt.data.prefetch import FetchedEarly


def test_items_come_once_and_in_order_whether_fetched_or_not():
    early = FetchedEarly(iter(range(4)))
    early.fetch()
    early.fetch()
    assert next(early) == 0 and next(early) == 1
    early.fetch()
    assert list(early) == [2, 3]


def test_an_exception_waits_for_its_turn():
    def source():
        yield 1
        raise OSError("disk")

    early = FetchedEarly(source())
    early.fetch()
    assert next(early) == 1
    early.fetch()
    with pytest.raises(OSError, match="disk"):
        next(early)


def test_the_end_is_seen_when_it_is_reached():
    early = FetchedEarly(iter([]))
    early.fetch()
    assert list(early) == []


def test_nothing_is_fetched_early_where_that_is_not_wanted():
    source = iter(range(3))
    early = FetchedEarly(source, early=False)
    early.fetch()
    assert next(source) == 0 and next(early) == 1


@pytest.mark.parametrize(("device", "fetched"), [("cuda", [0, 1]), ("cpu", [0])])
def test_a_benchmark_fetches_when_training_does(device, fetched):
    """On a GPU the next images while it is at work on these."""

    class Fetching(Exception):
        pass

    taken = []
    images = (taken.append(number) or number for number in range(9))

    def train_step(next_batch, *, fetch_next, **_):
        next_batch(), fetch_next()
        raise Fetching

    replica = SimpleNamespace(world=SimpleNamespace(device=torch.device(device)), train_step=train_step)
    with pytest.raises(Fetching):
        boston._train(replica, images, 1, SimpleNamespace(asked=False))
    assert taken == fetched
