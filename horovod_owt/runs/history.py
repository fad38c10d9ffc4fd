"""The whole history of a run, read once from its oldest record on, for reports.

A step is a row in columns of numbers, 100 bytes: a million steps fit in 100 MB.
"""

from __future__ import annotations

import json
import logging
import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError
from horovod_owt.runs.records import METRICS

log = logging.getLogger(__name__)

NUMBERS = (  # of a step record, each a column; NaN where a record has none
    "epoch",
    "loss",
    "lr",
    "images_per_s",
    "step_ms",
    "data_wait_ms",
    "exposed_comm_ms",
    "grad_norm",
)
MOST_STEPS = 1 << 62
MOST_FAULTS = 10_000  # kept with their text; further ones are counted


class Steps:
    """The step records, a column for each number, in the order of the file.

    `kept` is 0 for a step whose work was lost: a later start of the run resumed before it.
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
        self.time.append(time_of(record))
        for name, column in self.columns.items():
            column.append(_number(record.get(name)))
        self.kept.append(1)

    def lose_after(self, step: int, first: int, end: int) -> int:
        """Mark rows of one start, `first` to `end`, with a larger step as lost; returns how many were not."""
        row = bisect_right(self.step, step, first, end)
        lost = self.kept.count(1, row, end)
        self.kept[row:end] = bytes(end - row)
        return lost


@dataclass
class Start:
    """One start of the run, or a regrouping of an elastic one: a `run` record and what followed it."""

    record: dict[str, Any]
    first_row: int  # of its steps
    first_step: int  # the step that it resumed after
    lost_before: int = 0  # steps that the earlier ones had done beyond first_step
    sent: Counter[str] = field(default_factory=Counter)  # bytes, by what they carry
    sent_steps: int = 0

    def began_at(self) -> float:
        """When its process was started, or else when it had gathered its ranks; NaN in old records."""
        started = time_of(self.record, "started")
        return time_of(self.record) if math.isnan(started) else started


@dataclass(frozen=True)
class Event:
    """A record that is no step."""

    record: dict[str, Any]
    row: int  # how many step records came before it
    start: int  # index of the start that it belongs to, -1 before the first

    @property
    def kind(self) -> str:
        return self.record["kind"]


@dataclass
class History:
    """What a run's metrics.jsonl says."""

    steps: Steps = field(default_factory=Steps)
    starts: list[Start] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    validations: list[Event] = field(default_factory=list)  # without those of lost steps
    ranks: dict[str, Any] = field(default_factory=dict)  # the newest record of every rank's shares of a step
    lines: int = 0
    damaged: int = 0
    first_damaged: str = ""
    more_faults: int = 0  # beyond MOST_FAULTS

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def has_times(self) -> bool:
        """Whether the records have times: older ones have none."""
        return not math.isnan(self.began_at())

    def began_at(self) -> float:
        """The earliest time in the records, in seconds since 1970; NaN if they have none."""
        first = [start.began_at() for start in self.starts[:1]]
        times = [*first, *(time_of(event.record) for event in self.events[:1]), *self.steps.time[:1]]
        return min((time for time in times if not math.isnan(time)), default=math.nan)

    def ended_at(self) -> float:
        """The latest time in the records; NaN if they have none."""
        times = [*(time_of(event.record) for event in self.events[-1:]), *self.steps.time[-1:]]
        return max((time for time in times if not math.isnan(time)), default=math.nan)


def read_history(run_dir: Path) -> History:
    """The records of a run folder; empty if it has none. Raises ConfigError if they cannot be read.

    Damaged lines are counted and skipped; an incomplete last line may still be being written.
    """
    history = History()
    faults = 0
    for line in _lines(run_dir / METRICS):
        history.lines += 1
        record = _parsed(line)
        if record is None:
            history.damaged += 1
            history.first_damaged = history.first_damaged or repr(line[:40])[1:]
        elif record["kind"] == "step":
            _add_step(history, record)
        elif record["kind"] == "run":
            _add_start(history, record)
        else:
            faults += record["kind"] == "fault"
            if record["kind"] == "fault" and faults > MOST_FAULTS:
                history.more_faults += 1
                continue
            _add_event(history, record)
    return history


def time_of(record: dict[str, Any], key: str = "time") -> float:
    """Seconds since 1970 of a record with a time in ISO 8601; NaN without, as in old records."""
    try:
        return datetime.fromisoformat(record[key].replace("Z", "+00:00")).timestamp()
    except (KeyError, ValueError, AttributeError):
        return math.nan


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
        if earlier.first_step <= first_step:  # what is kept of the starts before it ended there
            break
        end = earlier.first_row
    history.validations = [event for event in history.validations if event.record["step"] <= first_step]
    history.starts.append(start)
    history.events.append(Event(record, len(steps), len(history.starts) - 1))


def _add_event(history: History, record: dict[str, Any]) -> None:
    event = Event(record, len(history.steps), len(history.starts) - 1)
    if record["kind"] == "validation" and isinstance(record.get("step"), int):
        history.validations.append(event)
    history.events.append(event)


def _lines(file: Path) -> Iterator[bytes]:
    """The complete lines of a file, without zeros that a power cut left."""
    try:
        with file.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n") and (text := line.strip(b"\0\n\r ")):
                    yield text
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        fix = "check its permissions and the file system"
        raise ConfigError(f"{file}: {error.strerror}", wanted="a file of records", fix=fix) from None


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A record with a kind, and with a step if it is one of a step; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    if record["kind"] == "step":
        step = record.get("step")
        return record if isinstance(step, int) and 0 <= step < MOST_STEPS else None
    return record


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan
