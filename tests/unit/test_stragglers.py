"""Slow ranks are named, and no others, whatever the noise of single steps."""

import logging
import time

import numpy as np
import pytest

from horovod_owt.train.rank_times import RankTimes
from horovod_owt.train.stragglers import EVERY, WINDOW, Stragglers, median_of_others

STEP_S = 0.1


class Job:
    """Ranks whose times are drawn; all wait for the slowest. `compute` and `data` are (steps, ranks)."""

    def __init__(self, ranks: int) -> None:
        self.recorded: list[dict] = []
        self.stragglers = Stragglers([f"node{rank // 2}" for rank in range(ranks)], self._record)

    def _record(self, kind: str, **values) -> None:
        assert kind == "straggler"
        self.recorded.append(values)

    def run(self, compute: np.ndarray, data: np.ndarray | None = None, first: int = 1) -> list[dict]:
        data = np.zeros_like(compute) if data is None else data
        comm = (compute + data).max(axis=1, keepdims=True) - compute - data
        for number, seconds in enumerate(np.stack([compute, data, comm], axis=2), start=first):
            self.stragglers.step(number, RankTimes(seconds))
        return self.recorded


def noise(draw: np.random.Generator, steps: int, ranks: int, kind: str) -> np.ndarray:
    """Seconds of compute: with a spread of 2 % from step to step, of 10 %, and of 10 % with one step in
    twenty that takes up to many times as long.
    """
    own = draw.normal(0, 0.01, ranks)  # of each rank, always
    spread = 0.02 if kind == "quiet" else 0.1
    times = STEP_S * np.exp(draw.normal(0, spread, (steps, ranks)) + own)
    if kind == "bursts":
        hit = draw.random((steps, ranks)) < 0.05
        times[hit] *= 1 + draw.pareto(2, hit.sum())
    return times


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize("kind", ["quiet", "rough", "bursts"])
def test_no_rank_is_named_in_a_thousand_steps_without_a_slow_one(kind, ranks):
    for seed in range(3):
        draw = np.random.default_rng(seed)
        assert Job(ranks).run(noise(draw, 1000, ranks, kind)) == []


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize("begins", [0, 203, 900])
def test_a_rank_slowed_by_a_fifth_is_named_within_fifty_steps(ranks, begins):
    for seed in range(5):
        draw = np.random.default_rng(seed)
        slow = int(draw.integers(ranks))
        times = noise(draw, begins + 50, ranks, "quiet")
        times[begins:, slow] *= 1.2
        (named,) = Job(ranks).run(times)
        assert (named["rank"], named["host"], named["what"]) == (slow, f"node{slow // 2}", "compute")
        assert begins < named["step"] <= begins + 50 and named["recovered"] is False
        assert 1.1 < named["own_ms"] / named["others_ms"] < 1.3


def test_a_host_that_is_slow_is_named_with_all_its_ranks_in_one_warning(caplog):
    times = noise(np.random.default_rng(0), 60, 4, "quiet")
    times[:, 2:] *= 1.3
    with caplog.at_level(logging.INFO):
        named = Job(4).run(times)
    assert [each["rank"] for each in named] == [2, 3]
    assert len(caplog.messages) == 1
    assert "rank 2 on node1 takes 13" in caplog.text and "rank 3 on node1" in caplog.text


def test_a_rank_that_waits_for_data_is_named_for_that():
    draw = np.random.default_rng(0)
    compute, data = noise(draw, 60, 4, "quiet"), draw.exponential(0.002, (60, 4))
    data[::4, 3] += 0.08  # its queue runs empty in every fourth step: a fifth of the time
    (named,) = Job(4).run(compute, data)
    assert (named["rank"], named["what"]) == (3, "data") and named["own_ms"] == pytest.approx(22, abs=4)


def test_a_few_long_waits_are_not_a_slow_disk():
    draw = np.random.default_rng(0)
    compute, data = noise(draw, 1000, 4, "quiet"), draw.exponential(0.002, (1000, 4))
    data[[100, 120, 500, 501, 800], [0, 0, 1, 1, 3]] += 30.0
    assert Job(4).run(compute, data) == []


def test_a_rank_is_named_once_until_it_has_recovered(caplog):
    draw, job = np.random.default_rng(0), Job(4)
    times = noise(draw, 900, 4, "quiet")
    times[100:400, 1] *= 1.25
    times[600:, 1] *= 1.25
    with caplog.at_level(logging.INFO):
        recorded = job.run(times)
    assert [(each["rank"], each["recovered"]) for each in recorded] == [(1, False), (1, True), (1, False)]
    assert "rank 1 on node0 is no longer slow (compute)" in caplog.text
    assert list(job.stragglers.slow) == [(1, "compute")]


def test_a_rank_at_the_margin_does_not_come_and_go():
    draw = np.random.default_rng(0)
    times = noise(draw, 1000, 4, "quiet")
    times[:, 1] *= 1.125
    assert len(Job(4).run(times)) <= 1


def test_ranks_that_wait_for_the_slow_one_are_not_slow():
    """They take as long for a step: nothing but `own` time tells them apart."""
    times = noise(np.random.default_rng(0), 60, 2, "quiet")
    times[:, 0] *= 1.5
    assert [each["rank"] for each in Job(2).run(times)] == [0]


def test_a_job_of_one_rank_has_no_stragglers():
    assert Job(1).run(noise(np.random.default_rng(0), 100, 1, "rough")) == []


@pytest.mark.parametrize(
    "values", [[3.0, 1.0], [3.0, 1.0, 2.0], [5.0, 5.0, 1.0, 1.0], [1.0, 9.0, 4.0, 4.0, 2.0]]
)
def test_the_median_of_the_others(values):
    wanted = [np.median(values[:rank] + values[rank + 1 :]) for rank in range(len(values))]
    assert median_of_others(np.array(values)).tolist() == wanted


@pytest.mark.parametrize(("ranks", "limit_ms"), [(8, 0.2), (256, 0.6)])
def test_watching_costs_less_than_a_500th_of_a_step(ranks, limit_ms):
    """Of 100 ms, and of 300 ms where 256 ranks take part."""
    times = [RankTimes(seconds) for seconds in np.random.default_rng(0).normal(0.1, 0.002, (200, ranks, 3))]
    job, fastest_s = Job(ranks), float("inf")
    for _ in range(3):
        start = time.process_time()
        for number, each in enumerate(times):
            job.stragglers.step(number, each)
        fastest_s = min(fastest_s, time.process_time() - start)
    assert 1e3 * fastest_s / len(times) < limit_ms
    assert WINDOW + 2 * EVERY <= 50


@pytest.mark.parametrize(("ranks", "looks"), [(2, 33), (1024, 17), (4096, 7)])
def test_more_ranks_are_looked_at_less_often(monkeypatch, ranks, looks):
    seen = []
    monkeypatch.setattr(Stragglers, "_check", lambda self, step: seen.append(step))
    stragglers = Stragglers(["node"] * ranks, lambda *_, **__: None)
    times = RankTimes(np.full((ranks, 3), 0.1))
    for step in range(1, 204):
        stragglers.step(step, times)
    assert len(seen) == looks
