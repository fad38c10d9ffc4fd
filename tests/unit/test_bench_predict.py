"""`bench scaling --predict`: rows of several ranks are predicted from the same run's row of one rank."""

import logging
from types import SimpleNamespace

import pytest

from horovod_owt.bench.scaling import _predict
from horovod_owt.config import TrainConfig
from horovod_owt.perf.machine import load_machine

CFG = TrainConfig(classes=1000, batch=8, parallel="hybrid", fc_group_size=2)


def rows_of(*, one_rank_ms: float, spread: float = 0.0) -> dict[tuple[str, int], dict]:
    """With predictions by cpu-2-cores, for a run in which one rank took that long."""
    quartiles = {"p25": one_rank_ms * (1 - spread), "median": one_rank_ms, "p75": one_rank_ms * (1 + spread)}
    rows = [
        {"strategy": strategy, "ranks": ranks, "batch_per_rank": 8, "precision": "fp32", "step_ms": quartiles}
        for strategy, ranks in [("ddp", 2), ("data", 2), ("hybrid", 2), ("data", 1)]
    ]
    request = SimpleNamespace(cfg=CFG, machine=load_machine("cpu-2-cores"))
    _predict(request, SimpleNamespace(local_size=2, is_root=True), rows)
    return {(row["strategy"], row["ranks"]): row for row in rows}


def test_several_ranks_are_as_slow_as_one_was_in_the_same_run():
    fast, slow = rows_of(one_rank_ms=600), rows_of(one_rank_ms=900)
    assert "predicted_step_ms" not in fast["ddp", 2]
    assert fast["data", 1]["predicted_step_ms"] == slow["data", 1]["predicted_step_ms"]  # by the file
    for row in [("data", 2), ("hybrid", 2)]:
        assert slow[row]["predicted_step_ms"] - fast[row]["predicted_step_ms"] == pytest.approx(300, rel=0.01)


def test_the_more_one_rank_varies_the_longer_several_wait():
    steady, noisy = rows_of(one_rank_ms=600), rows_of(one_rank_ms=600, spread=0.1)
    waits = {
        row: noisy[row]["predicted_step_ms"] - steady[row]["predicted_step_ms"]
        for row in steady
        if row[0] != "ddp"
    }
    assert waits["data", 1] == 0
    assert 20 < waits["data", 2] < waits["hybrid", 2] < 120  # hybrid meets more often


def test_a_machine_file_of_another_device_only_warns(caplog):
    with caplog.at_level(logging.WARNING):
        rows = rows_of(one_rank_ms=10)
    assert "less than cpu-2-cores needs" in caplog.text
    assert rows["data", 2]["predicted_step_ms"] > 100
