"""When a run started, regrouped, failed and ended: its starts and its events, oldest first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_owt.report.series import rounded
from horovod_owt.runs.attempts import ATTEMPTS
from horovod_owt.runs.history import Event, History, moment_of
from horovod_owt.runs.records import newest_records, utc

REGROUP = "ranks regroup"  # how the fault of an elastic job's regrouping begins
MOST_EVENTS = 300  # listed and marked; the first and the last ones


def starts_of(run_dir: Path, history: History, clock: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each start: when, where, from which step to which, and how it ended."""
    reasons = _reasons(run_dir)
    rows = []
    for number, start in enumerate(history.starts):
        following = history.starts[number + 1] if number + 1 < len(history.starts) else None
        end = following.first_row if following else len(history.steps)
        own = [event for event in history.events if event.start == number]
        last = [moment_of(own[-1].record), *history.steps.time[max(start.first_row, end - 1) : end]]
        record = start.record
        rows.append(
            {
                "start": number + 1,
                "attempt": record.get("attempt"),
                "job_id": record.get("job_id"),
                "how": "start" if not number else "regroup" if _regrouped(history, number) else "resume",
                "began": _utc(start.began_at()),
                "ended": _utc(max((time for time in last if not math.isnan(time)), default=math.nan)),
                "time": since_begin(history, start.began_at(), start.first_row, clock),
                "end_time": rounded(clock[end - 1]) if end > start.first_row else None,
                "hosts": dict(Counter(map(str, list_of(record.get("hosts"))))),
                "world_size": record.get("world_size"),
                "global_batch": record.get("global_batch"),
                "first_step": start.first_step,
                "last_step": history.steps.step[end - 1] if end > start.first_row else start.first_step,
                "steps": end - start.first_row,
                "lost_steps": history.steps.kept.count(0, start.first_row, end),
                "end": _end_of(own, following is not None, reasons.get(record.get("attempt"))),
            }
        )
    return rows


def _regrouped(history: History, number: int) -> bool:
    """Whether the fault just before this start's record says so."""
    position = next(i for i, e in enumerate(history.events) if e.kind == "run" and e.start == number)
    before = history.events[position - 1].record if position else {}
    return before.get("kind") == "fault" and str(before.get("fault", "")).startswith(REGROUP)


def _end_of(own: list[Event], superseded: bool, reason: str | None) -> str:
    """How a start ended, in the run's words, or else the supervisor's; empty if nobody wrote it down."""
    for event in reversed(own):
        if event.kind == "outcome":
            return str(event.record.get("reason", ""))
        if event.kind == "fault" and str(event.record.get("fault", "")).startswith(REGROUP):
            return str(event.record["fault"])
    return reason or ("no outcome: its process was killed, or its host went down" if superseded else "")


def _reasons(run_dir: Path) -> dict[Any, str]:
    """Why attempts ended according to who restarts them, by number."""
    records = [record for record in newest_records(run_dir / ATTEMPTS) if "attempt" in record]
    return {record["attempt"]: str(record.get("reason", "")) for record in reversed(records)}


def events_of(history: History, clock: Sequence[float]) -> tuple[list[dict[str, Any]], int]:
    """Starts, faults, stops and ends, and how many are left out in the middle. Bad images are elsewhere."""
    chosen = [
        event for event in history.events if event.kind in ("run", "fault", "outcome") and not is_image(event)
    ]
    half = MOST_EVENTS // 2
    left_out = max(0, len(chosen) - MOST_EVENTS)
    if left_out:
        chosen = [*chosen[:half], *chosen[-half:]]
    return [_event(history, event, clock) for event in chosen], left_out


def is_image(event: Event) -> bool:
    """Whether a fault is a bad image's."""
    return event.kind == "fault" and "path" in event.record


def _event(history: History, event: Event, clock: Sequence[float]) -> dict[str, Any]:
    record = event.record
    what = {"run": "start", "outcome": "end"}.get(event.kind, "fault")
    text = str(record.get("fault") or record.get("reason") or "")
    moment = moment_of(record)
    if event.kind == "run":
        moment = history.starts[event.start].began_at()
        hosts = len(set(map(str, list_of(record.get("hosts")))))
        text = f"{_count(record.get('world_size'), 'rank')} on {_count(hosts, 'host')}"
        text += f", after step {record['first_step']}" if record.get("first_step") else ""
    elif text.startswith(REGROUP):
        what = "regroup"
    elif event.kind == "outcome":
        what = {0: "done", 75: "stop"}.get(record.get("exit_code"), "failure")
    step = record.get("step", record.get("first_step"))
    return {
        "what": what,
        "text": text,
        "step": step if isinstance(step, int) else None,
        "start": event.start + 1,
        "when": _utc(moment),
        "time": since_begin(history, moment, event.row, clock),
    }


def checkpoints_of(history: History, clock: Sequence[float]) -> list[dict[str, Any]]:
    """Step, time and cost of each checkpoint that was written."""
    return [
        {
            "step": event.record.get("step"),
            "time": since_begin(history, moment_of(event.record), event.row, clock),
            "stall_ms": event.record.get("stall_ms"),
            "write_s": event.record.get("write_s"),
        }
        for event in history.of_kind("checkpoint")
    ]


def since_begin(history: History, moment: float, row: int, clock: Sequence[float]) -> float | None:
    """Seconds since the run began; of a record without a time, that of the step before it."""
    if not math.isnan(moment):
        return rounded(moment - history.began_at())
    return rounded(clock[row - 1]) if row else 0


def _utc(moment: float) -> str | None:
    return None if math.isnan(moment) else utc(moment)


def list_of(value: Any) -> list[Any]:
    """A list from a record; empty for anything else."""
    return value if isinstance(value, list) else []


def _count(number: Any, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"
