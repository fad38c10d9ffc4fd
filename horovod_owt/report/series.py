"""Curves of a run, reduced to a bounded number of points.

Steps are grouped into buckets of equal length. A bucket has the mean of its steps and, for the columns of
WITH_RANGE, their minimum and maximum, so that a spike of one step in a million stays visible. In a short run
each bucket is one step.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from horovod_owt.runs.history import History

MAX_POINTS = 1200  # per run; a chart is some 900 pixels wide
WITH_RANGE = ("loss", "images_per_s", "step_ms", "grad_norm")
MEAN_ONLY = ("lr",)
DIGITS = 9  # significant: float32 keeps 7


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows [first, end) of one start, all kept or all lost."""

    start: int
    first: int
    end: int
    kept: bool


def curves(history: History, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """`segments`, the columns of each stretch, and `steps_per_point`."""
    stretches = list(_stretches(history))
    per_point = max(1, math.ceil(len(history.steps) / max_points))
    clock = clock_of(history)
    segments = [_segment(history, clock, stretch, per_point) for stretch in stretches]
    return {"steps_per_point": per_point, "segments": segments}


def _stretches(history: History) -> Iterator[Stretch]:
    kept = history.steps.kept
    bounds = [start.first_row for start in history.starts] + [len(kept)]
    if bounds[0] > 0:  # steps before the first `run` record: of a damaged file
        bounds.insert(0, 0)
    before_first = len(bounds) - 1 - len(history.starts)
    for number, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        lost = kept.find(0, first, end)  # lost rows are the last ones of a start
        lost = end if lost < 0 else lost
        for begin, stop, is_kept in ((first, lost, True), (lost, end, False)):
            if begin < stop:
                yield Stretch(number - before_first, begin, stop, is_kept)


def clock_of(history: History) -> Sequence[float]:
    """Seconds from the run's start to the end of each step; the sum of the steps if records have no times."""
    steps = history.steps
    if history.has_times():
        began = history.began_at()
        return array("d", (moment - began for moment in steps.time))
    total, clock = 0.0, array("d")
    for step_ms in steps["step_ms"]:
        total += 0.0 if math.isnan(step_ms) else 1e-3 * step_ms
        clock.append(total)
    return clock


def _segment(history: History, clock: Sequence[float], stretch: Stretch, per_point: int) -> dict[str, Any]:
    rows = range(stretch.first, stretch.end, per_point)
    buckets = [(row, min(row + per_point, stretch.end)) for row in rows]
    steps = history.steps
    last = [end - 1 for _, end in buckets]
    found: dict[str, Any] = {
        "start": stretch.start,
        "kept": stretch.kept,
        "step": [steps.step[row] for row in last],
        "epoch": [rounded(steps["epoch"][row]) for row in last],
        "time": [rounded(clock[row]) for row in last],
    }
    for name in (*WITH_RANGE, *MEAN_ONLY):
        column = steps[name]
        parts = [finite(column[first:end]) for first, end in buckets]
        if not any(parts):
            continue
        found[name] = [rounded(math.fsum(part) / len(part)) if part else None for part in parts]
        if per_point > 1 and name in WITH_RANGE:
            found[f"{name}_low"] = [rounded(min(part, default=math.nan)) for part in parts]
            found[f"{name}_high"] = [rounded(max(part, default=math.nan)) for part in parts]
    return found


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def rounded(value: float) -> float | int | None:
    """Rounded to DIGITS for JSON; None for NaN and infinity, which JSON lacks."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
