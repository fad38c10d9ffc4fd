"""Where each rank's time goes in a step; an allreduce makes all ranks take equally long in sum.

The three numbers of the step before travel with the loss: no collective of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PARTS = ("compute", "data", "communication")
FIRST, EVERY = 10, 50  # steps whose means are a record, at first and later


def spent(*, step_s: float, data_wait_s: float, exposed_comm_s: float) -> tuple[float, float, float]:
    """A step of this rank in seconds, by PARTS."""
    return max(0.0, step_s - data_wait_s - exposed_comm_s), data_wait_s, exposed_comm_s


@dataclass(frozen=True)
class RankTimes:
    """A step of all ranks in seconds: a row per rank, a column per part."""

    seconds: np.ndarray  # (ranks, 3)

    @classmethod
    def from_flat(cls, values: Sequence[float]) -> RankTimes | None:
        """From all ranks' `spent`, one after the other; None before the first step."""
        seconds = np.array(values, np.float64).reshape(-1, len(PARTS))
        return cls(seconds) if seconds.any() else None

    def part(self, name: str) -> np.ndarray:
        """Seconds by rank."""
        return self.seconds[:, PARTS.index(name)]

    def spread(self, name: str) -> tuple[float, float, float]:
        """Minimum, median and maximum over the ranks, in seconds."""
        of_ranks = self.part(name)
        return float(of_ranks.min()), float(np.median(of_ranks)), float(of_ranks.max())


class RankRecords:
    """Records every rank's mean times, as lines of kind `ranks`: after FIRST steps, then more rarely."""

    def __init__(self, record: Callable[..., None]) -> None:
        self._record, self._due = record, FIRST
        self._sum, self._steps = 0.0, 0

    def step(self, step: int, times: RankTimes | None) -> None:
        """Note the times of the step before `step`."""
        if times is None:
            return
        self._sum, self._steps = self._sum + times.seconds, self._steps + 1
        if self._steps < self._due:
            return
        means = (1e3 * self._sum / self._steps).round(3).T.tolist()
        names = ("compute_ms", "data_wait_ms", "exposed_comm_ms")
        self._record("ranks", step=step - 1, steps=self._steps, **dict(zip(names, means, strict=True)))
        self._sum, self._steps, self._due = 0.0, 0, min(2 * self._due, EVERY)
