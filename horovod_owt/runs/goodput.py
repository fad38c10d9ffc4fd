"""Where the wall time of a run went, over all attempts, from the records in its folder.

Goodput is the share spent on steps that counted: those that no later attempt repeated. A span is the time
from a `run` record's `started` to the end of its attempt, or in an elastic job until the ranks regroup:

    started ........ first step ..................... last step that counts ..... end ..... next started
    start-up         steps, validation, checkpoints   lost work                   queue

The times within a step are those of rank 0.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from math import fsum
from pathlib import Path
from typing import Any

from horovod_owt.errors import Preempted
from horovod_owt.runs.attempts import ATTEMPTS
from horovod_owt.runs.records import METRICS, lacks_step, newest_records, records, time_of

STEP_PARTS = ("compute", "data", "communication")
LOSSES = ("start-up", "validation", "checkpoint", "lost work", "queue", "other")


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run, by STEP_PARTS of the steps that counted and by LOSSES; together the wall time."""

    seconds: dict[str, float]
    attempts: int
    steps: int  # that counted
    steps_lost: int  # repeated, or to be repeated

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput: the share of the wall time spent on steps that counted."""
        return sum(self.shares()[part] for part in STEP_PARTS)

    def shares(self) -> dict[str, float]:
        """The parts of the wall time, which add up to 1."""
        wall_s = self.wall_s or 1.0
        return {part: seconds / wall_s for part, seconds in self.seconds.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "goodput": self.share,
            "wall_s": self.wall_s,
            "seconds": self.seconds,
            "attempts": self.attempts,
            "steps": self.steps,
            "steps_lost": self.steps_lost,
        }


def goodput(run_dir: Path) -> Goodput | None:
    """The goodput of a run so far; None if its records have no times, as in older versions.

    Raises ConfigError if the records cannot be read. Steps after the last checkpoint do not count if the run
    has failed; they do, for now, if it is active.
    """
    spans = _spans(records(run_dir / METRICS), _ends_of_attempts(run_dir))
    if not spans:
        return None
    total = dict.fromkeys((*STEP_PARTS, *LOSSES), 0.0)
    steps = lost = 0
    for span, following, upto in zip_longest(spans, spans[1:], _kept(spans)):
        for part, seconds in span.parts(upto, last=following is None).items():
            total[part] += seconds
        steps += span.steps.upto(upto)
        lost += len(span.steps) - span.steps.upto(upto)
        if following:
            between = "queue" if following.attempt != span.attempt else "lost work"  # the ranks regroup
            total[between] += max(0.0, following.started - span.end)
    return Goodput(total, len({span.attempt for span in spans}), steps, lost)


class _Steps:
    """The steps of a span in ascending order, in columns, because a run may have millions."""

    def __init__(self) -> None:
        self.number = array("q")
        self.end, self.step_s, self.data_s, self.comm_s = (array("d") for _ in range(4))

    def __len__(self) -> int:
        return len(self.number)

    def append(self, number: int, *seconds: float) -> None:
        """`seconds` are end, step_s, data_s and comm_s."""
        self.number.append(number)
        for column, value in zip((self.end, self.step_s, self.data_s, self.comm_s), seconds, strict=True):
            column.append(value)

    def upto(self, step: int) -> int:
        """How many steps are not after `step`."""
        return bisect_right(self.number, step)


@dataclass
class _Span:
    """An attempt, or in an elastic job the time of one set of ranks."""

    started: float
    attempt: int
    first_step: int
    end: float
    exit_code: int | None = None  # None if it was killed, or is active
    steps: _Steps = field(default_factory=_Steps)
    validations: list[tuple[int, float, float]] = field(default_factory=list)  # step, end, seconds
    stalls: dict[int, float] = field(default_factory=dict)  # for checkpoints: seconds by step

    def kept_step(self) -> int:
        """The last step that counts if nothing follows."""
        failed = self.exit_code not in (None, 0, Preempted.exit_code)
        if failed:
            return max(self.stalls, default=self.first_step)
        return self.steps.number[-1] if self.steps else self.first_step

    def parts(self, upto: int, *, last: bool) -> dict[str, float]:
        """Seconds by part; steps after `upto` are lost. `last`: nothing follows this span."""
        steps, counted = self.steps, self.steps.upto(upto)
        step_s, data_s, comm_s = (
            fsum(column[:counted]) for column in (steps.step_s, steps.data_s, steps.comm_s)
        )
        validated = [(end, seconds) for step, end, seconds in self.validations if step <= upto]
        found = {
            "compute": step_s - data_s - comm_s,
            "data": data_s,
            "communication": comm_s,
            "validation": sum(seconds for _, seconds in validated),
            "checkpoint": sum(seconds for step, seconds in self.stalls.items() if step <= upto),
        }
        at_work = self._start_of_work()
        ends = (
            end + self.stalls.get(number, 0.0)
            for end, number in zip(steps.end[:counted], steps.number, strict=False)
        )
        kept_until = max(chain(ends, (end for end, _ in validated)), default=at_work)
        redone = counted < len(steps)
        if redone:
            kept_until = max(kept_until, steps.end[counted] - steps.step_s[counted])
        gracefully = self.exit_code in (0, Preempted.exit_code)
        under_way = last and self.exit_code is None
        # A run that stops or ends waits for its last checkpoint; after any other end the rest is lost.
        tail = "checkpoint" if gracefully and not redone else "other" if under_way else "lost work"
        found["start-up"] = at_work - self.started
        found["other"] = max(0.0, kept_until - self.started - sum(found.values()))
        found[tail] = found.get(tail, 0.0) + max(0.0, self.end - kept_until)
        return found

    def _start_of_work(self) -> float:
        """Unix time at which the first step or validation began."""
        begins = [self.steps.end[0] - self.steps.step_s[0]] if self.steps else []
        begins += [end - seconds for _, end, seconds in self.validations[:1]]
        return max(self.started, min(begins, default=self.end))


def _kept(spans: list[_Span]) -> list[int]:
    """For each span, the last step that no later span repeated."""
    kept = [spans[-1].kept_step()]
    for following in reversed(spans[1:]):
        kept.append(min(kept[-1], following.first_step))
    return kept[::-1]


def _spans(found: Iterable[dict[str, Any]], ends: dict[int, float]) -> list[_Span]:
    spans: list[_Span] = []
    for record in found:
        time, kind = time_of(record), record.get("kind")
        if time is None or lacks_step(record):
            continue
        if kind == "run":
            started = time_of(record, "started") or time
            attempt, first_step = record.get("attempt", 0), record.get("first_step", 0)
            spans.append(_Span(started, attempt, first_step, end=time))
        elif spans:
            _note(spans[-1], kind, time, record)
    for span, following in zip_longest(spans, spans[1:]):
        if following is None or following.attempt != span.attempt:
            span.end = max(span.end, ends.get(span.attempt, span.end))
        if following is not None:
            span.end = min(span.end, max(following.started, span.steps.end[-1] if span.steps else 0.0))
    return spans


def _note(span: _Span, kind: str | None, time: float, record: dict[str, Any]) -> None:
    if (
        kind == "fault" and "world_size" in record
    ):  # written by the next world, after the ranks have regrouped
        return
    span.end = max(span.end, time)
    if kind == "step":
        ms = (record.get(key) or 0.0 for key in ("step_ms", "data_wait_ms", "exposed_comm_ms"))
        span.steps.append(record["step"], time, *(value / 1e3 for value in ms))
    elif kind == "validation":
        span.validations.append((record["step"], time, record.get("validation_s") or 0.0))
    elif kind == "checkpoint":
        span.stalls[record["step"]] = record.get("stall_ms", 0.0) / 1e3
    elif kind == "outcome":
        span.exit_code = record.get("exit_code")


def _ends_of_attempts(run_dir: Path) -> dict[int, float]:
    """When each attempt's launcher had ended; empty without a supervisor or a batch process."""
    found = ((record.get("attempt"), time_of(record)) for record in newest_records(run_dir / ATTEMPTS))
    return {attempt: time for attempt, time in found if time is not None}
