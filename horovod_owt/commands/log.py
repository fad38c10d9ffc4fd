"""Logging of a command, to stderr."""

from __future__ import annotations

import logging

from horovod_owt.text import without_terminal_codes
from horovod_owt.topology import read_topology


class _RankPrefix(logging.Formatter):
    """`10:42:07 text` for INFO, `10:42:09 WARNING [rank 13 gpu07] text` for warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%H:%M:%S")
        message = without_terminal_codes(record.getMessage())
        if record.levelno < logging.WARNING:
            return f"{time} {message}"
        topology = read_topology()
        who = f" [rank {topology.rank} {topology.host}]" if topology.world_size > 1 else ""
        return f"{time} {record.levelname}{who} {message}"


def log_to_stderr() -> None:
    """Send the package's log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RankPrefix())
    logger = logging.getLogger("horovod_owt")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
