"""Warn once if steps take more than ten times as long as expected, and name the cause."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from time import process_time

import torch

from horovod_owt.config import TrainConfig
from horovod_owt.parallel import runtime
from horovod_owt.parallel.mpi import YIELD
from horovod_owt.parallel.runtime import World
from horovod_owt.perf.compute import generous_step_s
from horovod_owt.train.replica import StepReport

log = logging.getLogger(__name__)

SLOW = 10  # times the expected step time
STEPS = 3  # that are watched; the first one warms up and does not count
LARGE_SHARE = 0.5  # of a step
GPU_FLOPS_PER_S = 1e12  # below a Tesla K80's
MATRIX = 384  # rows and columns of the calibration product, which takes a few ms


def placement(world: World) -> list:
    """Host, cores and compute threads of this rank, to be gathered from all."""
    return [world.host, sorted(os.sched_getaffinity(0)), world.threads]


class SlowSteps:
    """Watches the first steps on rank 0; `placements` are those of all ranks."""

    def __init__(self, cfg: TrainConfig, world: World, placements: Sequence[list]) -> None:
        self._placements, self._on_cpu = placements, world.device.type == "cpu"
        self._steps: list[StepReport] = []
        self.expected_s = generous_step_s(
            cfg,
            flops_per_s=_flops_per_s() if self._on_cpu else GPU_FLOPS_PER_S,
            threads=min(world.threads, len(os.sched_getaffinity(0))) if self._on_cpu else 1,
        )

    def step(self, report: StepReport) -> None:
        """Add a step; after STEPS of them, warn if even the fastest was slow."""
        if len(self._steps) == STEPS:
            return
        self._steps.append(report)
        if len(self._steps) < STEPS:
            return
        fastest = min(self._steps[1:], key=lambda one: one.step_s)
        if fastest.step_s > SLOW * self.expected_s:
            why = reasons(fastest, self._placements if self._on_cpu else (), os.environ, runtime.uses_mpi())
            log.warning(
                "steps take %.1f s, more than %d times the %.1f s expected of a rank with its own cores: %s",
                fastest.step_s, SLOW, self.expected_s, "; ".join(why) or _load(),
            )  # fmt: skip


def reasons(
    report: StepReport, placements: Sequence[list], env: Mapping[str, str], uses_mpi: bool
) -> list[str]:
    """Why the ranks are slow, the likeliest cause first; `placements` is empty for ranks on GPUs."""
    found = [
        reason for host in dict.fromkeys(p[0] for p in placements) if (reason := _crowded(host, placements))
    ]
    choice = {name: env[name] for name, value in YIELD.items() if env.get(name, value) != value}
    if found and uses_mpi and choice:
        shown = " ".join(f"{name}={value}" for name, value in choice.items())
        found.append(f"MPI takes their cores while it waits: unset {shown}")
    data, comm = report.data_wait_s / report.step_s, report.exposed_comm_s / report.step_s
    if data > LARGE_SHARE:
        found.append(f"waiting for images takes {data:.0%} of a step: see `owt bench input DATA`")
    if comm > LARGE_SHARE and not found:
        slow = "a slow link, or a slower rank: see `owt preflight` under the same launcher"
        found.append(f"waiting for other ranks takes {comm:.0%} of a step, for {slow}")
    return found


def _crowded(host: str, placements: Sequence[list]) -> str:
    """In what way the ranks of a host lack cores; empty if they do not."""
    ranks = [rank for rank, placement in enumerate(placements) if placement[0] == host]
    union = set().union(*(placements[rank][1] for rank in ranks))
    threads = sum(placements[rank][2] for rank in ranks)
    if len(ranks) > len(union):
        have = f"{len(union)} core{'s'[: len(union) > 1]}"
        return f"{len(ranks)} ranks on {host} have {have}: start fewer, or give the job more cores"
    if threads > len(union):
        have = f"{threads} threads of {len(ranks)} ranks on {host} have {len(union)} cores"
        return f"{have}: unset OMP_NUM_THREADS"
    for core in sorted(union):
        sharing = [rank for rank in ranks if core in placements[rank][1]]
        reachable = set().union(*(placements[rank][1] for rank in sharing))
        if sum(placements[rank][2] for rank in sharing) > len(reachable):
            named = ", ".join(map(str, sharing))
            return f"ranks {named} on {host} are bound to the same cores: `mpirun --bind-to none`"
    return ""


def _load() -> str:
    return (
        f"no cause found in the job; this host has a load of {os.getloadavg()[0]:.0f} "
        f"on {os.cpu_count()} cores: see `top` on each host"
    )


def _flops_per_s() -> float:
    """FLOPs per second of CPU time (which excludes waiting for a core)."""
    a, b = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    fastest_s = float("inf")
    for _ in range(3):
        start = process_time()
        torch.mm(a, b)
        fastest_s = min(fastest_s, process_time() - start)
    return 2 * MATRIX**3 / max(fastest_s, 1e-6)
