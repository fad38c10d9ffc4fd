"""Steps that take more than ten times what they should are explained once, and no others."""

import logging
import os

import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.parallel.runtime import World
from horovod_owt.perf.compute import generous_step_s
from horovod_owt.train import slow_steps
from horovod_owt.train.replica import StepReport
from horovod_owt.train.slow_steps import SlowSteps, reasons

CFG = TrainConfig(classes=1000, batch=32)
WORLD = World(0, 4, 0, 4, "n1", torch.device("cpu"), threads=1)
SPINS = {"OMPI_MCA_mpi_yield_when_idle": "0"}


def report(step_s: float, *, data: float = 0.0, comm: float = 0.0) -> StepReport:
    """A step with these shares of waiting."""
    return StepReport(
        loss=1.0,
        stop_asked=False,
        step_s=step_s,
        data_wait_s=data * step_s,
        exposed_comm_s=comm * step_s,
    )


def own_cores(ranks: int, *, host: str = "n1", threads: int = 1) -> list[list]:
    return [[host, list(range(rank * threads, (rank + 1) * threads)), threads] for rank in range(ranks)]


SHARED = [["n1", [0, 1], 1] for _ in range(4)]


def test_the_expectation_is_above_what_was_measured_for_one_rank():
    """docs/performance.md: 2078 ms for 32 images, 616 ms for 8, on a core of some 60 GFLOP/s."""
    for batch, seconds in ((32, 2.078), (8, 0.616)):
        cfg = TrainConfig(classes=1000, batch=batch)
        assert seconds < generous_step_s(cfg, flops_per_s=60e9, threads=1) < 2.5 * seconds


@pytest.mark.parametrize(
    ("placements", "env", "step", "why"),
    [
        (SHARED, {}, report(9), ["4 ranks on n1 have 2 cores"]),
        (SHARED, SPINS, report(9), ["4 ranks on n1 have 2 cores", "unset OMPI_MCA_mpi_yield_when_idle=0"]),
        (own_cores(2), SPINS, report(9), []),
        ([["n1", [0], 1], ["n1", [0], 1], ["n1", [1], 1]], {}, report(9), ["3 ranks on n1 have 2 cores"]),
        (
            [["n1", [0], 1], ["n1", [0], 1], ["n1", [1, 2], 1]],
            {},
            report(9),
            ["ranks 0, 1 on n1 are bound to the same cores"],
        ),
        ([["n1", [0, 1], 8], ["n1", [2, 3], 8]], {}, report(9), ["16 threads of 2 ranks on n1 have 4 cores"]),
        ([["n1", [0, 1, 2, 3], 2], ["n1", [0, 1, 2, 3], 2]], {}, report(9), []),
        (
            own_cores(2) + own_cores(2, host="n2"),
            {},
            report(9, comm=0.9),
            ["waiting for other ranks takes 90%"],
        ),
        (own_cores(2), {}, report(9, data=0.8), ["waiting for images takes 80%"]),
        ((), SPINS, report(9, comm=0.2), []),
    ],
)
def test_the_cause_is_named(placements, env, step, why):
    found = reasons(step, placements, env, uses_mpi=True)
    assert len(found) == len(why) and all(part in line for part, line in zip(why, found, strict=True))


def watched(monkeypatch, caplog, placements, *seconds: float) -> list[str]:
    """What is logged where steps take `seconds`, with a rate of 60 GFLOP/s."""
    monkeypatch.setattr(slow_steps, "_flops_per_s", lambda: 60e9)
    monkeypatch.setattr(slow_steps.runtime, "uses_mpi", lambda: False)
    caplog.set_level(logging.INFO, logger="horovod_owt")
    watch = SlowSteps(CFG, WORLD, placements)
    for step_s in seconds:
        watch.step(report(step_s))
    return [record.getMessage() for record in caplog.records]


def test_one_line_says_why_steps_are_slow(monkeypatch, caplog):
    (line,) = watched(monkeypatch, caplog, SHARED, *[60.0] * 20)
    assert line.startswith("steps take 60.0 s, more than 10 times the 2.9 s expected of a rank with its own")
    assert line.endswith(": 4 ranks on n1 have 2 cores: start fewer, or give the job more cores")


def test_without_a_cause_in_the_job_the_load_is_named(monkeypatch, caplog):
    monkeypatch.setattr(slow_steps.os, "getloadavg", lambda: (17.2, 1.0, 1.0))
    (line,) = watched(monkeypatch, caplog, own_cores(2), 60.0, 60.0, 60.0)
    assert "no cause found in the job; this host has a load of 17 on" in line


@pytest.mark.parametrize(
    "seconds",
    [
        [2.1] * 9,
        [20.0] * 9,
        [90.0, 2.1, 2.1, 90.0, 90.0],  # the first warms up
        [2.0, 90.0, 2.0, 2.0],  # one of them, as where a disk stalls
        [60.0, 60.0],
    ],
)
def test_an_ordinary_run_has_no_such_line(monkeypatch, caplog, seconds):
    assert watched(monkeypatch, caplog, SHARED, *seconds) == []


@pytest.mark.parametrize("threads", [1, 64])
def test_a_tiny_net_on_many_cores_may_take_seconds(threads):
    """There, what the network needs is little, and everything else is not."""
    tiny = TrainConfig(classes=2, batch=1, image_size=64)
    assert generous_step_s(tiny, flops_per_s=100e9, threads=threads) > 0.2


def test_the_rate_of_this_machine_is_measured_in_no_time():
    assert 1e8 < slow_steps._flops_per_s() < 1e13


def test_a_rank_tells_its_host_cores_and_threads():
    host, cores, threads = slow_steps.placement(WORLD)
    assert (host, threads) == ("n1", 1) and set(cores) == os.sched_getaffinity(0)
