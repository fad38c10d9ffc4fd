"""Start a job again after a fault, for as long as it comes further: the logic of launch/supervise."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from horovod_owt.errors import ConfigError, Preempted
from horovod_owt.topology import LAUNCHERS

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 5.0  # after the launcher's end: for ranks that are about to leave
LAST_WORD_GRACE_S = (
    30.0  # after outcome.json: an elastic launcher would wait ten minutes for a rank that hangs
)
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True)
class Attempt:
    """How one launch of the job ended, and how far the run folder says it came."""

    exit_code: int  # as outcome.json has it, or the launcher's
    reason: str
    last_step: int  # 0 where it made none
    checkpoint: str  # the newest one's folder, empty where there is none
    new_checkpoint: bool
    asked_to_stop: bool = False  # by a signal to the supervisor


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


def find_run_dir(command: Sequence[str]) -> Path | None:
    """The command's --run-dir."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--run-dir" and (value or following):
            return Path(value if equals else following)
    return None


def run_dir_of(command: Sequence[str]) -> Path:
    """The command's --run-dir; raises ConfigError without one: each start would make a new folder."""
    run_dir = find_run_dir(command)
    if run_dir is None:
        raise ConfigError(
            "no --run-dir in the command", wanted="a run folder to go on from", fix="--run-dir RUNS/NAME"
        )
    return run_dir


class RunFolder:
    """What the run's folder says of one attempt: what was there before it does not count."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics, self._outcome = run_dir / "metrics.jsonl", run_dir / "outcome.json"
        self._checkpoints = run_dir / "checkpoints"
        self._metrics_before = self._metrics.stat().st_size if self._metrics.exists() else 0
        self._outcome_before = self._stamp()
        self._checkpoint_before = self.newest_checkpoint()

    def attempt(self, launcher_code: int, *, asked_to_stop: bool) -> Attempt:
        exit_code = 128 - launcher_code if launcher_code < 0 else launcher_code
        outcome = {"exit_code": exit_code, "reason": _said_by_launcher(launcher_code)}
        if self.has_ended():
            outcome |= json.loads(self._outcome.read_text())
        if launcher_code and not outcome["exit_code"]:  # done, and then a rank fell over
            outcome |= {"exit_code": exit_code}
        newest = self.newest_checkpoint()
        return Attempt(
            exit_code=outcome["exit_code"],
            reason=outcome["reason"],
            last_step=max((record["step"] for record in self._new_steps()), default=0),
            checkpoint=newest,
            new_checkpoint=newest != self._checkpoint_before,
            asked_to_stop=asked_to_stop,
        )

    def has_ended(self) -> bool:
        """Whether the run has said how it ended, in this attempt."""
        return self._stamp() != self._outcome_before

    def newest_checkpoint(self) -> str:
        """Its folder's name; by name, as steps have leading zeros. Whether it is sound, the run will see."""
        return max((path.name for path in self._checkpoints.glob("step-????????")), default="")

    def _stamp(self) -> tuple[int, int] | None:
        """Written beside and renamed, a new file is another inode."""
        try:
            stat = self._outcome.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _new_steps(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        with self._metrics.open("rb") as file:
            file.seek(self._metrics_before)
            lines = [line for line in file if line.startswith(b'{"kind": "step"') and line.endswith(b"}\n")]
        return [json.loads(line) for line in lines]


def _said_by_launcher(code: int) -> str:
    return f"the launcher ended by {signal.Signals(-code).name}" if code < 0 else f"the launcher said {code}"


class Supervisor:
    """Runs a command as often as it is worth it; never two at a time, and nothing of it stays behind.

    A second signal ends all at once; with `patient`, under a scheduler that sends several, it does not.
    """

    def __init__(self, command: Sequence[str], *, max_restarts: int = 0, patient: bool = False) -> None:
        self._command, self._max_restarts, self._patient = list(command), max_restarts, patient
        self._run_dir = run_dir_of(command)
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
        folder = RunFolder(self._run_dir)
        if self._asked_to_stop:  # between two attempts
            return folder.attempt(Preempted.exit_code, asked_to_stop=True)
        try:
            self._job = subprocess.Popen(self._command, start_new_session=True)
        except OSError as error:
            raise ConfigError(f"{self._command[0]}: {error.strerror}") from None
        if self._asked_to_stop:  # while it was started
            self._job.terminate()
        code = self._wait(folder)
        end_descendants(GRACE_S)
        return folder.attempt(code, asked_to_stop=self._asked_to_stop)

    def _wait(self, folder: RunFolder) -> int:
        """The launcher's exit code; one that goes on after the run's last word is ended."""
        ended_at = None
        while True:
            try:
                return self._job.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
            if ended_at is None and folder.has_ended():
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
    variables = {names[0] for names in LAUNCHERS.values()}
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):  # parents come before their children
        try:
            if variables & process.environ().keys() and process.ppid() not in found:
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
