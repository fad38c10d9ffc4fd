"""The training loop without ranks: what each step is asked for, and failures before the first one."""

from contextlib import contextmanager, nullcontext
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
from horovod_owt.train.replica import StepReport
from horovod_owt.train.stop import StopRequest


def run(folder, elastic_state=None, **values) -> Run:
    """Of rank 1 of 2."""
    images = SimpleNamespace(train=range(40), val=range(8))
    request = SimpleNamespace(data=folder, folder=images)
    world = World(1, 2, 1, 2, "here", torch.device("cpu"), 1)
    return Run(TrainConfig(classes=2, **values), request, world, Opened(folder), StopRequest(), elastic_state)


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


class Steps:
    """In place of a replica: notes what each step is asked for, and what happens between steps."""

    def __init__(self) -> None:
        self.asked, self.resets = [], []

    def train_step(self, next_batch, **how) -> StepReport:
        self.asked.append(how)
        return StepReport(loss=1.0, stop_asked=False, step_s=1.0, data_wait_s=0.0, exposed_comm_s=0.0)

    def reset_momentum(self) -> None:
        self.resets.append(len(self.asked))

    def average_running_statistics(self) -> None:
        pass


def test_each_step_is_asked_for_what_the_configuration_says(tmp_path, monkeypatch):
    """5 steps an epoch; the second row of the table is for epoch 3, which begins after 10."""
    monkeypatch.setattr(loop, "training_pipeline", lambda *_, **__: nullcontext())
    begun = run(
        tmp_path,
        batch=4,
        lr_batch=8,
        epochs=3,
        schedule=((1, 0.1, 0.5), (3, 0.01, 0.25)),
        momentum_reset=True,
        grad_norm_every=4,
        compression_start=6,
        checkpoint_every=7,
    )
    begun.replica, begun.total_steps, checkpoints, validations = Steps(), 15, {}, []
    monkeypatch.setattr(
        begun, "_checkpoint", lambda validation_due: checkpoints.update({begun.position.step: validation_due})
    )
    monkeypatch.setattr(begun, "_validate", lambda: validations.append(begun.position.step))
    monkeypatch.setattr(begun, "_finish_writing", lambda: None)
    begun._run_steps(None)
    asked = begun.replica.asked
    assert [how["consumed"] for how in asked] == list(range(0, 120, 8))
    assert [how["lr"] for how in asked] == pytest.approx([0.1] * 10 + [0.01] * 5)
    assert [how["weight_decay"] for how in asked] == [0.5] * 10 + [0.25] * 5
    assert [step for step, how in enumerate(asked, 1) if how["measure_norm"]] == [4, 8, 12]
    assert [step for step, how in enumerate(asked, 1) if not how["compress"]] == [1, 2, 3, 4, 5, 6]
    assert begun.replica.resets == [10]
    assert validations == [5, 10, 15]
    assert checkpoints == {5: True, 7: False, 10: True, 14: False, 15: True}
