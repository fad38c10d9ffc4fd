"""The attempts of a run: how each launch ended, and how far it got."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.files import users_path
from horovod_owt.runs.checkpoints import list_checkpoints
from horovod_owt.runs.folder import outcome_stamp, read_outcome
from horovod_owt.runs.owner import elastic_driver
from horovod_owt.runs.records import (
    METRICS,
    Start,
    append_record,
    last_attempt,
    last_step,
    newest_records,
    records_size,
)
from horovod_owt.runs.timeline import complete_timelines

ATTEMPTS = "attempts.jsonl"
JOB = "HOROVOD_OWT_JOB"  # environment variable: a name that all restarts of a job share


def job_name(env: Mapping[str, str]) -> str:
    """A name that all restarts of this job share; empty for a command that is never restarted."""
    slurm = f"slurm-{env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else ""
    return env.get(JOB) or slurm or elastic_driver(env)


def scheduler_job_id(env: Mapping[str, str]) -> str | None:
    """The scheduler's id of this job, as its own commands write it; None outside a job."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
    return next((env[name] for name in names if env.get(name)), None)


def next_start(run_dir: Path, env: Mapping[str, str]) -> Start:
    """The next start of the run in this folder."""
    attempt = max(last_attempt(run_dir / METRICS), last_attempt(run_dir / ATTEMPTS)) + 1
    return Start(attempt, scheduler_job_id(env))


def is_same_job(name: str, env: Mapping[str, str]) -> bool:
    """Whether this is a restart of the job named `name`.

    In an salloc shell all commands have the same SLURM_JOB_ID, and are not restarts unless it was requeued.
    """
    restartable = JOB in env or elastic_driver(env) or int(env.get("SLURM_RESTART_COUNT", 0))
    return bool(name) and name == job_name(env) and bool(restartable)


@dataclass(frozen=True)
class Attempt:
    """How one launch of the job ended, and how far it got according to the run folder."""

    exit_code: int  # from outcome.json, else the launcher's
    reason: str
    last_step: int  # 0 if it made none
    checkpoint: str  # folder of the newest one, empty if none
    new_checkpoint: bool
    asked_to_stop: bool = False  # by a signal to the supervisor
    stopped_by: str = ""  # at a checkpoint: a signal's name, or STOP for the file of `owt stop`


def find_run_dir(command: Sequence[str]) -> Path | None:
    """The command's --run-dir; of several the last one, which `owt train` uses."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--run-dir" and (text := value if equals else following):
            found = users_path(text)
    return found


def run_dir_of(command: Sequence[str]) -> Path:
    """The command's --run-dir; ConfigError if there is none, as each attempt would create a new folder."""
    run_dir = find_run_dir(command)
    if run_dir is None:
        raise ConfigError(
            "no --run-dir in the command", wanted="a run folder to resume from", fix="--run-dir RUNS/NAME"
        )
    return run_dir


class AttemptWatch:
    """Observes one attempt in its run folder, ignoring what earlier ones left."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.start = next_start(run_dir, os.environ)
        self._records_before = records_size(run_dir)
        self._outcome_before = outcome_stamp(run_dir)
        self._checkpoint_before = self._newest_checkpoint()

    def attempt(self, launcher_code: int, *, asked_to_stop: bool) -> Attempt:
        exit_code = 128 - launcher_code if launcher_code < 0 else launcher_code
        outcome = {"exit_code": exit_code, "reason": _launcher_reason(launcher_code)}
        if self.has_ended():
            outcome |= self._own_outcome()
        if launcher_code and not outcome["exit_code"]:  # the run succeeded, but a rank failed at exit
            outcome |= {"exit_code": exit_code}
        complete_timelines(self._run_dir)
        newest = self._newest_checkpoint()
        step, _ = last_step(self._run_dir, start=self._records_before)
        return Attempt(
            exit_code=outcome["exit_code"],
            reason=outcome["reason"],
            last_step=step or 0,
            checkpoint=newest[0] if newest else "",
            new_checkpoint=newest is not None and newest != self._checkpoint_before,
            asked_to_stop=asked_to_stop,
            stopped_by=str(outcome.get("stopped_by", "")),
        )

    def has_ended(self) -> bool:
        """Whether this attempt has written an outcome; False if the file server does not answer."""
        try:
            stamp = outcome_stamp(self._run_dir)
        except OSError:  # called every second, it must not end the supervisor
            return False
        return stamp not in (None, self._outcome_before)

    def _own_outcome(self) -> dict[str, Any]:
        """The run's outcome; if it is damaged, the launcher's exit code is kept."""
        try:
            return read_outcome(self._run_dir)
        except OwtError as error:
            return {"reason": error.saw}

    def _newest_checkpoint(self) -> tuple[str, int] | None:
        """Its name and modification time, which changes if a step's checkpoint is rewritten; None if none.

        It is not verified: the run does that when it resumes.
        """
        with suppress(OSError):
            for folder in list_checkpoints(self._run_dir):
                return folder.name, folder.stat().st_mtime_ns
        return None


def _launcher_reason(code: int) -> str:
    return f"launcher killed by {signal.Signals(-code).name}" if code < 0 else f"launcher exit code {code}"


def append_attempt(run_dir: Path, attempt: Attempt, *, start: Start, restarts: int) -> None:
    """Append the attempt to attempts.jsonl; raises OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {**start.stamp(), "restarts": restarts, **dataclasses.asdict(attempt)}
    append_record(run_dir / ATTEMPTS, record)


def earlier_attempts(run_dir: Path, job_id: str) -> list[Attempt]:
    """The attempts of this job, oldest first, without those of other jobs in the folder."""
    fields = dataclasses.fields(Attempt)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    own = [
        Attempt(**{field.name: record[field.name] for field in fields if field.name in record})
        for record in newest_records(run_dir / ATTEMPTS)
        if record.get("job_id") == job_id and record.keys() >= required
    ]
    return own[::-1]


def last_restarts(run_dir: Path) -> int | None:
    """The restart count of the last job that wrote here; None if there is none."""
    return next((record.get("restarts") for record in newest_records(run_dir / ATTEMPTS)), None)
