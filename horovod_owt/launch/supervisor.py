"""Restart a job automatically after a failure, as long as it makes progress: `owt launch supervise`."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from horovod_owt.errors import ConfigError, OwtError, Preempted
from horovod_owt.runs.attempts import JOB, Attempt, AttemptWatch, append_attempt, run_dir_of
from horovod_owt.runs.control import STOP
from horovod_owt.runs.folder import read_config
from horovod_owt.signals import heeded
from horovod_owt.topology import LAUNCHERS, Variables

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 5.0  # for ranks to exit after the launcher has exited
OUTCOME_GRACE_S = 30.0  # for the launcher to exit after the run; an elastic one would take ten minutes
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def reason_not_to_restart(
    attempts: Sequence[Attempt], max_restarts: int, *, restarts: int | None = None, stop_is_final: bool = True
) -> str:
    """The reason not to restart after the last of these attempts; empty to restart.

    `restarts` is the number of restarts so far, if some attempts are not recorded. Under a scheduler a stop
    by a signal is not final.
    """
    *before, last = attempts
    restarts = len(before) if restarts is None else restarts
    if last.exit_code == 0:
        return "done"
    if last.stopped_by == STOP:
        return "stopped by `owt stop`; the same command resumes"
    if last.asked_to_stop or last.exit_code == Preempted.exit_code:
        if stop_is_final:
            return "stopped by a signal; the same command resumes"
        if before and not last.last_step and not before[-1].last_step:  # as if its time limit were too short
            return "stopped twice before a step; a longer time limit, or a later warning (--signal), may help"
        return "" if restarts < max_restarts else _limit_reached(max_restarts)
    if last.exit_code == ConfigError.exit_code:
        return "bad usage or configuration"
    if not last.last_step and not (before and before[-1].last_step):  # once may be a host's fault
        return "failed before the first step"
    if before and not last.new_checkpoint and last.last_step == before[-1].last_step:
        return f"no progress: failed twice after step {last.last_step}, without a new checkpoint"
    return "" if restarts < max_restarts else _limit_reached(max_restarts)


def _limit_reached(max_restarts: int) -> str:
    return f"restart limit ({max_restarts}) reached"


class Supervisor:
    """Runs a command and restarts it after failures; leaves no process behind.

    A second signal kills everything, unless `patient`: a scheduler may send several.
    """

    def __init__(self, command: Sequence[str], *, max_restarts: int = 0, patient: bool = False) -> None:
        self._command, self._max_restarts, self._patient = list(command), max_restarts, patient
        self._run_dir = run_dir_of(command)
        # set by the batch process of a Slurm job
        self._job_name = os.environ.get(JOB) or secrets.token_hex(8)
        self._job: subprocess.Popen | None = None
        self._asked_to_stop = False

    def run_once(self) -> Attempt:
        """Run the command once, without restarting it."""
        self._set_up_process()
        return self._attempt()

    def run(self) -> int:
        """Run and restart the command; returns the last exit code, from outcome.json if the run wrote one."""
        self._set_up_process()
        attempts: list[Attempt] = []
        while True:
            attempts.append(self._attempt())
            self._note_attempt(attempts)
            end, last = reason_not_to_restart(attempts, self._max_restarts), attempts[-1]
            if end:
                if last.exit_code != 0:
                    say(f"exit code {last.exit_code}, not restarted: {end}; reason: {last.reason}")
                elif len(attempts) > 1:
                    say(f"done after {len(attempts)} starts")
                return last.exit_code
            start = f"start {len(attempts) + 1} of {self._max_restarts + 1}"
            place = last.checkpoint or "the beginning: there is no checkpoint"
            say(f"exit code {last.exit_code} after step {last.last_step}: {last.reason}")
            say(f"{start}, from {place}")

    def _note_attempt(self, attempts: Sequence[Attempt]) -> None:
        try:
            append_attempt(self._run_dir, attempts[-1], start=self._start, restarts=len(attempts) - 1)
        except OSError as error:
            say(f"WARNING {error.filename}: {error.strerror}")

    def _set_up_process(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # adopt the ranks of a dead launcher
        for number in heeded(FORWARDED):
            signal.signal(number, self._forward)

    def _attempt(self) -> Attempt:
        watch = AttemptWatch(self._run_dir)
        self._start = watch.start
        if self._asked_to_stop:  # between two attempts
            return watch.attempt(Preempted.exit_code, asked_to_stop=True)
        try:
            self._job = subprocess.Popen(
                self._command,
                env={**os.environ, JOB: self._job_name},
                start_new_session=True,
                restore_signals=False,  # SIGPIPE stays ignored: mpirun survives if nobody reads its output
            )
        except OSError as error:
            raise ConfigError(f"{self._command[0]}: {error.strerror}") from None
        if self._asked_to_stop:  # while it was started
            self._job.terminate()
        code = self._wait(watch)
        kill_descendants(GRACE_S)
        return watch.attempt(code, asked_to_stop=self._asked_to_stop)

    def _wait(self, watch: AttemptWatch) -> int:
        """The launcher's exit code; it is killed if it does not exit after the run has ended."""
        ended_at, grace_s = None, OUTCOME_GRACE_S
        while True:
            try:
                return self._job.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
            if ended_at is None and watch.has_ended():
                ended_at, grace_s = time.monotonic(), OUTCOME_GRACE_S + self._hook_s()
            if ended_at is not None and time.monotonic() > ended_at + grace_s:
                say(f"the launcher has not exited {grace_s:.0f} s after the run has ended: killing it")
                self._job.kill()

    def _hook_s(self) -> float:
        """Seconds that the run's hook may take at its end."""
        try:
            config = read_config(self._run_dir)
            return 2 * float(config["hook_limit_s"]) if config.get("hook") else 0.0
        except (OwtError, KeyError, TypeError, ValueError):  # an old, damaged or unreadable config.json
            return 0.0

    def _forward(self, number: int, _frame: object) -> None:
        """Forward the first signal to this host's ranks, which stop at a checkpoint; a second one kills all.

        Not to the launcher: horovodrun would kill its ranks 5 s later.
        """
        if self._asked_to_stop:
            if not self._patient:
                kill_descendants(0)
            return
        self._asked_to_stop = True
        if self._job is None or self._job.poll() is not None:
            return
        second = "" if self._patient else "; a second signal kills it"
        say(f"{signal.Signals(number).name}: the job stops at a checkpoint{second}")
        for process in ranks_here() or [psutil.Process(self._job.pid)]:
            try:
                process.send_signal(number if number != signal.SIGHUP else signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue


def ranks_here() -> list[psutil.Process]:
    """The descendants of this process that are ranks, without the ranks' own children.

    A rank has a launcher's variables with other values than this process: in a shell of `srun --pty`, all
    processes inherit some.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):  # parents before children
        try:
            env = process.environ()
            own = [names for names in LAUNCHERS.values() if names.are_in(env) and not _inherited(names, env)]
            if own and process.ppid() not in found:
                found[process.pid] = process
        except psutil.Error:
            continue
    parents = {process.ppid() for process in psutil.Process().children(recursive=True)}
    return [process for process in found.values() if process.pid not in parents or not _is_shell(process)]


def _inherited(names: Variables, env: Mapping[str, str]) -> bool:
    return all(env.get(name) == os.environ.get(name) for name in names)


def _is_shell(process: psutil.Process) -> bool:
    return process.name() in ("sh", "bash", "dash")


def kill_descendants(grace_s: float) -> None:
    """Wait for all descendants of this process to exit, then kill them, whatever their group or session."""
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
