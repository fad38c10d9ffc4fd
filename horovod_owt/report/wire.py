"""Bytes that rank 0 sent per step: counted, and expected by the closed form."""

from __future__ import annotations

from collections import Counter
from typing import Any

from horovod_owt.config import from_mapping
from horovod_owt.errors import ConfigError
from horovod_owt.perf.traffic import bytes_sent_per_step
from horovod_owt.report.formats import integer
from horovod_owt.report.series import rounded
from horovod_owt.runs.history import History, Start


def bytes_on_the_wire(history: History) -> list[dict[str, Any]]:
    """For each world size, the mean bytes per step by what they carry, sent and expected."""
    groups: dict[tuple[int | None, str], list[Start]] = {}
    for start in history.starts:
        if start.sent_steps:
            key = (integer(start.record.get("world_size")), repr(sorted(_expected(start).items())))
            groups.setdefault(key, []).append(start)
    return [_group(starts) for starts in groups.values()]


def _group(starts: list[Start]) -> dict[str, Any]:
    sent, steps = Counter[str](), 0
    for start in starts:
        sent.update(start.sent)
        steps += start.sent_steps
    expected = _expected(starts[0])
    names = [*expected, *(name for name in sent if name not in expected)]
    rows = [
        {
            "what": what,
            "sent": rounded(sent[what] / steps),
            "expected": expected.get(what, 0 if expected else None),
        }
        for what in names
    ]
    return {"world_size": integer(starts[0].record.get("world_size")), "steps": steps, "rows": rows}


def _expected(start: Start) -> dict[str, int]:
    """The closed form of perf.traffic as the run recorded it; computed here for runs that did not."""
    recorded = start.record.get("bytes_sent_per_step_expected")
    if isinstance(recorded, dict):
        return {str(what): number for what, number in recorded.items() if isinstance(number, int)}
    try:
        return bytes_sent_per_step(from_mapping(start.record["config"]), start.record["world_size"])
    except (ConfigError, KeyError, TypeError, AssertionError, ArithmeticError):
        return {}
