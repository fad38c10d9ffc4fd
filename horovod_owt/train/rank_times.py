"""Where each rank's time goes in a step; an allreduce makes all ranks take equally long in sum.

The three numbers of the step before travel with the loss: no collective of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PARTS = ("compute", "data", "communication")


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
