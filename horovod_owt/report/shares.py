"""The mean step of each rank: compute, waiting for images, exposed communication."""

from __future__ import annotations

import math
from typing import Any

from horovod_owt.report.formats import is_number
from horovod_owt.report.series import finite, rounded
from horovod_owt.report.timeline import list_of
from horovod_owt.runs.history import History

PARTS = ("compute_ms", "data_wait_ms", "exposed_comm_ms")


def step_shares(history: History) -> list[dict[str, Any]]:
    """A row for each rank, of the steps before the newest record of all ranks in the last start.

    Without one, as in older records, rank 0 of all steps of the last start.
    """
    if not history.starts:
        return []
    hosts = list(map(str, list_of(history.starts[-1].record.get("hosts"))))
    rows = _of_all_ranks(history) or _of_rank_0(history)
    named = zip(rows, [*hosts, *[""] * len(rows)], strict=False)
    return [
        {"rank": rank, "host": host, **dict(zip(PARTS, map(rounded, row), strict=True))}
        for rank, (row, host) in enumerate(named)
    ]


def _of_all_ranks(history: History) -> list[tuple[float, ...]]:
    own = [event for event in history.of_kind("ranks") if event.start == len(history.starts) - 1]
    if not own:
        return []
    columns = [list_of(own[-1].record.get(part)) for part in PARTS]
    rows = list(zip(*columns, strict=False))
    return rows if all(is_number(value) for row in rows for value in row) else []


def _of_rank_0(history: History) -> list[tuple[float, ...]]:
    first = history.starts[-1].first_row
    step_ms = _mean(history, "step_ms", first)
    if not step_ms:
        return []
    waits = [_mean(history, name, first) for name in PARTS[1:]]
    return [(max(0.0, step_ms - sum(waits)), *waits)]


def _mean(history: History, name: str, first: int) -> float:
    values = finite(history.steps[name][first:])
    return math.fsum(values) / len(values) if values else 0.0
