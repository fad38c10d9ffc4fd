"""Make Horovod's timelines valid JSON arrays even if their writer was killed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from horovod_owt.runs.folder import timeline_files

log = logging.getLogger(__name__)

TAIL_BYTES = 1 << 20  # more than Horovod's buffer
NEXT_EVENT = re.compile(rb',\s*(?=\{"(?:ph|name)")')


def complete_timelines(run_dir: Path) -> list[Path]:
    """Complete the timelines of a run that no rank is writing; returns them, oldest first."""
    files = timeline_files(run_dir)
    for file in files:
        try:
            complete_timeline(file)
        except OSError as error:
            log.warning("%s: %s", file, error.strerror)
    return files


def complete_timeline(file: Path) -> None:
    """Remove an incomplete last event, and add the closing bracket if it is missing.

    Horovod closes the array after each event, and reopens it for the next one.
    """
    with file.open("rb+") as stream:
        size = stream.seek(0, 2)
        begin = max(0, size - TAIL_BYTES)
        stream.seek(begin)
        tail = stream.read()
        end = complete_end(tail)
        if end is None:
            return
        stream.seek(begin + end)
        stream.write(b"]" if begin + end else b"[]")
        stream.truncate()


def complete_end(tail: bytes) -> int | None:
    """Where in the end of a file the closing bracket belongs; None if it is there."""
    text = tail.rstrip()
    starts = [match.end() for match in NEXT_EVENT.finditer(text)]
    first = starts[-1] if starts else len(text) - len(text.lstrip(b"[\n"))
    last = text[first:].rstrip(b",")
    if _is_json(last.removesuffix(b"]")):
        return None if last.endswith(b"]") else first + len(last)
    return len(text[:first].rstrip().rstrip(b",")) if starts else first


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
