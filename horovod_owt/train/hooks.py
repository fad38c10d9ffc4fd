"""A user's command that rank 0 runs on events: `--set hook="notify --channel training"`.

It gets two more arguments, the event (checkpoint, fault or end) and the run folder, and the event's record as
one line of JSON on stdin. It runs outside the training thread, one event at a time, without a shell and
without launchers' rank variables. Its failure never ends the run.
"""

from __future__ import annotations

import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from horovod_owt.errors import ConfigError
from horovod_owt.text import json_text
from horovod_owt.topology import LAUNCHERS, UNKNOWN_LAUNCHERS

log = logging.getLogger(__name__)

EVENTS = {"checkpoint": "checkpoint", "fault": "fault", "outcome": "end"}  # by kind of record
MAX_QUEUED = 16  # events; more are dropped
OUTPUT_BYTES = 4096  # read from the end of the output, for the message about a failure
LAUNCHER_VARIABLES = {name for names in LAUNCHERS.values() for name in names if name}
LAUNCHER_VARIABLES |= {name for rank, sizes in UNKNOWN_LAUNCHERS.items() for name in (rank, *sizes)}
LAUNCHER_PREFIXES = ("HOROVOD_", "OMPI_", "PMI", "PRTE_")


def check_hook(command: str) -> None:
    """Raise ConfigError if its program is not on this host's PATH."""
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise ConfigError(
            f"hook={command}: no program {program} on the host of rank 0",
            wanted="a program on PATH, or its absolute path",
            fix="chmod +x it, or --set hook= for none",
        )


class Hook:
    """Runs the command in a thread."""

    def __init__(self, words: list[str], run_dir: Path, limit_s: float) -> None:
        self._words, self._run_dir, self._limit_s = words, run_dir, limit_s
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self._process: subprocess.Popen | None = None
        self._thread = Thread(target=self._run, name="hook", daemon=True)
        self._thread.start()

    def tell(self, record: Mapping[str, Any]) -> None:
        """Run the command for this record, if its kind is one of EVENTS; does not wait."""
        if record["kind"] not in EVENTS:
            return
        try:
            self._events.put_nowait(dict(record))
        except queue.Full:
            log.warning("hook: %d events are waiting; not run for another one", MAX_QUEUED)

    def close(self) -> None:
        """Wait for the queued events, at most two time limits; may be called again."""
        if not self._thread.is_alive():
            return
        end = time.monotonic() + 2 * self._limit_s
        try:
            self._events.put(None, timeout=self._limit_s)
            self._thread.join(max(0.0, end - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            log.warning("hook: not run for the last events, as it takes too long")
            self._kill()

    def leave(self) -> None:
        """End after the queued events, without waiting for them."""
        with suppress(queue.Full):
            self._events.put_nowait(None)

    def _run(self) -> None:
        while (record := self._events.get()) is not None:
            event = EVENTS[record["kind"]]
            try:
                fault = self._call(event, record)
            except Exception as error:  # no failure of the hook may end the run
                fault = str(error)
            if fault:
                log.warning("hook %s %s: %s", self._words[0], event, fault)

    def _call(self, event: str, record: dict[str, Any]) -> str:
        """Run the command; returns what went wrong."""
        with tempfile.TemporaryFile() as output:
            self._process = subprocess.Popen(
                [*self._words, event, str(self._run_dir)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=without_launcher(os.environ),
                start_new_session=True,
            )
            try:
                self._process.communicate((json_text(record) + "\n").encode(), timeout=self._limit_s)
            except subprocess.TimeoutExpired:
                self._kill()
                return f"killed after {self._limit_s:g} s"
            code = self._process.returncode
            if not code:
                return ""
            output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
            said = output.read().decode(errors="replace").strip().splitlines()
            return f"exit code {code}" + (f": {said[-1]}" if said else "")

    def _kill(self) -> None:
        """Kill the command's process group."""
        process = self._process
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without launchers' variables: `owt` or mpirun in a hook is not a rank of the job."""
    return {
        name: value
        for name, value in env.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
