"""Where each rank's time goes in a step.

The total is the same on all ranks, because collectives make each wait for the slowest. The three numbers of a
step are summed along with the next step's loss, and need no collective of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PARTS = ("compute", "data", "communication")
FIRST, EVERY = 10, 50  # steps that a record averages over, at first and later


def spent(*, step_s: float, data_wait_s: float, exposed_comm_s: float) -> tuple[float, float, float]:
    """This rank's seconds in a step, by PARTS."""
    return max(0.0, step_s - data_wait_s - exposed_comm_s), data_wait_s, exposed_comm_s


@dataclass(frozen=True)
class RankTimes:
    """All ranks' seconds in a step: a row per rank, a column per part."""

    seconds: np.ndarray  # (ranks, 3)

    @classmethod
    def from_flat(cls, values: Sequence[float] | np.ndarray) -> RankTimes | None:
        """From the concatenated `spent` of all ranks; None before the first step."""
        seconds = np.array(values, np.float64).reshape(-1, len(PARTS))
        return cls(seconds) if seconds.any() else None

    def part(self, name: str) -> np.ndarray:
        """Seconds by rank."""
        return self.seconds[:, PARTS.index(name)]

    def spread(self, name: str) -> tuple[float, float, float]:
        """Minimum, median and maximum over the ranks, in seconds."""
        of_ranks = self.part(name)
        return float(of_ranks.min()), float(np.median(of_ranks)), float(of_ranks.max())


class MeanRankTimes:
    """Mean times of all ranks since the last `ranks` record."""

    def __init__(self, record: Callable[..., Any]) -> None:
        """`record` writes a line to the run's metrics."""
        self._record = record
        self._sum: np.ndarray | None = None
        self._steps = -1  # the first step of a world warms up

    def add(self, times: RankTimes | None) -> None:
        if times is None:
            return
        self._steps += 1
        if self._steps > 0:
            self._sum = times.seconds if self._sum is None else self._sum + times.seconds

    def write(self, step: int) -> None:
        """Write a `ranks` record, if there was a step, and start again."""
        if self._sum is None:
            return
        compute, data, communication = np.round(1e3 * self._sum.T / self._steps, 3).tolist()
        self._record(
            "ranks",
            step=step,
            steps=self._steps,
            compute_ms=compute,
            data_wait_ms=data,
            exposed_comm_ms=communication,
        )
        self._sum, self._steps = None, 0
