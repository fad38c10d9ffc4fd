"""Errors of the machine and of its file systems: never the fault of the image that was being read."""

from __future__ import annotations

import errno
import os
import resource
import stat
from contextlib import suppress

from horovod_owt.errors import RunError, fix_of

# What the file system says of one file: it is not there, or not a file.
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
# The process or the host has no more of something: every later image would fail too.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

OPEN_FILES = 16384  # rank 0 of 4096 has a connection of Horovod and one of the heartbeat for each of them


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to OPEN_FILES, as far as the hard one allows; a higher one is kept.

    Not to the hard limit: where it is a billion, as in some containers, programs that close all descriptors
    before they start another one take minutes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def is_of_the_file(error: OSError | MemoryError) -> bool:
    """Whether a failed read is the fault of that one file: it is gone, no file, or its own mode forbids it.

    A file that is missing together with its folder is not, nor one that its mode lets everybody read: then
    something is wrong with the mount.
    """
    if not isinstance(error, OSError):
        return False
    if error.errno == errno.EACCES:
        with suppress(OSError):
            return error.filename is not None and not os.stat(error.filename).st_mode & stat.S_IROTH
        return False
    folder = os.path.dirname(error.filename or b"") or b"."
    return error.errno in _OF_THE_FILE and (error.errno != errno.ENOENT or os.path.isdir(folder))


def reason_of(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    return error.strerror or str(error)


def machine_error(error: OSError | MemoryError, saw: str) -> RunError:
    """The error that ends a command for it; `saw` says what failed."""
    return RunError(f"{saw}: {reason_of(error)}", fix=fix_of(error))
