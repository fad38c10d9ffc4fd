"""Retry transient read errors: a file server that restarts must not end a run."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

PAUSES_S = (0.5, 2.0)  # before the second and the third try
# Errors of a network file system while its server is unreachable, and of a host that is short of something
# for a moment. ENOENT and EACCES are not transient.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO ESTALE ETIMEDOUT EAGAIN EINTR ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EHOSTDOWN "
        "EHOSTUNREACH ENETDOWN ENETUNREACH EREMOTEIO ESHUTDOWN EMFILE ENFILE ENOMEM"
    ).split()
    if hasattr(errno, name)
)
_warned: set[str] = set()


def with_retries(read: Callable[[int], bytes], index: int, path: Callable[[int], str]) -> bytes:
    """`read(index)`, up to three times over 2.5 s on transient errors; then its OSError.

    The process warns once per file.
    """
    for pause_s in PAUSES_S:
        try:
            return read(index)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if (name := path(index)) not in _warned:
                _warned.add(name)
                log.warning("reading %s failed (%s): trying again", name, error.strerror)
            time.sleep(pause_s)
    return read(index)
