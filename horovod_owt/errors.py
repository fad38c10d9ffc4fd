"""Errors that are printed as one line, with an exit code and the ranks that print them.

Exit codes: 1 the run failed; 2 bad usage or config; 3 a check found a problem; 75 stopped at a checkpoint,
please requeue.
"""

from __future__ import annotations

import errno
import os
import re
from enum import Enum


class PrintedBy(Enum):
    """Which of the ranks that raise an error print it."""

    ONE_RANK = "the rank that raised it"
    EVERY_RANK = "local rank 0 of each host, then the others, unless the launcher ends them first"
    RANK_0 = "rank 0 of the job"


class OwtError(Exception):
    """An error that needs no traceback: printed as one line with value seen, value wanted and fix."""

    exit_code = 1
    printed_by = PrintedBy.ONE_RANK
    rank = 0  # of this process; set with PrintedBy.RANK_0

    def __init__(self, saw: str, *, wanted: str = "", fix: str = "") -> None:
        self.saw, self.wanted, self.fix = saw, wanted, fix
        super().__init__(saw, wanted, fix)  # so that pickling keeps all three

    def on_every_rank(self) -> OwtError:
        """The same error, marked as raised by every rank of the job."""
        self.printed_by = PrintedBy.EVERY_RANK
        return self

    def by_rank_0(self, rank: int) -> OwtError:
        """The same error, marked as raised by every rank and to be printed by rank 0 only; this is `rank`."""
        self.printed_by, self.rank = PrintedBy.RANK_0, rank
        return self

    def __str__(self) -> str:
        parts = [self.saw, self.wanted and f"wanted {self.wanted}", self.fix and f"fix: {self.fix}"]
        return "; ".join(part for part in parts if part)

    def __reduce__(self):
        return _rebuild, (type(self), self.saw, self.wanted, self.fix)


def _rebuild(kind: type[OwtError], saw: str, wanted: str, fix: str) -> OwtError:
    return kind(saw, wanted=wanted, fix=fix)


class RunError(OwtError):
    """The run cannot continue: a bad image, a NaN loss, a full disk."""


class ConfigError(OwtError):
    """An invalid recipe, option or --set value."""

    exit_code = 2


class DataError(OwtError):
    """A data set that is missing, empty, unreadable or inconsistent."""

    exit_code = 2


class DeviceError(OwtError):
    """Ranks and devices do not match."""

    exit_code = 2


class ProblemFound(OwtError):
    """A check ran and found a problem in what it checked."""

    exit_code = 3


class Preempted(OwtError):
    """The run stopped at a checkpoint on request; requeue it."""

    exit_code = 75
    printed_by = PrintedBy.EVERY_RANK


NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc"
    r"|memory allocation failed|ALLOC(?:ATION)?_FAILED"
    r"|failed to map segment from shared object(?!: Operation not permitted)",
    re.IGNORECASE,
)
NO_THREADS = re.compile(r"can't start new thread|resource temporarily unavailable", re.IGNORECASE)
# CUDA's messages; the second means that another process has exclusive use of the GPU
GPU_FAULT = re.compile(r"uncorrectable (?:ECC|NVLink) error|busy or unavailable", re.IGNORECASE)
_FIXES = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n 4096`, or LimitNOFILE of the service)",
    errno.ENFILE: "too many files are open on this host: check other jobs, `sysctl fs.file-nr`",
    errno.ENOMEM: "use fewer ranks, workers or decode_threads on this host, a smaller batch, or more memory",
    errno.EAGAIN: "raise `ulimit -u` or the cgroup's pids.max, or use fewer ranks, threads and workers",
    errno.EACCES: "check the permissions and the mount: the user of the job needs access",
    errno.ENOSPC: "free some space on that disk: the same command continues",
    errno.EDQUOT: "free some of your quota: the same command continues",
    errno.EROFS: "use a folder that is not mounted read-only",
}
_FIXES[errno.EPERM] = _FIXES[errno.EACCES]
_OTHER_FIX = "check the disk, the mount or the file server (`dmesg`, `df`); the same command continues"
_NETWORK_ERRORS = {
    *(errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT)
}
SYSTEM_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ELOOP),
    *(
        errno.EIO,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.ENAMETOOLONG,
    ),
    *(errno.EMFILE, errno.ENFILE),
    *_NETWORK_ERRORS,
}


def as_owt_error(error: BaseException) -> OwtError | None:
    """An OwtError for an error of the system (memory, limits, disks, networks, GPUs); None for a bug.

    For errors that callers do not handle, because almost any statement may raise them.
    """
    if isinstance(error, OwtError):
        return error
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or NO_MEMORY.search(text):
        return RunError(
            f"out of memory: {_first_line(text)}" if text else "out of memory",
            fix=_FIXES[errno.ENOMEM],
        )
    if number == errno.EAGAIN or (isinstance(error, RuntimeError) and NO_THREADS.search(text)):
        return RunError(f"no more threads or processes: {_first_line(text)}", fix=_FIXES[errno.EAGAIN])
    if isinstance(error, RuntimeError) and GPU_FAULT.search(text):
        fix = "run `nvidia-smi` there, for other processes on it; `dmesg` has Xid errors of a GPU to replace"
        return RunError(f"the GPU failed: {_first_line(text)}", fix=fix)
    if isinstance(error, OSError) and number in SYSTEM_ERRORS:
        where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        saw = ": ".join(part for part in (where, error.strerror) if part)
        return RunError(saw, fix=fix_of(error))
    return None


def fix_of(error: OSError | MemoryError) -> str:
    """What a user can do about an error of the system."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
    if number in _NETWORK_ERRORS:
        return "check the network, the firewall and the port; then start again"
    return _FIXES.get(number, _OTHER_FIX)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]
