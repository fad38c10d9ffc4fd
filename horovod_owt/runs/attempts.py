"""The attempts of a run: how each launch of it ended, and how far the run folder says that it came."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError
from horovod_owt.runs.checkpoints import list_checkpoints
from horovod_owt.runs.folder import outcome_stamp, read_outcome
from horovod_owt.runs.owner import elastic_driver
from horovod_owt.runs.records import append_record, last_step, newest_records, records_size

ATTEMPTS = "attempts.jsonl"
JOB = "HOROVOD_OWT_JOB"  # a variable: the same name for each start of a job, by whoever starts it again


def job_name(env: Mapping[str, str]) -> str:
    """What all starts of this job have in common; empty for a command that nobody starts again."""
    slurm = f"slurm-{env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else ""
    return env.get(JOB) or slurm or elastic_driver(env)


def is_same_job(name: str, env: Mapping[str, str]) -> bool:
    """Whether this is another start of the job that `name` was the name of.

    In a shell of salloc each command has the same SLURM_JOB_ID; only a requeue makes one a job's next start.
    """
    lone = JOB not in env and not elastic_driver(env) and not int(env.get("SLURM_RESTART_COUNT", 0))
    return bool(name) and name == job_name(env) and not lone


@dataclass(frozen=True)
class Attempt:
    """How one launch of the job ended, and how far the run folder says it came."""

    exit_code: int  # as outcome.json has it, or the launcher's
    reason: str
    last_step: int  # 0 where it made none
    checkpoint: str  # the newest one's folder, empty where there is none
    new_checkpoint: bool
    asked_to_stop: bool = False  # by a signal to the supervisor


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


class AttemptWatch:
    """What the run's folder says of one attempt: what was there before it does not count."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._records_before = records_size(run_dir)
        self._outcome_before = outcome_stamp(run_dir)
        newest = self._newest_checkpoint()
        self._checkpoint_before = _made_at(newest) if newest else None

    def attempt(self, launcher_code: int, *, asked_to_stop: bool) -> Attempt:
        exit_code = 128 - launcher_code if launcher_code < 0 else launcher_code
        outcome = {"exit_code": exit_code, "reason": _said_by_launcher(launcher_code)}
        if self.has_ended():
            outcome |= self._own_outcome()
        if launcher_code and not outcome["exit_code"]:  # done, and then a rank fell over
            outcome |= {"exit_code": exit_code}
        newest = self._newest_checkpoint()
        step, _ = last_step(self._run_dir, start=self._records_before)
        return Attempt(
            exit_code=outcome["exit_code"],
            reason=outcome["reason"],
            last_step=step or 0,
            checkpoint=newest.name if newest else "",
            new_checkpoint=newest is not None and _made_at(newest) != self._checkpoint_before,
            asked_to_stop=asked_to_stop,
        )

    def has_ended(self) -> bool:
        """Whether the run has said how it ended, in this attempt."""
        return outcome_stamp(self._run_dir) != self._outcome_before

    def _own_outcome(self) -> dict[str, Any]:
        """What the run says; the launcher's word has to do where that is damaged."""
        try:
            return read_outcome(self._run_dir)
        except ConfigError as error:
            return {"reason": error.saw}

    def _newest_checkpoint(self) -> Path | None:
        """Whether it is sound, the run will see."""
        return next(iter(list_checkpoints(self._run_dir)), None)


def _made_at(checkpoint: Path) -> tuple[str, int]:
    """Differs for a checkpoint of the same step that was written again."""
    return checkpoint.name, checkpoint.stat().st_mtime_ns


def _said_by_launcher(code: int) -> str:
    return f"the launcher ended by {signal.Signals(-code).name}" if code < 0 else f"the launcher said {code}"


def append_attempt(run_dir: Path, attempt: Attempt, *, job_id: str, restarts: int) -> None:
    """Keep it for the job's next start; raises OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {"job_id": job_id, "restarts": restarts, **dataclasses.asdict(attempt)}
    append_record(run_dir / ATTEMPTS, record)


def earlier_attempts(run_dir: Path, job_id: str) -> list[Attempt]:
    """Of this job, the first one first; what another job did in the folder does not count."""
    fields = [field.name for field in dataclasses.fields(Attempt)]
    own = [
        Attempt(**{key: record[key] for key in fields})
        for record in newest_records(run_dir / ATTEMPTS)
        if record.get("job_id") == job_id and record.keys() >= set(fields)
    ]
    return own[::-1]


def last_restarts(run_dir: Path) -> int | None:
    """How often the job that wrote here last had been started again; None if none did."""
    return next((record.get("restarts") for record in newest_records(run_dir / ATTEMPTS)), None)
