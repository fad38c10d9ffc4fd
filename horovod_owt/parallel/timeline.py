"""Horovod's timeline: when each collective was negotiated and executed, on rank 0."""

from __future__ import annotations

import logging
from pathlib import Path

import horovod.torch as hvd

log = logging.getLogger(__name__)

# Must be set on every rank before `init`, to be able to start a timeline later.
ENVIRONMENT = {"HOROVOD_TIMELINE": "DYNAMIC"}


def start_timeline(file: Path) -> None:
    """Write a timeline to `file`, on rank 0 and after `init` with ENVIRONMENT."""
    try:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    except OSError as error:  # Horovod would only log it
        log.warning("%s: %s; no timeline", file, error.strerror)
        return
    hvd.start_timeline(str(file))


def stop_timeline() -> None:
    """Write what is left and close the file; Horovod's shutdown does the same."""
    if hvd.is_initialized():
        hvd.stop_timeline()
