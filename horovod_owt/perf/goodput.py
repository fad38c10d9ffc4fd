"""Goodput under failures: the share of time spent on progress that is not lost.

Failures are independent, with exponentially distributed intervals, and may occur during a restart too. After
a failure, the work since the last checkpoint is repeated.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from horovod_owt.perf.machine import Machine

DAY_S = 86_400.0


@dataclass(frozen=True)
class Faults:
    """A job's failures, and what they cost, in seconds."""

    mtbf_s: float  # of the whole job: a node's, divided by the nodes
    checkpoint_s: float  # for which training waits at each checkpoint
    restart_s: float

    @property
    def young_s(self) -> float:
        """Best time between checkpoints, first order (Young 1974)."""
        return math.sqrt(2 * self.checkpoint_s * self.mtbf_s)

    @property
    def daly_s(self) -> float:
        """Best time between checkpoints, higher order (Daly 2006)."""
        if self.checkpoint_s >= 2 * self.mtbf_s:
            return self.mtbf_s
        ratio = self.checkpoint_s / (2 * self.mtbf_s)
        return self.young_s * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.checkpoint_s

    def goodput(self, interval_s: float) -> float:
        """Share of time spent on kept progress, with a checkpoint every `interval_s` of work (Daly 2006)."""
        work = (interval_s + self.checkpoint_s) / self.mtbf_s
        # exp(-x) / -expm1(-x) is 1 / expm1(x), which overflows where failures are much more frequent
        kept = math.exp(-work - self.restart_s / self.mtbf_s) / -math.expm1(-work)
        return interval_s / self.mtbf_s * kept


def simulate(faults: Faults, interval_s: float, *, periods: int, seed: int = 0) -> float:
    """The goodput over `periods` intervals, by a simulation of each failure."""
    draw = random.Random(seed).expovariate
    clock_s, next_failure_s = 0.0, draw(1 / faults.mtbf_s)
    for _ in range(periods):
        end_s = clock_s + interval_s + faults.checkpoint_s
        while next_failure_s < end_s:
            clock_s = next_failure_s
            next_failure_s = clock_s + draw(1 / faults.mtbf_s)
            while next_failure_s < clock_s + faults.restart_s:  # another failure during the restart
                clock_s = next_failure_s
                next_failure_s = clock_s + draw(1 / faults.mtbf_s)
            clock_s += faults.restart_s
            end_s = clock_s + interval_s + faults.checkpoint_s
        clock_s = end_s
    return periods * interval_s / clock_s


def of_nodes(machine: Machine, nodes: int) -> Faults:
    return Faults(
        mtbf_s=machine["mtbf_days"] * DAY_S / nodes,
        checkpoint_s=machine["checkpoint_stall_s"],
        restart_s=machine["restart_s"],
    )


def goodput_report(machine: Machine, nodes: int, *, step_s: float, slow_step_s: float) -> dict[str, Any]:
    """The cost of failures on `nodes` nodes, and of a slow node with which a step takes `slow_step_s`."""
    faults = of_nodes(machine, nodes)
    interval_s = faults.daly_s
    return {
        "nodes": nodes,
        **asdict(faults),
        "young_s": faults.young_s,
        "daly_s": interval_s,
        "checkpoint_every_steps": max(1, round(interval_s / step_s)),
        "goodput": faults.goodput(interval_s),
        "goodput_hourly": faults.goodput(3600.0),
        "slow_node_costs": 1 - step_s / slow_step_s,  # of the whole job
        "without_it_costs": 1 / nodes,
    }
