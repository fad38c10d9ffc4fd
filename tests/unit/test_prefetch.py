"""Items that are fetched before they are taken."""

import pytest

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
