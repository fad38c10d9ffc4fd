"""Format numbers, durations, sizes and times for the page. UNKNOWN stands for what is missing or invalid."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

UNKNOWN = "–"
MAX_NUMBER = 1e300  # also excludes NaN, which compares false
SPACE = "\N{NO-BREAK SPACE}"


def is_number(value: Any) -> bool:
    """Whether `value` can be shown as a number: a damaged record may contain anything."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def integer(value: Any) -> int | None:
    """A whole number from a record, or None."""
    return value if isinstance(value, int) and is_number(value) else None


def number(value: Any, digits: int = 4) -> str:
    """With thousands separators and `digits` significant digits; integers in full."""
    if not is_number(value):
        return UNKNOWN
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-")
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:,.{max(0, places)}f}"


def plain(value: Any, digits: int = 4) -> str:
    """`number` without trailing zeros: settings as they were written."""
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def places(value: Any, places: int) -> str:
    """With `places` decimal places."""
    return UNKNOWN if not is_number(value) else f"{value:,.{places}f}"


def percent(share: Any, places: int = 1) -> str:
    """A share from 0 to 1 in percent."""
    return UNKNOWN if not is_number(share) else f"{100 * share:.{places}f}{SPACE}%"


def duration(seconds: Any) -> str:
    """Seconds in the two largest units: 2 d 3 h, 14 min 5 s."""
    if not is_number(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{number(seconds, 3)}{SPACE}s"
    whole, parts = round(seconds), []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append(f"{count}{SPACE}{unit}" if count else "")
    return SPACE.join(part for part in parts[:2] if part)


def size(count: Any) -> str:
    """Bytes in the unit that gives 1 to 999, from B to TB (powers of 1000)."""
    if not is_number(count):
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{number(float(count) if unit != 'B' else round(count), 4)}{SPACE}{unit}"
        count /= 1000
    raise AssertionError


def moment(utc: str | None) -> str:
    """An ISO 8601 UTC time, to the second."""
    if utc is None:
        return UNKNOWN
    return datetime.fromisoformat(utc.replace("Z", "+00:00")).strftime("%Y-%m-%d %H:%M:%S")


def count(value: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number(value)}{SPACE}{what}{'s'[: value != 1]}"
