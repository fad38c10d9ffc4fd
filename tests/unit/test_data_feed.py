import threading
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

from horovod_owt.data.feed import READERS, EncodedBatch, TrainFeed, ValidationFeed
from horovod_owt.data.prefetch import Prefetched
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import RunError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, classes=3, train_per_class=11, val_per_class=7, size=(32, 48), workers=1)
    return root


@pytest.fixture(scope="module")
def data(root):
    return open_data_set(root)


def rows(batches: list[EncodedBatch]) -> list[tuple]:
    """One tuple for each sample that counts: all there is to know of it."""
    return [
        (
            int(b.indices[i]),
            int(b.labels[i]),
            bytes(b.images[i]),
            tuple(b.windows[i].tolist()),
            bool(b.flips[i]),
        )
        for b in batches
        for i in np.flatnonzero(b.valid)
    ]


def train_rows(data, steps, **how) -> list[tuple]:
    with TrainFeed(data.train, seed=3, **how) as feed:
        return rows(list(islice(feed, steps)))


def test_a_row_is_one_sample_of_the_store(data):
    with TrainFeed(data.train, seed=3, batch=8) as feed:
        batch = next(feed)
    assert len(batch.images) == len(batch.windows) == len(batch.flips) == len(batch.labels) == 8
    for jpeg, index, label in zip(batch.images, batch.indices, batch.labels, strict=True):
        assert bytes(jpeg) == data.train.read(index) and label == data.train.labels[index]
    assert batch.labels.dtype == batch.indices.dtype == np.int64 and batch.windows.dtype == np.int32


@pytest.mark.parametrize("steps", [1, 4, 9])  # 33 samples: the fourth batch straddles two epochs
def test_a_feed_resumes_at_a_position_and_yields_the_same(data, steps):
    unbroken = train_rows(data, 12, batch=10)
    assert unbroken[steps * 10 :] == train_rows(data, 12 - steps, batch=10, position=steps * 10)


def test_training_does_not_depend_on_the_number_of_ranks(data):
    alone = train_rows(data, 6, batch=12)
    for world_size, accum_steps in [(2, 1), (3, 1), (2, 3), (1, 4)]:
        batch = 12 // world_size // accum_steps
        how = dict(batch=batch, world_size=world_size, accum_steps=accum_steps)
        ranks = [train_rows(data, 6 * accum_steps, rank=rank, **how) for rank in range(world_size)]
        share = 12 // world_size
        together = [
            row for step in range(6) for mine in ranks for row in mine[step * share : (step + 1) * share]
        ]
        assert together == alone


def test_an_epoch_sees_each_sample_once_and_the_next_one_differently(data):
    seen = train_rows(data, 22, batch=3)
    first, second = {row[0]: row for row in seen[:33]}, {row[0]: row for row in seen[33:]}
    assert first.keys() == second.keys() == set(range(33))
    assert [row[0] for row in seen[:33]] != [row[0] for row in seen[33:]]
    assert sum(first[i][3:] == second[i][3:] for i in range(33)) == 0  # other windows


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 30])  # 21 images: with 30 ranks some have none
def test_validation_counts_each_image_once(data, world_size):
    seen = []
    for rank in range(world_size):
        with ValidationFeed(data.val, batch=4, rank=rank, world_size=world_size) as feed:
            batches = list(feed)
        assert all(len(b.images) == len(b.windows) == len(b.valid) == 4 for b in batches)
        assert all(b.valid.all() for b in batches[:-1])
        seen += rows(batches)
    assert [row[0] for row in seen] == list(range(21))
    assert [row[1] for row in seen] == data.val.labels.tolist() and not any(row[4] for row in seen)


def test_a_rank_without_validation_images_yields_nothing(data):
    with ValidationFeed(data.val, batch=4, rank=0, world_size=30) as feed:
        assert list(feed) == []


