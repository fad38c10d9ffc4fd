"""Start a job again after a fault, for as long as it comes further: `owt launch supervise`."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from horovod_owt.errors import ConfigError, Preempted
from horovod_owt.runs.attempts import JOB, Attempt, AttemptWatch, run_dir_of
from horovod_owt.topology import LAUNCHERS

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 5.0  # after the launcher's end: for ranks that are about to leave
LAST_WORD_GRACE_S = (
    30.0  # after outcome.json: an elastic launcher would wait ten minutes for a rank that hangs
)
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def why_not_again(
    attempts: Sequence[Attempt], max_restarts: int, *, restarts: int | None = None, stop_is_final: bool = True
) -> str:
    """Why the last of these attempts is to be the last of all, in words; empty if another is worth it.

    `restarts`, where some attempts left no trace; `stop_is_final=False`, where it is a queue that stops jobs.
    """
    *before, last = attempts
    restarts = len(before) if restarts is None else restarts
    if last.exit_code == 0:
        return "done"
    if last.asked_to_stop or last.exit_code == Preempted.exit_code:
        if stop_is_final:
            return "it was told to stop; the same command goes on"
        return "" if restarts < max_restarts else _enough(max_restarts)
    if last.exit_code == ConfigError.exit_code:
        return "bad usage or configuration"
    if not last.last_step:
        return "it ended before its first step, and would again"
    if before and not last.new_checkpoint and last.last_step == before[-1].last_step:
        return f"step {last.last_step} was its last for the second time, without a checkpoint in between"
    return "" if restarts < max_restarts else _enough(max_restarts)


def _enough(max_restarts: int) -> str:
    return f"{max_restarts} restart{'s'[: max_restarts != 1]} did not help"


class Supervisor:
    """Runs a command as often as it is worth it; never two at a time, and nothing of it stays behind.

    A second signal ends all at once; with `patient`, under a scheduler that sends several, it does not.
    """

    def __init__(self, command: Sequence[str], *, max_restarts: int = 0, patient: bool = False) -> None:
        self._command, self._max_restarts, self._patient = list(command), max_restarts, patient
        self._run_dir = run_dir_of(command)
        self._job_name = os.environ.get(JOB) or secrets.token_hex(8)  # Slurm's requeues keep theirs
        self._job: subprocess.Popen | None = None
        self._asked_to_stop = False

    def run_once(self) -> Attempt:
        """Run it, and leave it to the caller what follows."""
        self._take_charge()
        return self._attempt()

    def run(self) -> int:
        """The exit code of the last attempt: outcome.json's where it wrote one."""
        self._take_charge()
        attempts: list[Attempt] = []
        while True:
            attempts.append(self._attempt())
            end, last = why_not_again(attempts, self._max_restarts), attempts[-1]
            if end:
                say(f"exit code {last.exit_code}, not started again: {end}; the run says: {last.reason}")
                return last.exit_code
            start = f"start {len(attempts) + 1} of {self._max_restarts + 1}"
            place = last.checkpoint or "the beginning, as there is no checkpoint"
            say(f"exit code {last.exit_code} after step {last.last_step}: {last.reason}")
            say(f"{start}, from {place}")

    def _take_charge(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a dead launcher's ranks become ours
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)

    def _attempt(self) -> Attempt:
        watch = AttemptWatch(self._run_dir)
        if self._asked_to_stop:  # between two attempts
            return watch.attempt(Preempted.exit_code, asked_to_stop=True)
        try:
            self._job = subprocess.Popen(
                self._command, env={**os.environ, JOB: self._job_name}, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"{self._command[0]}: {error.strerror}") from None
        if self._asked_to_stop:  # while it was started
            self._job.terminate()
        code = self._wait(watch)
        end_descendants(GRACE_S)
        return watch.attempt(code, asked_to_stop=self._asked_to_stop)

    def _wait(self, watch: AttemptWatch) -> int:
        """The launcher's exit code; one that goes on after the run's last word is ended."""
        ended_at = None
        while True:
            try:
                return self._job.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
            if ended_at is None and watch.has_ended():
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() > ended_at + LAST_WORD_GRACE_S:
                say(
                    f"the launcher is still there {LAST_WORD_GRACE_S:.0f} s after the run's last word: killed"
                )
                self._job.kill()

    def _pass_on(self, number: int, _frame: object) -> None:
        """The first signal goes to this host's ranks: a checkpoint, and the launcher's own haste is avoided.

        horovodrun would kill its ranks 5 s after it is told to stop. A second signal ends all at once.
        """
        if self._asked_to_stop:
            if not self._patient:
                end_descendants(0)
            return
        self._asked_to_stop = True
        if self._job is None or self._job.poll() is not None:
            return
        second = "" if self._patient else "; a second signal ends it at once"
        say(f"{signal.Signals(number).name}: the job ends at a checkpoint{second}")
        for process in ranks_here() or [psutil.Process(self._job.pid)]:
            try:
                process.send_signal(number if number != signal.SIGHUP else signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue


def ranks_here() -> list[psutil.Process]:
    """The processes below this one that a launcher gave a rank, without what they started themselves."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):  # parents come before their children
        try:
            told = any(names.are_in(process.environ()) for names in LAUNCHERS.values())
            if told and process.ppid() not in found:
                found[process.pid] = process
        except psutil.Error:
            continue
    parents = {process.ppid() for process in psutil.Process().children(recursive=True)}
    return [process for process in found.values() if process.pid not in parents or not _is_shell(process)]


def _is_shell(process: psutil.Process) -> bool:
    return process.name() in ("sh", "bash", "dash")


def end_descendants(grace_s: float) -> None:
    """Wait for whatever is left below this process, then KILL it, whatever group or session it is in."""
    left = psutil.Process().children(recursive=True)
    _, left = psutil.wait_procs(left, timeout=grace_s)
    while left:
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)
        left = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)
