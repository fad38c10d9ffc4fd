"""Name ranks that are slow by themselves.

All ranks take equally long for a step, since each waits for the slowest in the collectives. So ranks are
compared by what they do alone: compute, and waiting for data. A rank is slow if over a window of steps

- it computes longer than the other ranks' median, by MARGIN in half of the steps and by half of that in
  three quarters of them: single slow steps do not count, however slow;
- or it waits longer for data than the others' median, on average by MARGIN of a step. A wait counts as one
  step at most, so that a few long ones are not taken for a slow disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from horovod_owt.train.rank_times import PARTS, RankTimes

log = logging.getLogger(__name__)

WINDOW = 32  # steps that are looked at
SKIP = 3  # first steps of a world, which warm up
EVERY = 8  # steps between looks
MARGIN = 0.1  # of the others' time
SHOWN = 4  # ranks in a warning


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow by itself, over the last WINDOW steps."""

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


def find_stragglers(seconds: np.ndarray, hosts: Sequence[str], *, margin: float = MARGIN) -> list[Straggler]:
    """The slow ranks in a window of steps: (steps, ranks, PARTS) in seconds."""
    compute, data = (seconds[:, :, PARTS.index(part)] for part in ("compute", "data"))
    others = _median_of_others(compute)
    ordered = np.sort(compute / np.maximum(others, 1e-9) - 1, axis=0)
    slow = (ordered[len(ordered) // 2] > margin) & (ordered[len(ordered) // 4] > margin / 2)
    found = []
    for rank in np.flatnonzero(slow):
        own, median = np.median(compute[:, rank]), np.median(others[:, rank])
        found.append(Straggler(int(rank), hosts[rank], "compute", _ms(own), _ms(median)))
    step_s = np.median(seconds.sum(axis=2))
    waits = np.minimum(data, step_s).mean(axis=0)
    others = _median_of_others(waits[None])[0]
    for rank in np.flatnonzero(waits - others > margin * step_s):
        found.append(Straggler(int(rank), hosts[rank], "data", _ms(waits[rank]), _ms(others[rank])))
    return found


def _median_of_others(values: np.ndarray) -> np.ndarray:
    """For each rank, the median over the other ranks: (steps, ranks) -> (steps, ranks)."""
    steps, ranks = values.shape
    order = np.argsort(values, axis=1)
    places = np.empty_like(order)
    rows = np.arange(steps)[:, None]
    places[rows, order] = np.arange(ranks)
    ordered = values[rows, order]
    low, high = (ranks - 2) // 2, (ranks - 1) // 2  # the middle of the ranks - 1 others
    return (ordered[rows, low + (places <= low)] + ordered[rows, high + (places <= high)]) / 2


def _ms(seconds: float) -> float:
    return round(1e3 * float(seconds), 3)


class Stragglers:
    """Watches all ranks' times, on rank 0. A slow rank is reported once, and again when it has recovered."""

    def __init__(self, hosts: Sequence[str], record: Callable[..., None]) -> None:
        self._hosts, self._record = hosts, record
        self._window = np.zeros((WINDOW, len(hosts), len(PARTS)))
        self._seen = -SKIP
        self.slow: dict[tuple[int, str], Straggler] = {}  # now, by rank and what

    def step(self, step: int, times: RankTimes | None) -> None:
        """Note the times of a step."""
        if times is None or len(self._hosts) == 1:
            return
        if self._seen >= 0:
            self._window[self._seen % WINDOW] = times.seconds
        self._seen += 1
        if self._seen >= WINDOW and self._seen % EVERY == 0:
            self._look(step)

    def _look(self, step: int) -> None:
        found = {(each.rank, each.what): each for each in find_stragglers(self._window, self._hosts)}
        new = {key: each for key, each in found.items() if key not in self.slow}
        for each in new.values():
            self._record("straggler", step=step, **asdict(each), recovered=False)
        if new:
            more = f"; and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
            named = "; ".join(map(str, list(new.values())[:SHOWN]))
            log.warning("slow: %s%s: compare these hosts by `owt preflight`", named, more)
        if self.slow:
            still = {(e.rank, e.what) for e in find_stragglers(self._window, self._hosts, margin=MARGIN / 2)}
            for key in self.slow.keys() - still:
                over = self.slow.pop(key)
                log.info("rank %d on %s is no longer slow (%s)", over.rank, over.host, over.what)
                self._record("straggler", step=step, **asdict(over), recovered=True)
        self.slow |= new