@pytest.mark.parametrize(
    ("damage", "saw"),
    [
        (lambda file: file.unlink(), "bad image {}: unreadable: No such file"),
        (lambda file: file.write_bytes(b""), "bad image {}: empty file"),
        (lambda file: file.write_bytes(b"<html>"), "bad image {}: not an image"),
        (lambda file: file.write_bytes(file.read_bytes()[:90]), "bad image {}: truncated JPEG"),
    ],
)
def test_a_bad_file_is_named_after_the_good_batches_before_it(tmp_path, damage, saw):
    write_synthetic(
        tmp_path / "set", classes=1, train_per_class=1, val_per_class=12, size=(32, 48), workers=1
    )
    store = open_data_set(tmp_path / "set").val
    damage(Path(store.path(9)))
    with ValidationFeed(store, batch=4) as feed:
        assert next(feed).indices.tolist() == [0, 1, 2, 3]
        assert next(feed).indices.tolist() == [4, 5, 6, 7]
        for _ in range(2):  # and says so again when asked again
            with pytest.raises(RunError) as caught:
                next(feed)
            assert saw.format(store.path(9)) in str(caught.value) and caught.value.fix


# ---- reading ahead ----


class Waiting:
    """A store whose reads wait until `together` of them are under way, but for the first of each batch."""

    def __init__(self, store, batch: int, together: int) -> None:
        self._store, self._batch = store, batch
        self._meeting = threading.Barrier(together)
        self._count, self.threads = count(), set()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def read(self, index: int) -> bytes:
        self.threads.add(threading.current_thread().name)
        if next(self._count) % self._batch:
            self._meeting.wait(timeout=20)
        return self._store.read(index)


def test_one_thread_reads_what_comes_promptly(data, monkeypatch):
    monkeypatch.setattr("horovod_owt.data.feed.PATIENCE_S", 60)
    store = Waiting(data.train, batch=9, together=1)
    with TrainFeed(store, seed=3, batch=9) as feed:
        ours = rows(list(islice(feed, 4)))
    assert store.threads == {"read-batches"}
    assert ours == train_rows(data, 4, batch=9)


def test_all_readers_wait_for_a_slow_store_at_a_time(data, monkeypatch):
    monkeypatch.setattr("horovod_owt.data.feed.PATIENCE_S", 0)
    monkeypatch.setattr("horovod_owt.data.feed.PROMPT_S", 0)
    store = Waiting(data.train, batch=1 + 2 * READERS, together=READERS)
    with TrainFeed(store, seed=3, batch=1 + 2 * READERS) as feed:
        theirs = rows(list(islice(feed, 3)))
    assert len(store.threads) == 1 + READERS
    assert theirs == train_rows(data, 3, batch=1 + 2 * READERS)


def test_prefetching_stays_within_its_depth_and_keeps_the_order():
    taken, third = [], threading.Event()

    def source():
        for number in range(100):
            taken.append(number)
            if number == 2:
                third.set()
            yield number

    ahead = Prefetched(source(), depth=2, name="test")
    assert third.wait(10)  # two wait in the queue, the third in the thread's hand
    assert taken == [0, 1, 2]
    assert list(ahead) == list(range(100)) and list(ahead) == []
    ahead.close()


def test_closing_wakes_both_sides():
    never = threading.Event()

    def source():
        yield 1
        never.wait(30)
        yield 2

    ahead = Prefetched(source(), depth=1, name="test")
    assert next(ahead) == 1
    got = []
    consumer = threading.Thread(target=lambda: got.extend(ahead))
    consumer.start()
    closer = threading.Thread(target=ahead.close)
    closer.start()
    consumer.join(10)  # although the source is still stuck
    assert not consumer.is_alive() and got == []
    never.set()
    closer.join(10)
    assert not closer.is_alive()


def test_nothing_that_was_fetched_ahead_comes_after_the_end():
    full = threading.Event()

    def source():
        yield from range(2)
        full.set()
        yield 2

    ahead = Prefetched(source(), depth=2, name="test")
    assert full.wait(10)
    ahead.close()
    assert list(ahead) == []


def test_closed_feeds_leave_no_threads(data):
    before = set(threading.enumerate())
    for taken in (0, 1, 5):
        feed = TrainFeed(data.train, seed=0, batch=4)
        list(islice(feed, taken))
        feed.close()
        feed.close()
        assert list(feed) == []
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_an_exception_in_the_source_reaches_the_consumer():
    def source():
        yield 1
        raise ZeroDivisionError("in the thread")

    ahead = Prefetched(source(), depth=4, name="test")
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(ahead)
    ahead.close()
