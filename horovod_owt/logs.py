"""Log formats: text for people, or JSON for programs that collect logs."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import datetime, timezone

from horovod_owt.text import without_terminal_codes
from horovod_owt.topology import read_topology

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)
PACKAGE = "horovod_owt"


class TextLines(logging.Formatter):
    """`10:42:07 text` for INFO, `10:42:09 WARNING [rank 13 gpu07] text` for warnings and errors.

    In a file, which has the lines of one rank over many days: date and time in UTC, without the rank.
    """

    def __init__(self, *, in_file: bool = False) -> None:
        super().__init__()
        self._in_file = in_file

    def format(self, record: logging.LogRecord) -> str:
        if self._in_file:
            text = without_terminal_codes(_with_traceback(self, record))
            return f"{utc(record.created)} {record.levelname} {text}"
        clock = self.formatTime(record, "%H:%M:%S")
        message = without_terminal_codes(record.getMessage())
        if record.levelno < logging.WARNING:
            return f"{clock} {message}"
        topology = read_topology()
        who = f" [rank {topology.rank} {topology.host}]" if topology.world_size > 1 else ""
        return f"{clock} {record.levelname}{who} {message}"


class JsonLines(logging.Formatter):
    """One object per line: time (UTC), level, rank, host, pid, message."""

    def format(self, record: logging.LogRecord) -> str:
        topology = read_topology()
        return json.dumps(
            {
                "time": utc(record.created),
                "level": record.levelname.lower(),
                "rank": topology.rank,
                "host": topology.host,
                "pid": os.getpid(),
                "message": _with_traceback(self, record),
            }
        )


def utc(seconds: float | None = None) -> str:
    """A Unix time, by default now, as 2026-11-26T09:05:00.123Z."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def formatter(log_format: str, *, in_file: bool = False) -> logging.Formatter:
    return JsonLines() if log_format == JSON else TextLines(in_file=in_file)


def format_in_use() -> str:
    """The format of this process's log."""
    handlers = logging.getLogger(PACKAGE).handlers
    return JSON if any(isinstance(handler.formatter, JsonLines) for handler in handlers) else TEXT


def print_error(text: str) -> None:
    """Print a command's error on stderr, in the log's format."""
    if format_in_use() == JSON:
        logging.getLogger(PACKAGE).error("%s", text)
    else:
        print(f"owt: {text}", file=sys.stderr, flush=True)


def _with_traceback(own: logging.Formatter, record: logging.LogRecord) -> str:
    more = f"\n{own.formatException(record.exc_info)}" if record.exc_info else ""
    return record.getMessage() + more
