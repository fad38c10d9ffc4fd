"""The whole history of a run, for reports, read in one pass over its records.

Steps are stored in columns of numbers, 100 bytes a step: a million steps fit in 100 MB.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovod_owt.runs.records import METRICS, lacks_step, records, shown, time_of

NUMBERS = (  # columns, from the numbers of a step record; NaN where it has none
    "epoch",
    "loss",
    "lr",
    "images_per_s",
    "step_ms",
    "data_wait_ms",
    "exposed_comm_ms",
    "grad_norm",
)
MAX_FAULTS = 10_000  # kept with their text; more are only counted


class Steps:
    """The step records in the order of the file, in columns.

    `kept` is 0 for a step whose work was lost because the run later resumed before it.
    """

    def __init__(self) -> None:
        self.step = array("q")
        self.time = array("d")  # seconds since 1970, NaN in old records
        self.columns = {name: array("d") for name in NUMBERS}
        self.kept = bytearray()

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> array:
        return self.columns[name]

    def append(self, record: dict[str, Any]) -> None:
        self.step.append(record["step"])
        self.time.append(moment_of(record))
        for name, column in self.columns.items():
            column.append(_number(record.get(name)))
        self.kept.append(1)

    def lose_after(self, step: int, first: int, end: int) -> int:
        """Mark rows `first` to `end` with a step after `step` as lost; returns how many are new."""
        row = bisect_right(self.step, step, first, end)
        lost = self.kept.count(1, row, end)
        self.kept[row:end] = bytes(end - row)
        return lost


@dataclass
class Start:
    """One start of the run, or a regrouping of an elastic one: a `run` record and what followed it."""

    record: dict[str, Any]
    first_row: int  # of its steps
    first_step: int  # the step after which it resumed
    lost_before: int = 0  # steps of earlier starts beyond first_step
    sent: Counter[str] = field(default_factory=Counter)  # bytes, by purpose
    sent_steps: int = 0

    def began_at(self) -> float:
        """When its process was started, or else when its ranks had connected; NaN in old records."""
        started = time_of(self.record, "started")
        return moment_of(self.record) if started is None else started


@dataclass(frozen=True)
class Event:
    """A record other than of a step."""

    record: dict[str, Any]
    row: int  # number of step records before it
    start: int  # index of its start, -1 before the first

    @property
    def kind(self) -> str:
        return str(self.record.get("kind"))


@dataclass
class History:
    """The content of a run's metrics.jsonl."""

    steps: Steps = field(default_factory=Steps)
    starts: list[Start] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    validations: list[Event] = field(default_factory=list)  # except those of lost steps
    lines: int = 0
    damaged: int = 0
    first_damaged: str = ""
    more_faults: int = 0  # beyond MAX_FAULTS

    def note_damage(self, line: bytes) -> None:
        self.lines += 1
        self.damaged += 1
        self.first_damaged = self.first_damaged or shown(line)

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def has_times(self) -> bool:
        """Whether the records have times: older ones have none."""
        return not math.isnan(self.began_at())

    def began_at(self) -> float:
        """The earliest time in the records, in seconds since 1970; NaN if they have none."""
        first = [start.began_at() for start in self.starts[:1]]
        times = [*first, *(moment_of(event.record) for event in self.events[:1]), *self.steps.time[:1]]
        return min((time for time in times if not math.isnan(time)), default=math.nan)

    def ended_at(self) -> float:
        """The latest time in the records; NaN if they have none."""
        times = [*(moment_of(event.record) for event in self.events[-1:]), *self.steps.time[-1:]]
        return max((time for time in times if not math.isnan(time)), default=math.nan)


def read_history(run_dir: Path) -> History:
    """The records of a run folder; empty if it has none. Raises ConfigError if they cannot be read.

    Damaged lines are counted and skipped; an incomplete last line may still be being written.
    """
    history = History()
    faults = 0
    for record in records(run_dir / METRICS, history.note_damage):
        if lacks_step(record):
            history.note_damage(json.dumps(record).encode())
            continue
        history.lines += 1
        kind = record.get("kind")
        if kind == "step":
            _add_step(history, record)
        elif kind == "run":
            _add_start(history, record)
        elif kind == "fault" and faults == MAX_FAULTS:
            history.more_faults += 1
        else:
            faults += kind == "fault"
            _add_event(history, record)
    return history


def moment_of(record: dict[str, Any]) -> float:
    """When a record was written, in seconds since 1970; NaN in old records."""
    moment = time_of(record)
    return math.nan if moment is None else moment


def _add_step(history: History, record: dict[str, Any]) -> None:
    history.steps.append(record)
    sent = record.get("bytes_sent")
    if history.starts and isinstance(sent, dict):
        start = history.starts[-1]
        start.sent_steps += 1
        for what, number in sent.items():
            start.sent[what] += number if isinstance(number, int) else 0


def _add_start(history: History, record: dict[str, Any]) -> None:
    steps, first_step = history.steps, record.get("first_step")
    if not isinstance(first_step, int):
        first_step = steps.step[-1] if len(steps) else 0
    start = Start(record, first_row=len(steps), first_step=first_step)
    end = len(steps)
    for earlier in reversed(history.starts):
        start.lost_before += steps.lose_after(first_step, earlier.first_row, end)
        if earlier.first_step <= first_step:  # steps kept of the starts before that end there
            break
        end = earlier.first_row
    history.validations = [event for event in history.validations if event.record["step"] <= first_step]
    history.starts.append(start)
    history.events.append(Event(record, len(steps), len(history.starts) - 1))


def _add_event(history: History, record: dict[str, Any]) -> None:
    event = Event(record, len(history.steps), len(history.starts) - 1)
    if event.kind == "validation":
        history.validations.append(event)
    history.events.append(event)


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan
