"""A log file for each rank: RUN/logs/attempt-0003/rank-0001.log.

It has everything that the rank logs and how it ended, with the traceback of a bug: launchers mix the output
of ranks, and may cut it off.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from horovod_owt.logs import PACKAGE, format_in_use, formatter
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.folder import drop_old_logs, new_rank_log
from horovod_owt.runs.records import Start

MAX_BYTES = 10_000_000  # of a file
FULL = "this file is full: see stderr for the rest"


class RankLog(logging.Handler):
    """Appends this process's log to its own file until closed.

    A rank that cannot write to the run folder has no file: only rank 0 must be able to.
    """

    def __init__(self, run_dir: Path, start: Start, world: World) -> None:
        super().__init__()
        self.setFormatter(formatter(format_in_use(), in_file=True))
        self._left = MAX_BYTES
        try:
            self._file = new_rank_log(run_dir, start.attempt, world.rank)
        except OSError:
            self._file = None
        if world.is_root:
            drop_old_logs(run_dir)
        logging.getLogger(PACKAGE).addHandler(self)
        job = f", job {start.job_id}" if start.job_id else ""
        place = f"rank {world.rank} of {world.size} on {world.host}, {world.device}, process {os.getpid()}"
        self.note(logging.INFO, f"{place}, attempt {start.attempt}{job}")

    def note(self, level: int, text: str, *, error: BaseException | None = None) -> None:
        """Write a line to the file only; `error` adds its traceback."""
        exc_info = (type(error), error, error.__traceback__) if error else None
        self.handle(logging.LogRecord(PACKAGE, level, __file__, 0, text, None, exc_info))

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            return
        line = (self.format(record) + "\n").encode(errors="backslashreplace")
        self._left -= len(line)
        try:
            self._file.write(line if self._left > 0 else f"{FULL}\n".encode())
        except OSError:  # a full disk
            self._left = 0
        if self._left <= 0:
            self.close()

    def close(self) -> None:
        logging.getLogger(PACKAGE).removeHandler(self)
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                pass
        super().close()
