"""How a step's time is spent on a GPU: what its host may do meanwhile, and when compute waited for peers."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.model import alexnet_owt
from horovod_owt.parallel import traffic
from horovod_owt.parallel.runtime import World
from horovod_owt.train import loop
from horovod_owt.train.replica import Replica


class Stream:
    """A GPU's stream: its clock in milliseconds, and until when it is busy with queued work."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def event(self, *, enable_timing: bool):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def record(self) -> None:
        self.at = max(self._stream.now, self._stream.busy_until)

    def query(self) -> bool:
        return self.at <= self._stream.now

    def synchronize(self) -> None:
        self._stream.now = max(self._stream.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query()  # or it is an error
        return end.at - self.at


def test_communication_is_exposed_where_the_gpu_has_nothing_to_do(monkeypatch):
    """The host waits 7 ms for a sum, the GPU has work for 5 of them."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    counted = traffic.Traffic(torch.device("cuda"))
    stream.busy_until = 5.0
    with counted.waiting():
        stream.now = 7.0
    assert counted.waited_s() == pytest.approx(0.002)
    stream.busy_until = 20.0
    with counted.waiting():
        stream.now = 19.0
    assert counted.waited_s() == pytest.approx(0.002)
    counted.reset()
    assert counted.waited_s() == 0


@pytest.fixture
def replica(monkeypatch) -> Replica:
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 10)
    cfg = TrainConfig(classes=3, image_size=63, fc_group_size=1)
    return Replica(cfg, World(0, 1, 0, 1, "here", torch.device("cpu"), 1))


def random_batch() -> Batch:
    rows = torch.arange(2)
    return Batch(torch.rand(2, 3, 63, 63), rows, torch.ones(2, dtype=torch.bool), rows.numpy())


def test_images_are_waited_for_where_the_gpu_has_nothing_to_do(monkeypatch, replica):
    """Fetching takes the host 7 ms, the GPU has work for 5 of them."""
    stream, batch = Stream(), random_batch()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(replica, "_data_waits", traffic.Waits(torch.device("cuda")))
    for waited_s in (0.002, 0.0):  # the second one was there
        stream.busy_until = 5.0
        report = replica.train_step(
            lambda: batch, consumed=0, lr=0.1, fetch_next=lambda: setattr(stream, "now", 7.0)
        )
        assert report.data_wait_s == pytest.approx(waited_s)


def test_the_next_batch_is_fetched_before_the_host_waits_for_the_step(monkeypatch, replica):
    done = []
    finish, backward = replica.strategy.finish, replica.strategy.backward
    monkeypatch.setattr(
        replica.strategy, "backward", lambda *a, **k: done.append("backward") or backward(*a, **k)
    )
    monkeypatch.setattr(replica.strategy, "finish", lambda: done.append("finish") or finish())
    batch = random_batch()
    replica.train_step(lambda: batch, consumed=0, lr=0.1, fetch_next=lambda: done.append("fetch"))
    assert done == ["backward", "fetch", "finish"]


def test_ranks_watch_each_other_before_the_first_collective_on_their_devices(monkeypatch):
    """NCCL starts in it, and waits for ever behind a wrong interface."""
    watching = []

    @contextmanager
    def watched(*_, **__):
        watching.append(True)
        yield SimpleNamespace(lost=lambda: "")
        watching.pop()

    class FirstCollective(Exception):
        pass

    def begin(heartbeat):
        assert watching
        raise FirstCollective

    monkeypatch.setattr(loop, "watched", watched)
    monkeypatch.setattr(
        loop, "RankLog", lambda *_: SimpleNamespace(note=lambda *a, **k: None, close=lambda: None)
    )
    run = SimpleNamespace(
        cfg=TrainConfig(), run_dir=None, start=None, world=None, journal=None, _elastic_state=None,
        _record=None, _begin=begin, _close=lambda *_: None,
    )  # fmt: skip
    with pytest.raises(FirstCollective):
        loop.Run.train(run)
