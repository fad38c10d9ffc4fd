"""Watch for dead ranks and stalled collectives, and dump every rank's stacks."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from horovod_owt.errors import RunError
from horovod_owt.logs import print_error
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.heartbeat import Heartbeat
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.checkpoints import list_checkpoints
from horovod_owt.runs.folder import stacks_file, stacks_folder, write_outcome
from horovod_owt.runs.records import Start
from horovod_owt.runs.timeline import complete_timelines

log = logging.getLogger(__name__)

HOST_LIMIT_S = 20.0  # in an elastic job, a host that does not respond for this long counts as dead
REPORT_S = 60.0  # a collective that waits this long, or half the stall limit, is reported


class Stacks:
    """Stacks of a rank's threads, on SIGQUIT and when ranks wait too long: RUN/stacks/rank-0001.txt.

    They go to stderr if the rank cannot write to the run folder: only rank 0 must be able to.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = stacks_file(run_dir, rank)
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("a", buffering=1, errors="backslashreplace")
        except OSError as error:
            log.warning("%s: %s; stacks of this rank go to stderr", self._path, error.strerror)
            self._file = None
        faulthandler.register(signal.SIGQUIT, self._file or sys.stderr, all_threads=True)

    def dump(self, why: str) -> None:
        file = self._file or sys.stderr
        with suppress(OSError):  # a full disk must not end the heartbeat
            file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
            faulthandler.dump_traceback(file, all_threads=True)

    def close(self) -> None:
        """Close the file; remove it if it is empty."""
        faulthandler.unregister(signal.SIGQUIT)
        if self._file is None:
            return
        with suppress(OSError):
            self._file.close()
            if self._path.stat().st_size == 0:
                self._path.unlink()
            self._path.parent.rmdir()  # if it is empty


@contextmanager
def watched(
    world: World,
    run_dir: Path,
    *,
    start: Start,
    stall_limit_s: float,
    record: Callable[..., None],
    elastic: bool = False,
) -> Iterator[Heartbeat]:
    """Run a heartbeat, report stalls in log and metrics, and end the job after the stall limit.

    An `elastic` job survives dead ranks.
    """

    def report(who: str) -> None:
        log.warning("stalled: %s; stacks are in %s", who, stacks_folder(run_dir))
        record("fault", fault=f"stalled: {who}", step=now.step)

    def give_up(who: str) -> None:
        reason = RunError(f"stalled: {who}", fix=_how_to_resume(run_dir))
        outcome = {"exit_code": 1, "reason": str(reason), "step": now.step}
        write_outcome(run_dir, {**start.stamp(), **outcome})
        print_error(f"[rank {world.rank} {world.host}] {reason}")
        record("outcome", **outcome)  # last, because the user's hook may take a while
        os._exit(1)  # the main thread hangs in a collective; the launcher ends the other ranks

    def on_death(who: str) -> None:
        """Write the outcome, in case the launcher ends this rank before it fails itself."""
        if world.rank in (0, 1) and not elastic:
            outcome = {"exit_code": 1, "reason": f"lost contact with {who}: it died", "step": now.step}
            write_outcome(run_dir, {**start.stamp(), **outcome})

        if world.rank == 1:  # it only notices the death of rank 0
            complete_timelines(run_dir)

    stacks = Stacks(run_dir, world.rank)
    try:
        with Heartbeat(
            world,
            report_s=min(REPORT_S, stall_limit_s / 2),
            give_up_s=stall_limit_s,
            report=report,
            give_up=give_up,
            dump=stacks.dump,
            on_death=on_death,
            regroup_s=min(HOST_LIMIT_S, stall_limit_s / 2) if elastic else None,
        ) as heartbeat:
            yield heartbeat
    finally:
        stacks.close()


def _how_to_resume(run_dir: Path) -> str:
    try:
        checkpoints = list_checkpoints(run_dir)
    except OSError:  # the file server fails, which may be why the ranks hang
        return f"the same command with --run-dir {run_dir} resumes"
    if not checkpoints:
        return "there is no checkpoint yet: the same command starts again"
    return f"the same command with --run-dir {run_dir} resumes from {checkpoints[0].name}"
