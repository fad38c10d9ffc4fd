"""The training loop without ranks: what it makes of failures before the first step."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_owt.config import TrainConfig
from horovod_owt.errors import RunError
from horovod_owt.parallel.elastic import ElasticState
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.opening import Opened
from horovod_owt.train import loop
from horovod_owt.train.loop import Run
from horovod_owt.train.stop import StopRequest


def run(folder, elastic_state=None) -> Run:
    """Of rank 1 of 2."""
    images = SimpleNamespace(train=range(40), val=range(8))
    request = SimpleNamespace(data=folder, folder=images)
    world = World(1, 2, 1, 2, "here", torch.device("cpu"), 1)
    return Run(TrainConfig(classes=2), request, world, Opened(folder), StopRequest(), elastic_state)


@pytest.fixture
def lost_while_ranks_connect(monkeypatch):
    """Rank 0 dies, or refuses to go on, before this rank has its address for the heartbeat."""

    @contextmanager
    def watched(*_, **__):
        raise HorovodInternalError("Connection closed by peer")
        yield

    monkeypatch.setattr(loop, "watched", watched)


def test_a_rank_lost_before_there_is_a_heartbeat_is_no_bug(tmp_path, lost_while_ranks_connect):
    with pytest.raises(RunError, match="lost contact with another rank"):
        run(tmp_path).train()
    (log,) = tmp_path.glob("logs/*/rank-0001.log")
    assert "ERROR lost contact with another rank" in log.read_text(encoding="utf-8")


def test_in_an_elastic_job_the_others_regroup(tmp_path, lost_while_ranks_connect):
    elastic_state = ElasticState(torch.device("cpu"))
    with pytest.raises(HorovodInternalError):
        run(tmp_path, elastic_state).train()
    assert elastic_state.regrouped["fault"] == "ranks regroup: a rank was lost: Connection closed by peer"
