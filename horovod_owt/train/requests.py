"""Watch for requests to the run, which are files in its folder: see `runs.control`."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Event, Thread

from horovod_owt.runs.control import SAVE, STOP, pending_requests, withdraw
from horovod_owt.train.stop import StopRequest

log = logging.getLogger(__name__)

CHECK_S = 2.0


class FileRequests:
    """Checks for requests in a thread of rank 0, while it is entered; STOP is passed on to `stop`."""

    def __init__(self, run_dir: Path, stop: StopRequest) -> None:
        self._run_dir, self._stop = run_dir, stop
        self.save_asked = False
        self._saving: int | None = None  # step of the requested checkpoint, until it is on disk
        self._ending = Event()
        self._thread = Thread(target=self._run, name="requests", daemon=True)

    def __enter__(self) -> FileRequests:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def saving(self, step: int) -> None:
        """A checkpoint after `step` is being written."""
        if self.save_asked:
            self._saving, self.save_asked = step, False

    def saved(self, step: int) -> None:
        """The checkpoint after `step` is on disk."""
        if self._saving is not None and step >= self._saving:
            withdraw(self._run_dir, SAVE)
            self._saving = None

    def withdraw_all(self) -> None:
        """Remove all requests, at the end of the run."""
        for request in (STOP, SAVE):
            withdraw(self._run_dir, request)

    def _run(self) -> None:
        while not self._ending.wait(CHECK_S):
            try:
                found = pending_requests(self._run_dir)
            except OSError:  # a lost mount is reported when something is written
                continue
            if STOP in found and not self._stop.by_file:
                log.info("%s: stopping at a checkpoint", self._run_dir / STOP)
                self._stop.by_file = True
            if SAVE in found and self._saving is None and not self.save_asked:
                log.info("%s: writing a checkpoint", self._run_dir / SAVE)
                self.save_asked = True
