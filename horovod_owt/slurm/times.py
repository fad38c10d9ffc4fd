"""Time limits as Slurm writes them."""

from __future__ import annotations

import re

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
EARLY_S = 60  # how much sooner than asked for Slurm may warn: it looks at jobs in intervals
LEAST_S = 60  # for a job to make some steps before it is warned


def seconds_in(limit: str) -> int | None:
    """Of `90` and `90:30` (minutes), `1:30:00` (hours), `1-12` and `1-12:30:00` (days); None if unlimited."""
    found = TIME.fullmatch(limit)
    if not found:
        return None
    days, *parts = (int(part) if part else None for part in found.groups())
    parts = [part for part in parts if part is not None]
    if days is None and len(parts) < 3:  # minutes, or minutes and seconds
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds or None  # 0 is no limit


def warning_s(signal: str) -> int:
    """Seconds before the limit at which `--signal=B:USR1@120` warns; Slurm's default is 60."""
    _, _, seconds = signal.partition("@")
    return int(seconds) if seconds.isdecimal() else 60
