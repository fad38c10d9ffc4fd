"""Keep running when a standard stream is closed, as in cron jobs and daemons, or when its reader exits.

Output that nobody can read is dropped. If a result cannot be written to stdout for another reason, such as a
full disk, that is an error.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TextIO

from horovod_owt.errors import RunError

READER_GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO}  # EIO: the terminal was closed


def tolerate_closed_streams() -> None:
    """Call this first: a file opened while descriptor 2 is closed would receive the output of C libraries."""
    _open_closed_descriptors()
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
    sys.stdout = _stream(1, sys.stdout, errors="strict", is_log=False)
    sys.stderr = _stream(2, sys.stderr, errors="backslashreplace", is_log=True)


def _open_closed_descriptors() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest closed one, so this one
            assert opened == descriptor
            os.set_inheritable(descriptor, True)


def _stream(descriptor: int, old: TextIO | None, *, errors: str, is_log: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, is_log=is_log)),
        encoding=old.encoding if old else "utf-8",
        errors=old.errors if old else errors,
        line_buffering=is_log or old is None or old.line_buffering or old.write_through,
    )


def stdout_is_read() -> bool:
    """Whether there is still a reader: a command whose only result is its output need not go on without."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return not (isinstance(raw, _Output) and raw.is_lost)


class _Output(io.FileIO):
    def __init__(self, descriptor: int, *, is_log: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_log, self.is_lost = is_log, False

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        if self.is_lost:
            return size
        try:
            while (written := super().write(data)) is None:  # another process has made it non-blocking
                select.select((), (self.fileno(),), ())
            return written
        except OSError as error:
            if self._is_log:  # even on a full disk: there may be space later
                return size
            self.is_lost = True
            if error.errno in READER_GONE:
                return size
            raise RunError(
                f"cannot write to stdout: {error.strerror}", fix="write it elsewhere, or free some space"
            ) from None
