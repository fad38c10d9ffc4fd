"""Detect stragglers: ranks that slow down the job.

All ranks take equally long for a step, since each waits for the slowest in the collectives. So ranks are
compared by what they do alone: compute, and waiting for data. A rank is a straggler if over a window of steps

- it computes longer than the other ranks' median: by MARGIN in half of the steps, and by half of that in
  three quarters of them. A few slow steps do not count, however slow. If the excess varies much from window
  to window, as on hosts with other work, MARGIN is raised accordingly;
- or it waits longer for data than the others' median, on average by MARGIN of a step. A wait counts as one
  step at most, so that a few long ones are not taken for a slow disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from horovod_owt.train.rank_times import RankTimes

log = logging.getLogger(__name__)

SKIP = 3  # warm-up steps at the start of a world
WINDOW = 40  # steps that a check considers
EVERY = 5  # steps between checks; more with more than RANKS ranks
RANKS = 1024  # a check of so many takes rank 0 about 4 ms
MARGIN = 0.12  # of the others' time
CHECKS = 100  # over which the variation is estimated
MIN_CHECKS = 20  # before it is used
DEVIATIONS = 3  # a larger excess, in deviations of that variation, is not noise
SHOWN = 4  # ranks in a warning


@dataclass(frozen=True)
class Straggler:
    """A slow rank, with its times over the last WINDOW steps."""

    rank: int
    host: str
    what: str  # compute or data
    own_ms: float  # per step
    others_ms: float  # the other ranks' median

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} takes {self.own_ms:.0f} ms a step for {self.what}, "
            f"the others {self.others_ms:.0f} ms"
        )


class Stragglers:
    """Watches all ranks' times, on rank 0. A straggler is reported once, and again when it has recovered.

    `record` gets lines of kind `straggler`.
    """

    def __init__(self, hosts: Sequence[str], record: Callable[..., None]) -> None:
        self._hosts, self._record = hosts, record
        self._compute, self._excess, self._data = (np.zeros((WINDOW, len(hosts))) for _ in range(3))
        self._step_s = np.zeros(WINDOW)
        self._medians = np.zeros((CHECKS, len(hosts)))  # of the excess, at each check
        self._seen, self._checks, self._every = -SKIP, 0, EVERY * (1 + len(hosts) // RANKS)
        self.slow: dict[tuple[int, str], Straggler] = {}  # current stragglers, by rank and what

    def step(self, step: int, times: RankTimes | None) -> None:
        """Add the times of a step."""
        if times is None or len(self._hosts) == 1:
            return
        self._seen += 1
        if self._seen <= 0:
            return
        row, compute = self._seen % WINDOW, times.part("compute")
        self._compute[row], self._data[row] = compute, times.part("data")
        self._excess[row] = compute / np.maximum(median_of_others(compute), 1e-9) - 1
        self._step_s[row] = times.seconds[0].sum()
        if self._seen >= WINDOW and self._seen % self._every == 0:
            self._check(step)

    def _check(self, step: int) -> None:
        quartiles = np.partition(self._excess, (WINDOW // 4, WINDOW // 2), axis=0)
        lower, median = quartiles[WINDOW // 4], quartiles[WINDOW // 2]
        margin = max(MARGIN, DEVIATIONS * self._variation())
        self._medians[self._checks % CHECKS] = median
        self._checks += 1
        found = self._find(lower, median, margin, MARGIN)
        new = {key: each for key, each in found.items() if key not in self.slow}
        for each in new.values():
            self._record("straggler", step=step, **asdict(each), recovered=False)
        if new:
            more = f"; and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
            named = "; ".join(map(str, list(new.values())[:SHOWN]))
            log.warning("slow: %s%s: see `top` there, and compare hosts by `owt preflight`", named, more)
        if self.slow:
            still = self._find(lower, median, margin / 2, MARGIN / 2)
            for key in self.slow.keys() - still.keys():
                over = self.slow.pop(key)
                log.info("rank %d on %s is no longer slow (%s)", over.rank, over.host, over.what)
                self._record("straggler", step=step, **asdict(over), recovered=True)
        self.slow |= new

    def _find(
        self, lower: np.ndarray, median: np.ndarray, margin: float, data_margin: float
    ) -> dict[tuple[int, str], Straggler]:
        found = {}
        for rank in np.flatnonzero((median > margin) & (lower > margin / 2)):
            own = np.median(self._compute[:, rank])
            found[int(rank), "compute"] = self._straggler(rank, "compute", own, own / (1 + median[rank]))
        step_s = np.median(self._step_s)
        waits = np.minimum(self._data, step_s).mean(axis=0)
        others = median_of_others(waits)
        for rank in np.flatnonzero(waits - others > data_margin * step_s):
            found[int(rank), "data"] = self._straggler(rank, "data", waits[rank], others[rank])
        return found

    def _straggler(self, rank: int, what: str, own_s: float, others_s: float) -> Straggler:
        own_ms, others_ms = (round(1e3 * float(seconds), 3) for seconds in (own_s, others_s))
        return Straggler(int(rank), self._hosts[rank], what, own_ms, others_ms)

    def _variation(self) -> float:
        """The standard deviation of a rank's median between checks, robust against long slow spells."""
        if self._checks < MIN_CHECKS:
            return 0.0
        medians = self._medians[: self._checks, :: 1 + len(self._hosts) // RANKS]  # a sample of the ranks
        return 1.4826 * float(np.median(np.abs(medians - np.median(medians, axis=0))))


def median_of_others(values: np.ndarray) -> np.ndarray:
    """For each of several values, the median of the others."""
    order = np.argsort(values)
    ordered = values[order]
    places = np.empty_like(order)
    places[order] = np.arange(len(values))
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2  # the middle of the others
    return (ordered[low + (places <= low)] + ordered[high + (places <= high)]) / 2
