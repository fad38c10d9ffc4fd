"""A run's starts and events (regroupings, faults, ends), oldest first."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_owt.report.formats import integer, number
from horovod_owt.report.series import rounded
from horovod_owt.runs.attempts import ATTEMPTS
from horovod_owt.runs.history import Event, History, moment_of
from horovod_owt.runs.records import newest_records, utc

REGROUP = "ranks regroup"  # prefix of the fault that an elastic job's regrouping records
MARKED = ("run", "fault", "outcome", "straggler")
MAX_EVENTS = 300  # listed and marked; the first and the last ones


def starts_of(run_dir: Path, history: History, clock: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each start: when, where, from which step to which, and how it ended."""
    reasons, regrouped = _reasons(run_dir), _regrouped(history)
    events = defaultdict(list)
    for event in history.events:
        events[event.start].append(event)
    rows = []
    for index, start in enumerate(history.starts):
        following = history.starts[index + 1] if index + 1 < len(history.starts) else None
        end = following.first_row if following else len(history.steps)
        own = events[index]
        last = [moment_of(own[-1].record), *history.steps.time[max(start.first_row, end - 1) : end]]
        record = start.record
        rows.append(
            {
                "start": index + 1,
                "attempt": integer(record.get("attempt")),
                "job_id": record.get("job_id"),
                "how": "start" if not index else "regroup" if index in regrouped else "resume",
                "began": _utc(start.began_at()),
                "ended": _utc(max((time for time in last if not math.isnan(time)), default=math.nan)),
                "time": since_begin(history, start.began_at(), start.first_row, clock),
                "end_time": rounded(clock[end - 1]) if end > start.first_row else None,
                "hosts": dict(Counter(map(str, list_of(record.get("hosts"))))),
                "world_size": integer(record.get("world_size")),
                "global_batch": integer(record.get("global_batch")),
                "first_step": start.first_step,
                "last_step": history.steps.step[end - 1] if end > start.first_row else start.first_step,
                "steps": end - start.first_row,
                "lost_steps": history.steps.kept.count(0, start.first_row, end),
                "end": _end_of(own, following is not None, reasons.get(integer(record.get("attempt")))),
            }
        )
    return rows


def _regrouped(history: History) -> set[int]:
    """The starts that are regroupings: the fault just before their record says so."""
    pairs = zip(history.events, history.events[1:], strict=False)
    return {run.start for fault, run in pairs if run.kind == "run" and _is_regrouping(fault)}


def _is_regrouping(event: Event) -> bool:
    return event.kind == "fault" and str(event.record.get("fault", "")).startswith(REGROUP)


def _end_of(own: list[Event], superseded: bool, reason: str | None) -> str:
    """How a start ended according to the run, else to its supervisor; empty if neither recorded it."""
    for event in reversed(own):
        if event.kind == "outcome":
            return str(event.record.get("reason", ""))
        if _is_regrouping(event):
            return str(event.record["fault"])
    return reason or ("no outcome: its process was killed, or its host went down" if superseded else "")


def _reasons(run_dir: Path) -> dict[Any, str]:
    """Why each attempt ended, by its number, as recorded by the supervisor or the batch script."""
    records = [record for record in newest_records(run_dir / ATTEMPTS) if integer(record.get("attempt"))]
    return {record["attempt"]: str(record.get("reason", "")) for record in reversed(records)}


def events_of(history: History, clock: Sequence[float]) -> tuple[list[dict[str, Any]], int]:
    """Starts, faults, stops and ends without bad images, and how many are left out in the middle."""
    chosen = [event for event in history.events if event.kind in MARKED and not is_image(event)]
    half = MAX_EVENTS // 2
    left_out = max(0, len(chosen) - MAX_EVENTS)
    if left_out:
        chosen = [*chosen[:half], *chosen[-half:]]
    return [_event(history, event, clock) for event in chosen], left_out


def is_image(event: Event) -> bool:
    """Whether an event is the fault of a bad image."""
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
    elif event.kind == "straggler":
        what, text = "straggler", _straggler(record)
    elif _is_regrouping(event):
        what = "regroup"
    elif event.kind == "outcome":
        what = {0: "done", 75: "stop"}.get(integer(record.get("exit_code")), "failure")
    step = record.get("step", record.get("first_step"))
    return {
        "what": what,
        "text": text,
        "step": integer(step),
        "start": event.start + 1,
        "when": _utc(moment),
        "time": since_begin(history, moment, event.row, clock),
    }


def _straggler(record: dict[str, Any]) -> str:
    """The text of a record about a straggler: slow, or recovered."""
    who = f"rank {record.get('rank')} on {record.get('host')}"
    if record.get("recovered"):
        return f"{who} is no longer slow ({record.get('what')})"
    own, others = (number(record.get(key)) for key in ("own_ms", "others_ms"))
    return f"{who} is slow: {own} ms a step for {record.get('what')}, the others {others} ms"


def checkpoints_of(history: History, clock: Sequence[float]) -> list[dict[str, Any]]:
    """Step, time and cost of each checkpoint written."""
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
    """Seconds since the run began; for a record without a time, those of the step before it."""
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
