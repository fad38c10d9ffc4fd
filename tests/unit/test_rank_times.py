"""How the ranks' times travel with a step, and what is made of them."""

import numpy as np
import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.model import alexnet_owt
from horovod_owt.parallel.runtime import World
from horovod_owt.train.rank_times import MeanRankTimes, RankTimes, spent
from horovod_owt.train.replica import NUM_SUMS, Replica

CONFIG = TrainConfig(classes=3, image_size=63, batch=2, fc_group_size=1, dropout=0.0)


@pytest.fixture
def replica(monkeypatch):
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 10)
    return Replica(CONFIG, World(0, 1, 0, 1, "here", torch.device("cpu"), 1))


def batch() -> Batch:
    labels = torch.tensor([0, 1])
    return Batch(torch.randn(2, 3, 63, 63), labels, labels >= 0, np.arange(2))


def test_each_step_reports_the_times_of_the_one_before(replica):
    first, second = (replica.train_step(batch, consumed=0, lr=0.1) for _ in range(2))
    assert first.ranks is None
    wanted = spent(step_s=first.step_s, data_wait_s=first.data_wait_s, exposed_comm_s=first.exposed_comm_s)
    assert second.ranks.seconds == pytest.approx(np.array([wanted]), rel=1e-6)
    assert second.ranks.seconds.sum() == pytest.approx(first.step_s, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_fills_its_own_place_so_that_a_sum_gathers_all(replica, monkeypatch, rank):
    monkeypatch.setattr(replica, "world", World(rank, 3, rank, 3, "here", torch.device("cpu"), 1))
    replica._spent[:] = 1, 2, 3
    facts = replica._own_totals(stop=True, bad=4, unannounced=1, save=True)
    assert facts[:NUM_SUMS].tolist() == [0, 1, 4, 1, 1] and len(facts) == NUM_SUMS + 9
    rows = facts[NUM_SUMS:].reshape(3, 3)
    assert rows[rank].tolist() == [1, 2, 3] and rows.sum() == 6


def test_a_request_to_save_is_known_after_the_step(replica):
    assert [
        replica.train_step(batch, consumed=0, lr=0.1, save=save).save_asked for save in (True, False)
    ] == [
        True,
        False,
    ]


def test_times_by_part_and_their_spread():
    times = RankTimes.from_flat([1, 2, 3, 4, 5, 6, 9, 8, 7])
    assert times.part("data").tolist() == [2, 5, 8]
    assert times.spread("compute") == (1, 4, 9) and times.spread("communication") == (3, 6, 7)
    assert RankTimes.from_flat([0.0] * 6) is None


def test_own_time_is_what_is_neither_data_nor_communication():
    assert spent(step_s=1.0, data_wait_s=0.25, exposed_comm_s=0.5) == (0.25, 0.25, 0.5)
    assert spent(step_s=1.0, data_wait_s=0.5, exposed_comm_s=0.6)[0] == 0  # clocks that differ


def test_means_of_all_ranks_are_recorded_without_the_step_that_warms_up():
    records = []
    means = MeanRankTimes(lambda kind, **values: records.append((kind, values)))
    means.add(None)
    means.write(1)
    means.add(RankTimes(np.array([[9.0, 9, 9], [9, 9, 9]])))
    means.write(2)
    assert records == []
    means.add(RankTimes(np.array([[0.1, 0, 0.3], [0.3, 0.01, 0]])))
    means.add(RankTimes(np.array([[0.3, 0, 0.1], [0.5, 0.03, 0]])))
    means.write(4)
    wanted = {"compute_ms": [200, 400], "data_wait_ms": [0, 20], "exposed_comm_ms": [200, 0]}
    assert records == [("ranks", {"step": 4, "steps": 2, **wanted})]
    means.write(5)
    means.add(RankTimes(np.array([[1.0, 0, 0], [1, 0, 0]])))
    means.write(6)
    assert [(values["step"], values["steps"]) for _, values in records] == [(4, 2), (6, 1)]
