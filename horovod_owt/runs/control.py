"""Control of a run by files in its folder, without the scheduler.

    RUN/STOP   stop at a checkpoint         RUN/SAVE   write a checkpoint and continue

Rank 0 checks for the files, and removes each once it has done as requested. Files from before the start of a
run are removed at the start.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError, Preempted, RunError
from horovod_owt.filesystem import unlink_quietly
from horovod_owt.runs.checkpoints import list_checkpoints
from horovod_owt.runs.folder import read_outcome
from horovod_owt.runs.owner import Owner, active_owner
from horovod_owt.runs.records import METRICS, last_attempt

log = logging.getLogger(__name__)

STOP, SAVE = "STOP", "SAVE"
POLL_S = 0.5  # interval of a command that waits
REGROUP_S = 60.0  # how long an elastic job that has lost its rank 0 may be without an owner


def send_request(run_dir: Path, request: str) -> Owner:
    """Send a request to the run in this folder; returns the process that owns the folder.

    Raises ConfigError if no run is active there, or the file cannot be written.
    """
    owner = _owner(run_dir)
    try:
        (run_dir / request).touch()
    except OSError as error:
        raise ConfigError(f"{run_dir / request}: {error.strerror}", wanted="a folder to write to") from None
    return owner


def pending_requests(run_dir: Path) -> set[str]:
    """The requests in the folder; raises OSError.

    The folder is listed, because that makes an NFS client ask the server; a lookup of a name that was missing
    a moment ago would be answered from its cache for up to a minute.
    """
    return {STOP, SAVE}.intersection(os.listdir(run_dir))


def withdraw(run_dir: Path, request: str) -> None:
    """Remove a request."""
    unlink_quietly(run_dir / request)


def withdraw_stale(run_dir: Path, since: float) -> None:
    """Remove requests made before `since`, by the file system's clock, which are for an earlier start."""
    for request in pending_requests(run_dir):
        file = run_dir / request
        if file.stat().st_mtime < since:
            log.warning("%s is from before this start: removed", file)
            withdraw(run_dir, request)


def wait_for_end(run_dir: Path, owner: Owner, limit_s: float) -> str:
    """Wait until the owner has released the folder; returns how its run ended. RunError after `limit_s`.

    If rank 0 was killed, the outcome in the folder is that of an earlier attempt.
    """
    _wait(_End(run_dir, owner).has_come, limit_s, f"{run_dir} is still in use by {owner}")
    outcome = _outcome_of_last_attempt(run_dir)
    if outcome is None:
        return "the process has ended without an outcome: it was killed, or its host went down"
    return outcome["reason"]


def wait_for_checkpoint(run_dir: Path, owner: Owner, limit_s: float) -> Path:
    """Wait for the requested checkpoint; returns the newest one.

    Raises RunError after `limit_s`, or if the run ends before.
    """
    end = _End(run_dir, owner)
    _wait(
        lambda: not (run_dir / SAVE).exists() or end.has_come(),
        limit_s,
        f"{run_dir} has no new checkpoint yet",
    )
    found = list_checkpoints(run_dir)
    if (run_dir / SAVE).exists() or not found or _has_failed(run_dir):  # at its end a run withdraws requests
        raise RunError(f"the run in {run_dir} has ended without writing a checkpoint", fix="see outcome.json")
    return found[0]


class _End:
    """Detects the end of the owner's run. After a regrouping an elastic job continues under another owner."""

    def __init__(self, run_dir: Path, owner: Owner) -> None:
        self._run_dir, self._owner = run_dir, owner
        self._seen = time.monotonic()  # when an owner of the job was last seen

    def has_come(self) -> bool:
        current, first = active_owner(self._run_dir), self._owner
        if current == first or (current and current.driver and current.driver == first.driver):
            self._seen = time.monotonic()
            return False
        if current or not first.driver or _outcome_of_last_attempt(self._run_dir):
            return True
        return time.monotonic() > self._seen + REGROUP_S


def _outcome_of_last_attempt(run_dir: Path) -> dict[str, Any] | None:
    try:
        outcome, attempt = read_outcome(run_dir), last_attempt(run_dir / METRICS)
    except FileNotFoundError:
        return None
    return outcome if outcome.get("attempt", attempt) == attempt else None


def _has_failed(run_dir: Path) -> bool:
    """Whether the newest attempt has ended with an error."""
    try:
        outcome = read_outcome(run_dir)
    except (FileNotFoundError, ConfigError):
        return False
    own = outcome.get("attempt") == last_attempt(run_dir / METRICS)
    return own and outcome["exit_code"] not in (0, Preempted.exit_code)


def _owner(run_dir: Path) -> Owner:
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} does not exist", wanted="the --run-dir of an active run")
    owner = active_owner(run_dir)
    if owner is None:
        raise ConfigError(
            f"no run is active in {run_dir}",
            wanted="an active run",
            fix="`owt job cancel JOB` for a job that waits in the queue",
        )
    return owner


def _wait(done, limit_s: float, saw: str) -> None:
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise RunError(f"{saw} after {limit_s:g} s", fix="see the log of the run; the request stays")
        time.sleep(POLL_S)
